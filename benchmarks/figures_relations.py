"""The figures of docs/relation_losses.md.

    python benchmarks/figures_relations.py

What each relation loss says about one point of a cloud (`surface`, `rays`), and what
those between scores and predictions do where their neighbours do something else. Writes
docs/figures/relation_*.png in half a minute, most of it compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from drawing import BLUE, GREEN, GREY, INK, MONO, ORANGE, STYLE, YELLOW, write
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure

from distilljax import losses
from distilljax.evaluation.plot_layout import grid

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
OF_DIRECTIONS = (
    "probabilistic_transfer",
    "correlation_congruence",
    "embedding_relation",
)
"""These see a point's direction from the origin, and not how far it is."""


def surface(loss: Callable[..., jax.Array], resolution: int) -> dict[str, np.ndarray]:
    """Values and directions of descent, with the last point on a grid in the plane."""
    ticks = np.linspace(-EXTENT, EXTENT, resolution, dtype=np.float32)
    x, y = np.meshgrid(ticks, ticks)
    values, gradient = over(loss, np.stack([x, y], axis=-1))
    return {"x": x, "y": y, "values": values, "descent": -gradient}


def rays(loss: Callable[..., jax.Array], resolution: int) -> dict[str, np.ndarray]:
    """Values on two circles, for a loss that is the same along a ray: exact edges."""
    angles = np.linspace(0, 2 * np.pi, resolution, dtype=np.float32)
    radii = np.array([[0.01], [2 * EXTENT]], np.float32)
    x, y = radii * np.cos(angles), radii * np.sin(angles)
    values, _ = over(loss, np.stack([x, y], axis=-1))
    return {"x": x, "y": y, "values": values}


def over(
    loss: Callable[..., jax.Array], points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient with the student's last point at each of the points."""

    def moved(point: jax.Array) -> jax.Array:
        return loss(jnp.asarray(CLOUD).at[-1].set(point), jnp.asarray(CLOUD))

    values, gradient = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(moved))))(points)
    return np.asarray(values), np.asarray(gradient)


def draw(
    surfaces: Mapping[str, dict[str, np.ndarray]],
    circles: Mapping[str, dict[str, np.ndarray]],
) -> Figure:
    """Six maps of the plane in which the point moves, with one scale of shades."""
    with mpl.rc_context(STYLE | {"axes.spines.top": True, "axes.spines.right": True}):
        figure, axes = grid(6, width=3.3, height=3.5, columns=3)
        for axis, (name, found) in zip(axes, surfaces.items(), strict=True):
            shades = panel(axis, name, found, circles.get(name, found))
        bar = figure.colorbar(shades, ax=axes, location="bottom", aspect=60, pad=0.02)
        shares = [0, 0.1, 0.25, 0.5, 1, 2]
        bar.set_ticks(np.sqrt(shares).tolist(), labels=[f"{s:g}" for s in shares])
        bar.set_label(
            "loss with the student's seventh point there, in units of its median "
            "over the map, which is the number above it"
        )
        figure.supxlabel(
            "Dots: six points that teacher and student share. Star: where the teacher "
            "has the seventh. Cross: the origin. Arrows: which way the student's is "
            "pulled.",
            fontsize=9,
            color=INK,
        )
    return figure


