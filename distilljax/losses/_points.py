"""What all relation losses share: points, pairs of points, and rows of similarities.

A relation loss sees a batch as a cloud of points and compares how the points of the
student lie to each other with how those of the teacher do. The axes of the clouds never
meet, so student and teacher may be of different widths, and no projection is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from distilljax._checks import check_points
from distilljax.losses import _numerics as numerics
from distilljax.losses import _shards as shards
from distilljax.losses._shards import AxisName

# How many numbers the anchors that are worked on together may take: 1 MB in float32,
# which stays in a core's cache. Small batches are done in one piece.
_NUMBERS_AT_ONCE = 2**18


class Points(NamedTuple):
    """The points of a batch, those of all shards: masked ones are zeros."""

    student: Float[Array, "points student_width"]
    teacher: Float[Array, "points teacher_width"]
    mask: Bool[Array, "points"]

    def num_valid(self) -> Float[Array, ""]:
        """How many points count; 1 where none does, because it divides."""
        count = jnp.sum(self.mask, dtype=jnp.int32)
        return jnp.maximum(count, 1).astype(self.student.dtype)

    def pairs(self) -> Bool[Array, "points points"]:
        """Both ends count; a point makes a pair with itself."""
        return self.mask[:, None] & self.mask[None, :]

    def others(self) -> Bool[Array, "points points"]:
        """Both ends count, and are different points."""
        return self.pairs() & ~jnp.eye(self.mask.size, dtype=bool)

    def mean_over_pairs(
        self, values: Float[Array, "points points"]
    ) -> Float[Array, ""]:
        """Mean over all ordered pairs that count, a point with itself included."""
        total = jnp.sum(numerics.zero_masked(values, self.pairs()))
        return total / self.num_valid() ** 2


def points_of(
    function: str,
    student: Array,
    teacher: Array,
    where: Array | None,
    axis_name: AxisName | None,
) -> Points:
    """Checked features as points: rows of [batch, width] or [batch, time, width]."""
    check_points(function, student, teacher, where)
    dtype = numerics.compute_dtype(student, teacher)
    mask = numerics.as_mask(where)

    def cloud(features: Array) -> Float[Array, "points _"]:
        features = jnp.asarray(features).astype(dtype)
        features = numerics.zero_masked(features, mask, trailing=1)
        return shards.gather(features.reshape(-1, features.shape[-1]), axis_name)

    ours, theirs = cloud(student), cloud(jax.lax.stop_gradient(teacher))
    if mask is None:
        return Points(ours, theirs, jnp.ones(len(ours), bool))
    return Points(ours, theirs, shards.gather(mask.reshape(-1), axis_name))


def inner(x: Float[Array, "*b n k"]) -> Float[Array, "*b n n"]:
    """Inner products of the rows, in full float32 also where matrix units round it."""
    return jnp.einsum("...ik,...jk->...ij", x, x, precision=jax.lax.Precision.HIGHEST)


def unit(x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """Rows of length 1; a row of zeros stays as it is, and gets no gradient."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    zero = jnp.zeros((), x.dtype)
    safe = jnp.where(square > 0, square, jnp.ones((), x.dtype))
    return jnp.where(square > 0, x / jnp.sqrt(safe), zero)


def length(x: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """Euclidean length of the rows; at 0 its gradient is 0, not the inf of a root."""
    square = jnp.sum(x**2, axis=-1)
    root = jnp.sqrt(jnp.where(square > 0, square, jnp.ones((), x.dtype)))
    return jnp.where(square > 0, root, jnp.zeros((), x.dtype))


@jax.custom_jvp
def distances(x: Float[Array, "n k"]) -> Float[Array, "n n"]:
    """Euclidean distances between all rows, from differences, a few rows at a time.

    From inner products all would be rounded to some 1e-4 of the size of the cloud, and
    between near points nothing would be left. At 0 the gradient is 0.
    """
    return over_anchors(lambda at: length(x - at[None]), x, x.size)


@distances.defjvp
def _distances_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Each distance by its two ends, which are one sum and the same one transposed.

    So the gradient of a point is one sum over its row. The transposed loop over rows
    would add to all points in every step, and take many times as long.
    """
    (x,), (moved,) = primals, tangents
    apart = distances(x)
    zero = jnp.zeros((), x.dtype)
    safe = jnp.where(apart > 0, apart, jnp.ones((), x.dtype))
    inverse = jnp.where(apart > 0, 1 / safe, zero)

    def along(anchor: Any) -> Float[Array, "n"]:
        at, move, scale = anchor
        return scale * jnp.sum((at[None] - x) * move[None], axis=-1)

    one_end = over_anchors(along, (x, moved, inverse), x.size)
    return apart, one_end + one_end.T


def cosines(x: Float[Array, "n k"]) -> Float[Array, "n n"]:
    """The cosine between each two points, seen from the origin."""
    return inner(unit(x))


def huber(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x^2 / 2 up to 1, abs(x) - 1/2 beyond, so that no pair pulls with more than 1."""
    size = jnp.abs(x)
    return jnp.where(size <= 1, 0.5 * x**2, size - 0.5)


def rows_kl(
    student: Float[Array, "n n"],
    teacher: Float[Array, "n n"],
    pairs: Bool[Array, "n n"],
) -> Float[Array, ""]:
    """Mean over anchors of KL(p || q), p and q the softmax over an anchor's pairs."""
    anchors = jnp.any(pairs, axis=-1)
    # An anchor without pairs has no distribution: zeros stand in, and do not count.
    live = pairs | ~anchors[:, None]

    def log_rows(logits: Float[Array, "n n"]) -> Float[Array, "n n"]:
        return jax.nn.log_softmax(jnp.where(live, logits, -jnp.inf))

    values = numerics.kl(log_rows(teacher), log_rows(student))
    total = jnp.sum(numerics.zero_masked(values, anchors))
    count = jnp.maximum(jnp.sum(anchors, dtype=jnp.int32), 1)
    return total / count.astype(total.dtype)


def over_anchors(
    row: Callable[[Any], Float[Array, "..."]], anchors: Any, numbers: int
) -> Float[Array, "anchors ..."]:
    """``row(anchor)`` for all anchors, a few at a time, and again on the way back.

    Nothing that ``row`` makes is kept, so the memory is that of the anchors that are
    worked on together, however many there are. ``numbers`` is what one of them takes.
    """
    at_once = max(1, _NUMBERS_AT_ONCE // numbers)
    row = jax.checkpoint(row)
    if at_once >= len(jax.tree.leaves(anchors)[0]):
        return jax.vmap(row)(anchors)
    return jax.lax.map(row, anchors, batch_size=at_once)


def sum_over_anchors(
    row: Callable[[Array], Any], anchors: Shaped[Array, "anchors ..."], numbers: int
) -> Any:
    """The sum of ``row(anchor)``, a tree of arrays, over all anchors, a few at a time.

    For what has no way back: there, each step of the sum would be kept.
    """
    at_once = max(1, _NUMBERS_AT_ONCE // numbers)
    further = (len(anchors) - 1) // at_once
    first = len(anchors) - further * at_once  # so that all further pieces are whole
    pieces = anchors[first:].reshape(further, at_once, *anchors.shape[1:])

    def total(some: Array) -> Any:
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(row)(some))

    def add(so_far: Any, some: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, so_far, total(some)), None

    return jax.lax.scan(add, total(anchors[:first]), pieces)[0]
