"""How fast runs were, and where their time went: from what they logged of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distilljax.evaluation.arms import Arm
from distilljax.evaluation.comparison import Experiment
from distilljax.evaluation.formatting import shorten
from distilljax.evaluation.plot_layout import grid, label_ends

# In the order in which they are stacked; Okabe and Ito's colours, and grey.
PARTS = {
    "step": "#009E73",
    "data": "#E69F00",
    "teacher": "#56B4E9",
    "evaluation": "#CC79A7",
    "checkpoint": "#D55E00",
    "startup": "#BBBBBB",
}


def throughput(experiment: Experiment, colors: Mapping[str, str]) -> Figure | None:
    """Examples or tokens per second over steps, and the shares of the time."""
    series = {arm.name: rates_of(arm) for arm in experiment.arms}
    if not any(series.values()):
        return None
    shares = {arm.name: shares_of(arm) for arm in experiment.arms}
    panels = 2 if any(shares.values()) else 1
    figure, axes = grid(panels, width=4.1, height=3.2, columns=2)
    ends, units = [], set()
    for name, found in series.items():
        if found is None:
            continue
        unit, steps, values = found
        units.add(unit)
        mean = np.mean(values, axis=0)
        axes[0].plot(steps, mean, color=colors[name], lw=1.8, clip_on=False)
        ends.append((float(mean[-1]), name, colors[name]))
    axes[0].set_title(f"{' or '.join(sorted(units))} per second")
    axes[0].set_xlabel("step")
    axes[0].set_ylim(bottom=0)
    axes[0].grid(axis="y", color="#EEEEEE", lw=0.8)
    axes[0].set_axisbelow(True)
    label_ends(axes[0], ends)
    if panels == 2:
        _stacked(axes[1], experiment, shares)
    return figure


def rates_of(arm: Arm) -> tuple[str, list[int], list[list[float]]] | None:
    """Unit, steps that all seeds logged, and rates, seeds by steps.

    The first line of a process is of its compilation too, and is left out.

    Args:
      arm: The arm.
    """
    for unit in ("tokens", "examples"):
        logs = [
            {
                line["step"]: float(line[f"{unit}_per_second"])
                for line in _training(run.curves)
                if f"{unit}_per_second" in line and "share_startup" not in line
            }
            for run in arm.runs
        ]
        steps = sorted(set.intersection(*(set(log) for log in logs)))
        if len(steps) > 1:
            return unit, steps, [[log[step] for step in steps] for log in logs]
    return None


def shares_of(arm: Arm) -> dict[str, float]:
    """Where the time of all its windows went, each counted by how long it was.

    Args:
      arm: The arm.
    """
    spent: dict[str, float] = {}
    for run in arm.runs:
        before = 0.0
        for line in _training(run.curves):
            if "share_step" not in line:
                continue
            seconds = max(line["seconds"] - before, 0.0)
            before = line["seconds"]
            for part in PARTS:
                share = line.get(f"share_{part}", 0.0)
                spent[part] = spent.get(part, 0.0) + seconds * share
    total = sum(spent.values())
    return {part: x / total for part, x in spent.items()} if total else {}


def goodput_of(arm: Arm) -> float | None:
    """The mean over seeds of the last goodput that was logged; None without.

    Args:
      arm: The arm.
    """
    found = []
    for run in arm.runs:
        lines = [x["goodput"] for x in _training(run.curves) if x.get("goodput")]
        found += lines[-1:]
    return float(np.mean(found)) if found else None


def _training(curves: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    return [line for line in curves if line.get("split", "train") == "train"]


def _stacked(
    axis: Axes, experiment: Experiment, shares: Mapping[str, dict[str, float]]
) -> None:
    """A bar for each arm, whose parts are shares; its label has the goodput."""
    arms = [arm for arm in experiment.arms if shares[arm.name]]
    for row, arm in enumerate(arms):
        left = 0.0
        for part, color in PARTS.items():
            width = 100 * shares[arm.name].get(part, 0.0)
            axis.barh(row, width, left=left, color=color, height=0.6)
            left += width
    labels = []
    for arm in arms:
        good = goodput_of(arm)
        said = "" if good is None else f"\ngoodput {100 * good:.0f} %"
        labels.append(f"{shorten(arm.name)}{said}")
    axis.set_yticks(range(len(arms)), labels)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_title("share of the host's time, %")
    used = [p for p in PARTS if any(shares[arm.name].get(p, 0) > 0 for arm in arms)]
    for part in used:
        axis.barh(0, 0, color=PARTS[part], label=part)
    axis.legend(
        loc="upper center",
        bbox_to_anchor=(0.4, -0.1),
        ncols=3,
        frameon=False,
        fontsize=8.5,
    )
