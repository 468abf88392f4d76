"""The arithmetic under every divergence: masks, precision, and sums that do not cancel.

Three things go wrong in a divergence written straight from its formula: a KL near zero
is a difference of large numbers, a class of probability zero makes 0 * inf, and a mask
that multiplies keeps nan. Each is dealt with here, once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from distilljax._checks import check_logits, check_temperature, check_where, is_static
from distilljax.typing import Scalar

# Stands for log 0 in a difference of logs. Far below the log of any positive float64
# (-745), so that no probability changes; far above -inf, so that nothing becomes nan.
_LOG_ZERO = -1e4


def compute_dtype(*arrays: Any) -> Any:
    """float32, or float64 where an input has it (which needs x64 to be enabled)."""
    wide = any(jnp.result_type(array) == jnp.float64 for array in arrays)
    return jnp.float64 if wide else jnp.float32


def as_mask(where: Array | None) -> Bool[Array, "..."] | None:
    """What is not zero counts."""
    return None if where is None else jnp.asarray(where).astype(bool)


def zero_masked(
    x: Float[Array, "..."], mask: Bool[Array, "..."] | None, trailing: int = 0
) -> Float[Array, "..."]:
    """``x`` with zeros where the mask is false, and gradient exactly zero there.

    Done to the logits before any arithmetic, and to the values after it: a select, not
    a product, because 0 * nan is nan. ``trailing`` counts the axes that only x has.
    """
    if mask is None:
        return x
    mask = jnp.expand_dims(mask, range(mask.ndim, mask.ndim + trailing))
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def prepare(
    function: str, student: Array, teacher: Any, where: Array | None
) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"], Bool[Array, "*b"] | None]:
    """Checked logits in the compute dtype, masked rows at zero, the teacher fixed."""
    check_logits(function, student=student, teacher=teacher)
    check_where(function, where, jnp.shape(student)[:-1])
    dtype = compute_dtype(student, teacher)
    mask = as_mask(where)
    student = zero_masked(jnp.asarray(student).astype(dtype), mask, trailing=1)
    teacher = zero_masked(jnp.asarray(teacher).astype(dtype), mask, trailing=1)
    return student, jax.lax.stop_gradient(teacher), mask


def log_probs(
    function: str,
    student: Array,
    teacher: Any,
    temperature: Scalar,
    where: Array | None,
) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"], Bool[Array, "*b"] | None]:
    """``log q, log p, mask`` of student and teacher, both at the same temperature."""
    student, teacher, mask = prepare(function, student, teacher, where)
    check_temperature(function, temperature)
    temperature = positive_as(student.dtype, temperature)
    log_q = jax.nn.log_softmax(student / temperature)
    log_p = jax.nn.log_softmax(teacher / temperature)
    return log_q, log_p, mask


def positive_as(dtype: Any, value: Scalar) -> Float[Array, ""]:
    """A checked scalar; a traced one that is not positive and finite becomes nan.

    A schedule that leaves its domain must stop the run, and not train on something.
    """
    value = jnp.asarray(value).astype(dtype)
    return value * poison((value > 0) & (value < jnp.inf), dtype)


def between_as(
    dtype: Any, value: Scalar, low: float, high: float = math.inf
) -> Float[Array, ""]:
    """A checked scalar; a traced one that is not in ``[low, high]`` becomes nan."""
    value = jnp.asarray(value).astype(dtype)
    return value * poison((value >= low) & (value <= high), dtype)


def nan_with(
    values: Float[Array, "*b"],
    given: Scalar,
    scalar: Float[Array, ""],
    student: Float[Array, "*b c"],
) -> Float[Array, "*b"]:
    """The values; nan, in the student's gradient too, where a traced scalar is.

    For scalars that are compared with something, which would swallow the nan. ``given``
    is the scalar as it came: one that was known then has been checked.
    """
    if is_static(given):
        return values
    factor = jnp.where(jnp.isnan(scalar), jnp.nan, 0.0).astype(values.dtype)
    return values + factor * jnp.sum(floored(student), axis=-1)


def is_zero(log_a: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Which classes are impossible: -inf, and not merely too small for exp."""
    return jnp.isneginf(log_a)


def floored(log_a: Float[Array, "..."]) -> Float[Array, "..."]:
    """``log_a`` with a very negative number for -inf."""
    return jnp.where(is_zero(log_a), jnp.asarray(_LOG_ZERO, log_a.dtype), log_a)


def log_ratio(
    log_a: Float[Array, "*b c"], log_b: Float[Array, "*b c"]
) -> Float[Array, "*b c"]:
    """log(a / b): 0 where both are zero, very large but finite where one is."""
    return floored(log_a) - floored(log_b)


def infinite_if_missing(
    log_a: Float[Array, "*b c"], log_b: Float[Array, "*b c"]
) -> Float[Array, "*b"]:
    """+inf where b rules out a class that a does not, else 0; to be added to a sum.

    Added, and not selected, so that the gradient is the one that the floor gives:
    finite, and pointing the right way.
    """
    missing = jnp.any(is_zero(log_b) & ~is_zero(log_a), axis=-1)
    return jnp.where(missing, jnp.inf, 0.0).astype(log_a.dtype)


