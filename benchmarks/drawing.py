"""How the figures of the docs are drawn: the look of a report's, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from distilljax.evaluation import plots
from distilljax.evaluation.plots import STYLE as REPORT
from distilljax.evaluation.plots import TEACHER

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
STYLE = REPORT | {"legend.frameon": False}
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = plots.PALETTE
FAINT, INK = plots.FAINT, plots.INK
GREY = plots.BASELINE_GREYS[0]
MONO = "DejaVu Sans Mono"
"""For names of functions."""


def write(name: str, figure: Figure) -> None:
    """docs/figures/{name}.png, without a date or a version in it."""
    file = FIGURES / f"{name}.png"
    plots.save(figure, file)
    print(f"wrote {file.relative_to(FIGURES.parents[1])}")


def heat_table(
    table: Float[np.ndarray, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    note: str,
    *,
    size: tuple[float, float],
    blind_below: float,
) -> Figure:
    """A cell for each row and column; green where the loss sees nothing."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.add_subplot()
        shades = LinearSegmentedColormap.from_list("seen", ["#E8F1F8", BLUE])
        axis.imshow(np.clip(table, 0, 1), cmap=shades, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            blind = abs(value) < blind_below
            if blind:
                corner = (column - 0.5, row - 0.5)
                axis.add_patch(Rectangle(corner, 1, 1, color="#BFE5D3", lw=0))
            text = "0" if blind else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
            text = f"{value:.0f}" if value >= 10 else text
            axis.text(
                column,
                row,
                text.replace("-", "\N{MINUS SIGN}"),
                ha="center",
                va="center",
                fontsize=11 if blind else 10,
                color="white" if value > 0.55 else INK,
            )
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows, family=MONO)
        axis.xaxis.tick_top()
        axis.tick_params(length=0, labelsize=9)
        axis.set_xticks(np.arange(len(columns)) + 0.5, minor=True)
        axis.set_yticks(np.arange(len(rows)) + 0.5, minor=True)
        axis.grid(which="minor", color="white", lw=2)
        axis.tick_params(which="minor", length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel(note, fontsize=9.5, loc="left", color=INK)
    return figure


__all__ = [
    "BLUE",
    "FAINT",
    "FIGURES",
    "GREEN",
    "GREY",
    "INK",
    "MONO",
    "ORANGE",
    "PINK",
    "SKY",
    "STYLE",
    "TEACHER",
    "YELLOW",
    "heat_table",
    "write",
]
