"""``python -m benchmarks.training``."""

from __future__ import annotations

import sys

from benchmarks.training.cli import main

sys.exit(main())
