# `make demo`, `make test` and `make bench` do all the set-up by themselves, in .venv; ARGS are passed on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT_FROM := setup.py pyproject.toml requirements-dev.txt $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
HAS_TORCH := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 10))

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo $(ARGS)

# A process a core; ARGS="-n 0" runs all tests in one, ARGS="-p randomly" in random order.
test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks.micro $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A torch that the machine has already (2.10 or newer) is used; else requirements-dev.txt says which to install.
$(READY): $(BUILT_FROM)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "dal_kernels needs Python 3.10 or newer; choose one with: make PYTHON=..."; exit 1; }
	@if [ ! -x $(BIN)/python ]; then \
		if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then shared=--system-site-packages; fi; \
		echo "making $(VENV)"; $(PYTHON) -m venv $$shared $(VENV); \
	fi
	@$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || \
		{ echo "installing torch (once; this takes a while)"; $(BIN)/pip install --quiet -r requirements-dev.txt; }
	@echo "installing dal_kernels and what its tests and demo need"
	@grep -v '^torch\|^triton' requirements-dev.txt | $(BIN)/pip install --quiet -r /dev/stdin
	@rm -f dal_kernels/_native*.so dal_kernels/_cuda*.so
	@$(BIN)/pip install --quiet --no-build-isolation --editable '.[demo,test,lint]'
	@$(BIN)/python -c 'import dal_kernels; [print("backend", n + ":", r) for n, r in dal_kernels.available_backends().items()]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dal_kernels/_native*.so dal_kernels/_cuda*.so demo-output bench-output
