"""Information about the teacher's features, bounded through a Gaussian."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_positive, fail
from distilljax.losses import _features as features
from distilljax.losses import _numerics as numerics
from distilljax.typing import Scalar


def variational_information(
    student: Float[Array, "*batch channels"],
    teacher: Float[Array, "..."],
    *,
    raw_scale: Float[Array, "..."],
    epsilon: Scalar = 1e-5,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Mean over channels of the negative log-likelihood of the teacher's features.

    variational_information = mean over channels of 1/2 ((t - s)^2 / var + log var)
    var = softplus(raw_scale) + epsilon, one for each channel

    in nats, without the constant log(2 pi) / 2. The student predicts the mean of the
    teacher's features, by a learned map (three 1 x 1 convolutions, say), and one
    learned variance says how much of each channel can be known from the student at all:
    a channel that cannot be predicted loses its weight instead of dominating the loss.
    Minimising it maximises a lower bound on the mutual information of the two layers.

    Args:
      student: Predicted means [*batch, channels]: images [batch, height, width,
        channels], tokens [batch, time, channels]; gets the gradient.
      teacher: Features of the same shape; gets none.
      raw_scale: [channels], learned: it gets a gradient too, so make it a parameter of
        the student, in the optimizer. Start from log(expm1(5 - epsilon)), variance 5.
      epsilon: The smallest variance, > 0; may be traced.
      where: Mask [*batch]; where it is false the value and all gradients, that of the
        scale included, are exactly 0. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is). Below 0 where the variance is small:
      it is a likelihood of a density, and its minimum depends on the data.

    Numerics: A mean over channels; the sum of the paper is this times their number.

    Example:
      >>> import jax.numpy as jnp
      >>> raw = jnp.log(jnp.expm1(jnp.full(2, 4.0)))
      >>> value = variational_information(
      ...     jnp.array([1.0, 0.0]), jnp.array([3.0, 0.0]), raw_scale=raw, epsilon=1e-9
      ... )
      >>> round(float(value), 4)                  # (4 / 4 + 0) / 4 + log(4) / 2
      0.9431

    Reference: Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation
    for Knowledge Transfer", CVPR 2019, arXiv 1904.05835, section 2.
    """
    name = "variational_information"
    lead = jnp.ndim(student) - 1
    s, t, mask = features.prepare(
        name, "... channels", student, teacher, where, lead=lead
    )
    check_positive(name, "epsilon", epsilon, "Use 1e-5.")
    if jnp.shape(raw_scale) != s.shape[-1:]:
        fail(
            name,
            "raw_scale",
            f"have one entry for each channel, {s.shape[-1:]}",
            f"the shape {jnp.shape(raw_scale)}",
            "Start from jnp.full(channels, jnp.log(jnp.expm1(5 - epsilon))).",
        )
    variance = jax.nn.softplus(jnp.asarray(raw_scale).astype(s.dtype))
    variance += numerics.positive_as(s.dtype, epsilon)
    # Written out, because nobody may rely on ranks being promoted.
    variance = variance.reshape((1,) * (s.ndim - 1) + variance.shape)
    values = jnp.mean((t - s) ** 2 / variance + jnp.log(variance), axis=-1) / 2
    return numerics.zero_masked(values, mask)
