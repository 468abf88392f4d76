"""What the step asks of an objective besides its call. All of it is optional.

student_features, teacher_features     names of the features that it reads
average_features, uses_average         the same of the student's moving average
init_params(rng) -> params             parameters of its own, trained by the step:
                                       it is called with `params=`
init_state() -> state                  state of its own: it is called with `state=`
                                       and returns (terms, seen)
next_state(state, seen) -> state       once per update; `seen` is stacked over the
                                       microbatches
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distilljax._checks import fail
from distilljax._functional import Batch, PyTree
from distilljax.terms import Outputs, Teacher

Objective = Callable[..., Any]


def features_of(objective: Objective, whose: str) -> tuple[str, ...]:
    """The names of the features that an objective reads: whose is student, ..."""
    return tuple(getattr(objective, f"{whose}_features", ()))


def parts_of(objective: Objective) -> list[Objective]:
    """The objectives that one is made of, and that see its teacher; itself if of none.

    Example:
      >>> from distilljax.objectives import CrossEntropy, LogitKD, Sum
      >>> parts = parts_of(Sum({"soft": LogitKD(), "hard": CrossEntropy()}))
      >>> [type(part).__name__ for part in parts]
      ['LogitKD']
    """
    if not getattr(objective, "uses_teacher", True):
        return []
    inside = getattr(objective, "objective", None)
    parts = getattr(objective, "parts", None)
    if isinstance(parts, Mapping):
        return [found for part in parts.values() for found in parts_of(part)]
    return [objective] if inside is None else parts_of(inside)


def temperatures_of(objective: Objective) -> list[Any]:
    """The temperatures, or schedules of one, at which it sees its teacher, each once.

    Example:
      >>> from distilljax.objectives import LogitKD, Sum
      >>> temperatures_of(Sum({"a": LogitKD(4.0), "b": LogitKD(), "c": LogitKD(4.0)}))
      [4.0, 1.0]
    """
    parts: list[Any] = parts_of(objective)
    each = [part.temperature for part in parts if hasattr(part, "temperature")]
    return [x for i, x in enumerate(each) if x not in each[:i]]


def uses_average(objective: Objective) -> bool:
    """True if it reads what the student's moving average says."""
    return getattr(objective, "uses_average", False)


def check_average(objective: Objective, ema_decay: float | None) -> None:
    """A decay lies in [0, 1), and a teacher that is the student's average needs one."""
    if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
        fail(
            "make_distill_step",
            "ema_decay",
            "lie in [0, 1)",
            ema_decay,
            "Use 0.999 or so, or None for no average.",
        )
    if uses_average(objective) and ema_decay is None:
        fail(
            "make_distill_step",
            "ema_decay",
            "be given for an objective whose teacher is the student's average",
            None,
            "Use 0.999 or so.",
        )


def init_params(objective: Objective, rng: jax.Array) -> PyTree:
    """The objective's own parameters; None if it has none."""
    make = getattr(objective, "init_params", None)
    return None if make is None else make(rng) or None


def has_params(objective: Objective) -> bool:
    """True if the objective has parameters of its own."""
    shapes = jax.eval_shape(lambda: init_params(objective, jax.random.key(0)))
    return bool(jax.tree.leaves(shapes))


def init_state(objective: Objective) -> PyTree:
    """The objective's own state before the first step; None if it has none."""
    make = getattr(objective, "init_state", None)
    return _own(None if make is None else make())


def _own(state: PyTree) -> PyTree:
    # strong types: a weak one would make the second step another program; and copies:
    # a buffer that stands in two places cannot be donated
    return jax.tree.map(lambda x: jnp.copy(jnp.asarray(x, jnp.result_type(x))), state)


def loaded_state(state: PyTree, like: PyTree) -> PyTree:
    """A saved state, in arrays of its own; an error if it has another form."""
    remedy = (
        "Load it into a step of the same objective, with the same settings, as "
        "step.objective_state gave it."
    )
    _check_form("load_objective_state", "state", state, like, remedy)
    return _own(state)


def _check_form(
    function: str, argument: str, state: PyTree, like: PyTree, remedy: str
) -> None:
    """The same tree of arrays of the same types and shapes."""
    found, expected = (
        jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)
        for tree in (state, like)
    )
    if found != expected:
        fail(
            function,
            argument,
            f"have arrays as those of init_state, {expected}",
            found,
            remedy,
        )


def evaluate(
    objective: Objective,
    student: Outputs,
    teacher: Teacher,
    batch: Batch,
    params: PyTree = None,
    state: PyTree = None,
) -> tuple[Any, PyTree]:
    """Its terms, and what its state is to learn from this batch (None without one)."""
    own = {} if params is None else {"params": params}
    if state is None:
        return objective(student, teacher, batch, **own), None
    return objective(student, teacher, batch, **own, state=state)


def next_state(objective: Any, state: PyTree, seen: PyTree) -> PyTree:
    """The state after an update.

    Args:
      objective: The objective.
      state: The state before.
      seen: What `evaluate` returned, stacked over the microbatches of the update.
    """
    if state is None:
        return None
    new = jax.lax.stop_gradient(objective.next_state(state, seen))
    remedy = "A state that changes its form cannot be trained with, nor saved."
    _check_form("DistillStep", "the result of next_state", new, state, remedy)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), new)
