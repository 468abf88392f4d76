"""What is refused before a fused pass: all that would fail later, or teach nonsense."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from distilljax._checks import (
    check_between,
    check_count,
    check_finite,
    check_labels,
    check_logits,
    check_where,
    fail,
    is_static,
)
from distilljax.losses._fused_block import keywords
from distilljax.losses._heads import LinearHead, check_head


def check_inputs(
    name: str,
    student: Any,
    teacher: Any,
    labels: Any,
    where: Any,
    num_classes: Any,
) -> None:
    """Heads, teacher, labels and mask belong to the same positions and classes."""
    if not isinstance(student, LinearHead):
        fail(
            name,
            "student",
            "be a LinearHead",
            type(student).__name__,
            "Logits that exist already go to the divergence itself.",
            TypeError,
        )
    check_head(name, "student", student)
    lead = student.shape[:-1]
    check_where(name, where, lead)
    if labels is not None:
        check_labels(name, labels, lead)
    if num_classes is not None:
        check_count(name, "num_classes", num_classes)
        if num_classes > student.num_classes:
            fail(
                name,
                "num_classes",
                f"lie in [1, {student.num_classes}], the classes of student",
                num_classes,
                "It is the number of classes that are no padding.",
            )
    if teacher is None and labels is None:
        fail(
            name,
            "teacher",
            "be given, or labels",
            "neither",
            "There is nothing to learn from.",
        )
    if isinstance(teacher, LinearHead):
        check_head(name, "teacher", teacher)
    elif hasattr(teacher, "shape"):
        check_logits(name, teacher=teacher)
    if shape := getattr(teacher, "shape", None):  # a sparse signal has none
        _check_classes(name, student, shape, num_classes)


def _check_classes(
    name: str, student: LinearHead, shape: tuple[int, ...], num_classes: int | None
) -> None:
    """The teacher has the positions of the student, and the classes that count."""
    same = shape[-1:] == student.shape[-1:]
    enough = num_classes is not None and shape[-1] >= num_classes
    if shape[:-1] == student.shape[:-1] and (same or enough):
        return
    remedy = (
        "The leading axes differ: check that both models saw the same batch."
        if shape[:-1] != student.shape[:-1]
        else "Where padding makes the difference, pass num_classes, the number of "
        "classes that both know; else check that both have one vocabulary."
    )
    fail(name, "teacher", f"have the shape of student, {student.shape}", shape, remedy)


def check_plan(name: str, chunk_tokens: Any, matmul_dtype: Any) -> None:
    """How the pass is made."""
    if chunk_tokens is not None:
        check_count(name, "chunk_tokens", chunk_tokens)
    if matmul_dtype is not None and not jnp.issubdtype(matmul_dtype, jnp.floating):
        remedy = "Use jnp.bfloat16, or None for the type of the heads."
        rule = "be a floating-point type"
        fail(name, "matmul_dtype", rule, matmul_dtype, remedy, TypeError)


def weights_in_play(name: str, weights: dict[str, Any], labels: Any) -> dict[str, Any]:
    """The checked weights that are not 0 for certain.

    What has weight 0 is logged, and not in the sum, where 0 * nan would be nan.
    """
    for argument, value in weights.items():
        check_between(name, argument, value, 0, math.inf)
        check_finite(name, argument, value)
    found = {
        argument: value
        for argument, value in weights.items()
        if not (is_static(value) and float(value) == 0)
    }
    if labels is None and "ce_weight" in found:
        fail(
            name,
            "labels",
            "be given where ce_weight is not 0",
            None,
            "Set ce_weight=0 to learn from the teacher alone.",
        )
    return found


def check_divergence(
    name: str,
    divergence: Callable[..., Array],
    student: LinearHead,
    teacher: Any,
    temperature: Any,
    labels: Any,
) -> None:
    """It takes some of the positions, and gives each of them one value.

    Tried without compute on three positions: what sees the whole batch, or brings what
    belongs to all positions with it, would else pass until there are many of them.
    """
    known = inspect.signature(divergence).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    untempered = is_static(temperature) and float(temperature) == 1
    if "temperature" not in known and not takes_all and not untempered:
        shown = temperature if is_static(temperature) else "a traced one"
        rule = "be 1 for a divergence that takes none"
        remedy = "Use one between distributions, such as losses.forward_kl."
        fail(name, "temperature", rule, shown, remedy)
    num_axes = len(student.shape) - 1

    def three(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((3, *jnp.shape(x)[num_axes:]), jnp.result_type(x))

    z = jax.ShapeDtypeStruct((3, student.num_classes), jnp.float32)
    v = z
    if not isinstance(teacher, LinearHead) and not hasattr(teacher, "shape"):
        v = jax.tree.map(three, teacher)
    rows = {"where": jax.ShapeDtypeStruct((3,), jnp.bool)}
    if labels is not None:
        rows["labels"] = jax.ShapeDtypeStruct((3,), jnp.int32)

    def tried(z: Any, v: Any, rows: Any) -> Any:
        where, labels = rows["where"], rows.get("labels")
        return divergence(z, v, **keywords(divergence, temperature, where, labels))

    try:
        values = jax.eval_shape(tried, z, v, rows)
    except (TypeError, ValueError) as error:
        error.add_note(
            f"({name} calls the divergence with some of the positions at a time: here "
            "with three. What belongs to each position cannot be bound to it.)"
        )
        raise
    if getattr(values, "shape", None) != (3,):
        fail(
            name,
            "divergence",
            "give one value for each position",
            f"{jax.tree.map(lambda x: x.shape, values)} for three of them",
            "A loss over the whole batch, or a mean, cannot be made chunk by chunk: "
            "use RelationKD, or return the values before they are reduced.",
        )
