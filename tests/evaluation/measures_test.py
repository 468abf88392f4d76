"""`measure` and `summarize` against plain float64 NumPy, example by example."""

from __future__ import annotations

import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distilljax.evaluation import measure, summarize

CLASSES = 7

_jitted = jax.jit(measure, static_argnames="num_bins")


def _data(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    student = (3 * rng.normal(size=(n, CLASSES))).astype(np.float32)
    teacher = (student + 2 * rng.normal(size=(n, CLASSES))).astype(np.float32)
    labels = np.where(
        rng.random(n) < 0.6, student.argmax(1), rng.integers(0, CLASSES, n)
    )
    return student, teacher, labels.astype(np.int32)


def _measure(*arrays, **options):
    """`measure` of NumPy arrays, which the tests like to change in place."""
    device = [None if a is None else jnp.asarray(a) for a in arrays]
    return _jitted(*device, **options)


def _log_softmax(row):
    row = np.asarray(row, np.float64)
    top = row.max()
    return row - top - np.log(np.exp(row - top).sum())


def _oracle(student, teacher, labels, num_bins=15):
    """One loop over examples, as one would compute it by hand."""
    n, out = len(labels), {"nll": 0.0, "kl": 0.0, "correct": 0, "agree": 0}
    bins = [[0, 0.0, 0] for _ in range(num_bins)]
    names = ("count", "correct", "teacher_correct", "both_correct", "gained", "lost")
    classes = {name: [0] * CLASSES for name in names}
    for z, v, label in zip(student, teacher, labels, strict=True):
        p, q = _log_softmax(z), _log_softmax(v)
        right, teacher_right = z.argmax() == label, v.argmax() == label
        out["nll"] -= p[label]
        out["kl"] += float((np.exp(q) * (q - p)).sum())
        out["correct"] += right
        out["agree"] += z.argmax() == v.argmax()
        confidence = np.exp(p.max())
        entry = bins[min(num_bins - 1, int(np.ceil(confidence * num_bins)) - 1)]
        entry[0] += 1
        entry[1] += confidence
        entry[2] += right
        flags = (
            True,
            right,
            teacher_right,
            right and teacher_right,
            right and not teacher_right,
            teacher_right and not right,
        )
        for name, flag in zip(names, flags, strict=True):
            classes[name][label] += int(flag)
    ece = sum(abs(c - conf) for _, conf, c in bins) / n
    return {
        "accuracy": out["correct"] / n,
        "nll": out["nll"] / n,
        "kl_to_teacher": out["kl"] / n,
        "agreement": out["agree"] / n,
        "ece": ece,
        "bins": bins,
        "per_class": classes,
    }


def _assert_equals_oracle(result, oracle):
    for key in ("accuracy", "agreement"):
        assert result[key] == oracle[key]
    for key in ("nll", "kl_to_teacher", "ece"):
        np.testing.assert_allclose(result[key], oracle[key], rtol=2e-6, err_msg=key)
    assert result["per_class"] == oracle["per_class"]
    table = result["reliability"]
    assert table["count"] == [n for n, _, _ in oracle["bins"]]
    for i, (n, confidence, correct) in enumerate(oracle["bins"]):
        if n == 0:
            assert table["confidence"][i] is None
            assert table["accuracy"][i] is None
        else:
            np.testing.assert_allclose(
                table["confidence"][i], confidence / n, rtol=1e-6
            )
            assert table["accuracy"][i] == correct / n


def test_all_numbers_equal_a_float64_loop():
    student, teacher, labels = _data(403)
    result = summarize(jax.jit(measure)(student, teacher, labels))
    assert result["num_examples"] == 403
    _assert_equals_oracle(result, _oracle(student, teacher, labels))
    json.dumps(result, allow_nan=False)  # plain Python, no NumPy scalars


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_padding_counts_nothing_whatever_it_holds(bad):
    student, teacher, labels = _data(50)
    where = np.random.default_rng(1).random(50) < 0.7
    oracle = _oracle(student[where], teacher[where], labels[where])
    student[~where], teacher[~where], labels[~where] = bad, bad, -100
    result = summarize(jax.jit(measure)(student, teacher, labels, jnp.asarray(where)))
    _assert_equals_oracle(result, oracle)


def test_float_masks_and_leading_axes():
    student, teacher, labels = _data(24)
    where = np.random.default_rng(1).random(24) < 0.7
    flat = _measure(student, teacher, labels, jnp.asarray(where))
    folded = _measure(
        student.reshape(4, 6, -1),
        teacher.reshape(4, 6, -1),
        labels.reshape(4, 6),
        jnp.asarray(where, jnp.float32).reshape(4, 6),
    )
    for key, value in flat.items():
        np.testing.assert_allclose(folded[key], value, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("sizes", [(403,), (128, 128, 128, 19), (1,) * 13 + (390,)])
def test_sums_add_over_ragged_splits(sizes):
    student, teacher, labels = _data(403)
    cuts = np.cumsum(sizes)[:-1]
    parts = [
        _measure(*part)
        for part in zip(
            *(np.split(a, cuts) for a in (student, teacher, labels)), strict=True
        )
    ]
    total = functools.reduce(lambda a, b: jax.tree.map(operator.add, a, b), parts)
    whole = _measure(student, teacher, labels)
    for key, value in whole.items():
        if jnp.issubdtype(value.dtype, jnp.integer):
            np.testing.assert_array_equal(total[key], value, err_msg=key)
        else:
            np.testing.assert_allclose(total[key], value, rtol=1e-5, err_msg=key)
    _assert_equals_oracle(summarize(total), _oracle(student, teacher, labels))


def test_sharded_batch_gives_the_same_sums():
    devices = jax.devices()
    student, teacher, labels = _data(8 * 13)
    mesh = jax.make_mesh(
        (len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    place = functools.partial(
        jax.device_put, device=NamedSharding(mesh, PartitionSpec("data"))
    )
    sharded = jax.jit(measure)(place(student), place(teacher), place(labels))
    for key, value in _measure(student, teacher, labels).items():
        np.testing.assert_allclose(sharded[key], value, rtol=1e-5, err_msg=key)


def test_without_a_teacher_its_numbers_are_none():
    student, _, labels = _data(30)
    result = summarize(_measure(student, None, labels))
    assert result["kl_to_teacher"] is None
    assert result["agreement"] is None
    for key in ("teacher_correct", "both_correct", "gained", "lost"):
        assert result["per_class"][key] is None
    assert sum(result["per_class"]["count"]) == 30


def test_low_precision_is_read_as_float32():
    student, teacher, labels = _data(64)
    half = jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16)
    result = summarize(_measure(*half, labels))
    exact = _oracle(*(np.asarray(x.astype(jnp.float32)) for x in half), labels)
    np.testing.assert_allclose(result["nll"], exact["nll"], rtol=2e-6)
    np.testing.assert_allclose(
        result["kl_to_teacher"], exact["kl_to_teacher"], rtol=2e-5
    )


def test_classes_that_neither_knows_change_nothing():
    student, teacher, labels = _data(40)
    column = np.full((40, 1), -np.inf, np.float32)
    wider = summarize(
        _measure(np.hstack([student, column]), np.hstack([teacher, column]), labels)
    )
    narrow = summarize(_measure(student, teacher, labels))
    for key in ("accuracy", "nll", "kl_to_teacher", "agreement", "ece"):
        np.testing.assert_allclose(wider[key], narrow[key], rtol=1e-6, err_msg=key)


def test_a_broken_row_is_wrong_and_shows():
    student, teacher, labels = _data(20)
    student[3] = np.nan
    labels[3] = 0  # which argmax over nan would answer
    teacher[3] = 0.0
    result = summarize(_measure(student, teacher, labels))
    rest = np.arange(20) != 3
    right = (student[rest].argmax(1) == labels[rest]).sum()
    assert result["accuracy"] == right / 20
    assert np.isnan(result["nll"])
    assert np.isnan(result["kl_to_teacher"])
    assert np.isnan(result["ece"])


def test_bins_are_closed_above_and_perfect_confidence_has_a_bin():
    # Confidences 0.5 (the upper edge of bin 0 of 2) and 1.
    logits = np.array([[0.0, 0.0], [200.0, 0.0]], np.float32)
    result = summarize(_measure(logits, None, np.array([0, 0]), num_bins=2))
    assert result["reliability"]["count"] == [1, 1]
    assert result["reliability"]["edges"] == [0.0, 0.5, 1.0]
    assert result["ece"] == pytest.approx(0.25)  # (|1 - 0.5| + |1 - 1|) / 2


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_out_of_range_raises_at_the_end(label):
    student, teacher, labels = _data(5)
    labels[2] = label
    sums = jax.jit(measure)(student, teacher, labels)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\), got 1 of 5"):
        summarize(sums)


def test_nothing_counted_raises():
    student, teacher, labels = _data(5)
    sums = _measure(student, teacher, labels, jnp.zeros(5, bool))
    with pytest.raises(ValueError, match="at least one example"):
        summarize(sums)


def test_mismatched_arguments_name_both_shapes():
    student, teacher, labels = _data(5)
    with pytest.raises(ValueError, match=r"\(5, 7\), got \(5, 6\)"):
        measure.__wrapped__(student, teacher[:, :6], labels)
    with pytest.raises(ValueError, match=r"\(5,\), got \(4,\)"):
        measure.__wrapped__(student, teacher, labels[:4])
    with pytest.raises(ValueError, match=r"where must have the shape"):
        measure.__wrapped__(student, teacher, labels, jnp.ones((5, 1), bool))
    with pytest.raises(TypeError, match="integer classes"):
        measure.__wrapped__(student, teacher, labels.astype(np.float32))
