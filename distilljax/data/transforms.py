"""Grain transforms of single examples: at a position of a stream, or of a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from distilljax._checks import fail
from distilljax.data.hashing import derive_key
from distilljax.data.rows import Example
from distilljax.data.sources import Source, num_classes_of, read_examples


def transformed(
    example: Any, transforms: Sequence[Any], *, seed: int, position: int
) -> Example:
    """An example after all transforms, in their order.

    Args:
      example: As the source has it.
      transforms: What `check_transforms` lets pass.
      seed: Of the random ones.
      position: Of the example, in the stream or in the source.

    Example:
      >>> class Double(grain.transforms.Map):
      ...     def map(self, element):
      ...         return {"inputs": 2 * element["inputs"]}
      >>> transformed({"inputs": 3}, [Double(), Double()], seed=0, position=0)
      {'inputs': 12}
    """
    for step, transform in enumerate(transforms):
        match transform:
            case grain.transforms.Map():
                example = transform.map(example)
            case grain.transforms.RandomMap():
                # Random numbers of this position, whoever reads it and when.
                key = derive_key(seed, "transform", step, position)
                rng = np.random.Generator(np.random.Philox(key))
                example = transform.random_map(example, rng)
            case grain.transforms.MapWithIndex():
                example = transform.map_with_index(position, example)
    return example


def check_transforms(transforms: Sequence[Any]) -> None:
    """Every transform makes one example of one example."""
    kinds = (
        grain.transforms.Map,
        grain.transforms.RandomMap,
        grain.transforms.MapWithIndex,
    )
    for transform in transforms:
        if not isinstance(transform, kinds):
            fail(
                "Loader",
                "transforms",
                "be grain.transforms.Map, RandomMap or MapWithIndex",
                type(transform).__name__,
                "A filter would make the position of an example depend on the data "
                "before it: leave examples out of the source instead.",
                TypeError,
            )


@dataclass(frozen=True, eq=False)
class Transformed:
    """A source with transforms, none of them random: every pass is the same.

    Attributes:
      source: The source.
      transforms: Grain transforms of single examples.
    """

    source: Source
    transforms: tuple[Any, ...]

    def __post_init__(self):
        check_transforms(self.transforms)
        for transform in self.transforms:
            if isinstance(transform, grain.transforms.RandomMap):
                fail(
                    "Loader",
                    "eval_transforms",
                    "be given, and not be random, where there is an evaluation",
                    type(transform).__name__,
                    "For a random crop, for example, give one that crops the middle.",
                )

    @property
    def num_classes(self) -> int | None:
        """Of the source."""
        return num_classes_of(self.source)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the source."""
        return getattr(self.source, "class_names", ())

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """Example ``index``, transformed."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several examples, transformed, in the order of ``indices``."""
        return [
            transformed(example, self.transforms, seed=0, position=i)
            for i, example in zip(
                indices, read_examples(self.source, indices), strict=True
            )
        ]
