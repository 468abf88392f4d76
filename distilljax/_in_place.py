"""The NNX layer of the step: a module and its optimizer, updated in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distilljax import _objective
from distilljax._functional import Batch, PyTree, refuse_shared_arrays
from distilljax._objective import Objective
from distilljax.state import DistillState
from distilljax.typing import Metrics


class ObjectiveParam(nnx.Param):
    """A trained parameter of the objective, such as a projection's kernel."""


class Projected(nnx.Module):
    """A student together with the parameters of its objective, such as projections.

    Make the optimizer of this module and give it to the step; what you keep of it after
    training is `student`. (`step.init` does the same for the pure layer.)

    Args:
      student: The student: the same object, which is updated in place.
      objective: An objective with parameters of its own.
      rngs: Random streams, of which `params` initialises them.

    Example:
      >>> from distilljax import objectives, students
      >>> objective = objectives.FeatureKD(
      ...     {"out": "out"}, projection=students.Projection(4, 8)
      ... )
      >>> student = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> both = Projected(student, objective, rngs=nnx.Rngs(1))
      >>> both.student is student, both.objective["out"]["projection"]["kernel"].shape
      (True, (4, 8))
    """

    def __init__(self, student: nnx.Module, objective: Any, *, rngs: nnx.Rngs):
        self.student = student
        params = _objective.init_params(objective, rngs.params())
        self.objective = _as_module(params or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the student says."""
        student: Any = self.student
        return student(*args, **kwargs)


def _as_module(params: PyTree) -> Any:
    """Nested dicts of arrays as a module."""
    if not isinstance(params, Mapping):
        return ObjectiveParam(params)
    return nnx.Dict({name: _as_module(x) for name, x in params.items()})


def _joined(**states: Any) -> Any:
    """States as the state of one module that holds theirs under these names."""
    return nnx.from_flat_state(
        {
            (name, *path): variable
            for name, state in states.items()
            for path, variable in nnx.to_flat_state(state)
        }
    )


class InPlaceStep:
    """`metrics = step(student, optimizer, batch)`, over a pure update.

    Args:
      update: `(graphdef, tx, state, teacher_state, batch) -> (state, metrics)`.
      objective: The objective, which may have parameters and state of its own.
      trainable: NNX filter of what is trained.
      teacher_state: Arrays of the frozen teacher.
      keeps_ema: Whether the update moves an average of the parameters.
    """

    def __init__(
        self,
        update: Callable[..., tuple[DistillState, Metrics]],
        objective: Objective,
        trainable: Any,
        teacher_state: PyTree,
        *,
        keeps_ema: bool,
    ):
        self.compiled = jax.jit(update, static_argnums=(0, 1), donate_argnums=2)
        self.ema: PyTree = None
        self.objective_state = _objective.init_state(objective)
        self._has_params = _objective.has_params(objective)
        self._trainable = trainable
        self.wrt = trainable
        if self._has_params and trainable is not nnx.Param:
            self.wrt = nnx.Any(trainable, ObjectiveParam)
        self._teacher_state = teacher_state
        self._keeps_ema = keeps_ema
        self._student: weakref.ref[nnx.Module] | None = None

    def __call__(
        self, student: nnx.Module, optimizer: nnx.Optimizer, batch: Batch
    ) -> Metrics:
        """Update both in place; return the metrics."""
        if optimizer.wrt != self.wrt:
            raise ValueError(
                "DistillStep: optimizer.wrt must be the step's trainable filter, "
                f"{self.wrt}, got {optimizer.wrt}. Pass trainable= to "
                "make_distill_step, or wrt=step.wrt to nnx.Optimizer."
            )
        module = self._module(student)
        graphdef, params, rest = nnx.split(module, self._trainable, ...)
        if self._has_params:
            both: Any = student
            params = _joined(student=params, objective=nnx.state(both.objective))
        params, rest = nnx.as_pure(params), nnx.as_pure(rest)
        refuse_shared_arrays((params, rest), self._teacher_state)
        state = DistillState(
            params=params,
            rest=rest,
            opt_state=nnx.as_pure(optimizer.opt_state),
            step=optimizer.step[...],
            rng=None,  # a module has its own streams
            ema=self._ema_of(student, params),
            objective_state=self.objective_state,
        )
        state, metrics = self.compiled(
            graphdef, optimizer.tx, state, self._teacher_state, batch
        )
        nnx.update(student, state.params)
        nnx.update(module, state.rest)
        nnx.update(optimizer.opt_state, nnx.state(state.opt_state))
        optimizer.step.set_value(state.step)
        self.ema = state.ema
        self.objective_state = state.objective_state
        return metrics

    def load_objective_state(self, state: PyTree) -> None:
        """Go on from a saved state, of the form of the objective's own."""
        like = self.objective_state
        self.objective_state = _objective.loaded_state(state, like)

    def _module(self, student: nnx.Module) -> nnx.Module:
        """The student itself, without the objective's parameters."""
        if isinstance(student, Projected) != self._has_params:
            raise ValueError(
                "DistillStep: student must be "
                + (
                    "with the parameters of the objective, got a bare module. Wrap it, "
                    "and make the optimizer of the whole: distilljax.students."
                    "Projected(student, objective, rngs=nnx.Rngs(0))."
                    if self._has_params
                    else "a bare module, got one with parameters of an objective that "
                    "has none. Pass its .student, and make the optimizer of that."
                )
            )
        return student.student if isinstance(student, Projected) else student

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
