"""Settings given from Python, which checks no types by itself."""

from __future__ import annotations

from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dal_kernels.training.errors import UsageError

__all__ = ["check_least", "check_types"]


def check_types(settings: Any) -> None:
    """Raises UsageError where a field of a dataclass is not of its annotated type; an int is a float, a bool no int."""
    hints = get_type_hints(type(settings))
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if not _fits(value, hints[setting.name]):
            raise UsageError(f"{setting.name} must be {setting.type}, got {value!r}")


def check_least(**values: tuple[int, int]) -> None:
    """Raises UsageError where one of ``values``, each with the least that is accepted, is below it."""
    for name, (value, least) in values.items():
        if value < least:
            raise UsageError(f"{name} must be >= {least}, got {value}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(part, get_args(hint)[0]) for part in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else origin or hint)
