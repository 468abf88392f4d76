from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from distilljax.data import Idx, load_in_memory, read_idx

ASSETS = Path(os.environ.get("DISTILLJAX_ASSETS", "assets"))
needs_assets = pytest.mark.skipif(
    not (ASSETS / "mnist").is_dir(),
    reason=f"no data in {ASSETS}: scripts/fetch_assets.sh, or set DISTILLJAX_ASSETS",
)


def idx_bytes(array):
    array = np.asarray(array, np.uint8)
    header = bytes([0, 0, 8, array.ndim])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (10, 28, 28))
LABELS = np.arange(10)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS))
    packed = gzip.compress(idx_bytes(IMAGES[:4]))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(packed)
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(idx_bytes(LABELS[:4]))
    return tmp_path


def test_it_has_the_element_spec_of_tfds(folder):
    source = Idx(str(folder), "mnist", "train")()
    assert len(source) == 10
    example = source[3]
    assert example["inputs"].dtype == np.uint8
    assert example["inputs"].shape == (28, 28, 1)
    assert np.array_equal(example["inputs"][..., 0], IMAGES[3])
    assert example["labels"] == 3
    assert source.num_classes == 10


def test_compressed_files_and_both_spellings_are_found(folder):
    source = Idx(str(folder), "mnist", "test")()
    assert np.array_equal(source.inputs[..., 0], IMAGES[:4])


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:3]", [0, 1, 2]),
        ("train[7:]", [7, 8, 9]),
        ("train[-2:]", [8, 9]),
        ("train[2:4]", [2, 3]),
        ("train[:]", list(range(10))),
        ("train[:25%]", [0, 1]),
        ("train[-10%:]", [9]),
        ("train[30%:50%]", [3, 4]),
    ],
)
def test_splits_are_sliced_as_in_tfds(folder, split, expected):
    assert Idx(str(folder), "mnist", split)().labels.tolist() == expected


@pytest.mark.parametrize("split", ["validation", "train[1:2:3]", "train[a:]", "train["])
def test_a_split_that_does_not_exist_is_an_error(folder, split):
    with pytest.raises(ValueError, match="Idx: split must be"):
        Idx(str(folder), "mnist", split)()


def damaged(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], "must have 7856 bytes.*got 7855"),
        (
            "train-images-idx3-ubyte",
            lambda b: b + b"x",
            "got 7857.*truncated or damaged",
        ),
        ("train-images-idx3-ubyte", lambda b: b[:3], "magic number 0x00000803"),
        ("train-images-idx3-ubyte", lambda b: b"", "magic number 0x00000803"),
        ("train-labels-idx1-ubyte", lambda _: idx_bytes(IMAGES), "got 0x00000803"),
        ("train-labels-idx1-ubyte", lambda _: b"<html>", "got 0x3c68746d"),
        ("train-labels-idx1-ubyte", lambda _: idx_bytes(LABELS[:9]), "as many labels"),
        ("train-labels-idx1-ubyte", lambda _: idx_bytes(LABELS + 1), "got 10 at"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(folder, name, change, message):
    path = damaged(folder, name, change)
    with pytest.raises(ValueError, match=message) as caught:
        Idx(str(folder), "mnist", "train")()
    if "got 10 at" not in message:
        assert str(path) in str(caught.value)
        assert "scripts/fetch_assets.sh" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [lambda b: b[:-20], lambda b: b"no gzip at all", lambda b: b[:30] + b"??" + b[32:]],
    ids=["truncated", "foreign", "flipped"],
)
def test_a_damaged_gzip_file_is_an_error_that_names_it(folder, change):
    path = damaged(folder, "t10k-images-idx3-ubyte.gz", change)
    with pytest.raises(ValueError, match="be a complete gzip file") as caught:
        Idx(str(folder), "mnist", "test")()
    assert str(path) in str(caught.value)


def test_missing_files_say_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"got .*without it.*scripts/fetch_assets\.sh"):
        Idx(str(tmp_path), "fashion_mnist")()
    with pytest.raises(ValueError, match="no such directory"):
        Idx(str(tmp_path / "nowhere"), "mnist")()


def test_a_read_array_cannot_be_written_by_accident(folder):
    with pytest.raises(ValueError, match="read-only"):
        read_idx(folder / "train-labels-idx1-ubyte", 1)[0] = 1


@needs_assets
@pytest.mark.parametrize(
    ("dataset", "train_sum", "first_labels"),
    [
        ("mnist", 1_567_298_545, [5, 0, 4, 1, 9, 2, 1, 3]),
        ("fashion_mnist", 3_431_114_169, [9, 0, 0, 3, 0, 2, 7, 2]),
    ],
)
def test_the_real_files(dataset, train_sum, first_labels):
    train = load_in_memory(Idx(str(ASSETS), dataset, "train")())
    test = load_in_memory(Idx(str(ASSETS), dataset, "test")())
    assert train.inputs.shape == (60_000, 28, 28, 1)
    assert test.inputs.shape == (10_000, 28, 28, 1)
    assert int(train.inputs.sum(dtype=np.int64)) == train_sum
    assert train.labels[:8].tolist() == first_labels
    assert np.bincount(test.labels).sum() == 10_000
    if dataset == "mnist":
        counts = np.bincount(train.labels[:10_000]).tolist()
        assert counts == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    else:
        assert np.bincount(train.labels).tolist() == [6000] * 10
