"""Shares are kept, every row can be asked for, and no row is lost between epochs."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from distilljax.data import Loader
from distilljax.data.text import Mixture
from distilljax.data.text.mixture import PERIOD, quotas
from tests.data.text.packed_test import assert_same, global_batches
from tests.data.text.tiny import documents, packed


@pytest.fixture
def parts(model):
    return {
        "novels": packed(model, documents(90, seed=1)),
        "glosses": packed(model, documents(25, seed=2)),
        "letters": packed(model, documents(10, seed=3), repack=False),
    }


WEIGHTS = {"novels": 6, "glosses": 3.0, "letters": 1}


def test_shares_are_those_of_the_weights_from_the_first_rows_on(parts):
    rows = Mixture(parts, WEIGHTS)()
    for count in (10, 100, 1000, len(rows)):
        seen = Counter(rows.place(i)[0] for i in range(count))
        for name, weight in WEIGHTS.items():
            assert abs(seen[name] - count * weight / 10) <= 1
    # and later on
    seen = Counter(rows.place(i)[0] for i in range(7 * PERIOD, 7 * PERIOD + 100))
    assert seen == {"novels": 60, "glosses": 30, "letters": 10}


def test_a_part_is_read_row_by_row_and_begins_again(parts):
    rows = Mixture(parts, WEIGHTS)()
    found = {name: [] for name in parts}
    for i in range(3 * PERIOD):
        name, row = rows.place(i)
        found[name].append(row)
    for name in ("novels", "glosses"):
        assert found[name] == list(range(len(found[name])))
    few = len(rows.parts["letters"])
    assert found["letters"] == [i % few for i in range(len(found["letters"]))]


def test_an_epoch_ends_when_each_part_was_seen(parts):
    rows = Mixture(parts, WEIGHTS)()
    for name, part in rows.parts.items():
        seen = {
            row
            for found, row in (rows.place(i) for i in range(len(rows)))
            if found == name
        }
        assert seen >= set(range(len(part)))
    last = rows.place(len(rows) - 1)
    assert last[1] == len(rows.parts[last[0]]) - 1  # and not before


def test_a_row_is_that_of_its_part(parts):
    rows = Mixture(parts, WEIGHTS)()
    for index in (0, 17, 2 * len(rows) + 5):
        name, row = rows.place(index)
        for key, array in rows[index].items():
            np.testing.assert_array_equal(array, rows.parts[name][row][key])
        assert rows.spans(index) == (name, rows.parts[name].spans(row))


def test_any_number_of_processes_sees_the_same_mixture(parts):
    rows = Mixture(parts, WEIGHTS)()
    steps = len(rows) // 8 + 5  # into the second epoch
    whole, _ = global_batches(Loader(8), rows, 1, steps + 2)
    first, state = global_batches(Loader(8), rows, 4, steps)
    rest, _ = global_batches(Loader(8), rows, 2, 2, state)
    assert_same([*first, *rest], whole)


def test_weights_are_exact_in_ten_thousand_rows():
    assert quotas([1, 2], 10_000).tolist() == [3333, 6667]
    assert quotas([0.7, 0.2, 0.1], 10).tolist() == [7, 2, 1]
    with pytest.raises(ValueError, match="weights must be at least 1 / 10000"):
        quotas([1, 1e-6], 10_000)


def test_a_mixture_that_makes_no_sense_is_an_error(model, parts):
    with pytest.raises(ValueError, match="weights must have the names of the parts"):
        Mixture(parts, {"novels": 1})
    with pytest.raises(ValueError, match="weights must have the names of the parts"):
        Mixture({}, {})
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weights must be positive numbers"):
            Mixture(parts, WEIGHTS | {"letters": wrong})
    other = packed(model, documents(5), context=32)
    with pytest.raises(ValueError, match="parts must have rows of one context"):
        Mixture(parts | {"letters": other}, WEIGHTS)
    named = dataclasses.replace(other.text.tokenizer, eos="<|endoftext|>")
    text = dataclasses.replace(other.text, tokenizer=named)
    other = dataclasses.replace(other, text=text, context=64)
    with pytest.raises(ValueError, match="parts must have one tokenizer"):
        Mixture(parts | {"letters": other}, WEIGHTS)()


def test_a_mixture_with_other_weights_is_another_stream(parts):
    state = Loader(4)(Mixture(parts, WEIGHTS)(), seed=0).get_state()
    other = Mixture(parts, WEIGHTS | {"letters": 1.01})()
    with pytest.raises(ValueError, match="be of this stream"):
        Loader(4)(other, seed=0).set_state(state)
