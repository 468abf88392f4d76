"""What a model says (`Outputs`), and what an objective makes of it (`Term`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distilljax import losses
from distilljax._functional import Batch, shard_as_batch
from distilljax.losses._heads import map_positions
from distilljax.typing import Mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outputs:
    """What a model says about a batch.

    Attributes:
      logits: Unnormalised log-probabilities, floating point, [batch, ..., classes]; or
        a `losses.LinearHead`, whose logits are never whole; a teacher's may also be
        `losses.SparseLogits` or `losses.SampledLogits`.
      features: Named intermediate arrays, for losses that compare them.

    Example:
      >>> Outputs(logits=jnp.zeros((2, 10))).logits.shape
      (2, 10)
    """

    # Any, because transformations rebuild this node around whatever they carry
    logits: Any = None
    features: Mapping[str, Any] = field(default_factory=dict)


# What `diagnostics` finds of a student and its labels, and of a teacher.
OF_STUDENT = frozenset({"student_entropy", "accuracy"})
OF_TEACHER = frozenset({"agreement", "kl", "teacher_entropy"})
DIAGNOSTICS = OF_STUDENT | OF_TEACHER

# What an objective gets of teachers: one, several by name, or none.
Teacher = Outputs | Mapping[str, Outputs] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Term:
    """One term of the loss, not yet reduced.

    Attributes:
      values: One value per position, float32, any shape; or a `Mean`, where a loss has
        already summed and counted (`where` is None then).
      where: Which positions count: boolean, of the shape of `values`; None is all. Any
        number but 0 counts as True: a mask is no weight.
      weight: Factor of this term in the loss, a scalar; may be traced.
      parts: What else is known of it, by the names under which it is logged: a loss
        that was computed in one go has its summands here. Not added to the loss.

    Example:
      >>> term = Term(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False]))
      >>> float(term.mean().value)
      2.0
    """

    values: Any
    where: Any = None
    weight: Any = 1.0
    parts: Mapping[str, Mean] = field(default_factory=dict)

    def mean(self) -> Mean:
        """The sum of the values that count, and their count."""
        if isinstance(self.values, Mean):
            if self.where is not None:
                raise ValueError(
                    "Term: where must be None when values is a Mean, got a mask. "
                    "Apply the mask where the sum and the count are made."
                )
            return self.values
        total = losses.masked_sum(self.values, self.where)
        if self.where is None:
            return Mean(total, jnp.asarray(self.values.size, jnp.float32))
        return Mean(total, jnp.sum(self.where != 0, dtype=jnp.float32))


def reduce_terms(
    terms: Any, counts: Mapping[str, Float[Array, ""]] | None = None
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """Add up the terms of an objective, each a mean over its own valid positions.

    loss = sum over terms of weight * (sum of the values that count) / count

    Args:
      terms: The terms by name, a mapping from text to `Term`.
      counts: Denominators by name, where they are not those of `terms` themselves
        (a microbatch is divided by the count of the whole batch).

    Returns:
      The loss, float32 scalar; and each term unweighted, and its parts, as a `Mean`
      without gradient.

    Example:
      >>> terms = {"kd": Term(jnp.array([1.0, 3.0]), weight=2.0),
      ...          "ce": Term(jnp.array([5.0, 7.0]), jnp.array([True, False]))}
      >>> loss, metrics = reduce_terms(terms)
      >>> float(loss), float(metrics["ce"].value)     # 2 * 2 + 5
      (9.0, 5.0)
    """
    if not isinstance(terms, Mapping) or not all(
        isinstance(term, Term) for term in terms.values()
    ):
        raise TypeError(
            "reduce_terms: terms must map names to Term, got "
            f"{jax.tree.map(lambda x: type(x).__name__, terms)}. Return "
            "{'name': Term(values, where, weight)} from the objective."
        )
    if not terms:
        raise ValueError(
            "reduce_terms: terms must have at least one term, got none. Return "
            "{'name': Term(values, where, weight)} from the objective."
        )
    loss = jnp.zeros((), jnp.float32)
    metrics = {}
    for name, term in terms.items():
        mean = term.mean()
        count = mean.count if counts is None else counts[name]
        loss += term.weight * Mean(mean.sum, jax.lax.stop_gradient(count)).value
        found = {name: mean, **term.parts}
        if twice := sorted(metrics.keys() & found.keys()):
            raise ValueError(
                "reduce_terms: the names of terms and of their parts must differ, got "
                f"{twice} twice. Rename one in the objective."
            )
        metrics |= jax.lax.stop_gradient(found)
    return loss, metrics


def refuse_reserved_keys(batch: Batch, teacher_apply: Any) -> None:
    """Raise if the batch has a key that the step itself sets."""
    given = teacher_apply in (None, complete_teacher)
    ours = {"step"} if given else {"step", "teacher"}
    if taken := sorted(ours & batch.keys()):
        raise ValueError(
            f"DistillStep: batch must not have the keys {sorted(ours)}, got {taken}. "
            "The step adds 'step', and a teacher given to make_distill_step makes its "
            "own outputs: rename or drop the key."
        )


def refuse_reserved_names(terms: Mapping[str, Any], always: Mapping[str, Any]) -> None:
    """Raise if a term has the name of a metric that is always logged."""
    taken = sorted(terms.keys() & {*always, "loss", "grad_norm"})
    if taken:
        raise ValueError(
            "DistillStep: the names of terms must differ from those of the metrics "
            f"that are always logged, got {taken}. Name the term after its loss, such "
            "as 'reverse_kl'."
        )


def as_outputs(outputs: Any) -> Outputs:
    """Bare logits are outputs too."""
    return outputs if isinstance(outputs, Outputs) else Outputs(logits=outputs)


def as_teacher(outputs: Any) -> Teacher:
    """The outputs of one teacher, of several by name, or of none."""
    if outputs is None:
        return None
    if isinstance(outputs, Mapping):
        return {name: as_outputs(x) for name, x in outputs.items()}
    return as_outputs(outputs)


def split_heads(teacher: Any) -> tuple[Any, Any]:
    """A teacher's outputs, and of its heads what is the same for all batches.

    Hidden states are a fraction of the bytes of a kernel, which is sent once.

    Args:
      teacher: The outputs of one teacher, or of several by name.

    Returns:
      The outputs, each `LinearHead` with its hidden states alone; and the heads without
      them, or None where there is no head (a dict of these, of several teachers).

    Example:
      >>> head = losses.LinearHead(jnp.ones((2, 3)), jnp.ones((3, 5)))
      >>> sent, kept = split_heads(Outputs(head))
      >>> sent.logits.kernel is None, kept.hidden is None
      (True, True)
      >>> complete_teacher(kept, {"teacher": sent}).logits.shape
      (2, 5)
    """
    if teacher is None:
        return None, None
    if isinstance(teacher, Mapping):
        split = {name: split_heads(outputs) for name, outputs in teacher.items()}
        heads = {name: head for name, (_, head) in split.items()}
        found = any(head is not None for head in heads.values())
        return {k: sent for k, (sent, _) in split.items()}, heads if found else None
    head = teacher.logits
    if not isinstance(head, losses.LinearHead):
        return teacher, None
    hidden = losses.LinearHead(head.hidden, None, scale=None)
    return replace(teacher, logits=hidden), replace(head, hidden=None)


def complete_teacher(heads: Any, batch: Batch) -> Any:
    """What `split_heads` divided, as one: ``batch["teacher"]`` with its heads."""
    teacher = as_teacher(batch.get("teacher"))
    if isinstance(teacher, Mapping):
        return {
            name: complete_teacher((heads or {}).get(name), {"teacher": outputs})
            for name, outputs in teacher.items()
        }
    if teacher is None or not isinstance(teacher.logits, losses.LinearHead):
        return teacher
    if heads is None or teacher.logits.kernel is not None:
        return teacher
    return replace(teacher, logits=replace(heads, hidden=teacher.logits.hidden))


def as_one_teacher(teacher: Teacher) -> Outputs | None:
    """Several teachers as the mean of their probabilities; one as it is."""
    if not isinstance(teacher, Mapping):
        return teacher
    logits = [outputs.logits for outputs in teacher.values()]
    shapes = [getattr(v, "shape", None) for v in logits]
    if any(shape is None or shape != shapes[0] for shape in shapes):
        return None  # nothing that could be averaged
    if any(isinstance(v, losses.LinearHead) for v in logits):
        return Outputs(map_positions(lambda *v: log_mean_probabilities(v), *logits))
    return Outputs(log_mean_probabilities(logits))


def log_mean_probabilities(
    logits: Sequence[Array], weights: Sequence[Any] | None = None
) -> Array:
    """The log of the mean distribution; weights are divided by their sum."""
    stacked = jnp.stack([jnp.asarray(v, jnp.float32) for v in logits])
    weights = [1.0] * len(logits) if weights is None else weights
    share = jnp.asarray(weights, jnp.float32).reshape(-1, *[1] * logits[0].ndim)
    log_p = jax.nn.log_softmax(stacked, axis=-1)
    return jax.nn.logsumexp(log_p, axis=0, b=share / jnp.sum(share))


def shard_outputs(outputs: Any, axes: Any) -> Any:
    """Hold what belongs to the examples to the sharding of the batch, if `axes`."""
    if outputs is None:
        return None
    if isinstance(outputs, Mapping):
        return {name: shard_outputs(x, axes) for name, x in outputs.items()}
    head = outputs.logits
    if not isinstance(head, losses.LinearHead):
        return shard_as_batch(outputs, axes)
    sharded = shard_as_batch(Outputs(head.hidden, outputs.features), axes)
    return replace(sharded, logits=replace(head, hidden=sharded.logits))


def diagnostics(
    student: Outputs,
    teacher: Teacher,
    batch: Batch,
    terms: Mapping[str, Term] | None = None,
) -> dict[str, Mean]:
    """What is always logged of two sets of logits, at temperature 1, in nats.

    Nothing where the terms have it among their parts: a head's logits would be made a
    second time for it.
    """
    z = student.logits
    one = as_one_teacher(teacher)
    v = None if one is None else one.logits
    if z is None:
        return {}
    positions = z.shape[:-1]
    where, labels = batch.get("loss_mask"), batch.get("labels")
    where = where if where is not None and where.shape == positions else None
    labels = labels if labels is not None and labels.shape == positions else None
    sparse = isinstance(v, losses.SparseLogits)
    v = v if sparse or getattr(v, "shape", None) == z.shape else None
    known = {name for term in (terms or {}).values() for name in term.parts}
    if {"student_entropy"} | ({"agreement"} if v is not None else set()) <= known:
        return {}
    heads = any(isinstance(x, losses.LinearHead) for x in (z, v))
    values = (
        map_positions(_diagnose, z, v, labels) if heads else _diagnose(z, v, labels)
    )
    return {name: Term(x, where).mean() for name, x in values.items()}


def _diagnose(z: Array, v: Any, labels: Array | None) -> dict[str, Array]:
    top_z = jnp.argmax(z, axis=-1)
    values = {"student_entropy": losses.soft_cross_entropy(z, z)}
    if labels is not None:
        values["accuracy"] = (top_z == labels).astype(jnp.float32)
    if isinstance(v, losses.SparseLogits):
        best = jnp.argmax(v.log_probs, axis=-1)[..., None]
        top_v = jnp.take_along_axis(v.ids, best, axis=-1)[..., 0]
        values["agreement"] = (top_z == top_v).astype(jnp.float32)
        if 1.0 in v.temperatures:  # of the tail bucket, so at most the dense one
            values["kl"] = losses.forward_kl(z, v)
    elif v is not None:
        values["agreement"] = (top_z == jnp.argmax(v, axis=-1)).astype(jnp.float32)
        values["kl"] = losses.forward_kl(z, v)
        values["teacher_entropy"] = losses.soft_cross_entropy(v, v)
    return values
