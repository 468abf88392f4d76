"""Panels and labels for the figures: nothing here knows what is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from distilljax.evaluation.formatting import shorten


def grid(
    num_panels: int,
    *,
    width: float,
    height: float,
    columns: int = 3,
    share_y: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels (inches), row by row, with room for labels."""
    columns = min(columns, num_panels)
    rows = math.ceil(num_panels / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    flat = list(axes.flat)
    for axis in flat[num_panels:]:
        axis.remove()
    return figure, flat[:num_panels]


def percent_axis(axis: Axes) -> None:
    """End a vertical axis of percentages where they end, whatever its margins.

    Called when all panels that share the axis are drawn: it fixes the limits.
    """
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, 0.0), min(high, 100.0))


def left_labels(axes: Sequence[Axes], label: str) -> None:
    """The label of the vertical axis, on the first panel of each row only."""
    for axis in axes:
        spec = axis.get_subplotspec()
        if spec is not None and spec.is_first_col():
            axis.set_ylabel(label)


def wrap(text: str, width: int = 15) -> str:
    """A name on several short lines."""
    return textwrap.fill(text, width, max_lines=3, placeholder="…")


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in the same order, pushed apart until neighbours are `gap` apart."""
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, float)[order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            lack = gap - (placed[i + 1] - placed[i])
            if lack > 1e-9:
                placed[i] -= lack / 2
                placed[i + 1] += lack / 2
    result = np.empty(len(placed))
    result[order] = placed
    return result.tolist()


def label_ends(axis: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names (height, name, colour) at the right border, where the lines end."""
    low, high = axis.get_ylim()
    fractions = [(y - low) / (high - low) for y, _, _ in ends]
    for (_, name, color), height in zip(ends, apart(fractions, 0.07), strict=True):
        axis.annotate(
            shorten(name),
            (1.0, height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def label_points(
    axis: Axes, points: Sequence[tuple[float, float, str, str]], gap: float = 0.09
) -> None:
    """Names (x, y, name, colour) beside their points, on the side that has room.

    For a logarithmic x and a linear y. Points at one x, such as students of one size,
    get their names pushed apart, with a line to each.
    """
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    middle = math.sqrt(left * right)
    step = (right / left) ** 0.035
    for to_right in (True, False):
        group = [point for point in points if (point[0] < middle) == to_right]
        heights = apart([(y - low) / (high - low) for _, y, _, _ in group], gap)
        for (x, y, name, color), height in zip(group, heights, strict=True):
            axis.annotate(
                shorten(name, 22),
                (x, y),
                xytext=(
                    x * step if to_right else x / step,
                    low + height * (high - low),
                ),
                color=color,
                fontsize=8.5,
                fontweight="bold",
                va="center",
                ha="left" if to_right else "right",
                arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "alpha": 0.5},
                annotation_clip=False,
            )


def widen_log(axis: Axes, values: Sequence[float]) -> None:
    """Logarithmic x limits with room for names, at least a factor of ten wide."""
    low, high = min(values), max(values)
    factor = max(math.sqrt(10 * low / high), (high / low) ** 0.12, 1.25)
    axis.set_xlim(low / factor, high * factor)


def log_axis(axis: Axes) -> None:
    """A logarithmic x axis whose ticks read as sizes: "200 k", "0.05"."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def tick(value: float) -> str:
    """A tick of a logarithmic axis, without trailing zeros.

    Example:
      >>> tick(200_000), tick(0.05), tick(1_000_000)
      ('200 k', '0.05', '1 M')
    """
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{prefix}"
    return f"{value:g}"
