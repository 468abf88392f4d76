"""Margins between the scores of a ranker."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import fail
from distilljax.losses import _numerics as numerics


def margin_mse(
    student: Float[Array, "*batch candidates"],
    teacher: Float[Array, "..."],
    *,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Squared difference of the margins of a positive over its negatives.

    margin_mse = mean over negatives n of ((s_0 - s_n) - (t_0 - t_n))^2
    for the scores s of the student and t of the teacher; column 0 is the positive

    For rankers and retrievers: a bi-encoder whose inner products live on another scale
    than the logits of a cross-encoder learns the differences alone. A constant that
    is added to all scores of a query changes nothing, but the teacher's scale matters:
    with several teachers, standardise the margins of each. The gradient is
    2 (margin - teacher's margin) / negatives for s_0, the same with a minus for s_n.

    Args:
      student: Scores [*batch, candidates] of any floating dtype, the positive in column
        0, at least one negative after it; gets the gradient.
      teacher: Scores of the same shape; gets none.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the scores. None counts every query.

    Returns:
      [*batch], float32 (float64 if an input is), in squared scores. +inf where one
      side alone is -inf.

    Numerics: Computed in float32 whatever the inputs. Candidates at -inf on both sides
    are padding and not counted, so that queries may have unequal numbers of negatives.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([3.0, 1.0]), jnp.array([5.0, 4.0])
      >>> float(margin_mse(student, teacher))             # (2 - 1)^2
      1.0

    Reference: Hofstätter, Althammer, Schröder, Sertkan, Hanbury, "Improving Efficient
    Neural Ranking Models with Cross-Architecture Knowledge Distillation", 2020, arXiv
    2010.02666, equation 1.
    """
    s, t, mask = numerics.prepare("margin_mse", student, teacher, where)
    if s.shape[-1] < 2:
        fail(
            "margin_mse",
            "student",
            "have at least two candidates on its last axis",
            jnp.shape(student),
            "Put the score of the positive first and those of negatives after it.",
        )
    zero = jnp.zeros((), s.dtype)
    s_impossible, t_impossible = numerics.is_zero(s), numerics.is_zero(t)
    live = ~(s_impossible | t_impossible)
    gaps = jnp.where(live, s, zero) - jnp.where(live, t, zero)
    # The difference of the margins is the margin of the differences.
    gaps = jnp.where(live[..., 1:], gaps[..., :1] - gaps[..., 1:], zero)
    count = jnp.maximum(live[..., 1:].sum(axis=-1), 1).astype(s.dtype)
    values = jnp.sum(gaps**2, axis=-1) / count
    infinite = jnp.any(s_impossible ^ t_impossible, axis=-1)
    values += jnp.where(infinite, jnp.inf, 0.0).astype(s.dtype)
    return numerics.zero_masked(values, mask)
