"""Fused kernels in Triton: losses (objectives), device code named as in csrc/cuda, layout (plan), launches (launch)."""
