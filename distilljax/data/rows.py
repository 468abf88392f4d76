"""Several examples as arrays with one row each, and what is checked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Shaped

from distilljax._checks import fail

Example = dict[str, Any]
# ``inputs`` or ``tokens``, ``labels`` where there are labels, and all other keys.
Rows = dict[str, np.ndarray]


def stack_examples(
    examples: Sequence[Example], indices: Int[np.ndarray, " rows"]
) -> Rows:
    """Examples as rows of arrays; ``indices`` name them if they do not fit.

    Numerics: labels become int32, one or an array of them for each example; everything
    else keeps its dtype.

    Args:
      examples: At least one.
      indices: Their positions in the source.

    Example:
      >>> two = [{"inputs": np.zeros(3), "weight": w} for w in (0.5, 2.0)]
      >>> rows = stack_examples(two, np.arange(2))
      >>> rows["inputs"].shape, rows["weight"].tolist()
      ((2, 3), [0.5, 2.0])
    """
    keys = set(examples[0])
    if not keys & {"inputs", "tokens"}:
        fail(
            "Loader",
            "examples",
            "have inputs, or the tokens of a text",
            f"the keys {sorted(keys)} at example {indices[0]}",
            'Return {"inputs": array} from the source, and labels where there are any.',
        )
    for i, example in zip(indices, examples, strict=True):
        if example.keys() != keys:
            fail(
                "Loader",
                "examples",
                f"have the same keys, {sorted(keys)} as example {indices[0]}",
                f"{sorted(example)} at example {i}",
                "Leave the key out of all, or give all of them one.",
            )
    rows: Rows = {}
    if "inputs" in keys:
        rows["inputs"] = _stacked("inputs", examples, indices)
    if "labels" in keys:
        rows["labels"] = _labels(examples, indices)
    for name in examples[0]:
        if name not in rows:
            rows[name] = _stacked(name, examples, indices)
            check_numbers("Loader", name, rows[name])
    return rows


def _labels(
    examples: Sequence[Example], indices: Int[np.ndarray, " rows"]
) -> Int32[np.ndarray, "rows *time"]:
    """A class for each example, or one for each of its tokens."""
    if np.ndim(examples[0]["labels"]) == 0:
        return np.array([int(example["labels"]) for example in examples], np.int32)
    labels = _stacked("labels", examples, indices)
    if labels.dtype.kind not in "iu":
        fail(
            "Loader",
            "labels",
            "be integers",
            labels.dtype,
            "Pass class indices, not probabilities.",
            TypeError,
        )
    return labels.astype(np.int32)


def _stacked(
    name: str, examples: Sequence[Example], indices: Int[np.ndarray, " rows"]
) -> Shaped[np.ndarray, "rows *features"]:
    values = [np.asarray(example[name]) for example in examples]
    first = values[0]
    for i, value in zip(indices, values, strict=True):
        if value.shape != first.shape or value.dtype != first.dtype:
            fail(
                "Loader",
                name,
                f"have one shape and dtype, {first.shape} {first.dtype}",
                f"{value.shape} {value.dtype} at example {i}",
                "Crop, pad or cast them in Loader(transforms=...).",
            )
    return np.stack(values)


def concatenated(parts: Sequence[Rows]) -> Rows:
    """Rows one after the other; all parts have the same keys, shapes and dtypes.

    Example:
      >>> parts = [{"inputs": np.zeros((n, 4))} for n in (2, 3)]
      >>> concatenated(parts)["inputs"].shape
      (5, 4)
    """

    def kind(part: Rows) -> dict[str, str]:
        return {name: f"{x.shape[1:]} {x.dtype}" for name, x in part.items()}

    if "inputs" not in parts[0]:
        fail(
            "load_in_memory",
            "examples",
            "have inputs",
            f"the keys {sorted(parts[0])}",
            "Tokens are read from where they are: leave in_memory out.",
        )
    start = 0
    for part in parts:
        if kind(part) != kind(parts[0]):
            fail(
                "load_in_memory",
                "examples",
                f"have the keys, shapes and dtypes of the first, {kind(parts[0])}",
                f"{kind(part)} from example {start} on",
                "Make them equal in the source.",
            )
        start += len(part["inputs"])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_numbers(function: str, name: str, array: np.ndarray) -> None:
    """An array that is passed on to the devices holds numbers or booleans.

    Example:
      >>> check_numbers("Loader", "weight", np.zeros(3))
    """
    # V: bfloat16 and the other types of ml_dtypes; np.void is what has no numbers
    dtype = array.dtype
    if dtype.kind in "biuf" or (dtype.kind == "V" and dtype.type is not np.void):
        return
    fail(
        function,
        name,
        "be numbers or booleans",
        dtype,
        "Leave this key out of the examples, or encode it as numbers.",
        TypeError,
    )


def check_examples(
    function: str,
    rows: Mapping[str, np.ndarray],
    num_classes: int | None,
    index: Int[np.ndarray, " batch"] | None = None,
) -> None:
    """Inputs are finite and labels lie in [0, num_classes); names the first example.

    Where an example has an array of labels, each of them is checked, masked or not.

    Args:
      function: Who asks, for the message.
      rows: The examples; labels are checked where there are labels.
      num_classes: How many classes there are; None checks the lower end only.
      index: The examples' positions in the source; 0, 1, 2, ... if None.

    Example:
      >>> check_examples("Loader", {"inputs": np.zeros((2, 3))}, None)
    """
    inputs, labels = rows.get("inputs"), rows.get("labels")
    if labels is not None:
        high = np.iinfo(np.int32).max if num_classes is None else num_classes
        wrong = (labels < 0) | (labels >= high)
        if wrong.any():
            first = tuple(np.argwhere(wrong)[0].tolist())
            at = first[0] if index is None else index[first[0]]
            fail(
                function,
                "labels",
                f"lie in [0, {high})",
                f"{labels[first]} at example {at} ({wrong.sum()} such labels)",
                "Check num_classes, or leave these examples out.",
            )
    if inputs is None or inputs.dtype == np.uint8:
        return
    finite = np.isfinite(inputs).all(axis=tuple(range(1, inputs.ndim)))
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
