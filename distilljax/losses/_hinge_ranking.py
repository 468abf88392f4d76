"""A pairwise ranking loss: the teacher's order, and nothing of its probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_between, check_count, fail
from distilljax.losses import _numerics as numerics
from distilljax.losses._heads import accepts_heads
from distilljax.typing import Scalar


@accepts_heads
def hinge_ranking(
    student: Float[Array, "*batch classes"],
    teacher: Float[Array, "..."],
    *,
    k: int = 5,
    margin: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Mean hinge over the pairs that the teacher orders, at each position, in logits.

    hinge_ranking = mean over pairs (i, j) of max(0, margin - (z_i - z_j))
    pairs: i among the teacher's k likeliest classes, and v_i > v_j, for student logits
    z and teacher logits v

    It is 0 as soon as the student orders the teacher's best k classes, among themselves
    and before all others, as the teacher does, with the margin to spare: what is asked
    of a ranker, or of a student that is decoded greedily. Its gradient is -1 / pairs at
    i and 1 / pairs at j for each pair that lacks the margin. It knows nothing of
    probabilities: add a divergence or the cross-entropy.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape; gets none. Only their order matters, and
        classes with equal logits are no pair.
      k: How many of the teacher's classes must be ranked, from 1 to the number of
        classes. Time and memory grow with k times classes.
      margin: At least 0; may be traced. 0 asks for the order alone, and a student that
        gives all classes the same logit then has loss 0.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is). 0 where the teacher orders nothing;
      +inf where the student rules out a class that it should rank first.

    Numerics: Computed in float32 whatever the inputs. A class at -inf on both sides is
    in no pair. Exactly at the margin the gradient is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.array([3.0, 2.0, 1.0])
      >>> student = jnp.array([0.5, 1.0, 0.0])       # k = 1: hinges of 1.5 and 0.5
      >>> float(hinge_ranking(student, teacher, k=1))
      1.0

    Reference: the hinge over ordered pairs is that of Herbrich, Graepel, Obermayer,
    "Large Margin Rank Boundaries for Ordinal Regression", Advances in Large Margin
    Classifiers, 2000; the order at the top as a teacher's signal that of Reddi et al.,
    "RankDistil: Knowledge Distillation for Ranking", AISTATS 2021.
    """
    z, v, mask = numerics.prepare("hinge_ranking", student, teacher, where)
    check_count("hinge_ranking", "k", k)
    classes = z.shape[-1]
    if not 1 <= k <= classes:
        fail(
            "hinge_ranking",
            "k",
            f"lie in [1, {classes}], the number of classes",
            k,
            "Use k=1 to rank the teacher's first choice before all others.",
        )
    check_between("hinge_ranking", "margin", margin, 0, float("inf"))
    gap = numerics.between_as(z.dtype, margin, 0)
    zero = jnp.zeros((), z.dtype)
    v_top, ids = jax.lax.top_k(v, k)
    z_top = jnp.take_along_axis(z, ids, axis=-1)
    lower, higher = z[..., None, :], z_top[..., :, None]
    known = ~(numerics.is_zero(z) & numerics.is_zero(v))
    pairs = (v[..., None, :] < v_top[..., :, None]) & known[..., None, :]
    lacks = gap - (numerics.floored(higher) - numerics.floored(lower))
    # A select and not a maximum, whose slope at the corner is one half.
    hinges = jnp.where(pairs & (lacks > 0), lacks, zero)
    count = jnp.maximum(jnp.sum(pairs, axis=(-2, -1)), 1).astype(z.dtype)
    values = jnp.sum(hinges, axis=(-2, -1)) / count
    ruled_out = pairs & numerics.is_zero(higher) & ~numerics.is_zero(lower)
    infinite = jnp.any(ruled_out, axis=(-2, -1))
    values += jnp.where(infinite, jnp.inf, 0.0).astype(z.dtype)
    values = numerics.nan_with(values, margin, gap, z)
    return numerics.zero_masked(values, mask)
