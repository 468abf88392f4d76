from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distilljax.data import (
    ArrayRecord,
    Arrays,
    Loader,
    decode_example,
    encode_example,
    load_in_memory,
    write_array_record,
)

DTYPES = st.one_of(
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.boolean_dtypes(),
)


def arrays(num_examples=12):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_examples, 5, 5, 1)).astype(np.uint8)
    return Arrays(images, np.arange(num_examples) % 4, 4)


@given(
    st.dictionaries(
        st.text(max_size=5),
        hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)),
        max_size=4,
    )
)
def test_every_example_survives_the_round_trip(example):
    decoded = decode_example(encode_example(example))
    assert decoded.keys() == example.keys()
    for name, array in example.items():
        assert decoded[name].dtype == array.dtype.newbyteorder("<")
        assert decoded[name].shape == array.shape
        np.testing.assert_array_equal(decoded[name], array)


def test_the_encoding_is_the_documented_one():
    """Files are read by later versions, and by programs in other languages."""
    record = encode_example({"inputs": np.array([[1, 2]], ">u2"), "labels": 3})
    header = b'{"inputs":["<u2",[1,2]],"labels":["<i8",[]]}'
    expected = b"DJX1" + len(header).to_bytes(4, "little") + header
    assert record == expected + b"\x01\x00\x02\x00" + b"\x03" + bytes(7)


def test_only_numbers_can_be_written():
    with pytest.raises(TypeError, match="text must be a number"):
        encode_example({"text": "hello"})


@pytest.mark.parametrize("record", [b"", b"DJX", b"DJX1", b"\n\x05tfexample"])
def test_a_foreign_record_is_an_error(record):
    with pytest.raises(ValueError, match="begin with DJX1"):
        decode_example(record)


def test_a_cut_record_is_an_error():
    record = encode_example({"inputs": np.zeros(4)})
    with pytest.raises(ValueError, match="record must have"):
        decode_example(record[:-1])


def test_what_is_written_is_read_in_order_over_all_files(tmp_path):
    source = arrays()
    paths = (
        str(tmp_path / "a.array_record"),
        str(tmp_path / "deep" / "b.array_record"),
    )
    assert write_array_record(paths[0], itertools.islice(source, 7)) == 7
    assert write_array_record(paths[1], (source[i] for i in range(7, 12))) == 5
    read = ArrayRecord(paths, num_classes=4)()
    assert len(read) == 12
    loaded = load_in_memory(read)
    assert np.array_equal(loaded.inputs, source.inputs)
    assert np.array_equal(loaded.labels, source.labels)
    assert loaded.num_classes == 4
    single = [int(read[i]["labels"]) for i in (11, 0, 7, 6)]
    assert single == [3, 0, 3, 2]


def test_training_batches_equal_those_from_memory(tmp_path):
    path = str(tmp_path / "train.array_record")
    write_array_record(path, arrays())
    from_file = Loader(5, scale=255.0, in_memory=False)(ArrayRecord((path,))(), seed=2)
    from_memory = Loader(5, scale=255.0)(arrays(), seed=2)
    for _ in range(8):
        a, b = next(from_file), next(from_memory)
        assert all(np.array_equal(a[name], b[name]) for name in b)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "train.array_record"
    write_array_record(path, arrays(3))
    before = path.read_bytes()

    def failing():
        yield arrays()[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_array_record(path, failing())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["train.array_record"]


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1], ids=str)
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, keep):
    path = tmp_path / "train.array_record"
    write_array_record(path, arrays())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="complete ArrayRecord files") as caught:
        ArrayRecord((str(path),))()
    assert str(path) in str(caught.value)


def test_a_foreign_file_is_an_error(tmp_path):
    path = tmp_path / "train.array_record"
    path.write_bytes(b"something else " * 10_000)
    with pytest.raises(ValueError, match="complete ArrayRecord files"):
        ArrayRecord((str(path),))()


def test_a_missing_file_is_an_error():
    with pytest.raises(
        ValueError, match=r"files that exist, got nowhere\.array_record"
    ):
        ArrayRecord(("nowhere.array_record",))()


def test_no_files_are_an_error():
    with pytest.raises(TypeError, match="tuple of at least one file"):
        ArrayRecord(())()