def bregman_sum(
    a: Float[Array, "*b c"], b: Float[Array, "*b c"], gap: Float[Array, "*b c"]
) -> Float[Array, "*b"]:
    """Sum over classes of a gap - a + b, where gap = log(a / b).

    This is KL(a || b), because a and b each sum to 1. Unlike the terms of sum a gap,
    which are of both signs and cancel, each of these terms is at least 0 and vanishes
    to second order in the gap; so a rounding error in the gap, or in the sums to 1,
    costs only its product with the gap. Where the gap is small, gap + exp(-gap) - 1 is
    its series: nearly equal numbers are never subtracted.
    """
    return jnp.sum(bregman_terms(a, b, gap), axis=-1)


def bregman_terms(
    a: Float[Array, "*b c"], b: Float[Array, "*b c"], gap: Float[Array, "*b c"]
) -> Float[Array, "*b c"]:
    """The terms of `bregman_sum`."""
    near = jnp.abs(gap) < 0.5
    # Both branches are differentiated: the one not taken must stay finite.
    small = jnp.where(near, gap, jnp.zeros((), gap.dtype))
    return jnp.where(near, a * _exp_remainder(small), a * gap - a + b)


def _exp_remainder(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + exp(-x) - 1 for abs(x) <= 1/2, to full precision: x^2/2 - x^3/6 + ..."""
    # The first term left out is below eps / 32 of the first one kept.
    num_terms = 8 if x.dtype == jnp.float32 else 14
    total = jnp.zeros((), x.dtype)
    for k in reversed(range(2, num_terms + 2)):
        total = total * x + (-1) ** k / math.factorial(k)
    return total * x * x


def kl(log_a: Float[Array, "*b c"], log_b: Float[Array, "*b c"]) -> Float[Array, "*b"]:
    """KL(a || b), from log-probabilities; +inf where b is zero and a is not."""
    total = bregman_sum(jnp.exp(log_a), jnp.exp(log_b), log_ratio(log_a, log_b))
    return total + infinite_if_missing(log_a, log_b)


def kl_to_mixture(
    log_a: Float[Array, "*b c"], log_b: Float[Array, "*b c"], weight: Float[Array, ""]
) -> Float[Array, "*b"]:
    """KL(a || weight a + (1 - weight) b): KL(a || b) at weight 0, and 0 at weight 1.

    The log of a over the mixture is formed from r = log(a / b) alone,

        log(a / m) = -log(weight + (1 - weight) e^-r)
                   = -(log weight + softplus(log(1 - weight) - log weight - r)),

    because log a - log m, with m from logaddexp, loses it when the weight is near 1:
    it is then of size 1 - weight, under rounding errors of the size of log a.
    """
    inside = (weight > 0) & (weight < 1)
    safe = jnp.where(inside, weight, jnp.full_like(weight, 0.5))
    log_own, log_other = jnp.log(safe), jnp.log1p(-safe)
    gap = log_own + jax.nn.softplus(log_other - log_own - log_ratio(log_a, log_b))
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    mixed = bregman_sum(a, safe * a + (1 - safe) * b, -gap)
    ends = jnp.where(weight == 0, kl(log_a, log_b), jnp.zeros_like(mixed))
    return jnp.where(inside, mixed, ends)


def absolute_gap(
    log_p: Float[Array, "*b c"], log_q: Float[Array, "*b c"]
) -> Float[Array, "*b c"]:
    """|p - q|, and exactly 0, with gradient 0, where they agree to rounding.

    The compiler may round p and q differently, so p - q is noise where they should be
    equal, and its sign would be a gradient: differences within rounding are none.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    size = 1 + jnp.abs(floored(log_q))
    tie = jnp.abs(p - q) <= 8 * jnp.finfo(q.dtype).eps * size * q
    return jnp.where(tie, jnp.zeros((), q.dtype), jnp.abs(p - q))


def log_sum_exp(log_a: Float[Array, "*b c"]) -> Float[Array, "*b"]:
    """log of the sum of exp; -inf with gradient 0, and not nan, if all are -inf."""
    live = jnp.any(~is_zero(log_a), axis=-1)
    safe = jnp.where(live[..., None], log_a, jnp.zeros((), log_a.dtype))
    total = jax.nn.logsumexp(safe, axis=-1)
    return jnp.where(live, total, jnp.asarray(-jnp.inf, total.dtype))


def without(
    logits: Float[Array, "*b c"], ids: Integer[Array, "*b k"]
) -> Float[Array, "*b c"]:
    """The logits with -inf at the given classes; ids outside [0, classes) do nothing.

    So a chunk of a vocabulary may be given with ids relative to its start.
    """
    classes = logits.shape[-1]
    # A negative index would count from the end; one too large is dropped.
    ids = jnp.where((ids >= 0) & (ids < classes), ids, jnp.full_like(ids, classes))
    nothing = jnp.asarray(-jnp.inf, logits.dtype)
    return jnp.put_along_axis(logits, ids, nothing, axis=-1, inplace=False, mode="drop")


def index_in(
    ids: Integer[Array, "*b"], classes: int
) -> tuple[Integer[Array, "*b"], Bool[Array, "*b"]]:
    """An index that is safe to gather with, and whether it is the one asked for."""
    if ids.dtype.itemsize < 4:  # uint8 could not be compared with 1000 classes
        ids = ids.astype(jnp.int32)
    valid = (ids >= 0) & (ids < classes)
    return jnp.where(valid, ids, jnp.zeros_like(ids)), valid


def poison(valid: Bool[Array, "*b"], dtype: Any) -> Float[Array, "*b"]:
    """1 where valid, else nan: a factor, so that the gradient becomes nan as well.

    An update that silently ignores a bad label is worse than one that stops the run.
    """
    return jnp.where(valid, 1.0, jnp.nan).astype(dtype)
