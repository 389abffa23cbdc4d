"""What a stage gives for the report."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Outcome", "code_block"]


@dataclass(frozen=True)
class Outcome:
    """What a stage found.

    Attributes:
        status: "done", "failed", "cut off" where its time was over before anything failed, or "left out" where
            something for it is not here.
        text: Markdown for the report.
        patch: changes that it asks for.
        unknown: constants that it was to judge and has no times of.
    """

    status: str
    text: str
    patch: str = ""
    unknown: tuple[str, ...] = ()


def code_block(text: str) -> str:
    return f"```\n{text}\n```"
