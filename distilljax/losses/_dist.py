"""Correlations of predictions, over classes and over the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from distilljax._checks import (
    check_between,
    check_logits,
    check_points,
    check_temperature,
)
from distilljax.losses import _numerics as numerics
from distilljax.losses import _points as points
from distilljax.losses._shards import AxisName
from distilljax.typing import Scalar


def dist(
    student: Float[Array, "*batch classes"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 1.0,
    inter_weight: Scalar = 1.0,
    intra_weight: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """One minus the correlation of predictions, over classes and over the batch.

    dist = inter_weight mean over positions i of (1 - r(q_i, p_i))
         + intra_weight mean over classes c of (1 - r(q_:c, p_:c))
    r = Pearson's correlation, p = softmax(teacher / T), q = softmax(student / T)

    For a teacher that is much stronger than the student: it keeps the relations between
    predictions only, which class is preferred to which (inter), and which example is
    more of a class than which (intra), and not the probabilities. Combine it with a
    cross-entropy, since a correlation does not fix the scale. The gradient of 1 - r
    with respect to q is -(p' - r q') / |q - mean q|, with q' and p' centred and of
    length 1, and then through the softmax.

    Args:
      student: Logits [batch, classes] or [batch, time, classes] of any floating dtype;
        gets the gradient.
      teacher: Logits of the same shape; gets none.
      temperature: T > 0, divides both; may be traced. There is no factor T^2.
      inter_weight: Weight, at least 0, of the term over classes; may be traced.
      intra_weight: Weight, at least 0, of the term over the batch; may be traced.
      where: Mask, [batch] or [batch, time]; a masked position takes part in neither
        term, and gets gradient exactly 0. None counts every position.
      axis_name: Axis of the mesh over which the batch is split, inside `jax.shard_map`:
        the positions of all shards meet. None: those of this call.

    Returns:
      A scalar in [0, 2 (inter_weight + intra_weight)], float32 (float64 if an input
      is). With two positions every intra correlation is 1 or -1, and its gradient 0;
      with one, the intra term is 0.

    Numerics: 1 - r is formed as half the squared distance of the centred rows of length
    1, which does not cancel near r = 1. Where the teacher is constant, to rounding,
    there is nothing to correlate with, and the term is 0; where only the student is, it
    is 1, without a gradient: its direction would be noise. A class at -inf on both
    sides is not there.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
      >>> student = jnp.log(jnp.array([[0.1, 0.3, 0.6]]))
      >>> round(float(dist(student, teacher)), 3)         # 1 + .1233 / .1267
      1.974

    Reference: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger
    Teacher", NeurIPS 2022, arXiv 2205.10536, equations 5 to 9.
    """
    check_logits("dist", student=student, teacher=teacher)
    check_points("dist", student, teacher, where)
    check_temperature("dist", temperature)
    check_between("dist", "inter_weight", inter_weight, 0, jnp.inf)
    check_between("dist", "intra_weight", intra_weight, 0, jnp.inf)
    rows = points.points_of("dist", student, teacher, where, axis_name)
    dtype = rows.student.dtype
    absent = numerics.is_zero(rows.student) & numerics.is_zero(rows.teacher)
    live = rows.mask[:, None] & ~absent
    temperature = numerics.positive_as(dtype, temperature)
    q = jax.nn.softmax(rows.student / temperature)
    p = jax.nn.softmax(rows.teacher / temperature)
    inter = _mean(_one_minus_pearson(q, p, live), rows.mask)
    intra = _mean(_one_minus_pearson(q.T, p.T, live.T), jnp.any(live, axis=0))
    inter_weight, intra_weight = (
        numerics.between_as(dtype, weight, 0) for weight in (inter_weight, intra_weight)
    )
    return inter_weight * inter + intra_weight * intra


def _mean(values: Float[Array, "n"], counts: Bool[Array, "n"]) -> Float[Array, ""]:
    count = jnp.maximum(jnp.sum(counts, dtype=jnp.int32), 1)
    return jnp.sum(numerics.zero_masked(values, counts)) / count.astype(values.dtype)


def _one_minus_pearson(
    a: Float[Array, "n k"], b: Float[Array, "n k"], live: Bool[Array, "n k"]
) -> Float[Array, "n"]:
    """1 - r of the rows of a and b, over the columns that are live in them."""
    a, a_constant = _standardized(a, live)
    b, b_constant = _standardized(b, live)
    values = 0.5 * jnp.sum((a - b) ** 2, axis=-1)
    values = jnp.where(a_constant, jnp.ones((), a.dtype), values)
    return jnp.where(b_constant, jnp.zeros((), a.dtype), values)


def _standardized(
    x: Float[Array, "n k"], live: Bool[Array, "n k"]
) -> tuple[Float[Array, "n k"], Bool[Array, "n"]]:
    """Rows less their mean and of length 1; zeros for rows that are constant."""
    x = numerics.zero_masked(x, live)
    # The scale cancels, and with it its gradient; without it the squares of rare
    # classes underflow.
    largest = jnp.max(jax.lax.stop_gradient(x), axis=-1, keepdims=True)
    x = x / jnp.where(largest > 0, largest, jnp.ones((), x.dtype))
    count = jnp.maximum(live.sum(axis=-1, keepdims=True), 1).astype(x.dtype)
    centred = numerics.zero_masked(x - x.sum(axis=-1, keepdims=True) / count, live)
    square = jnp.sum(centred**2, axis=-1)
    rounding = (8 * jnp.finfo(x.dtype).eps) ** 2 * jnp.sum(x**2, axis=-1)
    constant = square <= rounding
    length = jnp.sqrt(jnp.where(constant, jnp.ones((), x.dtype), square))
    return jnp.where(constant[:, None], 0, centred / length[:, None]), constant
