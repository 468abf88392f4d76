"""From one value for each position to one number, under a mask."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_where
from distilljax.losses import _numerics as numerics


def masked_sum(
    values: Shaped[Array, "..."], where: Shaped[Array, "..."] | None = None
) -> Float[Array, ""]:
    """Sum over all axes of the values that count, in their unit.

    masked_sum = sum of values[i] over all i where where[i] is true

    Args:
      values: Any shape; booleans and integers are summed as numbers. Gets gradient 1
        where the mask is true and exactly 0 elsewhere, also from inf and nan.
      where: Mask of the shape of ``values``. None counts all.

    Returns:
      A scalar, float32 (float64 if ``values`` is); 0 if nothing counts.

    Numerics: Summed in float32 whatever the input.

    Example:
      >>> import jax.numpy as jnp
      >>> values = jnp.array([1.0, 2.0, jnp.nan])
      >>> float(masked_sum(values, jnp.array([True, True, False])))
      3.0
    """
    check_where("masked_sum", where, jnp.shape(values))
    values = jnp.asarray(values).astype(numerics.compute_dtype(values))
    return jnp.sum(numerics.zero_masked(values, numerics.as_mask(where)))


def masked_mean(
    values: Shaped[Array, "..."], where: Shaped[Array, "..."] | None = None
) -> Float[Array, ""]:
    """Mean over all axes of the values that count, in their unit.

    masked_mean = masked_sum(values, where) / count of true in where

    Every value weighs the same. Means of microbatches or shards cannot be averaged if
    their counts differ: keep sum and count apart there, as `distilljax.typing.Mean`.

    Args:
      values: Any shape; booleans and integers are averaged as numbers. Gets gradient
        1 / count where the mask is true and exactly 0 elsewhere.
      where: Mask of the shape of ``values``. None counts all.

    Returns:
      A scalar, float32 (float64 if ``values`` is); 0, with gradient 0, if nothing
      counts.

    Numerics: Summed in float32 whatever the input; counted in integers.

    Example:
      >>> import jax.numpy as jnp
      >>> values = jnp.array([1.0, 2.0, jnp.nan])
      >>> float(masked_mean(values, jnp.array([True, True, False])))
      1.5
      >>> float(masked_mean(values, jnp.zeros(3, bool)))
      0.0
    """
    check_where("masked_mean", where, jnp.shape(values))
    total = masked_sum(values, where)
    mask = numerics.as_mask(where)
    count = jnp.size(values) if mask is None else jnp.sum(mask, dtype=jnp.int32)
    return total / jnp.maximum(count, 1).astype(total.dtype)
