"""What a divergence compares: all classes, or those that a sparse teacher knows.

A sparse teacher knows k classes and the mass of the others, so both distributions are
seen through k + 1 categories; the divergences do not know the difference. The dense
[.., classes] form of a sparse teacher is never made.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distilljax._checks import (
    check_logits,
    check_temperature,
    check_where,
    fail,
    is_static,
)
from distilljax.losses import _numerics as numerics
from distilljax.losses._sparse import SampledLogits, SparseLogits
from distilljax.typing import Scalar

Pair = tuple[Float[Array, "*b c"], Float[Array, "*b c"], Bool[Array, "*b"] | None]


def categories(
    function: str,
    student: Array,
    teacher: Any,
    temperature: Scalar,
    where: Array | None,
) -> Pair:
    """``log q, log p, mask`` over the classes that the teacher tells apart.

    These are all classes for dense logits, and for `SparseLogits` its k classes, in its
    order, and the tail bucket, last.
    """
    if isinstance(teacher, SampledLogits):
        fail(
            function,
            "teacher",
            "be logits or SparseLogits",
            "SampledLogits",
            "A sample estimates forward_kl and soft_cross_entropy without bias, and no "
            "other divergence.",
            TypeError,
        )
    if not isinstance(teacher, SparseLogits):
        return numerics.log_probs(function, student, teacher, temperature, where)
    z, mask = _prepare(function, student, temperature, where)
    _check_slots(function, z, {"ids": teacher.ids, "log_probs": teacher.log_probs})
    _check_tail(function, z, teacher)
    dtype = numerics.compute_dtype(z, teacher.log_probs, teacher.log_tail)
    z = z.astype(dtype)
    # A masked position has everything in its tail: a number, whatever stands there.
    log_probs = _fixed(teacher.log_probs, mask, -jnp.inf, dtype)
    log_tail = _fixed(teacher.log_tail, mask, 0.0, dtype)
    temperature, log_tail = _on_grid(
        function, teacher.temperatures, log_tail, temperature
    )
    z, at_ids, ids = _gather(z / temperature, teacher.ids, ~numerics.is_zero(log_probs))
    rest = numerics.log_sum_exp(numerics.without(z, ids))
    log_q, log_p = bucketed(at_ids, rest, log_probs / temperature, log_tail)
    return log_q, log_p, mask


def bucketed(
    student_at_ids: Float[Array, "*b k"],
    student_rest: Float[Array, "*b"],
    teacher_at_ids: Float[Array, "*b k"],
    teacher_rest: Float[Array, "*b"],
) -> tuple[Float[Array, "*b k+1"], Float[Array, "*b k+1"]]:
    """``log q, log p`` of k classes and the tail bucket, all of it tempered already.

    This is all that a divergence needs of a student whose logits are seen in chunks:
    those at the ids, and the log-sum-exp of the *others*, which adds up over chunks of
    `numerics.without`. From the log-sum-exp of all classes the tail would be a
    difference, 1 - sum of q: in float32 it loses a tail of 1e-4 to three digits, and
    one of 1e-8 altogether.

    Args:
      student_at_ids: Logits / T, -inf in unused slots; gets the gradient.
      student_rest: log-sum-exp of logits / T over the other classes; gets the gradient.
      teacher_at_ids: log p / T, -inf in unused slots.
      teacher_rest: log of the sum of p^(1/T) over the other classes.
    """
    student = jnp.concatenate([student_at_ids, student_rest[..., None]], axis=-1)
    teacher = jnp.concatenate([teacher_at_ids, teacher_rest[..., None]], axis=-1)
    return jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)


def sampled(
    function: str,
    student: Array,
    teacher: SampledLogits,
    temperature: Scalar,
    where: Array | None,
) -> Pair:
    """``log q`` at the drawn classes, the logs of their weights, and the mask."""
    z, mask = _prepare(function, student, temperature, where)
    weights = teacher.log_weights
    _check_slots(function, z, {"ids": teacher.ids, "log_weights": weights})
    if is_static(temperature) and float(temperature) != 1:
        fail(
            function,
            "temperature",
            "be 1 where the teacher is a sample of classes",
            temperature,
            "A sample cannot be tempered: keep SparseLogits for that.",
        )
    dtype = numerics.compute_dtype(z, weights)
    temperature = jnp.asarray(temperature).astype(dtype)
    z = z.astype(dtype) * numerics.poison(temperature == 1, dtype)
    log_weights = _fixed(weights, mask, -jnp.inf, dtype)
    used = ~numerics.is_zero(log_weights)
    z, at_ids, _ = _gather(z, teacher.ids, used)
    total = jnp.where(used, numerics.log_sum_exp(z)[..., None], jnp.zeros((), dtype))
    return at_ids - total, log_weights, mask


def _prepare(
    function: str, student: Array, temperature: Scalar, where: Array | None
) -> tuple[Float[Array, "*b c"], Bool[Array, "*b"] | None]:
    """The student's checked logits in the compute dtype, masked rows at zero."""
    check_logits(function, student=student)
    check_where(function, where, jnp.shape(student)[:-1])
    check_temperature(function, temperature)
    mask = numerics.as_mask(where)
    student = jnp.asarray(student).astype(numerics.compute_dtype(student))
    return numerics.zero_masked(student, mask, trailing=1), mask


