"""Which instruction sets of a CPU can be tried on this machine."""

from __future__ import annotations

# Values of ATEN_CPU_CAPABILITY, lowest first, with the instruction set that our kernels then use.
CAPABILITIES = {"default": "baseline", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}


def available_capabilities(torch_capability: str, own: str) -> list[str]:
    """Those of this machine: up to what torch has chosen, and up to what our kernels have.

    ATEN_CPU_CAPABILITY is an order to torch, not a cap: torch takes kernels that the machine lacks and dies of SIGILL.

    Args:
        torch_capability: of torch.backends.cpu.get_cpu_capability(); another processor's stands for the least.
        own: what :func:`available_backends` says of the backend "cpu".
    """
    names = list(CAPABILITIES)
    highest = max(level for level, instructions in enumerate(CAPABILITIES.values()) if f"using {instructions}" in own)
    of_torch = names.index(torch_capability.lower()) if torch_capability.lower() in names else 0
    return names[: min(highest, of_torch) + 1]
