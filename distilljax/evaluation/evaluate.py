"""A student measured on a data set, beside its teacher: exact sums over examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilljax._functional import (
    Forward,
    PyTree,
    default_forward,
    split_module,
)
from distilljax.data.prefetch import as_read
from distilljax.evaluation.measures import measure, summarize
from distilljax.losses import LinearHead
from distilljax.losses._heads import first_classes, join_chunks, map_chunks
from distilljax.metrics import max_lead
from distilljax.sharding import replicated
from distilljax.terms import as_outputs


@dataclass(frozen=True)
class Evaluation:
    """What `Evaluator` returns: numbers by name, and the predictions in order."""

    student: dict[str, Any]
    teacher: dict[str, Any] | None
    labels: np.ndarray
    student_predictions: np.ndarray
    teacher_predictions: np.ndarray | None


def _measure_both(z: Any, v: Any, labels: Any, where: Any) -> tuple[Any, ...]:
    """Sums of student and teacher, and the predictions of both."""
    return (
        measure(z, v, labels, where),
        None if v is None else measure(v, None, labels, where),
        jnp.argmax(z, axis=-1),
        None if v is None else jnp.argmax(v, axis=-1),
    )


def _measure_all(z: Any, v: Any, labels: Any, where: Any) -> tuple[Any, ...]:
    """The same; the logits of a head are made for a chunk of positions at a time."""
    if not any(isinstance(x, LinearHead) for x in (z, v)):
        return _measure_both(z, v, labels, where)
    sums, teacher_sums, *tops = map_chunks(_measure_both, z, v, labels, where)
    sums, teacher_sums = jax.tree.map(
        lambda x: jnp.sum(x, axis=0, dtype=x.dtype), (sums, teacher_sums)
    )
    tops = jax.tree.map(lambda x: join_chunks(x, labels.shape), tops)
    return sums, teacher_sums, *tops


class Evaluator:
    """A compiled evaluation of one student structure against one teacher.

    Args:
      student: The student's structure, abstract or real.
      teacher_logits: `(state, batch) -> logits` of the frozen teacher, or None.
      student_forward: `(model, batch) -> Outputs | logits`.
      mesh: Devices to run on; batches are sharded over `data` and `fsdp`.
      trainable: The filter by which the student's state was split.
      num_classes: Classes that are no padding; None: all are.
    """

    def __init__(
        self,
        student: nnx.Module,
        teacher_logits: Callable[[PyTree, Any], Any] | None,
        *,
        mesh: Mesh,
        student_forward: Forward | None = None,
        trainable: Any = nnx.Param,
        num_classes: int | None = None,
    ):
        graphdef, _, _ = split_module(student, trainable, training=False)
        forward = student_forward or default_forward

        def run(params, rest, teacher_state, batch):
            model = nnx.merge(graphdef, params, rest, copy=True)
            z = as_outputs(forward(model, batch)).logits
            v = None
            if teacher_logits is not None:
                v = teacher_logits(teacher_state, batch)
            z, v = (first_classes(x, num_classes) for x in (z, v))
            where, labels = batch["loss_mask"], batch["labels"]
            return *_measure_all(z, v, labels, where), labels, where

        # Replicated: a handful of sums, and one integer per example.
        self._run = jax.jit(run, out_shardings=replicated(mesh))

    def __call__(
        self, params: PyTree, rest: PyTree, teacher_state: PyTree, batches: Iterable
    ) -> Evaluation:
        """Run over device batches that have `inputs`, `labels` and `loss_mask`."""
        results, read, lead = [], [], max_lead()
        for batch in batches:
            results.append(self._run(params, rest, teacher_state, batch))
            labels = batch["labels"]
            read.append(as_read(labels.sharding, labels.shape))
            if len(results) > lead:
                jax.block_until_ready(results[-1 - lead])
        if not results:
            raise ValueError(
                "Evaluator: batches must hold at least one batch, got none. Check that "
                "the split is not empty."
            )
        sums, teacher_sums, z, v, labels, where = zip(
            *jax.device_get(results), strict=True
        )

        def total(parts):
            return jax.tree.map(lambda *xs: _total(np.stack(xs)), *parts)

        def rows(parts):
            in_order = (x[order] for x, order in zip(parts, read, strict=True))
            return np.concatenate(list(in_order))

        keep = rows(where).astype(bool)

        has_teacher = teacher_sums[0] is not None
        return Evaluation(
            student=summarize(total(sums)),
            teacher=summarize(total(teacher_sums)) if has_teacher else None,
            labels=rows(labels)[keep],
            student_predictions=rows(z)[keep],
            teacher_predictions=rows(v)[keep] if has_teacher else None,
        )


def _total(sums: np.ndarray) -> np.ndarray:
    """Over all batches, in float64 or int64: adding in float32 loses small batches."""
    exact = np.float64 if np.issubdtype(sums.dtype, np.floating) else np.int64
    return np.asarray(np.sum(sums, axis=0, dtype=exact))
