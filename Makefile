# `make demo`, `make test` and `make bench` do all the set-up by themselves, in .venv; ARGS are passed on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT_FROM := setup.py pyproject.toml requirements-dev.txt $(wildcard csrc/build_support/*.py csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
HAS_TORCH := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 10))
INSTALL := $(BIN)/pip install --quiet --no-build-isolation --editable '.[demo]'
TESTABLE := $(VENV)/.testable
PINNED_TORCH := import sys, torch; sys.exit("torch==" + torch.__version__.split("+")[0] + "\n" not in open("requirements-dev.txt"))

.PHONY: demo test lint bench gpu fuzz docs clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo $(ARGS)

# A process a core; ARGS="-n 0" runs all tests in one, ARGS="-p randomly" in random order. Without a GPU the tests run the
# CUDA kernels in an executor, for which any one architecture does; nothing else needs them then.
test: export TORCH_CUDA_ARCH_LIST ?= $(if $(shell nvidia-smi -L 2>/dev/null),,9.0)
test: $(TESTABLE)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks.micro $(ARGS)
	$(BIN)/python -m benchmarks.host_time

# On a GPU, all there is to do on one, in at most 25 minutes after the build; what is done is kept in gpu-output, and the next call goes on.
gpu: $(TESTABLE)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# Ten minutes of calls that nobody thought of; ARGS="--minutes 1" for fewer.
fuzz: $(TESTABLE)
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

lint: $(READY)
	@$(BIN)/pip install --quiet 'dal_kernels[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --warn-unused-ignores tests/project/typical_use.py
	$(BIN)/pyright --pythonpath $(BIN)/python tests/project/typical_use.py

# A warning is an error: of a link, a name or a table that leads nowhere. Examples are run by the tests.
docs: $(READY)
	@$(BIN)/pip install --quiet 'dal_kernels[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs
	@echo "built build/docs/index.html"

# A torch that the machine has already (2.10 or newer) is used; else requirements-dev.txt says which to install.
$(READY): $(BUILT_FROM)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "dal_kernels needs Python 3.10 or newer; choose one with: make PYTHON=..."; exit 1; }
	@if [ ! -x $(BIN)/python ]; then \
		if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then shared=--system-site-packages; fi; \
		echo "making $(VENV)"; $(PYTHON) -m venv $$shared $(VENV); \
	fi
	@$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || \
		{ echo "installing torch (once; this takes a while)"; \
		  grep '^torch' requirements-dev.txt | $(BIN)/pip install --quiet -r /dev/stdin; }
	@echo "installing dal_kernels and what its demo needs"
	@grep '^setuptools' requirements-dev.txt | $(BIN)/pip install --quiet -r /dev/stdin
	@$(INSTALL)
	@$(BIN)/python -c 'import dal_kernels; [print("backend", n + ":", r) for n, r in dal_kernels.available_backends().items()]'
	@touch $@

# Built again where "make demo" came first and left out the CUDA kernels.
$(TESTABLE): $(READY)
	@echo "installing what the tests need"
	@if $(BIN)/python -c '$(PINNED_TORCH)'; then \
		grep '^triton' requirements-dev.txt | $(BIN)/pip install --quiet -r /dev/stdin; \
	fi
	@$(BIN)/pip install --quiet 'dal_kernels[test]'
	@if command -v nvcc >/dev/null && [ -z "$$(ls dal_kernels/_cuda*.so 2>/dev/null)" ]; then $(INSTALL); fi
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dal_kernels/_native*.so dal_kernels/_cuda*.so dal_kernels/_node*.so dal_kernels/_build.json demo-output bench-output gpu-output
