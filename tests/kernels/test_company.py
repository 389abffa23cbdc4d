"""When a call goes on without the other threads, because on a machine whose cores are all busy it waits for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.compiling import needs_compiler, output_of

# Microseconds of the caller's own share and of the whole of calls, and for how long it goes on alone after the last.
WAIT, NONE = (50, 8050), (50, 100)
CALLS = {
    "a thread that has slept": ([(10, 200)], 0),
    "long work, shared unevenly": ([(5000, 12_000)], 0),
    "no core for the others": ([WAIT], 2 * 8000),
    "none for long work either": ([(5000, 25_000)], 2 * 20_000),
    "never a core": (8 * [WAIT], 32 * 8000),
    "a core now and then": ([WAIT, WAIT, NONE, NONE, NONE, WAIT], 2 * 8000),
    "the process was stopped": ([(50, 600_000_000)], 1_000_000),
}

PROGRAM = """
#include <cstdio>
#include "company.h"
int main() {{
  using std::chrono::microseconds;
  dal::Company company;
  const dal::Company::Time now{{std::chrono::hours(1)}};
  const bool at_first = company.is_shunned(now);
  {calls}
  const auto shunned_at = [&](long after) {{ return company.is_shunned(now + microseconds(after)); }};
  std::printf("%d %d %d", at_first, shunned_at({alone} - 1), shunned_at({alone}));
}}
"""


@needs_compiler
@pytest.mark.parametrize("name", CALLS)
def test_other_threads_are_shunned_for_as_long_as_makes_up_for_the_wait(name: str, tmp_path: Path) -> None:
    calls, alone = CALLS[name]
    waited = " ".join(f"company.waited(microseconds({own}), microseconds({whole}), now);" for own, whole in calls)
    found = output_of(PROGRAM.format(calls=waited, alone=alone), tmp_path)
    assert found == f"0 {int(alone > 0)} 0"
