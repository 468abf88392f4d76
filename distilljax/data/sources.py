"""Where examples come from: anything with a length and an index.

Two things carry the word. A *source config* is a frozen dataclass, such as
``Idx("assets", "mnist")``: cheap, comparable, part of a config file. Calling it builds
the *source*: an object with ``len(source)`` and ``source[i]``, where each example is a
dict of ``inputs`` (uint8 as stored, or float32), of ``labels`` (an integer) where there
are labels, and of whatever else a batch shall have. Any object of your own with these
two methods is a source too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from distilljax._checks import fail
from distilljax.data.rows import (
    Example,
    Rows,
    check_examples,
    check_numbers,
    concatenated,
    stack_examples,
)


@runtime_checkable
class Source(Protocol):
    """Random access to examples. ``num_classes`` and ``class_names`` are optional."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """Example ``index``: a dict of ``inputs``, often ``labels``, and others."""
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
      labels: Integers in [0, num_classes), [examples]; None: there are none.
      num_classes: How many classes there are, where known.
      class_names: One name for each class, where known.
      extra: Other arrays by key, [examples, ...]: passed on into each batch as they
        are stored, such as ``loss_mask`` or the logits of a teacher.

    Example:
      >>> source = Arrays(np.zeros((3, 8, 8, 1), np.uint8), np.array([7, 0, 9]), 10)
      >>> len(source), source[2]["inputs"].shape, int(source[2]["labels"])
      (3, (8, 8, 1), 9)
      >>> source() is source
      True
      >>> transfer = Arrays(np.zeros((3, 4)), extra={"weight": np.array([1, 0, 2])})
      >>> sorted(transfer[2]), int(transfer[2]["weight"])
      (['inputs', 'weight'], 2)
    """

    inputs: np.ndarray
    labels: np.ndarray | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        inputs = _uint8_or_float32(np.asarray(self.inputs))
        extra = {name: np.asarray(array) for name, array in self.extra.items()}
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "extra", extra)
        if self.num_classes is None and self.class_names:
            object.__setattr__(self, "num_classes", len(self.class_names))
        rows: Rows = {"inputs": inputs}
        if self.labels is not None:
            labels = np.asarray(self.labels)
            _check_labels(labels, inputs)
            object.__setattr__(self, "labels", labels.astype(np.int32))
            # Checked at full width: int32 could wrap around into the range.
            rows["labels"] = labels.astype(np.int64)
        check_examples("Arrays", rows, self.num_classes)
        _check_extra(extra, len(inputs))

    @property
    def columns(self) -> Rows:
        """All arrays, by the key that they have in an example."""
        labels = {} if self.labels is None else {"labels": self.labels}
        return {"inputs": self.inputs, **labels, **self.extra}

    def __call__(self) -> Arrays:
        """Itself: there is nothing to open."""
        return self

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.inputs)

    def __getitem__(self, index: int) -> Example:
        """Example ``index``, as views of the arrays."""
        return {name: array[index] for name, array in self.columns.items()}

    def __iter__(self) -> Iterator[Example]:
        """All examples, in order."""
        return (self[i] for i in range(len(self)))


def _uint8_or_float32(
    inputs: Shaped[np.ndarray, "..."],
) -> Shaped[np.ndarray, "examples *features"]:
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
    if inputs.ndim < 1:
        fail(
            "Arrays",
            "inputs",
            "have a first axis of examples",
            f"shape {inputs.shape}",
            "One example is inputs[None].",
        )
    return inputs


def _check_labels(labels: np.ndarray, inputs: np.ndarray) -> None:
    if labels.dtype.kind not in "iu":
        fail(
            "Arrays",
            "labels",
            "be integers",
            labels.dtype,
            "Pass class indices, not one-hot rows or names.",
            TypeError,
        )
    if labels.ndim != 1 or len(labels) != len(inputs):
        fail(
            "Arrays",
            "labels",
            "have one entry for each example of inputs",
            f"labels {labels.shape} and inputs {inputs.shape}",
            "Check that both came from the same split.",
        )


def _check_extra(extra: Rows, num_examples: int) -> None:
    for name, array in extra.items():
        if name in ("inputs", "labels"):
            fail(
                "Arrays",
                "extra",
                "have other keys than inputs and labels",
                repr(name),
                "Pass it as the argument of that name.",
            )
        check_numbers("Arrays", name, array)
        if array.ndim < 1 or len(array) != num_examples:
            fail(
                "Arrays",
                name,
                f"have one entry for each of the {num_examples} examples",
                f"shape {array.shape}",
                "Its first axis is the example.",
            )


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

    @property
    def tokenizer(self) -> Any:
        """Of the whole source; None if it is no text."""
        return getattr(self.source, "tokenizer", None)

    @cached_property
    def fingerprint(self) -> str | None:
        """Of the whole source, and of what was chosen; None where it has none."""
        whole = getattr(self.source, "fingerprint", None)
        if whole is None:
            return None
        chosen = self.chosen.astype("<i8").tobytes()
        return hashlib.blake2b(str(whole).encode() + chosen, digest_size=16).hexdigest()

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
        rows = read_rows(source, chosen)
        return _arrays(rows, source.num_classes, source.class_names)
    return Subset(source, chosen)


def _arrays(
    rows: Rows, num_classes: int | None, class_names: tuple[str, ...]
) -> Arrays:
    extra = {k: x for k, x in rows.items() if k not in ("inputs", "labels")}
    return Arrays(rows["inputs"], rows.get("labels"), num_classes, class_names, extra)


def num_classes_of(source: Source) -> int | None:
    """How many classes a source has, or None where it does not say."""
    return getattr(source, "num_classes", None)


def read_examples(source: Any, indices: Sequence[int]) -> Sequence[Any]:
    """Several elements of a source, together where it can do that."""
    read_many = getattr(source, "__getitems__", None)
    if read_many is not None:
        return read_many(indices)
    return [source[i] for i in indices]


def read_rows(source: Source, indices: Int[np.ndarray, " rows"]) -> Rows:
    """Several examples, stacked: an array for each of their keys.

    Example:
      >>> source = Arrays(np.zeros((3, 4), np.uint8), np.array([7, 8, 9]))
      >>> rows = read_rows(source, np.array([2, 0]))
      >>> rows["inputs"].shape, rows["labels"].tolist()
      ((2, 4), [9, 7])
    """
    if isinstance(source, Arrays):
        return {name: array[indices] for name, array in source.columns.items()}
    return stack_examples(read_examples(source, indices.tolist()), indices)


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
    class_names = getattr(source, "class_names", ())
    return _arrays(concatenated(parts), num_classes_of(source), class_names)


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
