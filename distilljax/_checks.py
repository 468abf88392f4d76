"""Errors that name the function, the argument, the rule, the value and the fix."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator, Mapping
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


_OTHER_BATCH = (
    "The leading axes differ: check that both models saw the same batch, and that "
    "neither drops or adds positions."
)


def check_logits(function: str, **arrays: Any) -> None:
    """Every array is floating point and has a class axis, and all shapes are equal.

    Student and teacher never broadcast: a teacher of another shape is a mistake in the
    data or in the models, and would silently give a loss of another size.
    """
    (name, first), *others = arrays.items()
    for argument, array in arrays.items():
        if dataclasses.is_dataclass(array):
            fail(
                function,
                argument,
                "be a dense array of logits",
                type(array).__name__,
                "This loss needs all classes; divergences such as forward_kl take a "
                "sparse teacher.",
                TypeError,
            )
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
            remedy = _OTHER_BATCH
        fail(function, argument, f"have the shape of {name}, {shape}", other, remedy)


def check_features(
    function: str, axes: str, *, any_width: bool = False, **arrays: Any
) -> None:
    """Every array is floating point, has the named axes, and all shapes are equal.

    ``axes`` are words: "batch height width channels". A word "..." stands for any
    number of axes. With ``any_width`` the last axes may differ.
    """
    names = axes.split()
    most = np.inf if "..." in names else len(names)
    least = len(names) - names.count("...")
    (first, features), *others = arrays.items()
    for argument, array in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            fail(
                function,
                argument,
                "be a floating-point array of features",
                jnp.result_type(array),
                "Pass what a layer puts out, not labels or token ids.",
                TypeError,
            )
        if not least <= jnp.ndim(array) <= most or jnp.shape(array)[-1] == 0:
            fail(
                function,
                argument,
                f"have the axes [{', '.join(names)}], the last one not empty",
                f"the shape {jnp.shape(array)}",
                "Reshape or transpose the features, or check the slice that made them.",
            )
    shape = jnp.shape(features)
    for argument, array in others:
        other = jnp.shape(array)
        if other == shape or (any_width and other[:-1] == shape[:-1]):
            continue
        if other[:-1] == shape[:-1]:
            remedy = (
                f"The last axes ({names[-1]}) differ: {shape[-1]} and {other[-1]}. Map "
                "the student's features to the teacher's with a learned projection."
            )
        else:
            remedy = (
                "The leading axes differ: check that both models saw the same batch"
            )
            pool = ", and average-pool the larger map, with flax.nnx.avg_pool say."
            remedy += pool if "height" in names else "."
        extent = f" but for {names[-1]}" if any_width else ""
        fail(
            function, argument, f"have the shape of {first}, {shape}{extent}", other,
            remedy,
        )  # fmt: skip


def check_unequal_logits(function: str, student: Any, teacher: Any) -> None:
    """Two arrays of logits that may differ in their number of classes alone."""
    check_logits(function, student=student)
    check_logits(function, teacher=teacher)
    shape, other = jnp.shape(student), jnp.shape(teacher)
    if other[:-1] != shape[:-1]:
        rule = f"have the leading axes of student, {shape}"
        fail(function, "teacher", rule, other, _OTHER_BATCH)


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


def check_points(function: str, student: Any, teacher: Any, where: Any) -> None:
    """Features of the same points, of any width, and one mask value for each point.

    Points are the rows of [batch, width] or of [batch, time, width].
    """
    axes = "batch ... width"
    check_features(function, axes, any_width=True, student=student, teacher=teacher)
    shape = jnp.shape(student)
    if len(shape) > 3 or 0 in shape:
        fail(
            function,
            "student",
            "have the shape [batch, width] or [batch, time, width], no axis empty",
            shape,
            "Flatten or pool what is one point, and check the slice of an empty axis.",
        )
    if where is not None and jnp.shape(where) != shape[:-1]:
        fail(
            function,
            "where",
            f"have the shape of the points, {shape[:-1]}",
            jnp.shape(where),
            "One mask value belongs to each point, without its features.",
        )


def check_scalar(function: str, argument: str, value: Any) -> None:
    """One number, not an array of them."""
    if is_static(value) and not jnp.issubdtype(np.asarray(value).dtype, jnp.number):
        fail(
            function,
            argument,
            "be a number",
            repr(value),
            "Pass it without quotes.",
            TypeError,
        )
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


def check_positive(function: str, argument: str, value: Any, remedy: str) -> None:
    """A positive, finite scalar; the value of a traced one is not known yet."""
    check_scalar(function, argument, value)
    if is_static(value) and not 0 < np.asarray(value) < np.inf:
        fail(function, argument, "be positive and finite", value, remedy)


def check_temperature(
    function: str, temperature: Any, argument: str = "temperature"
) -> None:
    """A positive, finite scalar; the value of a traced one is not known yet."""
    remedy = "Use 1 for the models' own distributions, larger for softer ones."
    check_positive(function, argument, temperature, remedy)


def check_count(function: str, argument: str, value: Any, low: int = 1) -> None:
    """An integer, at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        fail(
            function,
            argument,
            "be an integer",
            repr(value),
            "Change it in the config.",
            TypeError,
        )
    if value < low:
        fail(
            function,
            argument,
            f"be at least {low}",
            value,
            "Change it in the config or on the command line.",
        )


