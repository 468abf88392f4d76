"""Correlations between the channels of an image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_features, check_where, fail
from distilljax.losses import _numerics as numerics
from distilljax.losses import _points as points


def interchannel_correlation(
    student: Float[Array, "batch *space channels"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "batch"]:
    """How much the channels that fire together differ, for each example.

    interchannel_correlation = mean over channels (c, d) of (S_cd - T_cd)^2
    S = inner products over space of the student's channels, each row divided by its
    length; T = the same of the teacher

    `similarity_preserving` with channels for examples: it says nothing about where
    something is seen, and so the images may be of different sizes, but the channels
    must be as many. For detection and segmentation, call it on patches of the image.

    Args:
      student: Features [batch, height, width, channels], or with any other axes of
        space; any floating dtype; gets the gradient. A student of fewer channels needs
        a projection first.
      teacher: Features of as many examples and channels; its space may differ. Gets no
        gradient.
      where: Mask [batch]; where it is false the value and the gradient are exactly 0,
        whatever the features. None counts every example.

    Returns:
      [batch], float32 (float64 if an input is). The authors' code has the sum over one
      of the two channels, which is this times the number of channels.

    Numerics: Computed in float32 whatever the inputs, on matrix units too. A channel
    that is 0 everywhere correlates with none: its row is zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.eye(2)[None]                      # each in a place of its own
      >>> teacher = jnp.ones((1, 1, 2))                   # both everywhere: 1 / sqrt(2)
      >>> values = interchannel_correlation(student, teacher)
      >>> [round(float(value), 4) for value in values]    # 1/2 (.293^2 + 1/2)
      [0.2929]

    Reference: Liu, Huang, Lin, Xie, Wang, Chang, Liang, "Exploring Inter-Channel
    Correlation for Diversity-Preserved Knowledge Distillation", ICCV 2021, arXiv
    2202.03680, section 3.
    """
    batch, channels = _check_channels(student, teacher)
    check_where("interchannel_correlation", where, (batch,))
    dtype = numerics.compute_dtype(student, teacher)
    mask = numerics.as_mask(where)

    def correlations(features: Array) -> Float[Array, "batch channels channels"]:
        features = jnp.asarray(features).astype(dtype).reshape(batch, -1, channels)
        features = numerics.zero_masked(features, mask, trailing=2)
        return points.unit(points.inner(features.mT))

    gaps = correlations(student) - correlations(jax.lax.stop_gradient(teacher))
    return numerics.zero_masked(jnp.mean(gaps**2, axis=(-2, -1)), mask)


def _check_channels(student: Array, teacher: Array) -> tuple[int, int]:
    """The number of examples and of channels, equal on both sides."""
    axes = "batch space ... channels"  # one by one: the space may differ
    check_features("interchannel_correlation", axes, student=student)
    check_features("interchannel_correlation", axes, teacher=teacher)
    shape, other = jnp.shape(student), jnp.shape(teacher)
    if shape[0] != other[0] or shape[-1] != other[-1]:
        if shape[-1] != other[-1]:
            remedy = (
                "The last axes (channels) differ: project the student's features to "
                "the teacher's channels first."
            )
        else:
            remedy = "The leading axes differ: check that both models saw one batch."
        rule = f"have the batch and the channels of student, {shape}"
        fail("interchannel_correlation", "teacher", rule, other, remedy)
    return shape[0], shape[-1]
