"""Who teaches: several models, or the student's own average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
from jaxtyping import Array

from distilljax import _objective
from distilljax._checks import fail
from distilljax._functional import Batch
from distilljax.objectives._combine import (
    Combine,
    MeanOfLogits,
    MeanOfProbabilities,
    Only,
    Routed,
)
from distilljax.objectives._logits import value_at
from distilljax.terms import OF_TEACHER, Outputs, Term


class _Around:
    """What an objective that holds another passes on: parameters and state."""

    objective: Any

    def init_params(self, rng: Array) -> Any:
        """The parameters of the objective inside."""
        return _objective.init_params(self.objective, rng)

    def init_state(self) -> Any:
        """The state of the objective inside."""
        return _objective.init_state(self.objective)

    def next_state(self, state: Any, seen: Any) -> Any:
        """The next state of the objective inside."""
        return _objective.next_state(self.objective, state, seen)

    def _inside(
        self, student: Outputs, teacher: Any, batch: Batch, params: Any, state: Any
    ) -> Any:
        terms, seen = _objective.evaluate(
            self.objective, student, teacher, batch, params, state
        )
        # What a fused pass found of this teacher is not what the step logs of all.
        terms = {name: _without_diagnostics(term) for name, term in terms.items()}
        return terms if state is None else (terms, seen)


def _without_diagnostics(term: Term) -> Term:
    parts = {key: x for key, x in term.parts.items() if key not in OF_TEACHER}
    return replace(term, parts=parts)


@dataclass(frozen=True)
class MultiTeacher(_Around):
    """Any objective, with several teachers combined into the one that it sees.

    Give the step a dict of teachers, `make_distill_step(objective, {"a": ..., "b":
    ...})`, or put a dict of their outputs under `batch["teacher"]`.

    Reference: You et al., "Learning from Multiple Teacher Networks", KDD 2017,
    equation 6 (the mean of softened probabilities).

    Example:
      >>> import jax.numpy as jnp
      >>> from distilljax.objectives import LogitKD
      >>> student = Outputs(jnp.log(jnp.array([[0.7, 0.3]])))
      >>> teachers = {"a": Outputs(jnp.log(jnp.array([[0.9, 0.1]]))),
      ...             "b": Outputs(jnp.log(jnp.array([[0.5, 0.5]])))}
      >>> terms = MultiTeacher(LogitKD())(student, teachers, {})
      >>> abs(round(float(terms["kd"].mean().value), 6))     # their mean exactly
      0.0
    """

    objective: Any
    """What is minimised, with one teacher; its temperature is that of the mean, or that
    of its parts, which must have the same."""
    combine: Combine = MeanOfProbabilities()  # noqa: RUF009  frozen
    """`MeanOfProbabilities`, `MeanOfLogits`, `Routed`, `Only`, or a function
    `(teachers, batch, temperature) -> Outputs`."""

    def __post_init__(self):
        names = _objective.features_of(self.objective, "teacher")
        if names and not isinstance(self.combine, Only):
            fail(
                "MultiTeacher",
                "combine",
                f"be Only(name) for an objective over features, {', '.join(names)}",
                self.combine,
                "Features of several teachers have no mean: sum an objective for each.",
            )
        found = _objective.temperatures_of(self.objective)
        if len(found) > 1 and not isinstance(
            self.combine, MeanOfLogits | Routed | Only
        ):
            fail(
                "MultiTeacher",
                "objective",
                "have one temperature, at which teachers are combined",
                ", ".join(map(str, found)),
                "Combine them for each part of the sum: Sum({'a': MultiTeacher(...)}).",
            )

    @property
    def student_features(self) -> tuple[str, ...]:
        """What the step is to capture of the student."""
        return _objective.features_of(self.objective, "student")

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """What the step is to capture, with the name of the teacher before it."""
        names = _objective.features_of(self.objective, "teacher")
        only = self.combine
        return tuple(f"{only.name}/{n}" for n in names if isinstance(only, Only))

    @property
    def average_features(self) -> tuple[str, ...]:
        """What the step is to capture of the student's average."""
        return _objective.features_of(self.objective, "average")

    @property
    def uses_average(self) -> bool:
        """True if the objective inside does."""
        return _objective.uses_average(self.objective)

    def __call__(
        self,
        student: Outputs,
        teacher: Any,
        batch: Batch,
        *,
        params: Any = None,
        state: Any = None,
    ) -> Any:
        """The terms of the objective."""
        if not isinstance(teacher, Mapping) or not teacher:
            fail(
                "MultiTeacher",
                "teacher",
                "be several, by name",
                "none" if teacher is None else "one",
                "Pass a dict of teachers to make_distill_step, or of outputs under "
                "batch['teacher'].",
            )
        temperature = value_at(
            (_objective.temperatures_of(self.objective) or [1.0])[0], batch
        )
        one = self.combine(teacher, batch, temperature)
        return self._inside(student, one, batch, params, state)


@dataclass(frozen=True)
class SelfDistillation(_Around):
    """Any objective, with the student's own moving average as its teacher.

    The average is evaluated inside the step, in inference mode and without gradient;
    the step needs `ema_decay`. There is no larger model: what is gained is the
    steadiness of the average, on unlabelled data too. At the first step the teacher is
    the student itself, so let the weight grow by a schedule, or add labels with `Sum`.

    Reference: Tarvainen, Valpola, "Mean teachers are better role models", NeurIPS 2017,
    arXiv 1703.01780, equations 1 and 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from distilljax.objectives import LogitKD
      >>> student = Outputs(jnp.array([[0.5, 1.0, 0.0, 0.0]]))
      >>> average = Outputs(jnp.array([[2.0, 1.0, 0.0, -1.0]]))
      >>> terms = SelfDistillation(LogitKD())(student, None, {"average": average})
      >>> round(float(terms["kd"].mean().value), 6)
      0.344752
    """

    uses_teacher: ClassVar[bool] = False
    uses_average: ClassVar[bool] = True

    objective: Any
    """What is minimised, with the average in the place of the teacher."""

    @property
    def student_features(self) -> tuple[str, ...]:
        """What the step is to capture of the student."""
        return _objective.features_of(self.objective, "student")

    @property
    def average_features(self) -> tuple[str, ...]:
        """What the step is to capture of the average."""
        return _objective.features_of(self.objective, "teacher")

    def __call__(
        self,
        student: Outputs,
        teacher: Any,
        batch: Batch,
        *,
        params: Any = None,
        state: Any = None,
    ) -> Any:
        """The terms of the objective."""
        del teacher
        average = jax.lax.stop_gradient(batch["average"])
        return self._inside(student, average, batch, params, state)


__all__ = ["MultiTeacher", "SelfDistillation"]
