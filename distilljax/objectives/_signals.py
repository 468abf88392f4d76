"""What objectives take: logits in their several forms, labels, and losses of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from distilljax import losses
from distilljax._checks import fail
from distilljax._functional import Batch
from distilljax.losses._heads import accepts_heads, first_classes, map_positions
from distilljax.terms import Teacher

Divergence = Callable[..., Float[Array, "*batch"]]


def logits_of(function: str, outputs: Teacher, whose: str) -> Any:
    """The logits, or an error that says where they should come from."""
    if isinstance(outputs, Mapping):
        fail(
            function,
            whose,
            "be one model",
            f"several, {', '.join(outputs)}",
            "Say how they are combined: MultiTeacher(objective, combine=...).",
        )
    if outputs is None or outputs.logits is None:
        fail(
            function,
            whose,
            "have logits",
            "none",
            "Give the step (teacher= of make_distill_step or of the config) a model "
            "whose forward returns logits, or put Outputs under batch['teacher'].",
        )
    return outputs.logits


def labels_of(
    function: str,
    batch: Batch,
    remedy: str = "Set ce_weight=0 to learn from the teacher alone.",
) -> Array:
    """The labels, or an error that says how to do without."""
    if "labels" not in batch:
        rule, got = "have 'labels'", f"the keys {sorted(batch)}"
        fail(function, "batch", rule, got, remedy)
    return batch["labels"]


def check_num_classes(function: str, num_classes: int | None) -> None:
    """Raise unless it is None or a number of classes."""
    if num_classes is not None and num_classes < 1:
        remedy = "It is the size of the vocabulary without what pads it."
        fail(function, "num_classes", "be at least 1", num_classes, remedy)


def real_classes(function: str, logits: Any, num_classes: int | None) -> Any:
    """The logits of the first `num_classes` classes, of which there must be as many."""
    shape = getattr(logits, "shape", None)  # a sparse signal has none
    if num_classes is not None and shape is not None and shape[-1] < num_classes:
        fail(
            function,
            "num_classes",
            "be at most the number of classes of both models",
            f"{num_classes} for logits of shape {shape}",
            "It is the size of the vocabulary that both know.",
        )
    return first_classes(logits, num_classes)


def by_position(function: str, loss: Divergence) -> Divergence:
    """A position-wise loss of logits that takes heads too; errors name the function."""

    def named(first: Any, second: Any, **options: Any) -> Array:
        return loss(first, second, **options)

    named.__name__ = function
    return accepts_heads(named)


def each_position(rows: Callable[..., Any], *signals: Any) -> Any:
    """`rows` of the signals, with the logits of heads made for a few at a time."""
    if any(isinstance(x, losses.LinearHead) for x in signals):
        return map_positions(rows, *signals)
    return rows(*signals)


def likeliest_class(function: str, teacher: Any) -> Array:
    """The class that a teacher decides for, at each position."""
    if isinstance(teacher, losses.SampledLogits):
        fail(
            function,
            "teacher",
            "have a likeliest class",
            "SampledLogits",
            "A sample does not tell it: pass logits, a LinearHead or SparseLogits.",
            TypeError,
        )
    if isinstance(teacher, losses.SparseLogits):
        best = jnp.argmax(teacher.log_probs, axis=-1)[..., None]
        return jnp.take_along_axis(teacher.ids, best, axis=-1)[..., 0]
    return each_position(lambda v: jnp.argmax(v, axis=-1), teacher)


def options_of(
    function: str, divergence: Divergence, known: Collection[str]
) -> frozenset[str]:
    """Which of the options that an objective can give a divergence takes.

    An error, if it cannot be called without an option that the objective does not know.
    """
    parameters = list(inspect.signature(divergence).parameters.values())
    by_name = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name += positional[2:]  # after the student and the teacher
    known = {*known, "where"}
    needed = [p.name for p in by_name if p.default is p.empty and p.name not in known]
    if needed:
        fail(
            function,
            "divergence",
            f"need no other options than {', '.join(sorted(known))}",
            f"{name_of(divergence)}, which needs {', '.join(needed)}",
            "Bind the others with functools.partial, or write an objective of your "
            "own: a function that returns Terms.",
        )
    # what passes anything on has a temperature, and no labels
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in by_name} | ({"temperature"} if rest else set())
    return frozenset(taken & known)


def check_tempered(
    function: str, divergence: Divergence, options: Collection[str], remedy: str
) -> None:
    """Raise unless a temperature is among the options of a divergence."""
    if "temperature" not in options:
        got = name_of(divergence)
        fail(function, "divergence", "take a temperature", got, remedy)


def name_of(divergence: Divergence) -> str:
    """What a divergence is called."""
    return getattr(divergence, "__name__", repr(divergence))
