"""One paragraph about any source: how many examples, what is in one, which classes."""

from __future__ import annotations

import numpy as np

from distilljax.data.labels import labels_of
from distilljax.data.sources import Source


def describe(source: Source) -> list[tuple[str, str]]:
    """How many examples a source has, what is in one, and how many are of each class.

    Args:
      source: A source (not its config).

    Example:
      >>> from distilljax.data.sources import Arrays
      >>> source = Arrays(np.zeros((3, 8), np.uint8), np.array([1, 0, 1]))
      >>> for name, text in describe(source):
      ...     print(f"{name}: {text}")
      examples: 3
      inputs: uint8 [8]
      labels: int32 []
      classes: 2, the rarest with 1 and the commonest with 2
    """
    lines = [("examples", f"{len(source):,}")]
    if len(source) == 0:
        return lines
    example = source[0]
    for name, value in example.items():
        array = np.asarray(value)
        lines.append((name, f"{array.dtype} {list(array.shape)}"))
    if "labels" in example and np.ndim(example["labels"]) == 0:
        counts = np.bincount(labels_of(source))
        found = counts[counts > 0]
        lines.append(
            (
                "classes",
                f"{len(found)}, the rarest with {found.min():,} and the commonest "
                f"with {found.max():,}",
            )
        )
    return lines
