"""``dal-train``, which is ``python -m dal_kernels.training``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["run"]


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status.

    torch and the trainer are imported here, so that an interrupt while they load ends as quietly as one later.
    """
    # Of the two ways to start it ``python -m`` alone looks for a user's loss in the working folder. Last, because no
    # file there is to take the place of a module that is imported later; not at all where Python was told so.
    if "" not in sys.path and not getattr(sys.flags, "safe_path", False):
        sys.path.append("")
    try:
        from dal_kernels.training.cli import main

        return main(argv)
    except KeyboardInterrupt:
        print("dal-train: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
