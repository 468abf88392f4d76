"""Losses between hidden states of one width, one value for each position."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax.losses import _features as features
from distilljax.losses import _numerics as numerics


def hidden_mse(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Mean over the width of (student - teacher)^2 at each position.

    hidden_mse = mean over width of (s - t)^2

    Its gradient is 2 (s - t) / width. The student's features are usually the output of
    a learned projection to the teacher's width, trained with the student and left out
    when the student is exported. Where a few large entries dominate the teacher's
    hidden states, pass both sides through a layer norm without parameters first.

    Args:
      student: Features [*batch, width] of any floating dtype: tokens [batch, time,
        width], images [batch, height, width, channels]; gets the gradient.
      teacher: Features of the same shape; gets none.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the features. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is), in squared units of the features.

    Numerics: A mean, so that the weight of this loss does not depend on the width.
    The loss of the paper is half the sum: width / 2 times this.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([1.0, 0.0]), jnp.array([4.0, 1.0])
      >>> float(hidden_mse(student, teacher))             # (9 + 1) / 2
      5.0

    Reference: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin
    Deep Nets", ICLR 2015, arXiv 1412.6550, equation 3. For transformers: Jiao et al.,
    "TinyBERT", Findings of EMNLP 2020, arXiv 1909.10351, equations 8 and 9.
    """
    lead = jnp.ndim(student) - 1
    s, t, mask = features.prepare(
        "hidden_mse", features.ANY, student, teacher, where, lead=lead
    )
    return numerics.zero_masked(jnp.mean((s - t) ** 2, axis=-1), mask)


def hidden_cosine(
    student: Float[Array, "*batch width"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """1 - cosine of the angle between student and teacher at each position.

    hidden_cosine = 1 - <s, t> / (|s| |t|), in [0, 2]

    Its gradient is -(t^ - cos s^) / |s|, for s^ = s / |s|, t^ = t / |t|: it turns the
    student's vector and never stretches it, so use it together with a loss that sets
    the scale, or where a layer norm follows. DistilBERT takes it for the last hidden
    states. It is half the squared distance of the directions, |s^ - t^|^2 / 2, so
    "patient" distillation (Sun et al., EMNLP 2019) is twice this.

    Args:
      student: Features [*batch, width] of any floating dtype; gets the gradient.
      teacher: Features of the same shape; gets none.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the features. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is). 1, with gradient 0, where one of the
      vectors is 0.

    Numerics: Computed as the distance between directions, which keeps its digits near
    0, with each vector divided by its largest entry before it is squared.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([3.0, 4.0]), jnp.array([2.0, 0.0])
      >>> round(float(hidden_cosine(student, teacher)), 6)            # 1 - 3 / 5
      0.4

    Reference: Sanh, Debut, Chaumond, Wolf, "DistilBERT, a distilled version of BERT",
    NeurIPS workshop on Energy Efficient Machine Learning 2019, arXiv 1910.01108,
    section 2.
    """
    lead = jnp.ndim(student) - 1
    s, t, mask = features.prepare(
        "hidden_cosine", features.ANY, student, teacher, where, lead=lead
    )
    return numerics.zero_masked(features.one_minus_cosine(s, t), mask)
