from __future__ import annotations

import numpy as np

from distilljax.data import Arrays
from distilljax.data.describe import describe


def test_a_source_is_described_by_its_first_example_and_its_classes():
    source = Arrays(
        np.zeros((5, 8, 8), np.uint8),
        np.array([0, 2, 2, 2, 0]),
        extra={"weight": np.ones(5, np.float16)},
    )
    assert describe(source) == [
        ("examples", "5"),
        ("inputs", "uint8 [8, 8]"),
        ("labels", "int32 []"),
        ("weight", "float16 []"),
        ("classes", "2, the rarest with 2 and the commonest with 3"),
    ]


def test_nothing_is_said_of_examples_that_are_not_there():
    assert describe([]) == [("examples", "0")]


def test_labels_of_tokens_are_no_classes():
    rows = [{"tokens": np.zeros(4, np.int32), "labels": np.zeros(4, np.int32)}] * 2
    assert dict(describe(rows)) == {
        "examples": "2",
        "tokens": "int32 [4]",
        "labels": "int32 [4]",
    }
