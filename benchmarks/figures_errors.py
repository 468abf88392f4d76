"""Which error of a student each loss between logits sees: a figure of docs/losses.md.

    python benchmarks/figures_errors.py

The student is its teacher but for one error: twice as sure, the best two classes
swapped, the rare classes in another order, and so on. Values are in units of the loss
of a student that has learnt nothing and gives all classes the same probability, so a
row says how a loss shares its attention out among errors. It takes half a minute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from drawing import heat_table, write
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from distilljax import losses

Logits = Float[Array, "positions classes"]

NUM_POSITIONS, NUM_CLASSES = 256, 20
NUM_COMMON = 5  # the others are called rare: a fifth of the probability
BLIND = 5e-4  # what is smaller is a rounding error


def teacher() -> Logits:
    """Log-probabilities near rank^-1.5, by rank: column 0 is the likeliest class."""
    ranks = jnp.arange(1, NUM_CLASSES + 1)
    noise = jax.random.normal(jax.random.key(0), (NUM_POSITIONS, NUM_CLASSES))
    logits = -1.5 * jnp.log(ranks) + 0.3 * noise
    return jax.nn.log_softmax(jnp.sort(logits, axis=-1, descending=True))


def likeliest_halved(v: Logits) -> Logits:
    """The others keep their proportions."""
    p = jnp.exp(v)
    first = p[:, :1] / 2
    return jnp.log(jnp.append(first, p[:, 1:] * (1 - first) / (1 - p[:, :1]), axis=1))


def others_even(v: Logits) -> Logits:
    """The likeliest class keeps its probability."""
    rest = jnp.log1p(-jnp.exp(v[:, :1])) - jnp.log(NUM_CLASSES - 1)
    return jnp.append(v[:, :1], jnp.tile(rest, NUM_CLASSES - 1), axis=1)


def rare_shuffled(v: Logits) -> Logits:
    rare = jax.random.permutation(
        jax.random.key(1), v[:, NUM_COMMON:], axis=1, independent=True
    )
    return jnp.append(v[:, :NUM_COMMON], rare, axis=1)


def rare_suppressed(v: Logits) -> Logits:
    return jax.nn.log_softmax(v.at[:, NUM_COMMON:].add(-jnp.log(10.0)))


def renamed(v: Logits) -> Logits:
    return jax.random.permutation(jax.random.key(2), v, axis=1, independent=True)


ERRORS: dict[str, Callable[[Logits], Logits]] = {
    "logits\n× 1/2": lambda v: v / 2,
    "logits\n× 2": lambda v: 2 * v,
    "likeliest\nclass\nat half": likeliest_halved,
    "all others\nmade even": others_even,
    "likeliest\ntwo\nswapped": lambda v: v.at[:, :2].set(v[:, 1::-1]),
    "rare ones\nshuffled": rare_shuffled,
    "rare ones\nat a tenth": rare_suppressed,
    "all classes\nshuffled": renamed,
}


def standardized(student: Logits, other: Logits) -> Array:
    """The forward KL of standardised logits."""
    pair = (losses.standardize_logits(x, ddof=1) for x in (student, other))
    return losses.forward_kl(*pair)


def decoupled(student: Logits, other: Logits) -> Array:
    """The labels are the teacher's likeliest classes."""
    return losses.decoupled_kd(student, other, labels=jnp.argmax(other, axis=-1))


LOSSES: dict[str, Callable[[Logits, Logits], Array]] = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jensen_shannon, beta=0.5": losses.jensen_shannon,
    "adaptive_kl": losses.adaptive_kl,
    "alpha_beta, powers .2, .7": losses.alpha_beta,
    "total_variation": losses.total_variation,
    "decoupled_kd, weights 1, 8": decoupled,
    "logit_mse, centered": functools.partial(losses.logit_mse, centered=True),
    "standardize + forward_kl": standardized,
    "dist": losses.dist,
    "hinge_ranking, k=5": losses.hinge_ranking,
    "universal_logit": losses.universal_logit,
}


def measure() -> Float[np.ndarray, "losses errors"]:
    """How far each error moves each loss; 1: as far as equal probabilities do."""
    right = teacher()
    students = [
        jnp.zeros_like(right),
        right,
        *(make(right) for make in ERRORS.values()),
    ]
    # `dist` looks at a class over positions: there a rank must not be a class.
    classes = jnp.tile(jnp.arange(NUM_CLASSES), (NUM_POSITIONS, 1))
    order = jax.random.permutation(jax.random.key(3), classes, 1, independent=True)
    student, other = (
        jnp.take_along_axis(jnp.stack(x), order[None], axis=-1)
        for x in (students, [right] * len(students))
    )

    @jax.jit
    @jax.vmap
    def values(*pair: Logits) -> Array:
        return jnp.stack([loss(*pair).mean() for loss in LOSSES.values()])

    far, best, *moved = np.asarray(values(student, other))
    return np.stack([(value - best) / (far - best) for value in moved], axis=1)


def draw(table: Float[np.ndarray, "losses errors"]) -> Figure:
    """A cell for each loss and error."""
    return heat_table(
        table,
        list(LOSSES),
        list(ERRORS),
        "Student = teacher with one error. 0: the loss does not see it. "
        "1: as bad as equal probabilities.\n"
        "Below 0: better than the teacher's own logits. Rare: the 6th class and on.",
        size=(9.6, 5.9),
        blind_below=BLIND,
    )


if __name__ == "__main__":
    write("responses_errors", draw(measure()))
