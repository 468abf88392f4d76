"""What the losses between features share: checks, masks, and directions of vectors.

A feature vector may be zero: a dead unit, a padded token. Its length then has no
derivative and its direction does not exist, and a division by a small constant instead
gives a gradient of a million. Here such a vector has no direction and no gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distilljax._checks import check_features, check_where
from distilljax.losses import _numerics as numerics

# Products in float32 are products in float32, on devices that would round them too.
PRECISE = jax.lax.Precision.HIGHEST

IMAGE = "batch height width channels"
TOKENS = "batch time width"
ANY = "... width"


def prepare(
    function: str,
    axes: str,
    student: Array,
    teacher: Array,
    where: Array | None,
    *,
    lead: int,
    any_width: bool = False,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Bool[Array, "..."] | None]:
    """Checked features in the compute dtype, zero where masked, the teacher fixed.

    The mask has the first ``lead`` axes of the features.
    """
    check_features(
        function, axes, any_width=any_width, student=student, teacher=teacher
    )
    check_where(function, where, jnp.shape(student)[:lead])
    mask = numerics.as_mask(where)
    dtype = numerics.compute_dtype(student, teacher)
    student, teacher = (settled(x, mask, dtype) for x in (student, teacher))
    return student, jax.lax.stop_gradient(teacher), mask


def settled(
    x: Float[Array, "..."], mask: Bool[Array, "..."] | None, dtype: Any
) -> Float[Array, "..."]:
    """Features in the compute dtype, zero in the rows where the mask is false."""
    trailing = 0 if mask is None else jnp.ndim(x) - mask.ndim
    return numerics.zero_masked(jnp.asarray(x).astype(dtype), mask, trailing=trailing)


def direction(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors of length 1 along the last axis; 0, with gradient 0, where x is 0.

    Each vector is divided by its largest entry first, so that no square overflows or
    vanishes; the direction does not depend on that factor, so it needs no gradient.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    exists = largest >= jnp.finfo(x.dtype).tiny
    one = jnp.ones((), x.dtype)
    scaled = jnp.where(exists, x / jnp.where(exists, largest, one), 0 * one)
    squares = jnp.sum(scaled**2, axis=-1, keepdims=True)
    return scaled * jax.lax.rsqrt(jnp.where(exists, squares, one))


def one_minus_cosine(
    a: Float[Array, "*b d"], b: Float[Array, "*b d"]
) -> Float[Array, "*b"]:
    """1 - cos(a, b), as half the squared distance between the two directions.

    The difference would lose its digits near 0. Where a vector is 0 its cosine with
    anything is 0, so the value is 1, and the gradient 0.
    """
    a, b = direction(a), direction(b)
    exist = jnp.any(a != 0, axis=-1) & jnp.any(b != 0, axis=-1)
    apart = jnp.sum((a - b) ** 2, axis=-1) / 2
    return jnp.where(exist, apart, jnp.ones((), a.dtype))


def rows_of(x: Array) -> Array:
    """[*batch, width] as a list of vectors, [rows, width]."""
    return jnp.reshape(x, (-1, x.shape[-1]))
