"""Makes calls until its time is up; each is written down before it is made, because a sanitizer ends the process."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.calls import calls, run

BATCH = 200


def main() -> None:
    current, corpus, seconds, first = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def make(call: dict[str, Any]) -> None:
        current.write_text(json.dumps(call), encoding="utf-8")
        outcomes[run(call)] += 1

    for file in sorted(corpus.glob("*.json")):
        make(json.loads(file.read_text(encoding="utf-8")))
    number = first
    while time.monotonic() < end:

        @seed(number)
        @settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(calls())
        def batch(call: dict[str, Any]) -> None:
            if time.monotonic() < end:
                make(call)

        batch()
        number += 1
    print(", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common()))


if __name__ == "__main__":
    main()
