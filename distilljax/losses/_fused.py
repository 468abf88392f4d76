"""Distillation from hidden states in one pass, gradient included."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Shaped

from distilljax._checks import check_between, check_temperature, is_static
from distilljax.losses import _numerics as numerics
from distilljax.losses._fused_block import Losses
from distilljax.losses._fused_checks import (
    check_divergence,
    check_inputs,
    check_plan,
    weights_in_play,
)
from distilljax.losses._fused_mesh import (
    has_split_classes,
    pad_axis,
    padded_classes,
    padded_rows,
    position_axes,
    products_for,
)
from distilljax.losses._fused_pass import Pass, all_at_once, total_and_values
from distilljax.losses._heads import LinearHead, flat_rows, is_one_block
from distilljax.losses._kl import forward_kl
from distilljax.typing import Mean, Scalar


def fused_divergence(
    student: LinearHead,
    teacher: Any = None,
    *,
    divergence: Callable[..., Array] = forward_kl,
    labels: Integer[Array, "..."] | None = None,
    temperature: Scalar = 1.0,
    kd_weight: Scalar = 1.0,
    ce_weight: Scalar = 0.0,
    label_smoothing: Scalar = 0.0,
    where: Shaped[Array, "..."] | None = None,
    num_classes: int | None = None,
    matmul_dtype: Any = None,
    chunk_tokens: int | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """Divergence and cross-entropy from hidden states, without the logits, in nats.

    total = kd_weight divergence(student, teacher) + ce_weight cross_entropy(student),
    summed over the positions that count

    One pass over chunks of positions: the logits of a chunk are made, compared, turned
    into the gradient of hidden states and kernel, and dropped. Asked for values alone,
    it forms no gradient. There is no factor T^2 in it: give kd_weight = w T^2.

    Args:
      student: A `LinearHead`, hidden states [*batch, width]; gets the gradient.
      teacher: A `LinearHead` of another width, dense logits [*batch, classes], or a
        sparse signal that the divergence takes; gets none. None for labels alone.
      divergence: Any position-wise loss of `distilljax.losses` between equal classes,
        or yours: the function itself, called with what it takes of ``temperature``,
        ``where`` and ``labels``. Bind other options, numbers, with `functools.partial`.
      labels: Class indices [*batch], or None.
      temperature: T > 0 of the divergence; may be traced; gets no gradient.
      kd_weight: Factor of the divergence, at least 0; may be traced.
      ce_weight: Factor of the cross-entropy (at temperature 1), at least 0; may be
        traced.
      label_smoothing: As in `cross_entropy`.
      where: Mask [*batch]; a position where it is false counts nowhere, and its
        gradient is exactly 0, whatever its hidden states. None counts every position.
      num_classes: Classes that are real, where the vocabularies are padded, perhaps to
        different sizes: the others take no probability and get no gradient. None takes
        all, and the sizes must agree.
      matmul_dtype: Type of the factors of all products, such as ``jnp.bfloat16``; sums
        are in float32. None keeps that of the heads.
      chunk_tokens: Positions in a chunk; None chooses by width and number of positions,
        and where these are few takes all at once, which then holds less.

    Returns:
      The total as a `Mean`, whose ``sum`` is differentiable with respect to the student
      and the weights, and its parts by name, each a `Mean` without gradient: ``kd``,
      ``ce`` unweighted, and at temperature 1 ``kl``, ``student_entropy``,
      ``teacher_entropy``, ``agreement`` of the likeliest classes and ``accuracy``, as
      far as there are a teacher and labels. The counts are of the mask.

    Numerics: Logits, softmax and sums are in float32 (float64 if an input is), and so
    is the gradient of the kernel while it is summed, whatever the dtype of the heads.

    Example:
      >>> import jax.numpy as jnp
      >>> student = LinearHead(jnp.eye(2), jnp.log(jnp.array([[0.25, 0.75]] * 2)))
      >>> teacher = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
      >>> total, parts = fused_divergence(student, teacher)
      >>> round(float(total.value), 4)      # (.5 log 2 + .5 log(2/3) + 0) / 2
      0.0719
      >>> float(parts["agreement"].value)   # equals of the first teacher: class 0
      0.5

    Reference: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training",
    2024, arXiv 2410.10989, section 3.2 (gradient in the forward pass, by chunks).
    """
    name = "fused_divergence"
    if teacher is not None and hasattr(teacher, "dtype"):
        teacher = jnp.asarray(teacher)  # of NumPy
    check_inputs(name, student, teacher, labels, where, num_classes)
    check_temperature(name, temperature)
    check_between(name, "label_smoothing", label_smoothing, 0, 1)
    check_plan(name, chunk_tokens, matmul_dtype)
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight}
    weights = weights_in_play(name, weights, labels)
    if teacher is not None:
        check_divergence(name, divergence, student, teacher, temperature, labels)

    rows, heads = _flat(student, teacher, labels, where)
    kernels = [head.kernel for head in heads.values()]
    widths = [kernel.shape[0] for kernel in kernels]
    plan = Pass(
        losses=Losses(
            divergence=divergence,
            has_teacher=teacher is not None,
            tempered=not (is_static(temperature) and float(temperature) == 1.0),
            smooth=not (is_static(label_smoothing) and float(label_smoothing) == 0.0),
        ),
        num_classes=num_classes or student.num_classes,
        chunk=chunk_tokens,
        products=products_for(matmul_dtype, widths),
        tied=student.tied,
    )
    dtype = numerics.compute_dtype(student.hidden, student.kernel)
    scalars = {
        "temperature": numerics.positive_as(dtype, temperature),
        "label_smoothing": numerics.between_as(dtype, label_smoothing, 0, 1),
    } | {key: jnp.asarray(x).astype(dtype) for key, x in weights.items()}
    few = chunk_tokens is None and is_one_block(widths[0], len(rows["mask"]))
    few |= len(rows["mask"]) == 0
    on_mesh = position_axes() or has_split_classes()
    run = all_at_once if few and not on_mesh else total_and_values
    with jax.named_scope("fused_loss"):
        total, values = run(plan, rows.pop("student"), heads, rows, scalars)
    count = jnp.sum(rows["mask"], dtype=jnp.float32)
    parts = {key: Mean(jnp.sum(x), count) for key, x in values.items()}
    return Mean(total, count), jax.lax.stop_gradient(parts)


def _flat(
    student: LinearHead, teacher: Any, labels: Any, where: Any
) -> tuple[dict[str, Any], dict[str, LinearHead]]:
    """What belongs to the positions, along one axis, and the heads without that.

    On a mesh both are padded to what its devices divide; padding counts nowhere.
    """
    lead = student.shape[:-1]
    where = jnp.ones(lead, bool) if where is None else where
    rows: dict[str, Any] = {"mask": jnp.asarray(where).astype(bool)}
    rows["student"], heads = student.hidden, {"student": student}
    if labels is not None:
        rows["labels"] = jnp.asarray(labels).astype(jnp.int32)
    classes = student.num_classes
    if isinstance(teacher, LinearHead):
        rows["teacher"], heads["teacher"] = teacher.hidden, teacher
        classes = max(classes, teacher.num_classes)
    elif shape := getattr(teacher, "shape", None):
        classes = max(classes, shape[-1])
    # Without an axis that splits the classes, logits are cut to size as they are made.
    classes = padded_classes(classes) if has_split_classes() else 0
    if "teacher" not in rows and teacher is not None:
        is_array = isinstance(teacher, jax.Array)
        rows["teacher"] = pad_axis(teacher, classes, -1) if is_array else teacher
    flat = flat_rows(jax.tree.map(jnp.asarray, rows), len(lead))
    full = padded_rows(math.prod(lead))
    flat = jax.tree.map(lambda x: pad_axis(x, full, 0), flat)
    return flat, {key: _rest(head, classes) for key, head in heads.items()}


def _rest(head: LinearHead, classes: int) -> LinearHead:
    """The head without its hidden states; zeros for classes that others have."""
    kernel = pad_axis(jnp.asarray(head.kernel), classes, 1)
    bias = None if head.bias is None else pad_axis(jnp.asarray(head.bias), classes, 0)
    return dataclasses.replace(head, hidden=None, kernel=kernel, bias=bias)
