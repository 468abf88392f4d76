"""Who teaches: several models, or the student's own average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from distilljax import _objective
from distilljax._checks import fail
from distilljax._functional import Batch
from distilljax.objectives._logits import logits_of, value_at
from distilljax.terms import Outputs, log_mean_probabilities

Teachers = Mapping[str, Outputs]
# (teachers by name, batch, temperature) -> the one that the objective sees
Combine = Callable[[Teachers, Batch, Any], Outputs]


def _logits(function: str, teachers: Teachers) -> list[Array]:
    """The logits of all, of one shape."""
    found = [logits_of(function, t, f"teacher {n!r}") for n, t in teachers.items()]
    for name, v in zip(teachers, found, strict=True):
        if v.shape != found[0].shape:
            fail(
                function,
                f"the logits of teacher {name!r}",
                f"have the shape of the others, {found[0].shape}",
                v.shape,
                "Teachers that are combined must know the same classes; slice padding "
                "off in teacher_forward.",
            )
    return found


def _shares(function: str, weights: Mapping[str, float], teachers: Teachers) -> list:
    if unknown := sorted(weights.keys() - teachers.keys()):
        fail(
            function,
            "weights",
            f"name teachers, {', '.join(teachers)}",
            unknown[0],
            "Check its spelling.",
        )
    return [weights.get(name, 1.0) for name in teachers]


@dataclass(frozen=True)
class MeanOfProbabilities:
    """What the teachers say on average: the mean of their softened distributions.

    logits = T * log(weighted mean over teachers of softmax(v / T))

    An ensemble as one teacher. A class is probable if any teacher finds it probable.

    Example:
      >>> teachers = {"a": Outputs(jnp.log(jnp.array([0.9, 0.1]))),
      ...             "b": Outputs(jnp.log(jnp.array([0.5, 0.5])))}
      >>> both = MeanOfProbabilities()(teachers, {}, 1.0)
      >>> [round(float(p), 4) for p in jnp.exp(both.logits)]
      [0.7, 0.3]
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of teachers by name, divided by their sum; 1 where there is none."""

    def __call__(self, teachers: Teachers, batch: Batch, temperature: Any) -> Outputs:
        """Logits whose softmax at the temperature is the mean."""
        name = "MeanOfProbabilities"
        logits = [v / temperature for v in _logits(name, teachers)]
        shares = _shares(name, self.weights, teachers)
        return Outputs(temperature * log_mean_probabilities(logits, shares))


@dataclass(frozen=True)
class MeanOfLogits:
    """The mean of the teachers' logits: the normalised product of what they say.

    logits = weighted mean over teachers of v

    A class is probable only if all teachers find it so: sharper than the mean of
    probabilities where they agree. Logits of models trained apart differ by a constant,
    which drops out, and by a scale, which does not.

    Example:
      >>> teachers = {"a": Outputs(jnp.array([2.0, 0.0])),
      ...             "b": Outputs(jnp.array([4.0, 1.0]))}
      >>> MeanOfLogits({"b": 3.0})(teachers, {}, 1.0).logits.tolist()
      [3.5, 0.75]
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of teachers by name, divided by their sum; 1 where there is none."""

    def __call__(self, teachers: Teachers, batch: Batch, temperature: Any) -> Outputs:
        """The mean, whatever the temperature."""
        logits = jnp.stack(_logits("MeanOfLogits", teachers), axis=-1)
        shares = jnp.asarray(_shares("MeanOfLogits", self.weights, teachers))
        return Outputs(logits.astype(jnp.float32) @ (shares / jnp.sum(shares)))


@dataclass(frozen=True)
class Routed:
    """Each example has a teacher of its own, by an index in the batch.

    For specialists: one teacher for each language, domain or group of classes. An index
    outside the names gives nan, which stops a run.

    Example:
      >>> teachers = {"a": Outputs(jnp.zeros((2, 3))), "b": Outputs(jnp.ones((2, 3)))}
      >>> batch = {"teacher_index": jnp.array([1, 0])}
      >>> Routed(("a", "b"))(teachers, batch, 1.0).logits[:, 0].tolist()
      [1.0, 0.0]
    """

    names: tuple[str, ...]
    """The teacher of index 0, of index 1, and so on."""
    key: str = "teacher_index"
    """Where the batch has the indices, integers [batch]."""

    def __call__(self, teachers: Teachers, batch: Batch, temperature: Any) -> Outputs:
        """Each example's row of its teacher's logits."""
        if missing := [name for name in self.names if name not in teachers]:
            fail(
                "Routed",
                "names",
                f"be teachers, {', '.join(teachers)}",
                missing[0],
                "Check its spelling.",
            )
        chosen = {name: teachers[name] for name in self.names}
        logits = jnp.stack(_logits("Routed", chosen), axis=1)
        if self.key not in batch:
            fail(
                "Routed",
                "batch",
                f"have {self.key!r}",
                f"the keys {sorted(batch)}",
                "Put the index of each example's teacher there.",
            )
        index = batch[self.key]
        if index.shape != logits.shape[:1] or not jnp.issubdtype(
            index.dtype, jnp.integer
        ):
            fail(
                "Routed",
                f"batch[{self.key!r}]",
                f"be integers of shape {logits.shape[:1]}",
                f"{index.dtype} of shape {index.shape}",
                "One index belongs to each example.",
            )
        # a negative index would count from the end
        index = jnp.where(index < 0, len(self.names), index)
        index = index.reshape(-1, *[1] * (logits.ndim - 1))
        rows = jnp.take_along_axis(
            logits, index, axis=1, mode="fill", fill_value=jnp.nan
        )
        return Outputs(rows[:, 0])


@dataclass(frozen=True)
class Only:
    """One of several teachers: for objectives over features, which have no mean.

    Example:
      >>> teachers = {"a": Outputs(jnp.zeros(3)), "b": Outputs(jnp.ones(3))}
      >>> Only("b")(teachers, {}, 1.0).logits.tolist()
      [1.0, 1.0, 1.0]
    """

    name: str
    """Name of the teacher."""

    def __call__(self, teachers: Teachers, batch: Batch, temperature: Any) -> Outputs:
        """Its outputs, features and all."""
        if self.name not in teachers:
            fail(
                "Only",
                "name",
                f"be a teacher, {', '.join(teachers)}",
                repr(self.name),
                "Check its spelling.",
            )
        return teachers[self.name]


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
        return terms if state is None else (terms, seen)


@dataclass(frozen=True)
class MultiTeacher(_Around):
    """Any objective, with several teachers combined into the one that it sees.

    Give the step a dict of teachers, `make_distill_step(objective, {"a": ..., "b":
    ...})`, or put a dict of their outputs under `batch["teacher"]`.

    Reference: You et al., "Learning from Multiple Teacher Networks", KDD 2017,
    equation 6 (the mean of softened probabilities).

    Example:
      >>> from distilljax.objectives import LogitKD
      >>> student = Outputs(jnp.log(jnp.array([[0.7, 0.3]])))
      >>> teachers = {"a": Outputs(jnp.log(jnp.array([[0.9, 0.1]]))),
      ...             "b": Outputs(jnp.log(jnp.array([[0.5, 0.5]])))}
      >>> terms = MultiTeacher(LogitKD())(student, teachers, {})
      >>> abs(round(float(terms["kd"].mean().value), 6))     # their mean exactly
      0.0
    """

    objective: Any
    """What is minimised, with one teacher; its `temperature` is that of the mean."""
    combine: Combine = MeanOfProbabilities()
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
        temperature = value_at(getattr(self.objective, "temperature", 1.0), batch)
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


__all__ = [
    "MeanOfLogits",
    "MeanOfProbabilities",
    "MultiTeacher",
    "Only",
    "Routed",
    "SelfDistillation",
]
