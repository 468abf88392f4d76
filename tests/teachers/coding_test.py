"""What was encoded is decoded, in few bytes, and damage is an error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilljax.teachers import SampledCoding, TopKCoding

VOCABULARY = 151_936
GRID = (1.0, 2.0, 4.0)

positions = st.lists(st.integers(0, 9), max_size=5)
seeds = st.integers(0, 2**32 - 1)
num_classes = st.one_of(st.integers(1, 20), st.integers(1, 2**20))


def draws(rng, classes, num_samples, count):
    """Ids that are close together, far apart, at the top, or all the same."""
    spread = min(classes, int(rng.choice([1, 3, num_samples, classes])))
    base = rng.integers(0, classes - spread + 1, (count, 1))
    return base + rng.integers(0, spread, (count, num_samples))


def log_sum_exp(x):
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)


def signals(rng, classes, k, count, temperatures=GRID):
    """Random classes and probabilities, some of them 0, that sum to 1."""
    ids = [rng.choice(classes, k, replace=False) for _ in range(count)]
    z = rng.normal(size=(count, k + 1)) * rng.choice([0.1, 3, 30])
    z[:, :-1][rng.random((count, k)) < 0.1] = -np.inf
    if k == classes:
        z[:, -1] = -np.inf
        z[:, 0] = 0
    log_p = z - log_sum_exp(z)[:, None]
    t = np.array(temperatures)
    tails = log_p[:, -1:] / t + np.where(t == 1, 0, rng.random((count, len(t))))
    return (
        np.array(ids, np.int64).reshape(count, k),
        log_p[:, :-1].astype(np.float32),
        tails.astype(np.float32),
    )


def ascending(ids, *others):
    order = np.argsort(ids, axis=1)
    return [np.take_along_axis(x, order, axis=1) for x in (ids, *others)]


def divergences(signal, coded, temperatures=GRID):
    """KL at each temperature and position, of the k classes and the tail."""
    found = []
    for g, temperature in enumerate(temperatures):
        log_p, log_q = (
            np.hstack([np.float64(log_probs) / temperature, log_tail[:, g : g + 1]])
            for log_probs, log_tail in (signal, coded)
        )
        log_p -= log_sum_exp(log_p)[:, None]
        log_q -= log_sum_exp(log_q)[:, None]
        terms = np.zeros_like(log_p)
        some = np.isfinite(log_p)
        terms[some] = np.exp(log_p[some]) * (log_p[some] - log_q[some])
        found.append(terms.sum(axis=1))
    return np.array(found)


@given(positions, num_classes, st.integers(1, 60), seeds)
def test_draws_come_back(positions, num_classes, num_samples, seed):
    rng = np.random.default_rng(seed)
    coding = SampledCoding(num_classes, num_samples)
    batch = [draws(rng, num_classes, num_samples, count) for count in positions]
    records = [coding.encode(rng.permuted(ids, axis=1)) for ids in batch]
    ids, counts = coding.decode(records, np.array(positions, np.int64))
    assert ids.dtype == np.int32
    assert counts.dtype == np.uint8
    rows = [row for ids in batch for row in ids]
    assert len(rows) == len(ids) == len(counts)
    for row, found, times in zip(rows, ids, counts, strict=True):
        expected, expected_times = np.unique(row, return_counts=True)
        used = len(expected)
        assert found[:used].tolist() == expected.tolist()
        assert times[:used].tolist() == expected_times.tolist()
        assert not found[used:].any()
        assert not times[used:].any()
    assert ids.shape[1] == max([len(np.unique(row)) for row in rows], default=1)


def test_many_draws_and_slots_that_are_asked_for():
    coding = SampledCoding(num_classes=5, num_samples=1000)
    record = coding.encode(np.repeat([[4, 2]], 500, axis=1))
    ids, counts = coding.decode([record], np.array([1]), width=3)
    assert counts.dtype == np.uint16
    assert (ids.tolist(), counts.tolist()) == ([[2, 4, 0]], [[500, 500, 0]])
    with pytest.raises(ValueError, match="width must be at least 2"):
        coding.decode([record], np.array([1]), width=1)


@pytest.mark.parametrize("values", ["log8", "bfloat16", "float32"])
@given(positions, num_classes, st.integers(1, 40), seeds)
def test_the_likeliest_come_back(values, positions, num_classes, k, seed):
    rng = np.random.default_rng(seed)
    k = min(k, num_classes)
    coding = TopKCoding(num_classes, k, GRID, values)
    batch = [signals(rng, num_classes, k, count) for count in positions]
    records = [coding.encode(*signal) for signal in batch]
    found, log_probs, log_tail = coding.decode(records, np.array(positions, np.int64))
    assert found.dtype == np.int32
    assert log_probs.dtype == log_tail.dtype == np.float32
    assert found.shape == log_probs.shape == (sum(positions), k)
    assert log_tail.shape == (sum(positions), 3)
    if not batch:
        return
    ids, probs, tail = (np.concatenate(x) for x in zip(*batch, strict=True))
    ids, probs = ascending(ids, probs)
    np.testing.assert_array_equal(found, ids)
    if values == "float32":
        np.testing.assert_array_equal(log_probs, probs)
        np.testing.assert_array_equal(log_tail, tail)
        return
    np.testing.assert_array_equal(np.isneginf(log_probs), np.isneginf(probs))
    np.testing.assert_array_equal(np.isneginf(log_tail), np.isneginf(tail))
    total = np.exp(log_probs).sum(axis=1) + np.exp(log_tail[:, 0])
    np.testing.assert_allclose(total, 1, atol=1e-5)
    # A range of 300 nats moves 0.1 nats; the step at the top decides.
    if len(ids):
        limit = 0.02 if values == "log8" else 1e-3
        assert divergences((probs, tail), (log_probs, log_tail)).max() < limit


def test_without_temperature_1_nothing_is_divided():
    coding = TopKCoding(10, 1, (2.0,), "bfloat16")
    record = coding.encode(np.array([[3]]), np.array([[-1.0]]), np.array([[0.5]]))
    _, log_probs, log_tail = coding.decode([record], np.array([1]))
    assert (log_probs.item(), log_tail.item()) == (-1.0, 0.5)


@pytest.mark.parametrize("k", [32, 128])
@pytest.mark.parametrize("values", ["log8", "bfloat16"])
def test_coding_costs_little_from_peaked_to_flat(k, values):
    """Rows as of Zipf, at temperatures of their own; ranges up to 300 nats."""
    classes, count = 32_000, 40
    coding = TopKCoding(classes, k, GRID, values)
    costs = []
    for seed, own in enumerate([None, None, 0.02, 0.05, 0.2, 1.0, 5.0, 50.0]):
        rng = np.random.default_rng(seed)
        z = -rng.uniform(0.8, 1.6, (count, 1)) * np.log(1 + np.arange(classes))
        z += rng.uniform(0, 1.5, (count, 1)) * rng.normal(size=(count, classes))
        z /= own or np.exp(rng.uniform(np.log(0.05), np.log(20), (count, 1)))
        z -= log_sum_exp(z)[:, None]
        ids = np.argsort(-z, axis=1)[:, :k]
        probs = np.take_along_axis(z, ids, axis=1).astype(np.float32)
        np.put_along_axis(z, ids, -np.inf, axis=1)
        tail = np.stack([log_sum_exp(z / t) for t in GRID], 1).astype(np.float32)
        record = coding.encode(ids, probs, tail)
        _, *found = coding.decode([record], np.array([count]))
        _, probs = ascending(ids, probs)
        costs.append(divergences((probs, tail), found))
    for cost in costs:
        assert (cost.mean(axis=1) <= 5e-5).all()  # the goal was 3e-4
        assert cost.min() > -1e-6
        assert cost.max() <= 3e-3


def distinct(rng, count, k):
    return np.array([rng.choice(VOCABULARY, k, replace=False) for _ in range(count)])


def test_bytes_of_random_ids():
    rng = np.random.default_rng(0)
    ids = distinct(rng, 256, 12)
    others = np.take_along_axis(ids, rng.integers(0, 12, (256, 38)), axis=1)
    record = SampledCoding(VOCABULARY, 50).encode(np.hstack([ids, others]))
    assert len(record) <= 29.5 * 256
    for k, limit in ((32, 96), (128, 330)):
        flat = np.full((256, k), -np.log(k + 1), np.float32)
        coding = TopKCoding(VOCABULARY, k, GRID)
        record = coding.encode(distinct(rng, 256, k), flat, flat[:, :3])
        assert len(record) <= limit * 256


def test_the_format_of_draws_is_this():
    """Stores are read by later versions: these bytes must never change."""
    coding = SampledCoding(num_classes=1000, num_samples=5)
    record = bytes.fromhex("08 0b 07 29 c2 21 20 18 b0 00 01 9f")
    drawn = np.array([[900, 41, 41, 41, 41], [7, 7, 7, 7, 7], [1, 2, 3, 300, 3]])
    assert coding.encode(drawn).hex(" ") == record.hex(" ")
    ids, counts = coding.decode([record], np.array([3]))
    assert ids.tolist() == [[41, 900, 0, 0], [7, 0, 0, 0], [1, 2, 3, 300]]
    assert counts.tolist() == [[4, 1, 0, 0], [5, 0, 0, 0], [1, 1, 2, 1]]


def test_the_format_of_the_likeliest_is_this():
    """Stores are read by later versions: these bytes must never change."""
    probs = np.log(np.array([[0.5, 0.25, 0.125]], np.float32))
    tail = np.array([[np.log(0.125), -0.25]], np.float32)
    golden = {
        "log8": "31 a6 f9 53 29 c0 00 b4 07 02 08 0f 91",
        "bfloat16": "b1 bf 05 c0 31 bf 29 c0 00 b4 07 02 08 0f 91",
        "float32": "18 72 b1 bf 92 15 05 c0 18 72 31 bf 92 15 05 c0 00 00 80 be"
        " 07 02 08 0f 91",
    }
    found = {
        values: TopKCoding(1000, 3, (1.0, 2.0), values)
        .encode(np.array([[700, 2, 400]]), probs, tail)
        .hex(" ")
        for values in golden
    }
    assert found == golden


CODINGS = [
    SampledCoding(300, 7),
    TopKCoding(300, 5, GRID),
    TopKCoding(300, 5, GRID, "float32"),
]


def record_of(coding, rng, count):
    if isinstance(coding, SampledCoding):
        return coding.encode(draws(rng, 300, 7, count))
    return coding.encode(*signals(rng, 300, 5, count))


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@given(st.integers(0, 9), st.integers(1, 400), seeds)
def test_a_record_of_another_length_is_an_error(coding, count, by, seed):
    rng = np.random.default_rng(seed)
    record = record_of(coding, rng, count)
    good = record_of(coding, rng, 3)
    longer = record + rng.integers(0, 256, by, np.uint8).tobytes()
    for damaged in (record[:-by], longer, record + bytes(by)):
        with pytest.raises(ValueError, match="record 1 of the batch"):
            coding.decode([good, damaged, good], np.array([3, count, 3]))


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@settings(max_examples=300)
@given(st.integers(1, 9), st.integers(-2, 2), seeds)
def test_damage_is_an_error_or_gives_a_signal_of_the_right_form(
    coding, count, off, seed
):
    """Values can be changed without a trace: the file has a checksum for that."""
    rng = np.random.default_rng(seed)
    record = bytearray(record_of(coding, rng, count))
    for at in rng.integers(0, len(record), rng.integers(0, 4)):
        record[at] = rng.integers(0, 256)
    claimed = max(count + off, 0)
    try:
        ids, numbers, *tail = coding.decode([bytes(record)], np.array([claimed]))
    except ValueError as error:
        assert "records must" in str(error)  # noqa: PT017
        return
    assert len(ids) == claimed
    assert not ids.size or (ids.min() >= 0 and ids.max() < 300)
    used = numbers > 0 if isinstance(coding, SampledCoding) else np.isfinite(ids)
    assert ((np.diff(ids) > 0) | ~used[:, 1:]).all()
    if isinstance(coding, SampledCoding):
        assert (numbers.sum(axis=1) == 7).all()
    else:
        assert not np.isnan(numbers).any()
        assert not np.isnan(tail[0]).any()


WRONG_IDS = {
    "too large": ([[0, 1, 300]], "lie in"),
    "negative": ([[0, 1, -1]], "lie in"),
    "too few": ([[0, 1]], "have the shape"),
    "one axis": ([0, 1, 2], "have the shape"),
}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_ids_that_cannot_be_written(name):
    ids, rule = WRONG_IDS[name]
    probs = np.log(np.full((1, 3), 0.25, np.float32))
    with pytest.raises(ValueError, match=f"encode: ids must {rule}"):
        SampledCoding(300, 3).encode(np.array(ids))
    with pytest.raises(ValueError, match=f"encode: ids must {rule}"):
        TopKCoding(300, 3).encode(np.array(ids), probs, probs[:, :1])


def test_numbers_that_cannot_be_written():
    coding = TopKCoding(300, 3)
    ids = np.array([[5, 1, 2]])
    good = np.log(np.full((1, 3), 0.25, np.float32))
    with pytest.raises(ValueError, match="ids must be different"):
        coding.encode(np.array([[5, 1, 5]]), good, good[:, :1])
    with pytest.raises(ValueError, match="log_tail must have the shape"):
        coding.encode(ids, good, good)
    with pytest.raises(ValueError, match="log_probs must be finite or -inf"):
        coding.encode(ids, good * np.nan, good[:, :1])
    with pytest.raises(ValueError, match="log_tail must be finite or -inf"):
        coding.encode(ids, good, good[:, :1] + np.inf)
    with pytest.raises(ValueError, match="log_probs must sum to 1"):
        coding.encode(ids, good - 0.1, good[:, :1])


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: SampledCoding(0, 5), "num_classes"),
        (lambda: SampledCoding(2**24 + 1, 5), "num_classes"),
        (lambda: SampledCoding(10, 0), "num_samples"),
        (lambda: SampledCoding(10, 65536), "num_samples"),
        (lambda: TopKCoding(10, 11), "k"),
        (lambda: TopKCoding(10, 0), "k"),
        (lambda: TopKCoding(10, 1, ()), "temperatures"),
        (lambda: TopKCoding(10, 1, (0.0,)), "temperatures"),
        (lambda: TopKCoding(10, 1, values="int4"), "values"),
    ],
)
def test_codings_that_there_are_not(make, argument):
    with pytest.raises(ValueError, match=f"Coding: {argument} must"):
        make()


def test_each_record_has_a_number_of_positions():
    coding = SampledCoding(10, 2)
    record = coding.encode(np.array([[1, 2]]))
    for wrong in ([1], [1, 1, 1], [1, -1]):
        with pytest.raises(ValueError, match="positions must be 2 numbers"):
            coding.decode([record, record], np.array(wrong))
