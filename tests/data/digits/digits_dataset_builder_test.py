from __future__ import annotations

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from distilljax.data import Tfds, load_in_memory


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    return {
        name: Tfds("digits", name, data_dir, labels="label")()
        for name in ("train", "validation", "test")
    }


def test_the_splits_have_the_promised_sizes_and_all_classes_alike(splits):
    assert {k: len(v) for k, v in splits.items()} == {
        "train": 1200,
        "validation": 197,
        "test": 400,
    }
    whole = np.bincount(load_digits().target) / 1797
    for source in splits.values():
        counts = np.bincount(load_in_memory(source).labels)
        assert np.all(np.abs(counts - whole * len(source)) < 2)


def test_the_splits_are_the_whole_data_and_do_not_overlap(splits):
    digits = load_digits()
    ids = []
    for source in splits.values():
        for record in source.records:
            ids.append(record["id"])
            assert np.array_equal(record["image"][..., 0], digits.images[record["id"]])
            assert record["label"] == digits.target[record["id"]]
    assert sorted(ids) == list(range(1797))


def test_the_splits_are_fixed(splits):
    """Numbers in the documentation were measured on these examples."""
    digest = hashlib.sha256()
    for source in splits.values():
        digest.update(np.array([r["id"] for r in source.records], "<i4").tobytes())
    assert digest.hexdigest()[:16] == "db68a9c8b2dbc89e"
