"""Divergences against a mixture of teacher and student, which are always finite."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_between
from distilljax.losses import _numerics as numerics
from distilljax.losses._categories import categories
from distilljax.losses._heads import accepts_heads
from distilljax.losses._sparse import Teacher
from distilljax.typing import Scalar


@accepts_heads
def jensen_shannon(
    student: Float[Array, "*batch classes"],
    teacher: Teacher,
    *,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
    normalized: bool = False,
) -> Float[Array, "*batch"]:
    """Generalised Jensen-Shannon divergence at each position, in nats.

    jensen_shannon = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    p = softmax(teacher / T), q = softmax(student / T)

    beta is the weight of the *teacher* in the mixture. Its gradient is
    (1 - beta) q (log(q / m) - KL(q || m)) / T. It is bounded by the entropy of a coin
    with bias beta, and is exactly 0 at beta 0 and 1: a sweep of beta towards the ends
    turns the distillation off. ``normalized=True`` divides by beta (1 - beta), so that
    all beta have comparable gradients; the limits are the forward KL at beta 0 and the
    reverse KL at beta 1, and those are what it returns there.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape, or `SparseLogits` of it; gets none.
      beta: Weight of the teacher in the mixture, in [0, 1]; may be traced.
      temperature: T > 0, divides both; may be traced.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.
      normalized: Divide by beta (1 - beta).

    Returns:
      [*batch], float32 (float64 if an input is).

    Numerics: Computed in float32 whatever the inputs; value and gradient keep their
    relative accuracy as beta tends to 0 or 1. A class at -inf on both sides counts 0.

    Example:
      >>> import jax.numpy as jnp
      >>> certain = jnp.array([0.0, -jnp.inf])            # they share no class
      >>> round(float(jensen_shannon(certain, certain[::-1])), 4)         # log 2
      0.6931

    Reference: Agarwal et al., "On-Policy Distillation of Language Models: Learning from
    Self-Generated Mistakes", ICLR 2024, arXiv 2306.13649, section 2.
    """
    log_q, log_p, mask = categories(
        "jensen_shannon", student, teacher, temperature, where
    )
    check_between("jensen_shannon", "beta", beta, 0, 1)
    weight = numerics.between_as(log_q.dtype, beta, 0, 1)
    teacher_kl = numerics.kl_to_mixture(log_p, log_q, weight)
    student_kl = numerics.kl_to_mixture(log_q, log_p, 1 - weight)
    one, zero = jnp.ones_like(weight), jnp.zeros_like(teacher_kl)
    if normalized:
        # 0 / 0 at one end each, where the limit of the quotient is 0.
        teacher_part = teacher_kl / jnp.where(weight == 1, one, 1 - weight)
        student_part = student_kl / jnp.where(weight == 0, one, weight)
        values = teacher_part + student_part
    else:
        inside = (weight > 0) & (weight < 1)  # at the ends a KL may be inf, 0 * inf nan
        total = weight * teacher_kl + (1 - weight) * student_kl
        values = jnp.where(inside, total, zero)
    values = numerics.nan_with(values, beta, weight, log_q)
    return numerics.zero_masked(values, mask)


@accepts_heads
def skew_forward_kl(
    student: Float[Array, "*batch classes"],
    teacher: Teacher,
    *,
    skew: Scalar = 0.1,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """KL(p || skew p + (1 - skew) q) at each position, in nats.

    skew_forward_kl = sum over classes of p log(p / m), m = skew p + (1 - skew) q
    p = softmax(teacher / T), q = softmax(student / T)

    The forward KL, made gentle by a share of the teacher in its reference: it is at
    most -log(skew), and its gradient stays bounded where the student gives almost no
    probability to what the teacher says. Skew 0 is `forward_kl`; skew 1 is 0.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape, or `SparseLogits` of it; gets none.
      skew: Weight of the teacher in the mixture, in [0, 1]; may be traced.
      temperature: T > 0, divides both; may be traced.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is).

    Numerics: As `jensen_shannon`. The value at p = q is 0 (it is no cross-entropy).

    Example:
      >>> import jax.numpy as jnp
      >>> certain = jnp.array([0.0, -jnp.inf])            # they share no class
      >>> round(float(skew_forward_kl(certain, certain[::-1])), 4)      # -log(0.1)
      2.3026

    Reference: Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large
    Language Models", ICML 2024, arXiv 2402.03898, section 3.1.
    """
    log_q, log_p, mask = categories(
        "skew_forward_kl", student, teacher, temperature, where
    )
    check_between("skew_forward_kl", "skew", skew, 0, 1)
    weight = numerics.between_as(log_q.dtype, skew, 0, 1)
    values = numerics.kl_to_mixture(log_p, log_q, weight)
    values = numerics.nan_with(values, skew, weight, log_q)
    return numerics.zero_masked(values, mask)


@accepts_heads
def skew_reverse_kl(
    student: Float[Array, "*batch classes"],
    teacher: Teacher,
    *,
    skew: Scalar = 0.1,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """KL(q || (1 - skew) p + skew q) at each position, in nats.

    skew_reverse_kl = sum over classes of q log(q / m), m = (1 - skew) p + skew q
    p = softmax(teacher / T), q = softmax(student / T)

    The reverse KL against a reference that is mostly the *teacher*: it is at most
    -log(skew), also where the teacher rules a class out. The gradient flows through q
    in the mixture too. Skew 0 is `reverse_kl`; skew 1 is 0.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape, or `SparseLogits` of it; gets none.
      skew: Weight of the student in the mixture, in [0, 1]; may be traced.
      temperature: T > 0, divides both; may be traced.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is).

    Numerics: As `jensen_shannon`.

    Example:
      >>> import jax.numpy as jnp
      >>> certain = jnp.array([0.0, -jnp.inf])            # they share no class
      >>> round(float(skew_reverse_kl(certain, certain[::-1])), 4)      # -log(0.1)
      2.3026

    Reference: Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large
    Language Models", ICML 2024, arXiv 2402.03898, section 3.1.
    """
    log_q, log_p, mask = categories(
        "skew_reverse_kl", student, teacher, temperature, where
    )
    check_between("skew_reverse_kl", "skew", skew, 0, 1)
    weight = numerics.between_as(log_q.dtype, skew, 0, 1)
    values = numerics.kl_to_mixture(log_q, log_p, weight)
    values = numerics.nan_with(values, skew, weight, log_q)
    return numerics.zero_masked(values, mask)
