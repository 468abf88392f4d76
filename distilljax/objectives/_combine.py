"""How several teachers become the one that an objective sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from distilljax._checks import fail
from distilljax._functional import Batch
from distilljax._schedules import Rule, check_numbers, check_weight
from distilljax.objectives._signals import each_position, logits_of
from distilljax.terms import Outputs, log_mean_probabilities

Teachers = Mapping[str, Outputs]
# (teachers by name, batch, temperature) -> the one that the objective sees
Combine = Callable[[Teachers, Batch, Any], Outputs]


def _logits(function: str, teachers: Teachers) -> list[Any]:
    """The logits of all, of one shape; as arrays or heads."""
    found = [logits_of(function, t, f"teacher {n!r}") for n, t in teachers.items()]
    for name, v in zip(teachers, found, strict=True):
        if not hasattr(v, "shape"):
            fail(
                function,
                f"the logits of teacher {name!r}",
                "be an array or a LinearHead",
                type(v).__name__,
                "A sparse signal lacks the classes of the others: combine dense "
                "teachers, or sum an objective for each, with Only(name).",
                TypeError,
            )
        if v.shape != found[0].shape:
            fail(
                function,
                f"the logits of teacher {name!r}",
                f"have the shape of the others, {found[0].shape}",
                v.shape,
                "Teachers that are combined must know the same classes; slice padding "
                "off in teacher_forward.",
            )
    return jax.lax.stop_gradient(found)


def _shares(function: str, weights: Mapping[str, float], teachers: Teachers) -> list:
    if unknown := sorted(weights.keys() - teachers.keys()):
        fail(
            function,
            "weights",
            f"name teachers, {', '.join(teachers)}",
            unknown[0],
            "Check its spelling.",
        )
    shares = [float(weights.get(name, 1.0)) for name in teachers]
    if sum(shares) == 0:
        fail(
            function,
            "weights",
            f"be positive for one of {', '.join(teachers)}",
            dict(weights),
            "They are divided by their sum.",
        )
    return shares


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

    rules: ClassVar[Mapping[str, Rule]] = {"weights": check_weight}

    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of teachers by name, divided by their sum; 1 where there is none."""

    def __post_init__(self):
        check_numbers(self)

    def __call__(self, teachers: Teachers, batch: Batch, temperature: Any) -> Outputs:
        """Logits whose softmax at the temperature is the mean."""
        name = "MeanOfProbabilities"
        shares = _shares(name, self.weights, teachers)

        def mean(*logits: Array) -> Array:
            softened = [v / temperature for v in logits]
            return temperature * log_mean_probabilities(softened, shares)

        return Outputs(each_position(mean, *_logits(name, teachers)))


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

    rules: ClassVar[Mapping[str, Rule]] = {"weights": check_weight}

    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of teachers by name, divided by their sum; 1 where there is none."""

    def __post_init__(self):
        check_numbers(self)

    def __call__(self, teachers: Teachers, batch: Batch, temperature: Any) -> Outputs:
        """The mean, whatever the temperature."""
        shares = jnp.asarray(_shares("MeanOfLogits", self.weights, teachers))

        def mean(*logits: Array) -> Array:
            stacked = jnp.stack(logits, axis=-1).astype(jnp.float32)
            return stacked @ (shares / jnp.sum(shares))

        return Outputs(each_position(mean, *_logits("MeanOfLogits", teachers)))


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

    def __post_init__(self):
        if not self.names or isinstance(self.names, str):
            fail(
                "Routed",
                "names",
                "be a tuple of at least one teacher",
                repr(self.names),
                "Pass Routed(('a', 'b')), in the order of the indices.",
            )

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
        logits = _logits("Routed", chosen)
        if self.key not in batch:
            fail(
                "Routed",
                "batch",
                f"have {self.key!r}",
                f"the keys {sorted(batch)}",
                "Put the index of each example's teacher there.",
            )
        index = batch[self.key]
        if index.shape != logits[0].shape[:1] or not jnp.issubdtype(
            index.dtype, jnp.integer
        ):
            fail(
                "Routed",
                f"batch[{self.key!r}]",
                f"be integers of shape {logits[0].shape[:1]}",
                f"{index.dtype} of shape {index.shape}",
                "One index belongs to each example.",
            )
        lead = logits[0].shape[:-1]
        index = jnp.broadcast_to(jnp.expand_dims(index, range(1, len(lead))), lead)
        # a negative index would count from the end
        index = jnp.where(index < 0, len(self.names), index)

        def chosen_rows(index: Array, *logits: Array) -> Array:
            stacked, index = jnp.stack(logits, axis=-2), index[..., None, None]
            rows = jnp.take_along_axis(
                stacked, index, axis=-2, mode="fill", fill_value=jnp.nan
            )
            return rows[..., 0, :]

        return Outputs(each_position(chosen_rows, index, *logits))


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


__all__ = ["Combine", "MeanOfLogits", "MeanOfProbabilities", "Only", "Routed"]
