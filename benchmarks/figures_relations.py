"""The figure of docs/relation_losses.md: what each relation loss says about one point.

Run it from anywhere; it writes docs/figures/relation_losses.png in a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distilljax import losses
from distilljax.evaluation.plots import INK, PALETTE

TARGET = Path(__file__).resolve().parents[1] / "docs/figures/relation_losses.png"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
}
LOSSES: dict[str, Callable[..., jax.Array]] = {
    "rkd_distance": losses.rkd_distance,
    "rkd_angle": losses.rkd_angle,
    "similarity_preserving": losses.similarity_preserving,
    "probabilistic_transfer": losses.probabilistic_transfer,
    "correlation_congruence": losses.correlation_congruence,
    "embedding_relation": losses.embedding_relation,
}
# The teacher's cloud; the student's is the same but for its last point, which moves.
CLOUD = np.array(
    [
        *([0.9, 2.3], [1.9, 1.2], [-1.5, 1.7], [-1.9, -0.6], [0.5, -1.8], [2.3, -0.7]),
        [1.4, 0.9],
    ],
    np.float32,
)
EXTENT = 3.0


def surface(loss: Callable[..., jax.Array], resolution: int) -> dict[str, np.ndarray]:
    """Values and directions of descent, with the last point on a grid in the plane."""
    ticks = np.linspace(-EXTENT, EXTENT, resolution, dtype=np.float32)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1)

    def moved(point: jax.Array) -> jax.Array:
        return loss(jnp.asarray(CLOUD).at[-1].set(point), jnp.asarray(CLOUD))

    over_grid = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(moved))))
    values, gradient = over_grid(grid)
    return {"ticks": ticks, "values": values, "descent": -np.asarray(gradient)}


def draw(surfaces: Mapping[str, dict[str, np.ndarray]]) -> Figure:
    """Six maps of the plane in which the point moves."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 7.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3)
        for axis, (name, found) in zip(axes.flat, surfaces.items(), strict=True):
            panel(axis, name, found)
        figure.supxlabel(
            "Dots: six points that teacher and student share. Star: where the teacher "
            "has the seventh. Cross: the origin.\nShade: the loss with the student's "
            "seventh point there, dark for low. Arrows: which way it is pulled.",
            fontsize=9,
            color=INK,
        )
    return figure


def panel(axis: Axes, name: str, found: dict[str, np.ndarray]) -> None:
    """One loss: its square root, so that the bottom of the bowl can be seen."""
    ticks, values = found["ticks"], np.sqrt(np.maximum(found["values"], 0))
    # A KL is very large where two points are opposite: the highest hundredth is one.
    levels = np.linspace(0, np.quantile(values, 0.99), 15)
    axis.contourf(ticks, ticks, values, levels, cmap="Blues_r", extend="max")
    axis.contour(ticks, ticks, values, levels, colors="white", linewidths=0.4)
    every = slice(len(ticks) // 16, None, max(1, len(ticks) // 8))
    u, v = np.moveaxis(found["descent"][every, every], -1, 0)
    size = np.hypot(u, v)
    length = np.where(size > 1e-2 * np.median(size), size, np.nan)  # not in a valley
    axis.quiver(
        ticks[every],
        ticks[every],
        u / length,
        v / length,
        color=PALETTE[5],
        scale=16,
        width=0.006,
        pivot="mid",
    )
    axis.plot(*CLOUD[:-1].T, "o", color="white", mec=INK, ms=6)
    axis.plot(*CLOUD[-1], "*", color=PALETTE[1], mec="white", ms=15)
    axis.plot(0, 0, "+", color="white", ms=9, mew=1.6)
    axis.set_title(name, family="DejaVu Sans Mono")
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])


if __name__ == "__main__":
    surfaces = {name: surface(loss, resolution=121) for name, loss in LOSSES.items()}
    draw(surfaces).savefig(TARGET, dpi=90)
    print(TARGET)
