"""Logits less their mean over their standard deviation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_between, check_logits, check_where, fail
from distilljax.losses import _numerics as numerics


def standardize_logits(
    logits: Float[Array, "*batch classes"],
    *,
    ddof: int = 1,
    min_std: float = 1e-6,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch classes"]:
    """Each position's logits with mean 0 and standard deviation 1 over the classes.

    standardize_logits = (z - mean) / std, for logits z
    std = sqrt(sum over classes of (z - mean)^2 / (classes - ddof))

    A transform of student and teacher, before a divergence: the student then learns the
    order and the relative distances of the teacher's logits, and not their scale, which
    a small model cannot always reach. The temperature comes after it. Its gradient has
    no component along a shift or a scaling of the logits, so nothing here determines
    the student's own scale: always add the cross-entropy with the labels.

    Args:
      logits: [*batch, classes] of any floating dtype. Gets the gradient, through mean
        and standard deviation; the divergence fixes the teacher's.
      ddof: 1 divides by classes - 1, as the authors' code and PyTorch do, 0 by classes,
        as NumPy does. With 4 classes that changes a distillation loss by a third.
      min_std: Positive; logits whose deviation is at most this, such as those of a head
        that starts with zeros, have no order to learn: zeros, without a gradient.
      where: Mask [*batch]; where it is false the result and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch, classes], float32 (float64 if the input is).

    Numerics: Computed in float32 whatever the input. A class at -inf stays there and is
    not counted.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([1.0, 2.0, 3.0])
      >>> standardize_logits(logits).tolist()
      [-1.0, 0.0, 1.0]
      >>> [round(x, 4) for x in standardize_logits(logits, ddof=0).tolist()]
      [-1.2247, 0.0, 1.2247]

    Reference: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge
    Distillation", CVPR 2024, arXiv 2403.01427, algorithm 1.
    """
    check_logits("standardize_logits", logits=logits)
    check_where("standardize_logits", where, jnp.shape(logits)[:-1])
    check_between("standardize_logits", "min_std", min_std, 1e-12, 1e12)
    classes = jnp.shape(logits)[-1]
    if not 0 <= ddof < classes:
        fail(
            "standardize_logits",
            "ddof",
            f"lie in [0, {classes - 1}], below the number of classes",
            ddof,
            "Use 1 (as PyTorch) or 0 (as NumPy).",
        )
    mask = numerics.as_mask(where)
    z = jnp.asarray(logits).astype(numerics.compute_dtype(logits))
    z = numerics.zero_masked(z, mask, trailing=1)
    dead = numerics.is_zero(z)
    zero = jnp.zeros((), z.dtype)
    live = jnp.sum(~dead, axis=-1, keepdims=True)
    z = jnp.where(dead, zero, z)
    mean = jnp.sum(z, axis=-1, keepdims=True) / jnp.maximum(live, 1).astype(z.dtype)
    centered = jnp.where(dead, zero, z - mean)
    squares = jnp.sum(centered**2, axis=-1, keepdims=True)
    variance = squares / jnp.maximum(live - ddof, 1).astype(z.dtype)
    # Inside the root, whose slope at 0 is infinite.
    varies = variance > jnp.asarray(min_std**2, z.dtype)
    std = jnp.sqrt(jnp.where(varies, variance, jnp.ones((), z.dtype)))
    standard = jnp.where(varies, centered / std, zero)
    standard = jnp.where(dead, jnp.asarray(-jnp.inf, z.dtype), standard)
    return numerics.zero_masked(standard, mask, trailing=1)
