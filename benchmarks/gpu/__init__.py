"""All there is to do on a GPU that has not run the kernels before, as one command: ``python -m benchmarks.gpu``."""
