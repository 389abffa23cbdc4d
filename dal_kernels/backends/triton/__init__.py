"""Fused kernels in Triton: the losses (objectives), device code (row and the kernels, as in csrc/cuda), plan (layout), launch."""
