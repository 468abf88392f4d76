"""The labels of a source, without decoding the inputs where possible."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from distilljax._checks import fail
from distilljax.data.sources import Arrays, Records, Source, Subset


def labels_of(source: Source) -> Int[np.ndarray, " examples"]:
    """All labels of a source, without decoding the inputs where possible.

    Example:
      >>> labels_of(Arrays(np.zeros((2, 1), np.uint8), np.array([3, 1]))).tolist()
      [3, 1]
    """
    check_labelled("labels_of", source, "Nothing in this source is labelled.")
    if isinstance(source, Arrays) and source.labels is not None:
        return source.labels
    if isinstance(source, Subset):
        return labels_of(source.source)[source.chosen]
    if isinstance(source, Records) and source.read_labels is not None:
        return source.read_labels()
    labels: list[Any] = [source[i].get("labels") for i in range(len(source))]
    if None in labels:
        fail(
            "labels_of",
            "examples",
            "all have labels",
            f"none at example {labels.index(None)}",
            "Make two sources, one with labels and one without.",
        )
    return np.array([int(label) for label in labels], np.int32)


def check_labelled(function: str, source: Source, remedy: str) -> None:
    """A source has labels, by its first example; an empty one may have them."""
    whole = source
    while isinstance(whole, Subset):
        whole = whole.source
    if isinstance(whole, Records) and whole.read_labels is not None:
        return
    if len(whole) and "labels" not in (example := whole[0]):
        fail(
            function,
            "source",
            "have labels",
            f"{type(whole).__name__} of {len(whole)} examples with the keys "
            f"{sorted(example)}",
            remedy,
        )