def panel(
    axis: Axes,
    name: str,
    found: dict[str, np.ndarray],
    shaded: dict[str, np.ndarray],
) -> ContourSet:
    """One loss: its square root, so that the bottom of the bowl can be seen."""
    unit = np.median(found["values"])
    values = np.sqrt(np.maximum(shaded["values"], 0) / unit)
    levels = np.linspace(0, np.sqrt(2), 15)  # a KL has ridges without an end
    place = shaded["x"], shaded["y"], values, levels
    shades = axis.contourf(*place, cmap="Blues_r", extend="max")
    # No line at 0, which is rounding errors along a valley.
    axis.contour(*place[:3], levels[1:], colors="white", linewidths=0.4)
    resolution = len(found["x"])
    every = slice(resolution // 16, None, max(1, resolution // 8))
    u, v = np.moveaxis(found["descent"][every, every], -1, 0)
    size = np.hypot(u, v)
    length = np.where(size > 1e-2 * np.median(size), size, np.nan)  # not in a valley
    axis.quiver(
        found["x"][every, every],
        found["y"][every, every],
        u / length,
        v / length,
        color=YELLOW,
        scale=16,
        width=0.006,
        pivot="mid",
    )
    axis.plot(*CLOUD[:-1].T, "o", color="white", mec=INK, ms=6)
    axis.plot(*CLOUD[-1], "*", color=ORANGE, mec="white", ms=15)
    axis.plot(0, 0, "+", color="white", ms=9, mew=1.6)
    axis.set_title(name, family=MONO)
    axis.set_title(f"{unit:.2g}", loc="right", fontsize=9)
    axis.set_aspect("equal")
    axis.set_xlim(-EXTENT, EXTENT)
    axis.set_ylim(-EXTENT, EXTENT)
    axis.set_xticks([])
    axis.set_yticks([])
    return shades


# --- Predictions and scores ----------------------------------------------------------

SCALES = np.geomspace(1 / 8, 8, 49)
MARGINS = np.linspace(-4, 12, 161)
TEACHER_MARGIN = 4.0


def sharpness() -> dict[str, np.ndarray]:
    """Losses of a student that has the teacher's logits times a number.

    In units of a student that gives all classes the same probability.
    """
    teacher = 3 * jax.random.normal(jax.random.key(0), (256, 10))

    def values(student: jax.Array) -> jax.Array:
        kl = losses.forward_kl(student, teacher).mean()
        return jnp.stack([kl, losses.dist(student, teacher)])

    students = jnp.asarray(SCALES, jnp.float32)[:, None, None] * teacher
    along = np.asarray(jax.jit(jax.lax.map, static_argnums=0)(values, students))
    along = along / np.asarray(jax.jit(values)(0 * teacher))
    return dict(zip(("forward_kl", "dist"), along.T, strict=True))


def pull() -> dict[str, np.ndarray]:
    """Minus the gradient at the positive's score, by the student's margin.

    In units of the pull at the margin 0.
    """
    teacher = jnp.array([TEACHER_MARGIN, 0.0])
    kinds: dict[str, Callable[..., jax.Array]] = {
        "margin_mse": losses.margin_mse,
        "forward_kl": losses.forward_kl,
        "hinge_ranking": lambda s, t: losses.hinge_ranking(s, t, k=1),
    }
    found = {}
    for name, loss in kinds.items():

        def along(margin: jax.Array, loss: Callable[..., jax.Array] = loss):
            return jax.grad(loss)(jnp.stack([margin, jnp.zeros(())]), teacher)[0]

        slopes = jax.jit(jax.vmap(along))(jnp.asarray([*MARGINS, 0.0]))
        found[name] = np.asarray(slopes[:-1] / slopes[-1])
    return found


def draw_others(
    values: Mapping[str, np.ndarray], pulls: Mapping[str, np.ndarray]
) -> Figure:
    """`dist` and `margin_mse`, each beside what else one might take."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = grid(2, width=4.7, height=3.1, columns=2)
        for y, color in zip(values.values(), (ORANGE, BLUE), strict=True):
            left.plot(SCALES, y, color=color, lw=2)
        left.text(0.26, 0.46, "forward_kl", color=ORANGE)
        left.text(5, 0.09, "dist", color=BLUE)
        left.set_xscale("log", base=2)
        ticks = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]
        left.set_xticks(ticks, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        left.set_xlabel("student's logits, in units of the teacher's")
        left.set_title("Loss; 1 for equal probabilities")
        left.set_ylim(0, 1.05)

        colors = {"margin_mse": BLUE, "forward_kl": ORANGE, "hinge_ranking": GREEN}
        for name, y in pulls.items():
            right.plot(MARGINS, y, color=colors[name], lw=2)
        right.axhline(0, color=GREY, lw=0.8)
        right.axvline(TEACHER_MARGIN, color=GREY, lw=1, ls=":")
        right.text(4.2, 1.85, "the teacher's margin", color=GREY, fontsize=9)
        right.text(8.2, -0.85, "margin_mse", color=BLUE)
        right.text(-1.5, 1.75, "forward_kl", color=ORANGE)
        right.text(-3.9, 0.7, "hinge_ranking", color=GREEN)
        right.set_xlabel("student's margin of the positive over a negative")
        right.set_title("Pull on the positive's score; 1 at margin 0")
    return figure


def main() -> None:
    surfaces = {name: surface(loss, resolution=121) for name, loss in LOSSES.items()}
    circles = {name: rays(LOSSES[name], resolution=1441) for name in OF_DIRECTIONS}
    write("relation_losses", draw(surfaces, circles))
    write("relation_others", draw_others(sharpness(), pull()))


if __name__ == "__main__":
    main()
