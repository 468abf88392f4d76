"""What a classifier is measured by: sums that add over batches, and their summary.

`measure` runs inside the compiled evaluation step and returns sums only, so that
batches, shards and hosts combine by addition and a ragged, padded last batch changes
nothing. `summarize` divides once, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distilljax._checks import check_logits, check_where, fail
from distilljax.losses import forward_kl

MAX_COUNTED_CLASSES = 1000
"""Of more classes, as of tokens, only sums over all of them are kept."""

_OF_TEACHER = ("teacher_correct", "both_correct", "gained", "lost")


def measure(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"] | None,
    labels: Int[Array, "*batch"],
    where: Bool[Array, "*batch"] | Float[Array, "*batch"] | None = None,
    *,
    num_bins: int = 15,
) -> dict[str, Array]:
    """Sums over the examples of a batch, from which every reported number follows.

    Add the results of all batches key by key (``jax.tree.map(jnp.add, a, b)``), then
    call `summarize`. Inside ``shard_map``, ``jax.lax.psum`` the dictionary.

    Formula, with p the softmax of the student at temperature 1 and q of the teacher::

        nll             = sum_i -log p_i[label_i]                              (nats)
        kl_to_teacher   = sum_i sum_c q_i[c] (log q_i[c] - log p_i[c])         (nats)
        agreement       = sum_i [argmax p_i == argmax q_i]
        bin_*[b]        = sums over i with b / bins < max p_i <= (b + 1) / bins
        class_*[c]      = counts over i with label_i == c

    Args:
      student_logits: Logits of the model that is measured. No gradient is meant.
      teacher_logits: Logits of its teacher on the same inputs, or None: then the keys
        that need a teacher are absent.
      labels: Class of each example, in [0, classes).
      where: True where an example counts, False for padding; None counts all.
      num_bins: Number of equal-width bins of the confidence, in (0, 1].

    Returns:
      A flat dictionary. Counts are int32 and exact; ``nll``, ``kl_to_teacher`` and
      ``bin_confidence`` are float32.

    Numerics:
      Logits of any float type are read as float32. Padding may hold inf or nan. A row
      that counts and holds nan is wrong for every label, and makes the nll nan: a model
      that broke must not look like one that guesses. Ties go to the lowest class. A
      label out of range is counted in ``invalid_labels``, for which `summarize` raises.

    Example:
      >>> logits = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]))
      >>> mask = jnp.array([True, True, False])
      >>> sums = measure(logits, None, jnp.array([0, 1, 1]), mask)
      >>> int(sums["count"]), sums["class_correct"].tolist()     # the third is padding
      (2, [1, 0])
      >>> round(float(sums["nll"]), 4)                           # log(4/3) + log 2
      0.9808

    Reference:
      C. Guo, G. Pleiss, Y. Sun, K. Weinberger, "On Calibration of Modern Neural
      Networks", ICML 2017, equation 3 (bins); G. Hinton, O. Vinyals, J. Dean,
      "Distilling the Knowledge in a Neural Network", 2015 (the teacher's distribution
      as the target).
    """
    teacher = {} if teacher_logits is None else {"teacher_logits": teacher_logits}
    check_logits("measure", student_logits=student_logits, **teacher)
    _check_labels(labels, student_logits)
    check_where("measure", where, jnp.shape(labels))
    live = jnp.ones(labels.shape, bool) if where is None else where.astype(bool)

    num_classes = student_logits.shape[-1]
    invalid = live & ((labels < 0) | (labels >= num_classes))
    label = jnp.clip(labels, 0, num_classes - 1)
    logits = _live_float32(student_logits, live)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_probs, label[..., None], axis=-1)[..., 0]
    top = _top(logits)
    correct = live & (top == label)
    sums = {
        "count": live.sum(dtype=jnp.int32),
        "invalid_labels": invalid.sum(dtype=jnp.int32),
        "correct": correct.sum(dtype=jnp.int32),
        "nll": jnp.where(live, nll, 0.0).sum(),
        **_confidence_bins(jnp.exp(log_probs.max(-1)), correct, live, num_bins),
    }
    counted = num_classes <= MAX_COUNTED_CLASSES
    if counted:
        sums["class_count"] = _per_class(live, label, num_classes)
        sums["class_correct"] = _per_class(correct, label, num_classes)
    if teacher_logits is None:
        return sums

    teacher_top = _top(_live_float32(teacher_logits, live))
    teacher_correct = live & (teacher_top == label)
    kl = forward_kl(student_logits, teacher_logits, temperature=1.0, where=live)
    sums["kl_to_teacher"] = kl.sum()
    agreement = live & (top == teacher_top) & (top >= 0)
    sums["agreement"] = agreement.sum(dtype=jnp.int32)
    if counted:
        both = correct & teacher_correct
        sums["class_teacher_correct"] = _per_class(teacher_correct, label, num_classes)
        sums["class_both_correct"] = _per_class(both, label, num_classes)
    return sums


def summarize(sums: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation, in plain Python, ready for JSON.

    Formula, with n the number of examples and n_b, conf_b, acc_b those of bin b::

        accuracy = correct / n           nll, kl_to_teacher, agreement = sum / n
        ece      = sum_b (n_b / n) |acc_b - conf_b|
        gained   = student right and teacher wrong;  lost = the reverse, per class

    Args:
      sums: What `measure` returned, added over all batches.

    Returns:
      ``num_examples``, ``accuracy`` (0 to 1), ``nll`` (nats), ``kl_to_teacher`` (nats),
      ``agreement`` (0 to 1), ``ece`` (0 to 1), ``reliability`` with ``edges``,
      ``count``, ``confidence`` and ``accuracy`` (None in an empty bin), and
      ``per_class`` with ``count``, ``correct``, ``teacher_correct``, ``both_correct``,
      ``gained``, ``lost``, which are empty for more than 1,000 classes. What needs a
      teacher is None where there was none.

    Numerics:
      Divisions are in float64.

    Example:
      >>> logits = jnp.log(jnp.array([[0.75, 0.25], [0.25, 0.75]]))
      >>> result = summarize(measure(logits, logits, jnp.array([0, 0])))
      >>> result["accuracy"], result["agreement"], result["per_class"]["correct"]
      (0.5, 1.0, [1, 0])
      >>> round(result["ece"], 6)                    # |1/2 right - 3/4 confident|
      0.25

    Reference:
      M. Naeini, G. Cooper, M. Hauskrecht, "Obtaining Well Calibrated Probabilities
      Using Bayesian Binning", AAAI 2015; C. Guo et al., ICML 2017, equation 3 (ece).
    """
    host = {key: np.asarray(value) for key, value in sums.items()}
    count = int(host["count"])
    if count == 0:
        fail(
            "summarize",
            "sums",
            "count at least one example",
            0,
            "Check that the split is not empty and that the mask is not all False.",
        )
    if invalid := int(host["invalid_labels"]):
        fail(
            "summarize",
            "labels",
            f"lie in [0, {len(host['class_count'])})"
            if "class_count" in host
            else "be classes of the model",
            f"{invalid} of {count} outside",
            "Check the number of classes of the model, or mask these examples.",
        )
    bins = {key: host[f"bin_{key}"] for key in ("count", "confidence", "correct")}
    gap = np.abs(bins["correct"].astype(np.float64) - bins["confidence"])
    result = {
        "num_examples": count,
        "accuracy": int(host["correct"]) / count,
        "nll": float(host["nll"]) / count,
        "kl_to_teacher": None,
        "agreement": None,
        "ece": float(gap.sum()) / count,
        "reliability": {
            "edges": np.linspace(0.0, 1.0, len(bins["count"]) + 1).tolist(),
            "count": bins["count"].tolist(),
            "confidence": _ratio_or_none(bins["confidence"], bins["count"]),
            "accuracy": _ratio_or_none(bins["correct"], bins["count"]),
        },
        "per_class": _summarize_classes(host),
    }
    if "agreement" in host:
        result["kl_to_teacher"] = float(host["kl_to_teacher"]) / count
        result["agreement"] = int(host["agreement"]) / count
    return result


