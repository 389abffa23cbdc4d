"""Settings of the command line in a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dal_kernels.training.atomic import replacing
from dal_kernels.training.config import TrainingConfig
from dal_kernels.training.errors import UsageError, need, reason
from dal_kernels.training.recipes import Recipe
from dal_kernels.training.records import Run

__all__ = ["arguments_of", "write_config"]

# What YAML does not print, or takes for the end of a line, and what stands for bytes of a file's name that are no text.
ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def arguments_of(path: Path, options: Collection[str], switches: Mapping[str, bool]) -> list[str]:
    """What a YAML, TOML or JSON file of options says, as the command line would say it.

    Each key is an option without its dashes in front; a list is of several values, and null says nothing.

    Args:
        options: that there are, with underscores.
        switches: those of them that are true or false, and whether there is a --no- form to say false by.

    Raises:
        UsageError: the file cannot be read, is not a table of options, or has another key or value than there are.
    """
    arguments = []
    for key, value in _read(path).items():
        name = str(key).replace("_", "-")
        option = name.replace("-", "_")
        if option not in options:
            near = [found.replace("_", "-") for found in get_close_matches(option, options, n=1)]
            raise UsageError(f"{path}: {key} is no option{f', do you mean {near[0]}?' if near else ''}")
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, dict | list) for one in values):
            raise UsageError(f"{path}: {key} must be a value or a list of values, got {value!r}")
        if option in switches:
            if not isinstance(value, bool):
                raise UsageError(f"{path}: {key} must be true or false, got {value!r}")
            arguments += [f"--{name}"] if value else [f"--no-{name}"] * switches[option]
        elif value is not None:
            arguments += [f"--{name}", *map(str, values)]
    return arguments


def _read(path: Path) -> dict[Any, Any]:
    try:
        if path.suffix == ".toml":
            content: Any = _toml().loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".yaml", ".yml"):
            content = need("yaml", "pyyaml").safe_load(path.read_text(encoding="utf-8"))
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            raise UsageError(f"config must be a file .yaml, .toml or .json, got {path}")
    except UsageError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(f"{path} cannot be read: {' '.join(reason(error, path).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must be a table of options, got {type(content).__name__}")
    return content


def _toml() -> Any:
    try:
        return need("tomllib")
    except UsageError:  # Python 3.10
        return need("tomli")


def write_config(path: Path, config: TrainingConfig, recipe: Recipe, run: Run) -> None:
    """Write what one run was trained with as YAML, for ``dal-train train --config``."""
    places = {"data_dir": config.data_dir, "labels": config.labels}
    options: dict[str, Any] = {
        "data": config.data,
        **{name: str(place) for name, place in places.items() if place is not None},
        "bad_images": config.bad_images,
        "noise": [str(run.noise)],
        "losses": [run.loss],
        "seeds": [run.seed],
        "logger": list(config.loggers),
        "workers": config.workers,
        "threads": config.threads,
        "device": config.device,
        **({} if config.preset is None else {"preset": config.preset}),
        **asdict(recipe),
    }
    with replacing(path) as partial:
        partial.write_text("".join(f"{name}: {_yaml(value)}\n" for name, value in options.items()), encoding="utf-8")


def _yaml(value: Any) -> str:
    """JSON is YAML, but for infinity, and for characters outside the BMP, which JSON can escape as two."""
    if value == math.inf:
        return ".inf"
    return ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
