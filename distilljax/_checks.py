"""Errors that name the function, the argument, the rule, the value and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def fail(
    function: str,
    argument: str,
    rule: str,
    got: Any,
    remedy: str,
    kind: type[Exception] = ValueError,
) -> NoReturn:
    """Raise ``{function}: {argument} must {rule}, got {value}. {remedy}``."""
    raise kind(f"{function}: {argument} must {rule}, got {got}. {remedy}")


def is_static(x: Any) -> bool:
    """True if the value of ``x`` is known now, outside any trace."""
    return not isinstance(x, Tracer)


def check_logits(function: str, **arrays: Any) -> None:
    """Every array is floating point and has a class axis, and all shapes are equal.

    Student and teacher never broadcast: a teacher of another shape is a mistake in the
    data or in the models, and would silently give a loss of another size.
    """
    (name, first), *others = arrays.items()
    for argument, array in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            fail(
                function,
                argument,
                "be a floating-point array of logits",
                jnp.result_type(array),
                "Pass the logits, not labels or token ids.",
                TypeError,
            )
        if jnp.ndim(array) == 0:
            fail(
                function,
                argument,
                "have a last axis of classes",
                "a scalar",
                "Pass an array of shape [..., classes].",
            )
        if jnp.shape(array)[-1] == 0:
            fail(
                function,
                argument,
                "have at least one class",
                jnp.shape(array),
                "Check the slice that made the last axis empty.",
            )
    shape = jnp.shape(first)
    for argument, array in others:
        other = jnp.shape(array)
        if other == shape:
            continue
        if other[:-1] == shape[:-1]:
            remedy = (
                f"The last axes (classes) differ: {shape[-1]} and {other[-1]}. Slice "
                "the padded side to the classes that both know, or check that both "
                "models were made for the same classes."
            )
        else:
            remedy = (
                "The leading axes differ: check that both models saw the same batch, "
                "and that neither drops or adds positions."
            )
        fail(function, argument, f"have the shape of {name}, {shape}", other, remedy)


def check_labels(function: str, labels: Any, shape: tuple[int, ...]) -> None:
    """Labels are class indices, one for each position."""
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        fail(
            function,
            "labels",
            "be integer class indices",
            jnp.result_type(labels),
            "Use soft_cross_entropy for distributions; for a teacher's logits pass "
            "jnp.argmax(logits, axis=-1).",
            TypeError,
        )
    if jnp.shape(labels) != shape:
        fail(
            function,
            "labels",
            f"have the shape of logits without the class axis, {shape}",
            jnp.shape(labels),
            "One integer belongs to each position; turn one-hot rows into indices with "
            "jnp.argmax(labels, axis=-1).",
        )


def check_where(function: str, where: Any, shape: tuple[int, ...]) -> None:
    """A mask has exactly the shape of the result; what is not zero counts."""
    if where is None:
        return
    if jnp.shape(where) != shape:
        fail(
            function,
            "where",
            f"have the shape of the result, {shape}",
            jnp.shape(where),
            "One mask value belongs to each position, without the class axis.",
        )


def check_features(
    function: str, student: Any, teacher: Any, shapes: Mapping[int, str]
) -> None:
    """Both are floating point, of one of the ranks in ``shapes``, and not empty.

    ``shapes`` says what the axes of each rank are, for the message.
    """
    for argument, array in (("student", student), ("teacher", teacher)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            fail(
                function,
                argument,
                "be a floating-point array of features",
                jnp.result_type(array),
                "Pass hidden states or embeddings, not labels or token ids.",
                TypeError,
            )
        if jnp.ndim(array) not in shapes or 0 in jnp.shape(array):
            fail(
                function,
                argument,
                f"have the shape {' or '.join(shapes.values())}, and no empty axis",
                jnp.shape(array),
                "Flatten or pool the other axes, and check the slice of an empty one.",
            )


def check_points(
    function: str, student: Any, teacher: Any, where: Any, images: bool = False
) -> None:
    """Features of the same points, one mask value for each; widths may differ.

    Points are the rows of [batch, width] or [batch, time, width], or, with ``images``,
    the examples of [batch, height, width, channels].
    """
    shapes = {2: "[batch, width]", 3: "[batch, time, width]"}
    if images:
        shapes[4] = "[batch, height, width, channels]"
    check_features(function, student, teacher, shapes)
    shape, other = jnp.shape(student), jnp.shape(teacher)
    lead = 1 if len(shape) == 4 else len(shape) - 1
    if len(shape) != len(other) or shape[:lead] != other[:lead]:
        fail(
            function,
            "teacher",
            f"hold the points of student, {shape}, of any width",
            other,
            "The leading axes differ: check that both models saw the same batch, and "
            "that neither drops or adds positions.",
        )
    if where is not None and jnp.shape(where) != shape[:lead]:
        fail(
            function,
            "where",
            f"have the shape of the points, {shape[:lead]}",
            jnp.shape(where),
            "One mask value belongs to each point, without its features.",
        )


def check_scalar(function: str, argument: str, value: Any) -> None:
    """One number, not an array of them."""
    if jnp.ndim(value) != 0:
        fail(
            function,
            argument,
            "be a scalar",
            f"an array of shape {jnp.shape(value)}",
            "Call the function once for each value, or map over both with jax.vmap.",
        )


def check_between(
    function: str, argument: str, value: Any, low: float, high: float
) -> None:
    """A scalar in ``[low, high]``; the value of a traced one is not known yet."""
    check_scalar(function, argument, value)
    # np.asarray, because jnp comparisons would be staged out inside a trace.
    if is_static(value) and not low <= np.asarray(value) <= high:
        fail(
            function,
            argument,
            f"lie in [{low:g}, {high:g}]",
            value,
            "Check the value in the config or the call.",
        )


def check_temperature(function: str, temperature: Any) -> None:
    """A positive, finite scalar; the value of a traced one is not known yet."""
    check_scalar(function, "temperature", temperature)
    if is_static(temperature) and not 0 < np.asarray(temperature) < np.inf:
        fail(
            function,
            "temperature",
            "be positive and finite",
            temperature,
            "Use 1 for the models' own distributions, larger for softer ones.",
        )