def of_text(
    tokenizer: Any, labels: Int[np.ndarray, " tokens"]
) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """What is said of language models beyond classes, from the same sums.

    Formula, with the sums over the predicted tokens::

        perplexity    = exp(nll)
        bits_per_byte = sum_i nll_i / (log 2 sum_i bytes of token i)

    Perplexities are comparable between models of one tokenizer alone, bits per byte
    between all models.

    Args:
      tokenizer: Whose tokens the labels are; None if they are none.
      labels: The tokens that were predicted.

    Returns:
      A function from the summary of a model to ``perplexity`` and ``bits_per_byte``; to
      an empty dict without a tokenizer.

    Example:
      >>> from types import SimpleNamespace
      >>> tokenizer = SimpleNamespace(num_bytes=lambda: np.array([1, 3]))
      >>> found = of_text(tokenizer, np.array([0, 1]))({"nll": np.log(4.0)})
      >>> round(found["perplexity"], 6), round(found["bits_per_byte"], 6)
      (4.0, 1.0)
    """
    if tokenizer is None:
        return lambda summary: {}
    num_bytes = int(tokenizer.num_bytes()[labels].sum())

    def of(summary: Mapping[str, Any]) -> dict[str, float]:
        nats, count = summary["nll"], len(labels)
        found = {"perplexity": float(np.exp(nats))}
        if num_bytes:
            found["bits_per_byte"] = nats * count / (np.log(2.0) * num_bytes)
        return {name: float(value) for name, value in found.items()}

    return of


