"""The picture of the schedules in docs/schedules.md: q and the bootstrap weight against time.

    python -m benchmarks.schedule_figure

writes docs/schedule.svg, the same bytes each time with one release of matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dal_kernels import DynamicsAwareSchedule
from dal_kernels.training.errors import need

__all__ = ["save_picture"]

STEPS = 100
# A title, what is not plain about the schedule, and the step before which it is restarted.
PANELS: tuple[tuple[str, dict[str, Any], int | None], ...] = (
    ("linear", {}, None),
    ('shape="cosine"', {"shape": "cosine"}, None),
    ("warm-up, largest λ 0.5", {"warmup_steps": 30, "max_bootstrap_weight": 0.5}, None),
    ("restart() halfway", {"total_steps": 50}, 50),
)


def values_of(settings: dict[str, Any], restart: int | None) -> list[tuple[float, float]]:
    """(q, bootstrap_weight) at each step of a training."""
    schedule = DynamicsAwareSchedule(**{"q_start": 0.6, "q_end": 1.5, "total_steps": STEPS, **settings})
    values = []
    for step in range(STEPS + 1):
        if step == restart:
            schedule.restart()
        values.append((schedule.q, schedule.bootstrap_weight))
        schedule.step()
    return values


def save_picture(path: Path) -> None:
    """Write the picture, an SVG without a date."""
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot", "matplotlib")
    with pyplot.rc_context({"svg.hashsalt": "dal_kernels", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(PANELS), figsize=(9.6, 2.2), sharey=True, layout="constrained")
        for axis, (title, settings, restart) in zip(axes, PANELS, strict=True):
            q, weight = zip(*values_of(settings, restart), strict=True)
            axis.plot(q, color="#0072B2", label="q")
            axis.plot(weight, color="#D55E00", linestyle="--", label="λ, the bootstrap weight")
            axis.set_title(title)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xticks([0, STEPS // 2, STEPS], ["start", "half", "end"])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    save_picture(Path(__file__).parent.parent / "docs" / "schedule.svg")
