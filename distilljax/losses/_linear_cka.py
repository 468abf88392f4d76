"""Centred kernel alignment: do two layers arrange a batch in the same way?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from distilljax.losses import _features as features
from distilljax.losses import _numerics as numerics
from distilljax.losses import _shards as shards


def linear_cka(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
    axis_name: shards.AxisName | None = None,
) -> Float[Array, ""]:
    """1 - linear CKA between the features of a batch, one number for all of it.

    linear_cka = 1 - |Y' X|^2 / (|X' X| |Y' Y|), with Frobenius norms

    for student features X and teacher features Y, one row for each example, less the
    mean of each column. It is 1 - cos of the angle between the two tables of all inner
    products of examples, and so blind to rotations and to the scale of the features; no
    projection is needed, and the widths may differ. The name is that of the similarity,
    which is 1 for equal features; the loss is 1 less that, and 0 for equal features.

    Args:
      student: Features [*batch, width]; the axes of the batch are one list of rows.
        Gets the gradient.
      teacher: Features [*batch, any width]; gets none.
      where: Mask [*batch], such as [batch] or [batch, time]; a row where it is false is
        not part of the batch, whatever is in it. None counts every row.
      axis_name: Axis, or axes, of the mesh over which the batch is split, inside
        `jax.shard_map`: rows are gathered, and every shard returns the same number,
        whose mean over shards is the loss of the whole batch.

    Returns:
      A scalar, float32 (float64 if an input is), in [0, 1]. 1, with gradient 0, where
      one side does not vary; 0 where fewer than two rows count.

    Numerics: With no more rows than columns, as half the squared distance of the two
    normalised tables of inner products, which keeps its digits near 0; otherwise from
    products of columns, with a rounding error of 1e-6. With fewer rows than columns the
    estimate is biased towards 0, unrelated features included: use large batches.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
      >>> teacher = student[:, :1]                # the same, less one direction
      >>> round(float(linear_cka(student, teacher)), 4)   # 1 - 1 / sqrt 2
      0.2929

    Reference: Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network
    Representations Revisited", ICML 2019, arXiv 1905.00414, section 3.
    """
    lead = jnp.ndim(student) - 1
    x, y, mask = features.prepare(
        "linear_cka",
        "batch ... width",
        student,
        teacher,
        where,
        lead=lead,
        any_width=True,
    )
    x, y = (shards.gather(features.rows_of(a), axis_name) for a in (x, y))
    if mask is not None:
        mask = shards.gather(mask.reshape(-1), axis_name)
    count = jnp.asarray(len(x)) if mask is None else jnp.sum(mask, dtype=jnp.int32)
    x, y = (_centred(a, mask, count) for a in (x, y))
    if len(x) <= max(x.shape[1], y.shape[1]):
        tables = (jnp.matmul(a, a.T, precision=features.PRECISE) for a in (x, y))
        value = features.one_minus_cosine(*(table.reshape(-1) for table in tables))
    else:
        value = 1 - _alignment(x, y)
    return jnp.where(count >= 2, value, jnp.zeros((), value.dtype))


def _centred(
    x: Float[Array, "n d"], mask: Bool[Array, "n"] | None, count: Int[Array, ""]
) -> Float[Array, "n d"]:
    """Less the mean of the rows that count, divided by the largest entry left.

    The alignment does not depend on that factor, and with it nothing overflows. Columns
    that are constant leave rounding errors behind, which are no variation.
    """
    mean = jnp.sum(x, axis=0, keepdims=True) / jnp.maximum(count, 1).astype(x.dtype)
    error = 8 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x))
    x = numerics.zero_masked(x - mean, mask, trailing=1)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    varies = largest > jax.lax.stop_gradient(error)
    scaled = x / jnp.where(varies, largest, jnp.ones((), x.dtype))
    return jnp.where(varies, scaled, jnp.zeros((), x.dtype))


def _alignment(x: Float[Array, "n d"], y: Float[Array, "n e"]) -> Float[Array, ""]:
    """Linear CKA from the covariances of columns; 0 where one side does not vary."""
    squares = [
        jnp.sum(jnp.matmul(a.T, b, precision=features.PRECISE) ** 2)
        for a, b in ((x, y), (x, x), (y, y))
    ]
    both = squares[1] * squares[2]
    varies = both > 0
    safe = jnp.where(varies, both, jnp.ones_like(both))
    cka = squares[0] * jax.lax.rsqrt(safe)
    return jnp.where(varies, cka, jnp.zeros_like(cka))
