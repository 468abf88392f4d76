"""What a block of logits gives: values at each position, and the student's gradient.

A block is a few positions with all their classes, [rows, classes]. Any divergence is
differentiated as it stands. The forward KL and the cross-entropy, which most runs use,
have closed forms that touch the block less often.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from distilljax.losses import _numerics as numerics
from distilljax.losses._cross_entropy import cross_entropy
from distilljax.losses._fused_mesh import has_split_classes
from distilljax.losses._kl import forward_kl
from distilljax.losses._sparse import SparseLogits

Block = Float[Array, "rows classes"]
Values = dict[str, Float[Array, "rows"]]

# Classes of a group whose largest logit is kept.
_GROUP = 256


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
      z: Student's logits; where the mask is false, of zero hidden states.
      v: Teacher's logits, the same, or a signal that the divergence knows, or None.
      row: `mask` [rows], and `labels` [rows] if there are any.
      scalars: `temperature`, `label_smoothing`, and `kd_weight` and `ce_weight` as far
        as they are in the sum: what is not cannot make it nan.
    """
    mask = row["mask"]
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
    """softmax(logits / T): the exponentials, once, and two numbers for each row."""

    def __init__(self, logits: Block, temperature: Any = None):
        self.logits = logits
        self.largest, self.largest_at = jax.lax.stop_gradient(_largest(logits))
        shifted = logits - self.largest
        self.shifted = shifted if temperature is None else shifted / temperature
        self.exps = jnp.exp(self.shifted)
        self.total = jnp.sum(self.exps, axis=-1, keepdims=True)
        self.log_total = jnp.log(self.total)

    def probs(self) -> Block:
        """The probabilities."""
        return self.exps * (1 / self.total)

    def log_probs(self) -> Block:
        """Logarithms of the probabilities."""
        return self.shifted - self.log_total

    def entropy(self) -> Float[Array, "rows"]:
        """Entropy in nats; a class at -inf counts 0."""
        mean = jnp.sum(self.exps * numerics.floored(self.shifted), axis=-1)
        return self.log_total[:, 0] - mean / self.total[:, 0]

    def kl_to(self, other: Softmax) -> Float[Array, "rows"]:
        """KL(self || other), as `numerics.kl` has it: +inf where only other is zero."""
        log_a, log_b = self.log_probs(), other.log_probs()
        gap = numerics.log_ratio(log_a, log_b)
        terms = numerics.bregman_terms(self.probs(), other.probs(), gap)
        missing = numerics.is_zero(log_b) & ~numerics.is_zero(log_a)
        return jnp.sum(jnp.where(missing, jnp.inf, terms), axis=-1)

    def top(self) -> Array:
        """The likeliest class, the first one of equals; -1 in a row that is nan."""
        undefined = jnp.isnan(self.log_total[:, 0])  # a maximum may pass over a nan
        return jnp.where(undefined, -1, self.largest_at)


def _largest(logits: Block) -> tuple[Float[Array, "rows 1"], Array]:
    """The largest of each row, and the first class that has it.

    On a CPU by groups of classes, which takes one pass over the logits, not three.
    Elsewhere a group would not lie as the logits do.
    """
    size = math.gcd(logits.shape[1], _GROUP)
    if size < _GROUP // 8 or has_split_classes():
        return _largest_of_all(logits)
    by_groups = functools.partial(_largest_by_groups, size)
    return jax.lax.platform_dependent(logits, cpu=by_groups, default=_largest_of_all)


def _largest_of_all(logits: Block) -> tuple[Float[Array, "rows 1"], Array]:
    largest = logits.max(axis=-1, keepdims=True)
    return largest, _first(logits == largest)


def _largest_by_groups(
    size: int, logits: Block
) -> tuple[Float[Array, "rows 1"], Array]:
    by_group = logits.reshape(logits.shape[0], -1, size)
    # Held, or the compiler would take the maximum of the row from the logits again.
    maxima = jax.lax.optimization_barrier(by_group.max(axis=-1))
    largest = maxima.max(axis=-1, keepdims=True)
    group = _first(maxima == largest)
    found = jnp.take_along_axis(by_group, group[:, None, None], axis=1)[:, 0]
    return largest, group * size + _first(found == largest)


def _first(at: Bool[Array, "rows columns"]) -> Array:
    """The first column where it is true; -1 if nowhere."""
    # In floating point, because the minimum of integers is ten times slower.
    wide = jnp.float32 if at.shape[-1] < 2**24 else jnp.float64
    index = jax.lax.broadcasted_iota(wide, at.shape, 1)
    first = jnp.min(jnp.where(at, index, jnp.inf), axis=-1)
    return jnp.where(jnp.isfinite(first), first, -1.0).astype(jnp.int32)


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
    v = v.astype(z.dtype)
    teacher = Softmax(v)
    metrics = {
        "teacher_entropy": teacher.entropy(),
        "agreement": (own.top() == teacher.top()).astype(z.dtype),
    }
    kl = teacher.kl_to(own)
    metrics["kl"] = kl
    if losses.divergence is not forward_kl:
        kd, slope = _differentiate(losses.divergence, z, v, temperature, row)
        return kd, slope, metrics
    if not losses.tempered:
        return kl, own.probs() - teacher.probs(), metrics
    soft, softer = Softmax(z, temperature), Softmax(v, temperature)
    slope = (soft.probs() - softer.probs()) / temperature
    return softer.kl_to(soft), slope, metrics


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
    slope = own.probs() - hit.astype(z.dtype)
    return values, slope * poison[:, None]
