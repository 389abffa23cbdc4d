"""Fused kernels in Triton: kernels (device code), plan (layout), launch (buffers and launches)."""
