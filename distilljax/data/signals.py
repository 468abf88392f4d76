"""What is checked of a sparse signal on the host, where an error can say it."""

from __future__ import annotations

import numpy as np

from distilljax._checks import fail
from distilljax.losses import SampledLogits, SparseLogits


def check_signal(
    signal: SparseLogits | SampledLogits,
    num_classes: int,
    where: np.ndarray | None = None,
) -> None:
    """Raise unless every id in use is a class, and none of the best is there twice.

    The probabilities of the best classes and of the others must make 1, to a hundredth.
    Compiled programs cannot raise: there an id out of range makes the loss nan, and a
    class that is there twice counts twice. So a pipeline that reads signals calls this,
    as `train` does for every batch that has one under ``teacher``.

    Args:
      signal: Arrays on the host. Unused slots, at -inf, may have any id.
      num_classes: How many classes the student has.
      where: Mask of the positions; what stands at others is not looked at.

    Example:
      >>> ids, log_probs = np.array([[3, 1]]), np.log([[0.5, 0.25]])
      >>> signal = SparseLogits(ids, log_probs, np.log([[0.25]]))
      >>> check_signal(signal, num_classes=4)
      >>> check_signal(signal, num_classes=3)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: check_signal: ids must lie in [0, 3), ... got 3 at position (0,). ...
    """
    is_sample = isinstance(signal, SampledLogits)
    weights = signal.log_weights if is_sample else signal.log_probs
    ids, used = np.asarray(signal.ids), ~np.isneginf(np.asarray(weights, np.float32))
    counts = np.ones(ids.shape[:-1], bool) if where is None else np.asarray(where) != 0
    used &= counts[..., None]
    outside = np.argwhere(used & ((ids < 0) | (ids >= num_classes)))
    if len(outside):
        place = tuple(outside[0].tolist())
        fail(
            "check_signal",
            "ids",
            f"lie in [0, {num_classes}), the classes of the student",
            f"{ids[place]} at position {place[:-1]}",
            "Check that the signal was made with the vocabulary of the student.",
        )
    if isinstance(signal, SampledLogits):
        return
    _check_mass(signal, used, counts)
    # unused slots become numbers that are all different
    unused = -1 - np.arange(ids.shape[-1])
    order = np.sort(np.where(used, ids, unused), axis=-1)
    twice = np.argwhere(order[..., 1:] == order[..., :-1])
    if len(twice):
        place = tuple(twice[0].tolist())
        fail(
            "check_signal",
            "ids",
            "name each class at most once per position",
            f"{order[place]} twice at position {place[:-1]}",
            "Draws with copies are SampledLogits; of a teacher's best classes each is "
            "one.",
        )


def _check_mass(signal: SparseLogits, used: np.ndarray, counts: np.ndarray) -> None:
    """At temperature 1, the best classes and the tail have probability 1 together."""
    if 1.0 not in signal.temperatures:
        return
    tail = np.asarray(signal.log_tail, np.float64)[..., signal.temperatures.index(1.0)]
    best = np.where(used, np.asarray(signal.log_probs, np.float64), -np.inf)
    mass = np.exp(best).sum(axis=-1) + np.exp(tail)
    wrong = np.argwhere(counts & ~(np.abs(mass - 1) <= 0.01))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        fail(
            "check_signal",
            "log_probs",
            "be log-probabilities at temperature 1, which with the tail make 1",
            f"a total of {mass[place]:.4g} at position {place}",
            "Logits, or probabilities at another temperature, are none.",
        )