def check_finite(function: str, argument: str, value: Any) -> None:
    """A scalar that is neither nan nor infinite."""
    check_scalar(function, argument, value)
    if is_static(value) and not np.isfinite(np.asarray(value)):
        fail(function, argument, "be finite", value, "Check the value in the config.")


def check_below(
    function: str, argument: str, value: Any, low: float, high: float
) -> None:
    """A scalar in ``[low, high)``; the value of a traced one is not known yet."""
    check_scalar(function, argument, value)
    if is_static(value) and not low <= np.asarray(value) < high:
        rule = f"lie in [{low:g}, {high:g})"
        fail(function, argument, rule, value, "Check the value in the config.")


def check_type(
    function: str, argument: str, value: Any, kind: type, remedy: str
) -> None:
    """An instance of a class."""
    if not isinstance(value, kind):
        got = f"a {type(value).__name__}"
        fail(function, argument, f"be a {kind.__name__}", got, remedy, TypeError)


def check_instance(function: str, argument: str, value: Any) -> None:
    """An object, and not the class that makes it."""
    if isinstance(value, type):
        got, remedy = f"the class {value.__name__}", f"Write {value.__name__}(...)."
        fail(function, argument, "be an instance", got, remedy, TypeError)


def check_widths(function: str, argument: str, value: Any) -> None:
    """A tuple of integers, each at least 1."""
    if not isinstance(value, tuple | list):
        fail(
            function,
            argument,
            "be a tuple of integers",
            repr(value),
            f"For a single one write ({value},).",
            TypeError,
        )
    for width in value:
        check_count(function, argument, width)


def suggest_field(error: TypeError, path: str) -> None:
    """Raise with a suggestion if the error is about an unknown field of a dataclass.

    Args:
      error: What a config file raised.
      path: Of that file.
    """
    unknown = re.match(
        r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)
    )
    if unknown is None:
        return
    part, field = unknown.groups()
    # a class of the same name elsewhere may have other fields
    ours = (m for name, m in sys.modules.items() if name.startswith("distilljax."))
    kind = next((vars(m)[part] for m in ours if part in vars(m)), None)
    if not dataclasses.is_dataclass(kind):
        return
    known = [field.name for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(field, known, n=1)
    fail(
        part,
        field,
        f"be a field of {part}",
        f"it in {path!r}",
        f"Did you mean {near[0]}?" if near else f"It has {', '.join(known)}.",
        TypeError,
    )


@contextlib.contextmanager
def inputs_in_errors(whose: str, batch: Mapping[str, Any]) -> Iterator[None]:
    """Add to whatever a model raises what it was given."""
    try:
        yield
    except (TypeError, ValueError) as error:
        shapes = ", ".join(f"{name} {x.shape}" for name, x in batch.items())
        error.add_note(f"(The {whose} was called with a batch of {shapes}.)")
        raise
