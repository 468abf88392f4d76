"""Forward and reverse KL, weighed by where teacher and student differ."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_between
from distilljax.losses import _numerics as numerics
from distilljax.losses._categories import categories
from distilljax.losses._heads import accepts_heads
from distilljax.losses._sparse import Teacher
from distilljax.typing import Scalar


@accepts_heads
def adaptive_kl(
    student: Float[Array, "*batch classes"],
    teacher: Teacher,
    *,
    mu: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Weighted sum of forward and reverse KL at each position, in nats.

    adaptive_kl = w KL(p || q) + (1 - w) KL(q || p)
    w = sum over the head of |p - q| / sum over all classes of |p - q|
    p = softmax(teacher / T), q = softmax(student / T)

    The head are the teacher's likeliest classes, as many as have together at most the
    probability mu, and the likeliest one in any case. The forward KL is quick to fit
    the head, the reverse KL the tail: each gets the weight of what is still to be done
    there. The weight is a constant to the gradient, which is therefore
    w (q - p) / T + (1 - w) q (log(q / p) - KL(q || p)) / T.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape, or `SparseLogits` of it; gets none. There the
        tail bucket counts as one class, whether it falls into the head or not.
      mu: Probability of the head, in [0, 1]; may be traced. Gets no gradient.
      temperature: T > 0, divides both; may be traced.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is). +inf where either KL is and has a
      weight.

    Numerics: As `forward_kl`; sorts the classes. At p = q the weight is 1/2.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> student = jnp.log(jnp.array([0.25, 0.25, 0.5]))    # w = .25 / .5
      >>> round(float(adaptive_kl(student, teacher)), 4)     # both KL are .25 log 2
      0.1733

    Reference: Wu, Tao, Wang, Yang, Zhao, Wong, "Rethinking Kullback-Leibler Divergence
    in Knowledge Distillation for Large Language Models", COLING 2025, arXiv 2404.02657.
    """
    log_q, log_p, mask = categories("adaptive_kl", student, teacher, temperature, where)
    check_between("adaptive_kl", "mu", mu, 0, 1)
    # Sorted by logs: equal logs have equal probabilities, but exp may round unequally.
    order = jnp.argsort(log_p, axis=-1, descending=True, stable=True)
    p, q = jnp.exp(log_p), jax.lax.stop_gradient(jnp.exp(log_q))
    gaps = jnp.take_along_axis(jnp.abs(p - q), order, axis=-1)
    mass = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1)
    most = jax.lax.stop_gradient(numerics.between_as(mass.dtype, mu, 0, 1))
    head = (mass <= most).at[..., 0].set(True)
    of_head = jnp.sum(jnp.where(head, gaps, jnp.zeros_like(gaps)), axis=-1)
    of_all = jnp.sum(gaps, axis=-1)
    safe = jnp.where(of_all > 0, of_all, jnp.ones_like(of_all))
    weight = jnp.where(of_all > 0, of_head / safe, jnp.full_like(of_all, 0.5))
    values = _times(weight, numerics.kl(log_p, log_q))
    values += _times(1 - weight, numerics.kl(log_q, log_p))
    values = numerics.nan_with(values, mu, most, log_q)
    return numerics.zero_masked(values, mask)


def _times(weight: Float[Array, "*b"], kl: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """A product that is 0 where the weight is, also if the divergence is infinite."""
    return jnp.where(weight > 0, weight * kl, jnp.zeros_like(kl))
