"""Where examples come from: anything with a length and an index.

Two things carry the word. A *source config* is a frozen dataclass, such as
``Idx("assets", "mnist")``: cheap, comparable, part of a config file. Calling it builds
the *source*: an object with ``len(source)`` and ``source[i]``, where each example is a
dict of ``inputs`` (uint8 as stored, or float32) and ``labels`` (an integer). Any object
of your own with these two methods is a source too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from distilljax._checks import fail

Example = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Random access to examples. ``num_classes`` and ``class_names`` are optional."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """Example ``index``: a dict with ``inputs`` and ``labels``."""
        ...


@runtime_checkable
class SourceConfig(Protocol):
    """A frozen dataclass that says where data is, and opens it when called."""

    def __call__(self) -> Source:
        """Open the source."""
        ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """Examples that are already in memory: a source, and its own config.

    The inputs are kept as they are given (uint8 images stay uint8); a Loader converts
    and scales each batch. Labels and values are checked here, once.

    Attributes:
      inputs: uint8 or floating point, [examples, ...].
      labels: Integers in [0, num_classes), [examples].
      num_classes: How many classes there are, where known.
      class_names: One name for each class, where known.

    Example:
      >>> source = Arrays(np.zeros((3, 8, 8, 1), np.uint8), np.array([7, 0, 9]), 10)
      >>> len(source), source[2]["inputs"].shape, int(source[2]["labels"])
      (3, (8, 8, 1), 9)
      >>> source() is source
      True
    """

    inputs: np.ndarray
    labels: np.ndarray
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self):
        inputs, labels = np.asarray(self.inputs), np.asarray(self.labels)
        if inputs.dtype != np.uint8:
            if inputs.dtype.kind not in "fV":  # V: bfloat16 of ml_dtypes
                fail(
                    "Arrays",
                    "inputs",
                    "be uint8 or floating point",
                    inputs.dtype,
                    "Convert them, so that nothing wraps around unnoticed.",
                    TypeError,
                )
            inputs = inputs.astype(np.float32, copy=False)
        if labels.dtype.kind not in "iu":
            fail(
                "Arrays",
                "labels",
                "be integers",
                labels.dtype,
                "Pass class indices, not one-hot rows or names.",
                TypeError,
            )
        if labels.ndim != 1 or inputs.ndim < 1 or len(labels) != len(inputs):
            fail(
                "Arrays",
                "labels",
                "have one entry for each example of inputs",
                f"labels {labels.shape} and inputs {inputs.shape}",
                "Check that both came from the same split.",
            )
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "labels", labels.astype(np.int32))
        if self.num_classes is None and self.class_names:
            object.__setattr__(self, "num_classes", len(self.class_names))
        # Checked at full width: int32 could wrap around into the range.
        check_examples("Arrays", inputs, labels.astype(np.int64), self.num_classes)

    def __call__(self) -> Arrays:
        """Itself: there is nothing to open."""
        return self

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """Example ``index``, as views of the arrays."""
        return {"inputs": self.inputs[index], "labels": self.labels[index]}

    def __iter__(self) -> Iterator[Example]:
        """All examples, in order."""
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, eq=False)
class Records:
    """A source that reads and decodes records when they are asked for.

    Attributes:
      records: Random access to encoded records; ``__getitems__`` is used where there
        is one, because storage reads many records faster than one at a time.
      decode: From a record to an example; picklable, for worker processes.
      num_classes: How many classes there are, where known.
      class_names: One name for each class, where known.
      read_labels: Reads all labels without decoding the inputs, where possible.
    """

    records: Any
    decode: Callable[[Any], Example]
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    read_labels: Callable[[], Int[np.ndarray, " examples"]] | None = None

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        """Example ``index``, decoded."""
        return self.decode(self.records[index])

    def __iter__(self) -> Iterator[Example]:
        """All examples, in order."""
        return (self[i] for i in range(len(self)))

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several examples, in the order of ``indices``."""
        return [self.decode(r) for r in read_examples(self.records, indices)]


@dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of a source, in a given order.

    Attributes:
      source: The source.
      chosen: Which of its examples.
    """

    source: Source
    chosen: Int[np.ndarray, " chosen"]

    @property
    def num_classes(self) -> int | None:
        """Of the whole source: a class that was left out still has its index."""
        return num_classes_of(self.source)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the whole source."""
        return getattr(self.source, "class_names", ())

    def __len__(self) -> int:
        """How many examples were chosen."""
        return len(self.chosen)

    def __getitem__(self, index: int) -> Example:
        """Chosen example ``index``."""
        return self.source[int(self.chosen[index])]

    def __iter__(self) -> Iterator[Example]:
        """All chosen examples, in order."""
        return (self[i] for i in range(len(self)))

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Several chosen examples, in the order of ``indices``."""
        chosen = self.chosen[np.asarray(indices, np.int64)]
        return list(read_examples(self.source, chosen.tolist()))


def subset(source: Source, chosen: Int[np.ndarray, " chosen"]) -> Source:
    """The examples ``chosen`` of ``source``; arrays stay arrays.

    Example:
      >>> source = Arrays(np.arange(3.0)[:, None], np.array([4, 5, 6]))
      >>> subset(source, np.array([2, 0])).labels.tolist()
      [6, 4]
    """
    if isinstance(source, Arrays):
        return Arrays(
            source.inputs[chosen],
            source.labels[chosen],
            source.num_classes,
            source.class_names,
        )
    return Subset(source, chosen)


def num_classes_of(source: Source) -> int | None:
    """How many classes a source has, or None where it does not say."""
    return getattr(source, "num_classes", None)


def read_examples(source: Any, indices: Sequence[int]) -> Sequence[Any]:
    """Several elements of a source, together where it can do that."""
    read_many = getattr(source, "__getitems__", None)
    if read_many is not None:
        return read_many(indices)
    return [source[i] for i in indices]


def read_rows(
    source: Source, indices: Int[np.ndarray, " rows"]
) -> tuple[Shaped[np.ndarray, "rows *features"], Int[np.ndarray, " rows"]]:
    """The inputs and the labels of several examples, stacked.

    Example:
      >>> source = Arrays(np.zeros((3, 4), np.uint8), np.array([7, 8, 9]))
      >>> inputs, labels = read_rows(source, np.array([2, 0]))
      >>> inputs.shape, labels.tolist()
      ((2, 4), [9, 7])
    """
    if isinstance(source, Arrays):
        return source.inputs[indices], source.labels[indices]
    return stack_examples(read_examples(source, indices.tolist()), indices)


def stack_examples(
    examples: Sequence[Example], indices: Int[np.ndarray, " rows"]
) -> tuple[Shaped[np.ndarray, "rows *features"], Int[np.ndarray, " rows"]]:
    """Examples as rows of arrays; ``indices`` name them if they do not fit."""
    rows = [np.asarray(example["inputs"]) for example in examples]
    for i, row in zip(indices, rows, strict=True):
        if row.shape != rows[0].shape or row.dtype != rows[0].dtype:
            fail(
                "Loader",
                "inputs",
                f"have one shape and dtype, {rows[0].shape} {rows[0].dtype}",
                f"{row.shape} {row.dtype} at example {i}",
                "Crop or pad them in Loader(transforms=...).",
            )
    return np.stack(rows), np.array([int(e["labels"]) for e in examples], np.int32)


def labels_of(source: Source) -> Int[np.ndarray, " examples"]:
    """All labels of a source, without decoding the inputs where possible.

    Example:
      >>> labels_of(Arrays(np.zeros((2, 1), np.uint8), np.array([3, 1]))).tolist()
      [3, 1]
    """
    if isinstance(source, Arrays):
        return source.labels
    if isinstance(source, Subset):
        return labels_of(source.source)[source.chosen]
    if isinstance(source, Records) and source.read_labels is not None:
        return source.read_labels()
    return np.array([int(source[i]["labels"]) for i in range(len(source))], np.int32)


def load_in_memory(source: Source) -> Arrays:
    """The whole source as arrays, read and checked once.

    Pass the result to every loader and evaluation of a program that trains more than
    one model, and the data is decoded once.

    Args:
      source: Any source; ``Arrays`` are returned as they are.

    Example:
      >>> tiny = [{"inputs": np.zeros(2, np.uint8), "labels": k} for k in (1, 0)]
      >>> load_in_memory(tiny).labels.tolist()
      [1, 0]
    """
    if isinstance(source, Arrays):
        return source
    check_not_empty("load_in_memory", source)
    parts = [
        read_rows(source, np.arange(start, min(start + 1024, len(source))))
        for start in range(0, len(source), 1024)
    ]
    inputs = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    class_names = getattr(source, "class_names", ())
    return Arrays(inputs, labels, num_classes_of(source), class_names)


def check_not_empty(function: str, source: Source) -> None:
    """A source has at least one example."""
    if len(source) == 0:
        fail(
            function,
            "source",
            "have at least one example",
            0,
            "Check its split, its slice and the classes that were left out.",
        )


def check_examples(
    function: str,
    inputs: Shaped[np.ndarray, "batch *features"],
    labels: Int[np.ndarray, " batch"],
    num_classes: int | None,
    index: Int[np.ndarray, " batch"] | None = None,
) -> None:
    """Inputs are finite and labels lie in [0, num_classes); names the first example.

    Args:
      function: Who asks, for the message.
      inputs: The examples.
      labels: Their labels.
      num_classes: How many classes there are; None checks the lower end only.
      index: The examples' positions in the source; 0, 1, 2, ... if None.
    """
    high = np.iinfo(np.int32).max if num_classes is None else num_classes
    bad = np.flatnonzero((labels < 0) | (labels >= high))
    if len(bad):
        at = bad[0] if index is None else index[bad[0]]
        fail(
            function,
            "labels",
            f"lie in [0, {high})",
            f"{labels[bad[0]]} at example {at} ({len(bad)} such labels)",
            "Check num_classes, or leave these examples out.",
        )
    if inputs.dtype == np.uint8:
        return
    finite = np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)
    bad = np.flatnonzero(~finite)
    if len(bad):
        at = bad[0] if index is None else index[bad[0]]
        fail(
            function,
            "inputs",
            "be finite",
            f"nan or inf at example {at} ({len(bad)} such examples)",
            "Clean or drop these examples.",
        )
