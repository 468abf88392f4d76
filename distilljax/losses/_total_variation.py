"""Total variation distance."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax.losses import _numerics as numerics
from distilljax.losses._categories import categories
from distilljax.losses._heads import accepts_heads
from distilljax.losses._sparse import Teacher
from distilljax.typing import Scalar


@accepts_heads
def total_variation(
    student: Float[Array, "*batch classes"],
    teacher: Teacher,
    *,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Total variation distance at each position, a probability in [0, 1].

    total_variation = 1/2 sum over classes of |p - q|
    p = softmax(teacher / T), q = softmax(student / T)

    The largest difference that any event can have under the two, and one minus the
    rate at which speculative decoding accepts the student's draft. Its gradient is
    q (g - sum of q g) / T with g = sign(q - p) / 2: small where the student is certain,
    and of the same size however close p and q are.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape, or `SparseLogits` of it; gets none.
      temperature: T > 0, divides both; may be traced.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is).

    Numerics: Computed in float32 whatever the inputs. At the kink, where p and q agree
    to rounding, the gradient is 0. A class at -inf on both sides counts 0.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([0.5, 0.5]))
      >>> student = jnp.log(jnp.array([0.2, 0.8]))
      >>> round(float(total_variation(student, teacher)), 4)
      0.3

    Reference: Wen, Li, Du, Mou, "f-Divergence Minimization for Sequence-Level Knowledge
    Distillation", ACL 2023, arXiv 2307.15190, section 3.
    """
    log_q, log_p, mask = categories(
        "total_variation", student, teacher, temperature, where
    )
    gaps = numerics.absolute_gap(log_p, log_q)
    return numerics.zero_masked(0.5 * jnp.sum(gaps, axis=-1), mask)
