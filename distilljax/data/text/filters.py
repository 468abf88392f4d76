"""Which documents are in the rows: splits by hash, and what is dropped and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int64

from distilljax._checks import fail

Split = Literal["all", "train", "validation"]


def in_split(
    hashes: Any, split: Split, validation_fraction: float
) -> Bool[np.ndarray, " documents"]:
    """Which documents belong to a split, by the hash of their text alone.

    So copies of a document are on one side, whatever the order of the files; and the
    validation split of a smaller fraction is a part of that of a larger one.

    Args:
      hashes: uint64 [documents].
      split: Which split.
      validation_fraction: The share that is for validation.

    Example:
      >>> in_split(np.uint64([2**63, 2**60]), "validation", 0.1).tolist()
      [False, True]
    """
    if split == "all":
        return np.ones(len(hashes), bool)
    validation = (hashes >> np.uint64(11)) * 2.0**-53 < validation_fraction
    return validation if split == "validation" else ~validation


def sift(
    function: str,
    part: Bool[np.ndarray, " documents"],
    reasons: Sequence[tuple[str, Any]],
) -> tuple[Int64[np.ndarray, " kept"], dict[str, int]]:
    """The documents of ``part`` that nothing speaks against, and how many it does.

    Args:
      function: Who asks, for messages.
      part: Which documents belong to the split.
      reasons: Names, and bool [documents]; a document is counted under its first one.

    Example:
      >>> lengths = np.array([0, 5, 900])
      >>> reasons = [("empty", lengths < 1), ("too long", lengths > 100)]
      >>> kept, drops = sift("Packed", np.ones(3, bool), reasons)
      >>> kept.tolist(), drops
      ([1], {'empty': 1, 'too long': 1})
    """
    drops, kept = {}, part
    for reason, dropped in reasons:
        if count := int((kept & dropped).sum()):
            drops[reason] = count
        kept = kept & ~dropped
    if not kept.any():
        fail(
            function,
            "the documents",
            "leave at least one after its split and filters",
            f"0 of {len(part)}; the split has {part.sum()}, and dropped were {drops}",
            "Check split, min_tokens, max_tokens, long and context.",
        )
    return np.flatnonzero(kept), drops


def check_choice(function: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """``value`` is one of ``choices``.

    Example:
      >>> check_choice("Packed", "long", "split", ("split", "drop"))
    """
    if value not in choices:
        fail(
            function,
            name,
            f"be one of {', '.join(map(str, choices))}",
            repr(value),
            "Check its spelling.",
        )


def check_split(function: str, split: str, validation_fraction: float) -> None:
    """A split is one of three, and two of them need a fraction.

    Example:
      >>> check_split("Packed", "train", 0.01)
    """
    check_choice(function, "split", split, ("all", "train", "validation"))
    whole = split == "all"
    right = validation_fraction == 0 if whole else 0 < validation_fraction < 1
    if not right:
        fail(
            function,
            "validation_fraction",
            'lie in (0, 1), and be 0 for the split "all"',
            f"{validation_fraction} for the split {split!r}",
            "Give both splits the same fraction.",
        )