def _fixed(
    x: Any, mask: Bool[Array, "*b"] | None, masked: float, dtype: Any
) -> Float[Array, "*b k"]:
    """A part of the teacher: no gradient, and ``masked`` where the mask is false."""
    x = jax.lax.stop_gradient(jnp.asarray(x).astype(dtype))
    return (
        x if mask is None else jnp.where(mask[..., None], x, jnp.asarray(masked, dtype))
    )


def _gather(
    z: Float[Array, "*b c"], ids: Any, used: Bool[Array, "*b k"]
) -> tuple[Float[Array, "*b c"], Float[Array, "*b k"], Array]:
    """The logits, those at the used ids, and these ids, out of range where unused.

    A used id that is out of range makes all logits of its position nan.
    """
    ids, valid = numerics.index_in(jnp.asarray(ids), z.shape[-1])
    z = z * numerics.poison(jnp.all(valid | ~used, axis=-1), z.dtype)[..., None]
    ids = ids.astype(jnp.int32)  # in range now; unsigned ones could not be -1
    at_ids = jnp.take_along_axis(z, ids, axis=-1)
    at_ids = jnp.where(used, at_ids, jnp.asarray(-jnp.inf, z.dtype))
    return z, at_ids, jnp.where(used, ids, jnp.full_like(ids, -1))


def _on_grid(
    function: str,
    grid: tuple[float, ...],
    log_tail: Float[Array, "*b g"],
    temperature: Scalar,
) -> tuple[Float[Array, ""], Float[Array, "*b"]]:
    """The temperature, nan if it is traced and not in the grid, and the tail there."""
    if is_static(temperature):
        known = float(temperature)
        nearest = min(range(len(grid)), key=lambda g: abs(grid[g] - known))
        if abs(grid[nearest] - known) > 1e-6 * known:
            fail(
                function,
                "temperature",
                f"be one of those whose tail the teacher has, {grid}",
                temperature,
                "A tempered tail cannot be had from another one: make the signal with "
                "every temperature, SparseLogits.top_k(logits, k, (1.0, 2.0)) or "
                "distilljax cache --temperatures 1,2.",
            )
        return jnp.asarray(temperature).astype(log_tail.dtype), log_tail[..., nearest]
    traced = jnp.asarray(temperature).astype(log_tail.dtype)
    points = jnp.asarray(grid).astype(log_tail.dtype)
    distances = jnp.abs(points - traced)
    nearest = jnp.argmin(distances)
    found = distances[nearest] <= 1e-6 * points[nearest]
    tail = jnp.take(log_tail, nearest, axis=-1)
    return traced * numerics.poison(found, traced.dtype), tail


def _check_slots(function: str, z: Array, parts: dict[str, Any]) -> None:
    """ids are integers and weights floating point, of one shape [*batch, k]."""
    shape = jnp.shape(parts["ids"])
    for name, part in parts.items():
        kind = jnp.integer if name == "ids" else jnp.floating
        if not jnp.issubdtype(jnp.result_type(part), kind):
            word = "integer class indices" if name == "ids" else "floating point"
            remedy = "Check the order in which the fields were given."
            found = jnp.result_type(part)
            fail(function, f"teacher.{name}", f"be {word}", found, remedy, TypeError)
        if jnp.shape(part) != shape or shape[:-1] != z.shape[:-1] or not shape:
            fail(
                function,
                f"teacher.{name}",
                f"have the leading axes of student, {z.shape[:-1]}, and one of slots",
                jnp.shape(part),
                "ids and what belongs to them have one shape, [*batch, slots]; check "
                "that both models saw the same batch.",
            )


def _check_tail(function: str, z: Array, teacher: SparseLogits) -> None:
    """No more classes than the student has, and a tail for each temperature."""
    if jnp.shape(teacher.ids)[-1] > z.shape[-1]:
        fail(
            function,
            "teacher.ids",
            f"name at most the {z.shape[-1]} classes of student",
            f"{jnp.shape(teacher.ids)[-1]} slots",
            "Check that both models were made for the same classes.",
        )
    expected = (*z.shape[:-1], len(teacher.temperatures))
    if jnp.shape(teacher.log_tail) != expected:
        fail(
            function,
            "teacher.log_tail",
            f"have the shape {expected}, with a column for each temperature",
            jnp.shape(teacher.log_tail),
            f"The grid is {teacher.temperatures}.",
        )
