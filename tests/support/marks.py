"""Tests that need more than a Python and torch: skipped, with the reason, where it is not there."""

from __future__ import annotations

import pytest

from benchmarks import cuda_emulator, executor


def _absent() -> str | None:
    try:
        executor.load()
    except executor.MissingError as error:
        return str(error)
    return None


needs_executor = pytest.mark.skipif(_absent() is not None, reason=str(_absent()))
needs_emulator = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing()))
