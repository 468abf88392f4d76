"""Bits in and out, against a reader that goes through them one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilljax.teachers import _bits as bits

flags = st.lists(st.booleans(), max_size=70)
widths = st.integers(0, bits.MAX_WIDTH)


@st.composite
def numbers(draw):
    width = draw(widths)
    return width, draw(st.lists(st.integers(0, 2**width - 1), max_size=40))


@st.composite
def sets(draw, num_classes):
    """The sets of one record."""
    one = st.sets(st.integers(0, num_classes - 1), min_size=1, max_size=20)
    return [sorted(ids) for ids in draw(st.lists(one, max_size=6))]


def write(record):
    flat = np.array([i for ids in record for i in ids], np.int64)
    return bits.pack_sets(flat, np.array([len(ids) for ids in record], np.int64))


def read(packed, records, num_classes):
    sizes = np.array([len(ids) for record in records for ids in record], np.int64)
    num_sets = np.array([len(record) for record in records], np.int64)
    return bits.unpack_sets("f", bits.join(packed), sizes, num_sets, num_classes)


def one_by_one(packed, sizes):
    """The sets of a record, as the layout is described."""
    width, octets = packed[0], packed[1:]

    def bit(i):
        return octets[i // 8] >> i % 8 & 1

    place = 8 * -(-sum(sizes) * width // 8)
    low, found = 0, []
    for size in sizes:
        high, ids = 0, []
        while len(ids) < size:
            if bit(place):
                value = sum(bit(low + i) << i for i in range(width))
                ids.append(high << width | value)
                low += width
            else:
                high += 1
            place += 1
        found.append(ids)
    assert len(octets) == -(-place // 8)
    return found


@given(st.lists(flags, min_size=1, max_size=5))
def test_flags_are_found_where_they_were_set(records):
    packed = [bits.pack_flags(np.array(record, bool)) for record in records]
    joined = bits.join(packed)
    sizes = np.array([bits.bytes_of(len(record)) for record in records], np.int64)
    places, counts = bits.find_flags(joined.data, joined.starts, sizes)
    assert places.tolist() == [i for r in records for i, on in enumerate(r) if on]
    assert counts.tolist() == [sum(record) for record in records]


@given(st.lists(numbers(), max_size=5))
def test_numbers_of_any_width_come_back(records):
    packed = [bits.pack_numbers(np.array(x, np.int64), w) for w, x in records]
    joined = bits.join(packed)
    counts = np.array([len(x) for _, x in records], np.int64)
    width = np.array([w for w, _ in records], np.int64)
    assert (joined.ends - joined.starts == bits.bytes_of(counts * width)).all()
    found = bits.unpack_numbers(joined.data, joined.starts, counts, width)
    assert found.tolist() == [number for _, x in records for number in x]


@given(st.data(), st.integers(1, 2**20))
def test_sets_come_back_by_the_batch_and_bit_by_bit(data, num_classes):
    records = data.draw(st.lists(sets(num_classes), max_size=5))
    packed = [write(record) for record in records]
    expected = [i for record in records for ids in record for i in ids]
    assert read(packed, records, num_classes).tolist() == expected
    for octets, record in zip(packed, records, strict=True):
        assert one_by_one(octets, [len(ids) for ids in record]) == record


@given(sets(2**20))
def test_no_other_width_takes_fewer_bytes(record):
    def size(width):
        low = sum(len(ids) for ids in record) * width
        high = sum(len(ids) + (ids[-1] >> width) for ids in record)
        return 1 + -(-low // 8) + -(-high // 8)

    assert len(write(record)) == min(map(size, range(bits.MAX_WIDTH + 1)))


def test_the_largest_ids_and_all_ids_come_back():
    top = 2**bits.MAX_WIDTH
    records = [[[0, top - 1]], [list(range(300)), [299]], [], [[top - 1]]]
    packed = [write(record) for record in records]
    expected = [0, top - 1, *range(300), 299, top - 1]
    assert read(packed, records, top).tolist() == expected
    assert len(packed[1]) == 1 + -(-(300 + 299 + 1 + 299) // 8)


def test_a_random_set_takes_little_more_than_its_entropy():
    rng = np.random.default_rng(0)
    record = [sorted(rng.choice(2**17, 128, replace=False)) for _ in range(64)]
    entropy = sum(np.log2((2**17 - i) / (i + 1)) for i in range(128)) / 128
    used = 8 * len(write(record)) / (64 * 128)
    # 2 - log2(e), and the term of Stirling's formula that is not linear
    assert entropy < used < entropy + 0.56 + np.log2(2 * np.pi * 128) / 256


def test_the_format_is_this():
    """Stores are read by later versions: these bytes must never change."""
    record = [[3, 1000, 70000], [70001], [0, 1, 2]]
    golden = "0d 03 00 7d c0 c5 b8 08 00 02 80 00 00 03 04 78"
    assert write(record).hex(" ") == golden
    assert one_by_one(bytes.fromhex(golden), [3, 1, 3]) == record
    assert write([]).hex() == "00"


DAMAGED = {
    "no byte": ("", "have a byte for the width"),
    "width": ("19 42 11", "width 0 to 24"),
    "cut low bits": ("18 42 11", "have room for the low bits"),
    "cut": ("00 42", "hold as many ids"),
    "one more": ("00 42 31", "hold as many ids"),
    "behind": ("00 42 11 00", "end with the last id"),
    "too large": ("00 42 21", "have ascending ids below 4"),
    "twice": ("01 03 1b", "have ascending ids below 4"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_an_error_that_names_the_record(name):
    octets, rule = DAMAGED[name]
    sizes, num_sets = np.array([1, 3, 1]), np.array([1, 2])
    joined = bits.join([write([[2]]), bytes.fromhex(octets)])
    with pytest.raises(ValueError, match=rf"f: records must .*{rule}.*record 1 of"):
        bits.unpack_sets("f", joined, sizes, num_sets, num_classes=4)
