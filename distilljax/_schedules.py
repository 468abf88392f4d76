"""What the numbers of an objective must satisfy, as numbers and as schedules.

An objective, or another frozen dataclass, may have `rules`: for the fields that are
numbers or schedules a function `(function, argument, value)` that raises. A number is
checked when the objective is built, a schedule before a run, at steps from its first to
its last, because inside the compiled step nothing can raise any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distilljax._checks import check_between, check_finite, check_temperature

Rule = Callable[[str, str, Any], None]

# Between them a schedule is taken to be what it is beside them.
_MOST_STEPS = 1025
# A cosine ends at 0 but for rounding, which is no mistake of who wrote it.
_DIGITS = 6


def check_weight(function: str, argument: str, value: Any) -> None:
    """Finite, and at least 0: below it, learning would be undone."""
    check_finite(function, argument, value)
    check_between(function, argument, value, 0, float("inf"))


def check_share(function: str, argument: str, value: Any) -> None:
    """A part of a whole."""
    check_between(function, argument, value, 0, 1)


def check_softness(function: str, argument: str, value: Any) -> None:
    """A temperature."""
    check_temperature(function, value, argument)


def check_numbers(part: Any) -> None:
    """Raise if a field of this part is a number that breaks its rule."""
    for name, value, rule in _ruled(part):
        if value is not None and not callable(value):
            rule(type(part).__name__, name, value)


def check_schedules(part: Any, num_steps: int) -> None:
    """Raise if a schedule of this part, or of one inside it, breaks its field's rule.

    Args:
      part: An objective; parts are found in the fields of dataclasses, and in mappings.
      num_steps: Length of the run.
    """
    for name, value, rule in _ruled(part):
        if callable(value):
            for step, found in _values(value, num_steps):
                rule(type(part).__name__, f"{name} at step {step}", found)
    for inner in _inside(part):
        check_schedules(inner, num_steps)


def _ruled(part: Any) -> Iterator[tuple[str, Any, Rule]]:
    """The fields that have a rule; of a mapping its values."""
    for field, rule in getattr(part, "rules", {}).items():
        value = getattr(part, field)
        if isinstance(value, Mapping):
            yield from ((f"{field}[{name!r}]", x, rule) for name, x in value.items())
        else:
            yield field, value, rule


def _inside(part: Any) -> Iterator[Any]:
    if isinstance(part, Mapping):
        yield from part.values()
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        yield from (getattr(part, field.name) for field in dataclasses.fields(part))


def _values(schedule: Callable[[Any], Any], num_steps: int) -> Iterator[Any]:
    """Steps, and what a schedule gives there."""
    count = min(num_steps + 1, _MOST_STEPS)
    steps = np.linspace(0, num_steps, count).astype(np.int32)
    # as inside the step, where it sees an array as well
    found = jax.vmap(lambda step: jnp.asarray(schedule(step)))(steps)
    for step, value in zip(steps, np.asarray(found, np.float64), strict=True):
        yield int(step), value if value.ndim else round(float(value), _DIGITS)


__all__ = [
    "Rule",
    "check_numbers",
    "check_schedules",
    "check_share",
    "check_softness",
    "check_weight",
]
