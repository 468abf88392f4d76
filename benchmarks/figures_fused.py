"""The figure of docs/fused.md: temporary memory by the number of positions.

    python benchmarks/figures_fused.py

Left: value and gradient compiled here, for CPU; nothing is run, so no memory is needed.
Right: the same for one TPU chip, from benchmarks/results/loss_plan.json, which
`python benchmarks/loss.py --plan` writes. It takes a minute.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import loss
import matplotlib as mpl
from drawing import BLUE, GREY, ORANGE, STYLE, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distilljax.evaluation.plot_layout import grid, left_labels, tick

PLAN = Path(__file__).parent / "results" / "loss_plan.json"
POSITIONS = (128, 512, 2048, 8192, 32768)
CHIP, CHIP_BYTES = "v5e:4x4", 15.75 * 2**30
COLORS = {"plain": ORANGE, "fused": BLUE}
Curve = dict[int, float]  # bytes by the number of positions


def compiled_here(positions: Sequence[int]) -> dict[str, Curve]:
    """Temporary bytes of the plain and the fused program."""
    found = {n: loss.temp_bytes(n) for n in positions}
    return {
        name: {n: sizes[name]["bytes"] for n, sizes in found.items()} for name in COLORS
    }


def planned(plan: Sequence[dict[str, Any]], dtype: str) -> dict[str, Curve]:
    """The same on a chip; a program that does not fit says how much it would take."""
    rows = [row for row in plan if (row["topology"], row["dtype"]) == (CHIP, dtype)]
    return {
        name: {row["tokens"]: bytes_of(row[name]) for row in rows} for name in COLORS
    }


def bytes_of(size: int | str) -> float:
    """Of a number, or of "... HLO temporaries (36.23G) exceeds ..."."""
    if isinstance(size, str):
        (gib,) = re.findall(r"temporaries \(([\d.]+)G\)", size)
        return float(gib) * 2**30
    return float(size)


def draw(here: dict[str, Curve], plan: Sequence[dict[str, Any]]) -> Figure:
    """One panel for each machine, with equal scales."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = grid(2, width=4.7, height=3.5, columns=2, share_y=True)
        for name, color in COLORS.items():
            curve(left, here[name], color, "-")
            for dtype, line in (("float32", "-"), ("bfloat16", "--")):
                curve(right, planned(plan, dtype)[name], color, line)
        widths = loss.LARGE
        left.set_title(f"For CPU, widths {widths['width']} and 1,024, float32")
        right.set_title("For one TPU v5e, widths 4,096 and 8,192")
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(axis="y", color="#EEEEEE", lw=0.8)
            axis.set_xlabel("positions")
            axis.yaxis.set_major_formatter(lambda value, _: tick(value) + "B")
        left.set_xticks(POSITIONS, [f"{n:,}" for n in POSITIONS])
        spots = sorted(planned(plan, "float32")["fused"])
        right.set_xticks(spots, [f"{n:,}" for n in spots])
        right.minorticks_off()
        left_labels([left, right], "temporary memory")
        label(left, here)
        label(right, planned(plan, "float32"))
        right.axhline(CHIP_BYTES, color=GREY, lw=1, ls=":")
        right.text(
            spots[0], CHIP_BYTES * 1.12, "15.75 GiB: all that the chip has", color=GREY
        )
        right.plot([], [], color=GREY, label="float32")
        right.plot([], [], color=GREY, ls="--", label="bfloat16")
        right.legend(loc="lower right", fontsize=9)
    return figure


def curve(axis: Axes, sizes: Curve, color: str, line: str) -> None:
    spots = sorted(sizes)
    heights = [sizes[n] for n in spots]
    axis.plot(spots, heights, color=color, ls=line, lw=1.8, marker="o", ms=4)


def label(axis: Axes, curves: dict[str, Curve]) -> None:
    """Each name beside the last point of its line."""
    for name, color in COLORS.items():
        last = max(curves[name])
        axis.annotate(
            name,
            (last, curves[name][last]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="right",
            color=color,
            fontweight="bold",
        )


if __name__ == "__main__":
    sizes = compiled_here(POSITIONS)
    for name, curve_ in sizes.items():
        print(name, {n: f"{size / 1e9:.3f} GB" for n, size in curve_.items()})
    write("fused_memory", draw(sizes, json.loads(PLAN.read_text())["plan"]))
