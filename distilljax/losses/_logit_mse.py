"""Squared error between logits."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax.losses import _numerics as numerics
from distilljax.losses._heads import accepts_heads


@accepts_heads
def logit_mse(
    student: Float[Array, "*batch classes"],
    teacher: Float[Array, "..."],
    *,
    centered: bool = False,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Mean over classes of (student - teacher)^2 at each position, in squared logits.

    logit_mse = mean over classes of (z - v)^2, for student logits z, teacher logits v
    centered: z and v less their means over classes

    Its gradient is 2 (z - v) / classes. Softmax ignores a constant that is added to all
    logits, but this loss does not, unless ``centered``; the centred form is twice the
    limit of T^2 forward_kl for large T.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape; gets none.
      centered: Subtract the mean over classes from both.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is). +inf where one side alone is -inf.

    Numerics: Computed in float32 whatever the inputs. Classes at -inf on both sides
    contribute nothing and are not counted.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([1.0, 0.0]), jnp.array([4.0, 1.0])
      >>> float(logit_mse(student, teacher))              # (9 + 1) / 2
      5.0
      >>> float(logit_mse(student, teacher, centered=True))           # (1 + 1) / 2
      1.0

    Reference: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014,
    arXiv 1312.6184, equation 1.
    """
    z, v, mask = numerics.prepare("logit_mse", student, teacher, where)
    zero = jnp.zeros((), z.dtype)
    z_impossible, v_impossible = numerics.is_zero(z), numerics.is_zero(v)
    live = ~(z_impossible | v_impossible)
    count = jnp.maximum(live.sum(axis=-1, keepdims=True), 1).astype(z.dtype)
    difference = jnp.where(live, z, zero) - jnp.where(live, v, zero)
    if centered:
        mean = difference.sum(axis=-1, keepdims=True) / count
        difference = jnp.where(live, difference - mean, zero)
    values = jnp.sum(difference**2, axis=-1) / count[..., 0]
    infinite = jnp.any(z_impossible ^ v_impossible, axis=-1)
    values += jnp.where(infinite, jnp.inf, 0.0).astype(z.dtype)
    return numerics.zero_masked(values, mask)
