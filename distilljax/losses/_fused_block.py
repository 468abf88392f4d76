"""What a block of logits gives: values at each position, and the student's gradient.

A block is a few positions with all their classes, [rows, classes]. Any divergence is
differentiated as it stands. The forward KL and the cross-entropy, which most runs use,
have closed forms that touch the block less often.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distilljax.losses import _numerics as numerics
from distilljax.losses._cross_entropy import cross_entropy
from distilljax.losses._kl import forward_kl
from distilljax.losses._sparse import SparseLogits

Block = Float[Array, "rows classes"]
Values = dict[str, Float[Array, "rows"]]


@dataclass(frozen=True)
class Losses:
    """What is computed of a block, as far as it is known when compiled.

    Attributes:
      divergence: Position-wise loss of (student, teacher, temperature=, where=).
      has_teacher: Whether there is one.
      tempered: Whether the temperature may be other than 1.
      smooth: Whether the labels may be smoothed.
    """

    divergence: Callable[..., Array]
    has_teacher: bool
    tempered: bool
    smooth: bool


def evaluate(
    losses: Losses, z: Block, v: Any, row: dict[str, Any], scalars: dict[str, Any]
) -> tuple[Values, Block]:
    """Values of the rows, and the gradient of their weighted sum with respect to z.

    Args:
      losses: What to compute.
      z: Student's logits.
      v: Teacher's logits, or a signal that the divergence knows; None for none.
      row: `mask` [rows], and `labels` [rows] if there are any.
      scalars: `temperature`, `label_smoothing`, and `kd_weight` and `ce_weight` as far
        as they are in the sum: what is not cannot make it nan.
    """
    mask = row["mask"]
    z = numerics.zero_masked(z, mask, trailing=1)
    own = Softmax(z)
    values: Values = {"student_entropy": own.entropy()}
    slope = jnp.zeros_like(z)
    if losses.has_teacher:
        kd, soft, metrics = _divergence(losses, z, v, own, row, scalars)
        values |= {"kd": kd, **metrics}
        if "kd_weight" in scalars:
            slope = soft * scalars["kd_weight"]
    if "labels" in row:
        ce, hard = _labelled(losses, z, own, row["labels"], mask, scalars)
        values |= {"ce": ce, "accuracy": (own.top() == row["labels"]).astype(z.dtype)}
        if "ce_weight" in scalars:
            slope = slope + hard * scalars["ce_weight"]
    values = {name: numerics.zero_masked(x, mask) for name, x in values.items()}
    return values, numerics.zero_masked(slope, mask, trailing=1)


class Softmax:
    """softmax(logits / T), from the logits and two numbers for each row."""

    def __init__(self, logits: Block, temperature: Any = None):
        self.logits = logits
        self.largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        shifted = logits - self.largest
        self.shifted = shifted if temperature is None else shifted / temperature
        total = jnp.sum(jnp.exp(self.shifted), axis=-1, keepdims=True)
        self.log_total = jnp.log(total)

    def log_probs(self) -> Block:
        """Logarithms of the probabilities."""
        return self.shifted - self.log_total

    def entropy(self) -> Float[Array, "rows"]:
        """Entropy in nats; a class at -inf counts 0."""
        terms = jnp.exp(self.log_probs()) * numerics.floored(self.shifted)
        return self.log_total[:, 0] - jnp.sum(terms, axis=-1)

    def top(self) -> Array:
        """The likeliest class, the first one of equals; -1 if none (nan)."""
        # In floating point, because the minimum of integers is ten times slower.
        classes = self.logits.shape[-1]
        wide = jnp.float32 if classes < 2**24 else jnp.float64
        index = jax.lax.broadcasted_iota(wide, self.logits.shape, 1)
        at_top = self.logits == self.largest
        first = jnp.min(jnp.where(at_top, index, jnp.inf), axis=-1)
        found = jnp.isfinite(first)
        return jnp.where(found, first, -1.0).astype(jnp.int32)


def _divergence(
    losses: Losses,
    z: Block,
    v: Any,
    own: Softmax,
    row: dict[str, Any],
    scalars: dict[str, Any],
) -> tuple[Array, Block, Values]:
    """The divergence, its gradient, and what else is known of the two."""
    temperature = scalars["temperature"] if losses.tempered else 1.0
    mask = row["mask"]
    if not isinstance(v, jax.Array):
        kd, slope = _differentiate(losses.divergence, z, v, temperature, row)
        return kd, slope, _sparse_metrics(z, v, own, mask)
    v = numerics.zero_masked(v.astype(z.dtype), mask, trailing=1)
    teacher = Softmax(v)
    metrics = {
        "teacher_entropy": teacher.entropy(),
        "agreement": (own.top() == teacher.top()).astype(z.dtype),
    }
    if losses.divergence is not forward_kl:
        metrics["kl"] = numerics.kl(teacher.log_probs(), own.log_probs())
        kd, slope = _differentiate(losses.divergence, z, v, temperature, row)
        return kd, slope, metrics
    kl = numerics.kl(teacher.log_probs(), own.log_probs())
    if not losses.tempered:
        slope = jnp.exp(own.log_probs()) - jnp.exp(teacher.log_probs())
        return kl, slope, metrics | {"kl": kl}
    log_q = Softmax(z, temperature).log_probs()
    log_p = Softmax(v, temperature).log_probs()
    slope = (jnp.exp(log_q) - jnp.exp(log_p)) / temperature
    return numerics.kl(log_p, log_q), slope, metrics | {"kl": kl}


def _sparse_metrics(z: Block, v: Any, own: Softmax, mask: Array) -> Values:
    """As far as k classes and a tail tell: the KL is at most the dense one."""
    if not isinstance(v, SparseLogits):
        return {}
    best = jnp.argmax(v.log_probs, axis=-1)[:, None]
    top = jnp.take_along_axis(v.ids, best, axis=-1)[:, 0]
    metrics = {"agreement": (own.top() == top).astype(z.dtype)}
    if 1.0 in v.temperatures:
        metrics["kl"] = forward_kl(z, v, where=mask)
    return metrics


def _differentiate(
    loss: Callable[..., Array], z: Block, v: Any, temperature: Any, row: dict[str, Any]
) -> tuple[Array, Block]:
    options = keywords(loss, temperature, row["mask"], row.get("labels"))
    values, pull = jax.vjp(lambda z: loss(z, v, **options), z)
    return values, pull(jnp.ones_like(values))[0]


def keywords(
    loss: Callable[..., Array], temperature: Any, where: Any, labels: Any
) -> dict[str, Any]:
    """What of the usual keyword arguments a position-wise loss is called with.

    One that knows no temperature compares the logits as they are. Labels go to a loss
    that asks for them.
    """
    known = inspect.signature(loss).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    given = {"temperature": temperature, "where": where}
    options = {key: x for key, x in given.items() if takes_all or key in known}
    if "labels" in known and known["labels"].default is inspect.Parameter.empty:
        options["labels"] = labels
    return options


def _labelled(
    losses: Losses,
    z: Block,
    own: Softmax,
    labels: Array,
    mask: Bool[Array, "rows"],
    scalars: dict[str, Any],
) -> tuple[Array, Block]:
    """Cross-entropy with the labels, and its gradient."""
    if losses.smooth:
        eps = scalars["label_smoothing"]
        values, pull = jax.vjp(
            lambda z: cross_entropy(z, labels, label_smoothing=eps, where=mask), z
        )
        return values, pull(jnp.ones_like(values))[0]
    hit = jax.lax.broadcasted_iota(labels.dtype, z.shape, 1) == labels[:, None]
    # A label out of range hits no class: nan, in the gradient too.
    valid = (labels >= 0) & (labels < z.shape[-1])
    poison = jnp.where(valid, 1.0, jnp.nan).astype(z.dtype)
    at_label = jnp.sum(jnp.where(hit, own.shifted, 0.0), axis=-1)
    values = (own.log_total[:, 0] - at_label) * poison
    slope = jnp.exp(own.log_probs()) - hit.astype(z.dtype)
    return values, slope * poison[:, None]
