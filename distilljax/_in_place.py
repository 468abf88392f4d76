"""The NNX layer of the step: a module and its optimizer, updated in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distilljax._functional import (
    Batch,
    Forward,
    PyTree,
    module_apply,
    refuse_shared_arrays,
)
from distilljax.state import DistillState
from distilljax.typing import Mean


class InPlaceStep:
    """`metrics = step(student, optimizer, batch)`, over a pure update.

    Args:
      update: `(apply, tx, state, teacher_state, batch) -> (state, metrics)`.
      forward: `(model, batch) -> outputs` of the student.
      trainable: NNX filter of what is trained.
      teacher_state: Arrays of the frozen teacher.
      keeps_ema: Whether the update moves an average of the parameters.
    """

    def __init__(
        self,
        update: Callable[..., tuple[DistillState, dict[str, Mean]]],
        forward: Forward,
        trainable: Any,
        teacher_state: PyTree,
        *,
        keeps_ema: bool,
    ):
        def compiled(graphdef, tx, state, teacher_state, batch):
            apply = module_apply(graphdef, trainable, forward)
            return update(apply, tx, state, teacher_state, batch)

        self.compiled = jax.jit(compiled, static_argnums=(0, 1), donate_argnums=2)
        self.ema: PyTree = None
        self._trainable = trainable
        self._teacher_state = teacher_state
        self._keeps_ema = keeps_ema
        self._student: weakref.ref[nnx.Module] | None = None

    def __call__(
        self, student: nnx.Module, optimizer: nnx.Optimizer, batch: Batch
    ) -> dict[str, Mean]:
        """Update both in place; return the metrics."""
        if optimizer.wrt != self._trainable:
            raise ValueError(
                "DistillStep: optimizer.wrt must be the step's trainable filter, "
                f"{self._trainable}, got {optimizer.wrt}. Pass trainable= to "
                "make_distill_step, or wrt= to nnx.Optimizer."
            )
        graphdef, params, rest = nnx.split(student, self._trainable, ...)
        params, rest = nnx.as_pure(params), nnx.as_pure(rest)
        refuse_shared_arrays((params, rest), self._teacher_state)
        state = DistillState(
            params=params,
            rest=rest,
            opt_state=nnx.as_pure(optimizer.opt_state),
            step=optimizer.step[...],
            rng=None,  # a module has its own streams
            ema=self._ema_of(student, params),
        )
        state, metrics = self.compiled(
            graphdef, optimizer.tx, state, self._teacher_state, batch
        )
        nnx.update(student, state.params, state.rest)
        nnx.update(optimizer.opt_state, nnx.state(state.opt_state))
        optimizer.step.set_value(state.step)
        self.ema = state.ema
        return metrics

    def _ema_of(self, student: nnx.Module, params: PyTree) -> PyTree:
        if not self._keeps_ema:
            return None
        if self._student is not None and self._student() is not student:
            raise ValueError(
                "DistillStep: student must be the one whose moving average this step "
                "keeps, got another module. Make a step for each student, or none with "
                "ema_decay."
            )
        self._student = weakref.ref(student)
        return jax.tree.map(jnp.copy, params) if self.ema is None else self.ema
