"""Parts of a source, chosen by rules that depend on the labels and a seed alone.

Each selection is a frozen dataclass around another source config, so they nest:
``WithoutClasses(Idx("assets", "mnist"), classes=(3,))``. The choice is by hash (see
``hashing``): a seed means the same examples on any machine and any version of NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from distilljax._checks import fail
from distilljax.data.hashing import derive_key, random_bits
from distilljax.data.labels import check_labelled, labels_of
from distilljax.data.sources import Source, SourceConfig, subset

_UNLABELLED = "It chooses by label; Slice chooses by position, and needs none."


@dataclass(frozen=True)
class Slice:
    """Examples ``start`` to ``stop`` (exclusive) of a source, in order.

    Of text that every epoch packs anew (``Packed(..., repack=True)``) these are rows of
    the first epoch, and every epoch has the same.

    Attributes:
      source: The source config.
      start: First example; counts from the end if negative, as Python's slices do.
      stop: One after the last example; None for all that follow.

    Example:
      >>> from distilljax.data.sources import Arrays
      >>> source = Arrays(np.zeros((5, 1), np.uint8), np.array([5, 6, 7, 8, 9]))
      >>> Slice(source, 1, 3)().labels.tolist()
      [6, 7]
    """

    source: SourceConfig
    start: int = 0
    stop: int | None = None

    def __call__(self) -> Source:
        """Open the source and take the slice."""
        source = self.source()
        return subset(source, np.arange(len(source))[self.start : self.stop])


@dataclass(frozen=True)
class Stratified:
    """A random part of a source with the class proportions of the whole.

    With ``complement=True`` it is all the *other* examples, so that two configs which
    differ in this field alone split a source in two. The order of the source is kept.

    Attributes:
      source: The source config.
      num_examples: How many examples to draw (and, with complement, to leave out).
      seed: Of the draw. The draws of one seed are nested, up to rounding.
      complement: Keep the examples that were not drawn.

    Example:
      >>> from distilljax.data.sources import Arrays
      >>> source = Arrays(np.zeros((12, 1), np.uint8), np.array([0] * 8 + [1] * 4))
      >>> np.bincount(Stratified(source, 3, seed=0)().labels).tolist()
      [2, 1]
      >>> np.bincount(Stratified(source, 3, seed=0, complement=True)().labels).tolist()
      [6, 3]
    """

    source: SourceConfig
    num_examples: int
    seed: int = 0
    complement: bool = False

    def __call__(self) -> Source:
        """Open the source and draw the part."""
        source = self.source()
        check_labelled("Stratified", source, _UNLABELLED)
        labels = labels_of(source)
        chosen = stratified_indices(labels, self.num_examples, self.seed)
        if self.complement:
            chosen = np.setdiff1d(np.arange(len(labels)), chosen)
        return subset(source, chosen)


@dataclass(frozen=True)
class Few:
    """A few examples, as many of each class as of any other.

    Where the number does not divide, the classes that get one more are drawn as well.
    36 of ten classes are three of each and a fourth of six.

    Attributes:
      source: The source config.
      num_examples: How many examples to draw, over all classes.
      seed: Of the draw.

    Example:
      >>> from distilljax.data.sources import Arrays
      >>> source = Arrays(np.zeros((12, 1), np.uint8), np.array([0] * 8 + [1] * 4))
      >>> np.bincount(Few(source, 6, seed=0)().labels).tolist()
      [3, 3]
    """

    source: SourceConfig
    num_examples: int
    seed: int = 0

    def __call__(self) -> Source:
        """Open the source and draw the examples."""
        source = self.source()
        check_labelled("Few", source, _UNLABELLED)
        labels = labels_of(source)
        classes, counts = np.unique(labels, return_counts=True)
        each, more = divmod(self.num_examples, max(len(classes), 1))
        quotas = np.full(len(classes), each)
        ranks = np.argsort(random_bits(derive_key(self.seed, "classes"), classes))
        quotas[ranks[:more]] += 1
        if self.num_examples < 1 or np.any(quotas > counts):
            fail(
                "Few",
                "num_examples",
                f"be at least 1 and at most {len(classes)} times the smallest class",
                f"{self.num_examples} with {dict(_counts(classes, counts))}",
                "Draw fewer, or use Stratified, which follows the class sizes.",
            )
        return subset(source, _draw(labels, classes, quotas, self.seed))


@dataclass(frozen=True)
class WithoutClasses:
    """The examples of a source whose label is none of ``classes``.

    The number of classes stays: the model still has an output for what it never saw.

    Attributes:
      source: The source config.
      classes: The labels to leave out.

    Example:
      >>> from distilljax.data.sources import Arrays
      >>> source = Arrays(np.zeros((4, 1), np.uint8), np.array([3, 1, 3, 0]), 10)
      >>> rest = WithoutClasses(source, classes=(3,))()
      >>> rest.labels.tolist(), rest.num_classes
      ([1, 0], 10)
    """

    source: SourceConfig
    classes: tuple[int, ...]

    def __call__(self) -> Source:
        """Open the source and leave the classes out."""
        source = self.source()
        check_labelled("WithoutClasses", source, _UNLABELLED)
        labels = labels_of(source)
        missing = sorted(set(self.classes) - set(labels.tolist()))
        if missing:
            fail(
                "WithoutClasses",
                "classes",
                "occur in the source",
                missing,
                "Nothing would be left out; check the labels.",
            )
        return subset(source, np.flatnonzero(~np.isin(labels, self.classes)))


def stratified_indices(
    labels: Int[np.ndarray, " examples"], num_examples: int, seed: int
) -> Int[np.ndarray, " chosen"]:
    """Positions of ``num_examples`` examples with the class proportions of ``labels``.

    Each class gets its share rounded down, and the largest remainders one more.

    Args:
      labels: All labels.
      num_examples: How many to draw.
      seed: Of the draw.

    Returns:
      The positions, ascending.

    Example:
      >>> labels = np.array([0, 0, 0, 0, 1, 1])
      >>> np.bincount(labels[stratified_indices(labels, 3, seed=1)]).tolist()
      [2, 1]
    """
    if not 1 <= num_examples <= len(labels):
        fail(
            "Stratified",
            "num_examples",
            f"lie between 1 and the size of the source, {len(labels)}",
            num_examples,
            "Ask for fewer examples.",
        )
    classes, counts = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(counts * num_examples, len(labels))
    order = np.argsort(-remainders, kind="stable")
    quotas[order[: num_examples - quotas.sum()]] += 1
    return _draw(labels, classes, quotas, seed)


def _draw(
    labels: Int[np.ndarray, " examples"],
    classes: Int[np.ndarray, " classes"],
    quotas: Int[np.ndarray, " classes"],
    seed: int,
) -> Int[np.ndarray, " chosen"]:
    """The ``quotas[k]`` examples of class ``classes[k]`` with the smallest hashes."""
    hashes = random_bits(derive_key(seed, "examples"), np.arange(len(labels)))
    chosen: list[Any] = []
    for label, quota in zip(classes, quotas, strict=True):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.argsort(hashes[members])[:quota]])
    return np.sort(np.concatenate(chosen))


def _counts(
    classes: Int[np.ndarray, " classes"], counts: Int[np.ndarray, " classes"]
) -> list[tuple[int, int]]:
    return list(zip(classes.tolist(), counts.tolist(), strict=True))
