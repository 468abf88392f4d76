"""The alpha-beta divergences: forward KL, reverse KL, squared distance and between."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from distilljax._checks import check_finite
from distilljax.losses import _numerics as numerics
from distilljax.losses._categories import categories
from distilljax.losses._heads import accepts_heads
from distilljax.losses._sparse import Teacher
from distilljax.typing import Scalar

# Stands for log 0 here: powers of 1e-6 of it are still 0.
_LOG_ZERO = -1e9


@accepts_heads
def alpha_beta(
    student: Float[Array, "*batch classes"],
    teacher: Teacher,
    *,
    teacher_power: Scalar = 0.2,
    student_power: Scalar = 0.7,
    temperature: Scalar = 1.0,
    where: Shaped[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Alpha-beta divergence of teacher p and student q at each position.

    alpha_beta = -1 / (a b) sum over classes of
                 p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)
    a = teacher_power, b = student_power (alpha and beta of the paper: exponents, no
    weights), p = softmax(teacher / T), q = softmax(student / T)

    a and b choose what counts: (1, 0) is the forward KL, (0, 1) the reverse KL, (1, 1)
    half the squared distance of p and q, and (1/2, 1/2) four times their squared
    Hellinger distance. A large a looks at the classes in which the teacher believes, a
    large b at those in which the student does. With g = -(p^a q^(b-1) - q^(a+b-1)) / a
    its gradient is q (g - sum of q g) / T.

    Args:
      student: Logits [*batch, classes] of any floating dtype; gets the gradient.
      teacher: Logits of the same shape, or `SparseLogits` of it; gets none.
      teacher_power: a, any finite number, also 0 or -b; may be traced. No gradient.
      student_power: b, any finite number, also 0 or -a; may be traced. No gradient.
      temperature: T > 0, divides both; may be traced.
      where: Mask [*batch]; where it is false the value and the gradient are exactly 0,
        whatever the logits. None counts every position.

    Returns:
      [*batch], float32 (float64 if an input is). +inf where one side alone rules a
      class out, unless the powers are all positive.

    Numerics: Computed in float32 whatever the inputs, as a sum of (log p - log q)^2
    times the second divided difference of exp between (a + b) log q, a log p + b log q
    and (a + b) log p: terms that are not negative, with one formula for all powers, so
    that the limits at a = 0, b = 0 and a + b = 0 are those of the mathematics. The
    gradient is the closed form.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([0.5, 0.5]))
      >>> student = jnp.log(jnp.array([0.2, 0.8]))
      >>> half = alpha_beta(student, teacher, teacher_power=1, student_power=1)
      >>> round(float(half), 4)                               # (.3^2 + .3^2) / 2
      0.09

    Reference: Wang, Yang, Wang, Wang, Xu, Huang, "ABKD: Pursuing a Proper Allocation of
    the Probability Mass in Knowledge Distillation via alpha-beta-Divergence", ICML
    2025, arXiv 2505.04560; the divergence and its limits are those of Cichocki, Cruces,
    Amari, "Generalized Alpha-Beta Divergences and Their Application to Robust
    Nonnegative Matrix Factorization", Entropy 13, 2011.
    """
    log_q, log_p, mask = categories("alpha_beta", student, teacher, temperature, where)
    check_finite("alpha_beta", "teacher_power", teacher_power)
    check_finite("alpha_beta", "student_power", student_power)
    a, b = (
        jax.lax.stop_gradient(jnp.asarray(power).astype(log_q.dtype))
        for power in (teacher_power, student_power)
    )
    no_p, no_q = numerics.is_zero(log_p), numerics.is_zero(log_q)
    one_sided = no_p ^ no_q
    # What a class that one side rules out costs: a multiple of the other side's power,
    # unless that diverges. Then it is left out of the sum, and inf is added.
    diverges = (no_p & ((a <= 0) | (a + b <= 0))) | (no_q & ((b <= 0) | (a + b <= 0)))
    infinite = jnp.any(one_sided & diverges, axis=-1)
    absent = (no_p & no_q) | (one_sided & (a + b <= 0))
    floor = jnp.asarray(_LOG_ZERO, log_q.dtype)
    zero = jnp.zeros_like(log_q)
    x = jnp.where(absent, zero, jnp.where(no_p, floor, log_p))
    y = jnp.where(absent, zero, jnp.where(no_q, floor, log_q))
    values = jnp.sum(_terms(x, y, a, b), axis=-1)
    values += jnp.where(infinite, jnp.inf, 0.0).astype(values.dtype)
    return numerics.zero_masked(values, mask)


@jax.custom_jvp
def _terms(
    x: Float[Array, "*b c"],
    y: Float[Array, "*b c"],
    a: Float[Array, ""],
    b: Float[Array, ""],
) -> Float[Array, "*b c"]:
    """The terms of the sum from x = log p, y = log q; differentiable in y."""
    gap = x - y
    highest = jnp.maximum(jnp.maximum((a + b) * y, a * x + b * y), (a + b) * x)
    # Nodes relative to one of them: these differences keep their digits.
    return gap**2 * jnp.exp(highest) * _second_difference(a * gap, (a + b) * gap)


@_terms.defjvp
def _terms_jvp(primals, tangents):
    x, y, a, b = primals
    gap = x - y
    highest = jnp.maximum((a + b) * y, a * x + b * y)
    slope = -gap * jnp.exp(highest) * _first_difference(-jnp.abs(a * gap))
    return _terms(x, y, a, b), slope * tangents[1]


def _first_difference(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """(exp(t) - 1) / t, and 1 at 0."""
    safe = jnp.where(t == 0, jnp.ones_like(t), t)
    return jnp.where(t == 0, jnp.ones_like(t), jnp.expm1(safe) / safe)


def _second_difference(
    first: Float[Array, "..."], second: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Second divided difference of exp at 0, first, second, over exp of the largest.

    The difference of two first divided differences, over the distance of the outer
    nodes; where these are near to each other, the power series of it instead, in which
    nothing cancels: sum over n of h_n / (n + 2)!, with h_n the complete homogeneous
    polynomial of degree n in the two lower nodes, the largest being 0.
    """
    zero = jnp.zeros_like(first)
    top = jnp.maximum(jnp.maximum(first, second), zero)
    low = jnp.minimum(jnp.minimum(first, second), zero) - top
    between = jnp.minimum(jnp.maximum(first, second), zero)
    middle = jnp.maximum(jnp.minimum(first, second), between) - top
    near = low > -1
    far_low = jnp.where(near, -jnp.ones_like(low), low)
    upper = _first_difference(middle)
    lower = jnp.exp(middle) * _first_difference(jnp.minimum(far_low - middle, zero))
    far = (upper - lower) / -far_low

    low, middle = jnp.where(near, low, zero), jnp.where(near, middle, zero)
    # The first term left out is at most (n + 1) / (n + 2)!; the sum is at least .26.
    last = 18 if low.dtype == jnp.float64 else 10
    series = jnp.full_like(low, 0.5)
    polynomial = power = jnp.ones_like(low)
    factorial = 2.0
    for n in range(1, last):
        power = power * middle
        polynomial = low * polynomial + power
        factorial *= n + 2
        series += polynomial / factorial
    return jnp.where(near, series, far)
