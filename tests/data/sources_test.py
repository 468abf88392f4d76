from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from distilljax.data import Arrays, Source, SourceConfig, labels_of, load_in_memory
from distilljax.data.sources import Records, Subset, read_rows, subset


def arrays(num_examples=5):
    inputs = np.arange(num_examples * 2, dtype=np.uint8).reshape(-1, 2)
    return Arrays(inputs, np.arange(num_examples) % 3, class_names=("a", "b", "c"))


def records(num_examples=5):
    return Records(arrays(num_examples), dict, 3, ("a", "b", "c"))


class Bulk:
    """Storage that would rather be asked once."""

    def __init__(self, examples):
        self.examples, self.calls = examples, []

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        raise AssertionError("asked for a single record")

    def __getitems__(self, indices):
        self.calls.append(list(indices))
        return [self.examples[i] for i in indices]


def test_arrays_are_a_source_and_its_config():
    source = arrays()
    assert isinstance(source, Source)
    assert isinstance(source, SourceConfig)
    assert source() is source
    assert source.num_classes == 3
    assert len(source) == 5
    assert source[3]["inputs"].tolist() == [6, 7]
    assert source[3]["labels"] == 0


def test_arrays_keep_bytes_and_make_everything_else_float32():
    labels = np.zeros(2, np.int64)
    kept = Arrays(np.zeros((2, 3), np.uint8), labels)
    assert kept.inputs.dtype == np.uint8
    assert kept.labels.dtype == np.int32
    for dtype in (np.float64, np.float16, ml_dtypes.bfloat16, np.float32):
        given = np.full((2, 3), 0.5, dtype)
        assert Arrays(given, labels).inputs.dtype == np.float32
        assert np.all(Arrays(given, labels).inputs == 0.5)


@pytest.mark.parametrize(
    ("inputs", "labels", "kind", "message"),
    [
        (np.zeros((2, 3), np.int64), np.zeros(2, int), TypeError, "got int64"),
        (np.zeros((2, 3)), np.zeros(2), TypeError, "labels must be integers"),
        (np.zeros((2, 3)), np.zeros((2, 10), int), ValueError, "one entry for each"),
        (np.zeros((2, 3)), np.zeros(3, int), ValueError, r"labels \(3,\) and inputs"),
        (np.zeros((2, 3)), np.array([0, 7]), ValueError, "got 7 at example 1"),
        (np.zeros((2, 3)), np.array([-1, 0]), ValueError, "got -1 at example 0"),
        (np.array([[0.0], [np.nan]]), np.zeros(2, int), ValueError, "inf at example 1"),
    ],
)
def test_arrays_that_cannot_be_examples_are_an_error(inputs, labels, kind, message):
    with pytest.raises(kind, match=f"Arrays: .*{message}"):
        Arrays(inputs, labels, num_classes=7)


def test_a_subset_is_in_the_order_that_was_asked_for():
    chosen = np.array([4, 0, 4])
    from_arrays, from_records = subset(arrays(), chosen), subset(records(), chosen)
    assert isinstance(from_arrays, Arrays)
    assert isinstance(from_records, Subset)
    for source in (from_arrays, from_records):
        assert len(source) == 3
        assert [source[i]["inputs"].tolist() for i in range(3)] == [
            [8, 9],
            [0, 1],
            [8, 9],
        ]
        assert labels_of(source).tolist() == [1, 0, 1]
        assert (source.num_classes, source.class_names) == (3, ("a", "b", "c"))


def test_loading_reads_everything_in_bulk_and_keeps_the_names():
    examples = [arrays(2100)[i] for i in range(2100)]
    storage = Bulk(examples)
    loaded = load_in_memory(Records(storage, dict, 3, ("a", "b", "c")))
    assert np.array_equal(loaded.inputs, arrays(2100).inputs)
    assert np.array_equal(loaded.labels, arrays(2100).labels)
    assert (loaded.num_classes, loaded.class_names) == (3, ("a", "b", "c"))
    assert [i for call in storage.calls for i in call] == list(range(2100))
    assert len(storage.calls) == 3


def test_a_subset_of_records_is_read_in_bulk_too():
    storage = Bulk([arrays()[i] for i in range(5)])
    source = subset(Records(storage, dict), np.array([3, 1]))
    rows = read_rows(source, np.array([1, 0, 1]))
    assert rows["inputs"].tolist() == [[2, 3], [6, 7], [2, 3]]
    assert rows["labels"].tolist() == [1, 0, 1]
    assert storage.calls == [[1, 3, 1]]


def test_loading_arrays_copies_nothing():
    source = arrays()
    assert load_in_memory(source) is source


def test_a_plain_list_of_examples_is_a_source():
    source = [arrays()[i] for i in range(5)]
    assert np.array_equal(load_in_memory(source).inputs, arrays().inputs)
    assert labels_of(source).tolist() == [0, 1, 2, 0, 1]


def test_labels_are_read_without_the_inputs_where_a_source_can():
    source = Records(Bulk([]), dict, read_labels=lambda: np.array([2, 1], np.int32))
    assert labels_of(source).tolist() == [2, 1]
    assert labels_of(Subset(source, np.array([1]))).tolist() == [1]


def test_records_can_be_iterated_to_their_end():
    assert [e["labels"] for e in records()] == [0, 1, 2, 0, 1]


def test_importing_the_package_imports_nothing_heavy():
    """A config file names sources and loaders; reading its --help must be quick."""
    code = (
        "import sys, distilljax.data;"
        "print([m for m in ('grain', 'tensorflow_datasets', 'array_record', 'sklearn',"
        " 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_part_is_known_by_the_whole_and_by_what_was_chosen():
    """So that a run on part of a text does not go on with another text."""

    class Known(list):
        fingerprint = "of these"

    class Other(list):
        fingerprint = "of others"

    part = Subset(Known([{}, {}, {}]), np.array([0, 2]))
    assert part.fingerprint == Subset(Known([{}] * 3), np.array([0, 2])).fingerprint
    assert part.fingerprint != Subset(Known([{}] * 3), np.array([0, 1])).fingerprint
    assert part.fingerprint != Subset(Other([{}] * 3), np.array([0, 2])).fingerprint
    assert Subset([{}, {}], np.array([0])).fingerprint is None
