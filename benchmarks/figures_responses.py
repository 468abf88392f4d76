"""Draw the figures of docs/losses.md and docs/sparse_targets.md; prints their numbers.

    python benchmarks/figures_responses.py

What each divergence does to a student that cannot fit its teacher (`fit`), what a
temperature does to both, and what a student learns from sparse targets (`learnt`).
Takes half a minute, most of it compilation. Writes docs/figures/responses_*.png.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from drawing import BLUE, FAINT, GREEN, ORANGE, PINK, STYLE, TEACHER, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distilljax import losses
from distilljax.evaluation.plot_layout import grid, left_labels

# --- A student of one bump, and a teacher of two -------------------------------------

BINS = jnp.linspace(-5.0, 5.0, 101)
FLOOR = 1e-6
DIVERGENCES: dict[str, Callable[..., Any]] = {
    "forward_kl": losses.forward_kl,
    "skew_forward_kl, skew = 0.1": losses.skew_forward_kl,
    "jensen_shannon, beta = 0.1": functools.partial(losses.jensen_shannon, beta=0.1),
    "adaptive_kl, mu = 0.5": losses.adaptive_kl,
    "alpha_beta, powers 0.2, 0.7": losses.alpha_beta,
    "jensen_shannon, beta = 0.5": losses.jensen_shannon,
    "reverse_kl": losses.reverse_kl,
    "skew_reverse_kl, skew = 0.1": losses.skew_reverse_kl,
    "total_variation": losses.total_variation,
}
LOW = 0.01  # "hardly any teacher": less than this share of its highest probability


def two_bumps() -> jax.Array:
    """Log-probabilities: .4 N(-2.5, .4) + .6 N(2.5, .4) on the bins, and a floor."""
    bumps = [jnp.exp(-(((BINS - mean) / 0.4) ** 2) / 2) for mean in (-2.5, 2.5)]
    p = 0.4 * bumps[0] / bumps[0].sum() + 0.6 * bumps[1] / bumps[1].sum() + FLOOR
    return jnp.log(p / p.sum())


def bump(parameters: jax.Array) -> jax.Array:
    """Logits of a Gaussian on the bins, from its mean and log standard deviation."""
    mean, log_std = parameters
    return -(((BINS - mean) / jnp.exp(log_std)) ** 2) / 2


@functools.partial(jax.jit, static_argnames=("loss", "num_starts", "num_steps"))
def fit(
    loss: Callable[..., jax.Array], num_starts: int = 32, num_steps: int = 2000
) -> tuple[jax.Array, jax.Array]:
    """Parameters [starts, (mean, std)] and final losses, each from a start of its own.

    Starts have means from N(0, 2) and the standard deviation .5: from wide starts the
    reverse KL would often end in a minimum that covers both bumps.
    """
    teacher, optimizer = two_bumps(), optax.adam(0.03)

    def objective(parameters):
        return loss(bump(parameters), teacher)

    def update(carry, _):
        parameters, state = carry
        changes, state = optimizer.update(jax.grad(objective)(parameters), state)
        return (optax.apply_updates(parameters, changes), state), None

    def train(mean):
        parameters = jnp.array([mean, jnp.log(0.5)])
        carry = (parameters, optimizer.init(parameters))
        (parameters, _), _ = jax.lax.scan(update, carry, length=num_steps)
        fitted = jnp.stack([parameters[0], jnp.exp(parameters[1])])
        return fitted, objective(parameters)

    return jax.vmap(train)(2.0 * jax.random.normal(jax.random.key(0), (num_starts,)))


def describe(parameters: np.ndarray) -> dict[str, float]:
    """Moments of a fitted student, and its mass where the teacher has next to none."""
    mean, std = parameters
    p = np.exp(np.asarray(two_bumps(), np.float64))
    q = np.asarray(jax.nn.softmax(bump(jnp.stack([mean, np.log(std)]))), np.float64)
    x = np.asarray(BINS, np.float64)
    return {
        "mean": float(mean),
        "std": float(std),
        "first_moment_error": float((q - p) @ x),
        "second_moment_error": float((q - p) @ x**2),
        "low_density_mass": float(q[p < LOW * p.max()].sum()),
    }


def modes() -> Figure:
    """The best student of each divergence, and how often one bump was all it got."""
    figure, axes = grid(9, width=3.2, height=2.15, columns=3, share_y=True)
    p = np.exp(two_bumps())
    for axis, (name, loss) in zip(axes, DIVERGENCES.items(), strict=True):
        parameters, finals = (np.asarray(x) for x in fit(loss))
        best = parameters[np.argmin(finals)]
        one = np.mean(parameters[:, 1] < 1)
        found = describe(best)
        print(name, f"one bump {one:.0%}", {k: round(v, 3) for k, v in found.items()})
        axis.fill_between(BINS, p, color=FAINT, lw=0)
        students = jax.vmap(bump)(jnp.asarray(parameters).at[:, 1].apply(jnp.log))
        for q in np.asarray(jax.nn.softmax(students)):
            axis.plot(BINS, q, color=BLUE, lw=0.6, alpha=0.35)
        q = jax.nn.softmax(bump(jnp.stack([best[0], jnp.log(best[1])])))
        axis.plot(BINS, q, color=BLUE, lw=2.2)
        axis.set_title(name)
        axis.set_xticks([-2.5, 0, 2.5])
        note = (
            f"{round(one * len(finals))} of {len(finals)} starts on one bump\n"
            f"best: {found['low_density_mass']:.0%} of it in the gaps"
        )
        axis.text(-5, 0.137, note, va="top", fontsize=8.5, color=BLUE)
    axes[0].text(2.5, 0.066, "teacher p", ha="center", fontsize=8.5, color="#767676")
    axes[0].set_ylim(0, 0.14)
    axes[0].set_yticks([0, 0.05, 0.1])
    left_labels(axes, "probability of a bin")
    for axis in axes[-3:]:
        axis.set_xlabel("bin")
    figure.supxlabel(
        "Bold: the student of least loss. Thin: those of all 32 starts. "
        "Gaps: bins in which p is below 1 % of its highest value.",
        fontsize=9.5,
        x=0.01,
        ha="left",
    )
    return figure


# --- Temperature ---------------------------------------------------------------------

V, Z = jnp.array([2.0, 1.0, 0.0, -1.0]), jnp.array([0.5, 1.0, 0.0, 0.0])


def temperature() -> Figure:
    """A softened teacher, and the loss that it makes."""
    figure, (left, right) = grid(2, width=4.4, height=2.9, columns=2)
    for column, (at, color) in enumerate(
        zip((1, 2, 4, 16), ("#08306B", "#2171B5", "#6BAED6", "#BDD7E7"), strict=True)
    ):
        p = jax.nn.softmax(V / at)
        spots = np.arange(4) + 0.2 * (column - 1.5)
        left.bar(spots, p, width=0.18, color=color, label=f"T = {at}")
    left.set_xticks(range(4), [f"{v:g}" for v in V])
    left.set_xlabel("the teacher's logit")
    left.set_title("Probability of four classes")
    left.legend()

    temperatures = np.geomspace(0.5, 64, 60)
    kl = jax.jit(jax.vmap(lambda t: losses.forward_kl(Z, V, temperature=t)))
    plain = np.asarray(kl(jnp.asarray(temperatures)))
    right.plot(temperatures, plain, color=ORANGE, lw=2)
    right.plot(temperatures, plain * temperatures**2, color=BLUE, lw=2)
    limit = float(losses.logit_mse(Z, V, centered=True)) / 2
    right.axhline(limit, color=TEACHER, lw=1, ls=":")
    right.text(3, limit + 0.025, "half the centred logit_mse", fontsize=9)
    right.text(11, 0.33, "T² forward_kl", color=BLUE)
    right.text(7, 0.05, "forward_kl", color=ORANGE)
    right.set_xscale("log", base=2)
    ticks = [0.5, 1, 2, 4, 8, 16, 32, 64]
    right.set_xticks(ticks, [f"{at:g}" for at in ticks])
    right.set_ylim(0, None)
    right.set_xlabel("temperature T")
    right.set_title("Loss of one student, in nats")
    return figure


# --- Sparse targets ------------------------------------------------------------------

ZIPF = np.arange(1, 513) ** -1.2
ZIPF = ZIPF / ZIPF.sum()
VOCABULARY = jnp.log(jnp.asarray(ZIPF, jnp.float32))
NUM_POSITIONS = 4000


def learnt(kind: str, k: int, seed: int = 0) -> np.ndarray:
    """What free logits converge to on 4000 positions of one teacher.

    Each loss is q minus a target in its gradient, so they converge to its mean over
    the positions; the tail bucket leaves the tail even, as logits start.
    """
    if kind == "renormalised":
        return np.where(np.arange(512) < k, ZIPF / ZIPF[:k].sum(), 0.0)
    if kind == "tail bucket":
        return np.where(np.arange(512) < k, ZIPF, ZIPF[k:].mean())
    logits = jnp.broadcast_to(VOCABULARY, (NUM_POSITIONS, 512))
    sample = losses.SampledLogits.draw(jax.random.key(seed), logits, k)
    ids = np.asarray(sample.ids)
    if kind == "sampled":
        return np.bincount(ids.ravel(), minlength=512) / ids.size
    used = ~np.isneginf(np.asarray(sample.merge().log_weights))
    weights = np.where(used, ZIPF[ids], 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.bincount(ids.ravel(), weights.ravel(), 512) / NUM_POSITIONS


KINDS = {
    "renormalised": ORANGE,
    "sampled ids, weights p": PINK,
    "tail bucket": GREEN,
    "sampled": BLUE,
}


def kl(q: np.ndarray) -> float:
    """KL of the teacher against what was learnt, in nats; inf where a class is lost."""
    with np.errstate(divide="ignore"):
        return float(np.sum(ZIPF * np.log(ZIPF / q)))


def sparse() -> Figure:
    """What is learnt from twelve ids per position, and how far from the teacher."""
    figure, (left, right) = grid(2, width=4.6, height=3.1, columns=2)
    ranks = np.arange(1, 513)
    edges = np.unique(np.append(np.geomspace(1, 513, 22).astype(int), 13))
    left.plot(ranks, ZIPF, color=TEACHER, lw=5, alpha=0.25, label="teacher")
    for kind, color in KINDS.items():
        q = learnt(kind, 12)
        # Means of neighbouring ranks: a sample's rare classes are noisy one by one.
        means = [q[a - 1 : b - 1].mean() for a, b in itertools.pairwise(edges)]
        spots = [np.sqrt(a * (b - 1)) for a, b in itertools.pairwise(edges)]
        kept = [m if m > 0 else np.nan for m in means]
        left.plot(spots, kept, color=color, lw=1.8, label=kind)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("rank of the class")
    left.set_title("Probability learnt from 12 ids per position")
    left.legend(fontsize=8.5, loc="lower left")
    divergences(right)
    return figure


def divergences(axis: Axes) -> None:
    """KL(teacher, learnt) by the number of ids; what is infinite cannot be drawn."""
    counts = [5, 12, 25, 50, 100, 200]
    for kind in ("sampled ids, weights p", "tail bucket", "sampled"):
        values = [kl(learnt(kind, k)) for k in counts]
        print(kind, dict(zip(counts, np.round(values, 4).tolist(), strict=True)))
        axis.plot(counts, values, color=KINDS[kind], lw=1.8, marker="o", ms=4)
    axis.text(55, 0.72, "sampled ids,\nweights p", color=PINK, fontsize=9)
    axis.text(29, 0.19, "tail bucket", color=GREEN, fontsize=9)
    axis.text(6, 0.0032, "sampled", color=BLUE, fontsize=9)
    top = axis.get_xaxis_transform()  # infinite: an arrow out of the picture
    for k in counts:
        assert np.isinf(kl(learnt("renormalised", k)))
        head = {"arrowstyle": "-|>", "color": ORANGE, "lw": 1.4, "shrinkA": 0}
        axis.annotate(
            "", (k, 1.0), (k, 0.9), top, top, arrowprops=head, annotation_clip=False
        )
    axis.text(4.8, 0.84, "renormalised: infinite", transform=top, color=ORANGE, size=9)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(2e-4, 10)
    axis.set_xticks(counts, [str(k) for k in counts])
    axis.minorticks_off()
    axis.set_xlabel("ids per position")
    axis.set_title("KL(teacher, learnt), in nats")


def main() -> None:
    with mpl.rc_context(STYLE):
        drawn = {"modes": modes(), "temperature": temperature(), "sparse": sparse()}
        for name, figure in drawn.items():
            write(f"responses_{name}", figure)


if __name__ == "__main__":
    main()
