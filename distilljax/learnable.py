"""Whether an objective can learn from what is kept of a teacher; before it is asked."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from distilljax._checks import fail
from distilljax._objective import Objective, features_of, init_params, parts_of
from distilljax.losses import SampledLogits, SparseLogits
from distilljax.teachers.signals import Kind, Sampled, TopK
from distilljax.terms import Outputs


def check_learnable(
    objective: Objective,
    kind: Kind | None,
    num_classes: int | None,
    features: Collection[str] = (),
) -> None:
    """Raise if a student could not be trained on a signal: that is found in a moment.

    Args:
      objective: What the student shall minimise. One that needs no teacher is not
        looked at.
      kind: What is kept of the logits; None: nothing.
      num_classes: Of the teacher; None without logits.
      features: Names of the features that are kept.

    Raises:
      ValueError: A part of the objective cannot take it.

    Example:
      >>> from distilljax.objectives import LogitKD
      >>> check_learnable(LogitKD(), Sampled(12), 1000)
      >>> check_learnable(LogitKD(4.0), Sampled(12), 1000)    # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: cache: what is kept must be what LogitKD can learn from, got ...
    """
    for part in parts_of(objective):
        name = type(part).__name__
        names = features_of(part, "teacher")
        if missing := sorted(set(names) - set(features)):
            fail(
                "cache",
                "features",
                f"have those that {name} reads",
                f"none of the name {missing[0]!r}",
                "Keep it too: --features, or features=.",
            )
        if not names:
            _try(part, name, kind, num_classes)


def _try(part: Objective, name: str, kind: Kind | None, num_classes: Any) -> None:
    """Trace its loss at one position, if all that it needs is known here."""
    lossy = isinstance(kind, TopK | Sampled)
    known = lossy and not features_of(part, "student") and _has_no_params(part)
    if not known or not hasattr(part, "divergence"):
        return
    z = jax.ShapeDtypeStruct((1, num_classes), jnp.float32)
    batch = {
        "labels": jax.ShapeDtypeStruct((1,), jnp.int32),
        "loss_mask": jax.ShapeDtypeStruct((1,), bool),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }

    def loss(z: Any, signal: Any, batch: Any) -> Any:
        terms = part(Outputs(z), Outputs(signal), batch)
        return {key: term.mean() for key, term in terms.items()}

    try:
        jax.eval_shape(loss, z, _signal(kind), batch)
    except (TypeError, ValueError) as error:
        fail(
            "cache",
            "what is kept",
            f"be what {name} can learn from",
            f"{kind}, of which it says: {str(error).rstrip('.')}",
            "Keep another kind (--kind hidden is for every loss), or name the arm that "
            "shall learn from it (--arm).",
        )


def _has_no_params(part: Objective) -> bool:
    return init_params(part, jax.random.key(0)) is None and not hasattr(
        part, "init_state"
    )


def _signal(kind: Any) -> Any:
    """Its form at one position."""
    if isinstance(kind, TopK):
        ids, log_probs = _pair(kind.k)
        tail = jax.ShapeDtypeStruct((1, len(kind.temperatures)), jnp.float32)
        return SparseLogits(ids, log_probs, tail, kind.temperatures)
    return SampledLogits(*_pair(kind.num_samples))


def _pair(size: int) -> tuple[Any, Any]:
    ids = jax.ShapeDtypeStruct((1, size), jnp.int32)
    return ids, jax.ShapeDtypeStruct((1, size), jnp.float32)


__all__ = ["check_learnable"]
