"""Several objectives at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
from jaxtyping import Array

from distilljax import _objective
from distilljax._checks import fail
from distilljax._functional import Batch
from distilljax._schedules import Rule, check_numbers, check_weight
from distilljax.objectives._logits import Schedule, value_at
from distilljax.terms import DIAGNOSTICS, Outputs, Term
from distilljax.typing import Mean


@dataclass(frozen=True)
class Sum:
    """The sum of several objectives, each with a name and a weight.

    objective = sum over parts of weight of the part * part

    A term is logged as `part/term`. Parameters, state and features of the parts are
    those of the sum.

    Reference: the multi-task loss of FitNets and of nearly every method since.

    Example:
      >>> import jax.numpy as jnp
      >>> from distilljax.objectives import CrossEntropy, LogitKD
      >>> objective = Sum({"soft": LogitKD(), "hard": CrossEntropy()}, {"hard": 0.1})
      >>> z = Outputs(jnp.array([[0.0, 0.0]]))
      >>> terms = objective(z, z, {"labels": jnp.array([1])})
      >>> {name: float(term.weight) for name, term in terms.items()}
      {'soft/kd': 1.0, 'hard/ce': 0.1}
    """

    rules: ClassVar[Mapping[str, Rule]] = {"weights": check_weight}

    parts: Mapping[str, Any]
    """Objectives by name."""
    weights: Mapping[str, float | Schedule] = field(default_factory=dict)
    """Factors on all terms of a part, by its name; 1 where there is none."""

    def __post_init__(self):
        if not self.parts:
            fail(
                "Sum",
                "parts",
                "have at least one objective",
                "none",
                "Pass {'logits': LogitKD(), ...}.",
            )
        if unknown := sorted(self.weights.keys() - self.parts.keys()):
            fail(
                "Sum",
                "weights",
                f"name parts, {', '.join(self.parts)}",
                unknown[0],
                "Check its spelling.",
            )
        check_numbers(self)

    def _features(self, whose: str) -> tuple[str, ...]:
        each = (_objective.features_of(part, whose) for part in self.parts.values())
        return tuple(dict.fromkeys(name for names in each for name in names))

    @property
    def student_features(self) -> tuple[str, ...]:
        """What the step is to capture of the student."""
        return self._features("student")

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """What the step is to capture of the teacher."""
        return self._features("teacher")

    @property
    def average_features(self) -> tuple[str, ...]:
        """What the step is to capture of the student's average."""
        return self._features("average")

    @property
    def uses_teacher(self) -> bool:
        """True if a part does."""
        return any(getattr(part, "uses_teacher", True) for part in self.parts.values())

    @property
    def uses_average(self) -> bool:
        """True if a part does."""
        return any(_objective.uses_average(part) for part in self.parts.values())

    def init_params(self, rng: Array) -> dict[str, Any]:
        """The parameters of the parts that have any."""
        keys = jax.random.split(rng, len(self.parts))
        made = {
            name: _objective.init_params(part, key)
            for key, (name, part) in zip(keys, self.parts.items(), strict=True)
        }
        return {name: params for name, params in made.items() if params is not None}

    def init_state(self) -> dict[str, Any] | None:
        """The states of the parts that have one; None if none has."""
        made = {name: _objective.init_state(p) for name, p in self.parts.items()}
        return {name: s for name, s in made.items() if s is not None} or None

    def __call__(
        self,
        student: Outputs,
        teacher: Any,
        batch: Batch,
        *,
        params: Mapping[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> Any:
        """The terms of all parts; with a state also what the parts have seen."""
        terms, seen, logged = {}, {}, set()
        for name, part in self.parts.items():
            own = (params or {}).get(name), (state or {}).get(name)
            found, noted = _objective.evaluate(part, student, teacher, batch, *own)
            weight = value_at(self.weights.get(name, 1.0), batch)
            for term_name, term in found.items():
                parts = _named(name, term.parts, logged)
                logged |= parts.keys()
                scaled: Term = replace(term, weight=weight * term.weight, parts=parts)
                terms[f"{name}/{term_name}"] = scaled
            if own[1] is not None:
                seen[name] = noted
        return terms if state is None else (terms, seen)

    def next_state(
        self, state: Mapping[str, Any], seen: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The next state of each part that has one."""
        return {
            name: _objective.next_state(self.parts[name], own, seen[name])
            for name, own in state.items()
        }


def _named(
    name: str, parts: Mapping[str, Mean], logged: Collection[str]
) -> dict[str, Mean]:
    """The parts of a term under its objective's name.

    What the step logs of any student and teacher keeps its own, of the first that has
    it: several objectives over one head find the same.
    """
    named = {k if k in DIAGNOSTICS else f"{name}/{k}": x for k, x in parts.items()}
    return {key: x for key, x in named.items() if key not in logged}


__all__ = ["Sum"]