def _summarize_classes(host: Mapping[str, np.ndarray]) -> dict[str, list[int] | None]:
    """Counts per class; gained and lost follow from the three that add."""
    if "class_count" not in host:
        return {"count": [], "correct": [], **dict.fromkeys(_OF_TEACHER)}
    classes: dict[str, list[int] | None] = {
        "count": host["class_count"].tolist(),
        "correct": host["class_correct"].tolist(),
    }
    if "class_both_correct" not in host:
        return classes | dict.fromkeys(_OF_TEACHER)
    both, teacher = host["class_both_correct"], host["class_teacher_correct"]
    return classes | {
        "teacher_correct": teacher.tolist(),
        "both_correct": both.tolist(),
        "gained": (host["class_correct"] - both).tolist(),
        "lost": (teacher - both).tolist(),
    }


def _ratio_or_none(total: np.ndarray, count: np.ndarray) -> list[float | None]:
    """Mean of each bin; None, not 0, where nothing fell into it."""
    pairs = zip(total.tolist(), count.tolist(), strict=True)
    return [float(t) / n if n else None for t, n in pairs]


def _live_float32(
    logits: Float[Array, "*batch classes"], live: Bool[Array, "*batch"]
) -> Float[Array, "*batch classes"]:
    """Float32 logits with padding zeroed first: 0 * nan would still be nan."""
    return jnp.where(live[..., None], logits, 0).astype(jnp.float32)


def _top(logits: Float[Array, "*batch classes"]) -> Int[Array, "*batch"]:
    """The predicted class, or -1 (no label) for a row with nan."""
    return jnp.where(jnp.isnan(logits).any(-1), -1, logits.argmax(-1))


def _confidence_bins(
    confidence: Float[Array, "*batch"],
    correct: Bool[Array, "*batch"],
    live: Bool[Array, "*batch"],
    num_bins: int,
) -> dict[str, Array]:
    """Count, confidence and correct answers per bin, open below and closed above."""
    index = jnp.clip(jnp.ceil(confidence * num_bins) - 1, 0, num_bins - 1)
    # nan belongs to no bin by itself; it is put in the first, so that the ece shows it.
    index = jnp.where(jnp.isnan(confidence), 0, index)
    member = (index[..., None] == jnp.arange(num_bins)) & live[..., None]
    axes = tuple(range(live.ndim))
    return {
        "bin_count": member.sum(axes, dtype=jnp.int32),
        "bin_confidence": jnp.where(member, confidence[..., None], 0.0).sum(axes),
        "bin_correct": (member & correct[..., None]).sum(axes, dtype=jnp.int32),
    }


def _per_class(
    selected: Bool[Array, "*batch"], labels: Int[Array, "*batch"], num_classes: int
) -> Int[Array, " classes"]:
    """How many selected examples each class has."""
    zeros = jnp.zeros(num_classes, jnp.int32)
    return zeros.at[labels].add(selected.astype(jnp.int32))


def _check_labels(labels: Any, logits: Any) -> None:
    """Integer classes, one for each row of logits."""
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        fail(
            "measure",
            "labels",
            "be integer classes",
            jnp.result_type(labels),
            "Pass class indices, not one-hot rows or floats.",
            TypeError,
        )
    if jnp.shape(labels) != jnp.shape(logits)[:-1]:
        fail(
            "measure",
            "labels",
            f"have the leading shape of the logits, {jnp.shape(logits)[:-1]}",
            jnp.shape(labels),
            "One label belongs to each row of logits.",
        )
