from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilljax.data import Arrays, Few, Slice, Stratified, WithoutClasses
from distilljax.data.hashing import random_bits
from distilljax.data.selections import stratified_indices
from distilljax.data.sources import Records


def numbered(labels):
    """A source whose inputs say which example each is."""
    labels = np.asarray(labels)
    return Arrays(np.arange(len(labels), dtype=np.float32)[:, None], labels, 10)


def members(source):
    return source.inputs[:, 0].astype(int).tolist()


LABELS = np.repeat(np.arange(10), [9, 30, 12, 20, 5, 5, 40, 11, 8, 60])
SOURCE = numbered(LABELS[np.argsort(random_bits(0, np.arange(200)))])


def test_a_slice_is_pythons():
    assert members(Slice(SOURCE, 3, 6)()) == [3, 4, 5]
    assert members(Slice(SOURCE, -2)()) == [198, 199]
    assert members(Slice(SOURCE, stop=2)()) == [0, 1]


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_a_stratified_draw_has_the_proportions_to_within_one(labels, share, seed):
    labels = np.array(labels)
    num_examples = max(1, round(share * len(labels)))
    chosen = stratified_indices(labels, num_examples, seed)
    assert len(set(chosen.tolist())) == num_examples
    drawn = np.bincount(labels[chosen], minlength=5)
    exact = np.bincount(labels, minlength=5) * num_examples / len(labels)
    assert np.all(np.abs(drawn - exact) < 1)


def test_a_draw_and_its_complement_split_the_source():
    part = members(Stratified(SOURCE, 70, seed=3)())
    rest = members(Stratified(SOURCE, 70, seed=3, complement=True)())
    assert len(part) == 70
    assert sorted(part + rest) == list(range(200))
    assert part == sorted(part)


def test_three_parts_by_nesting_do_not_overlap():
    rest = Stratified(SOURCE, 50, seed=0, complement=True)
    parts = [
        Stratified(SOURCE, 50, seed=0),
        Stratified(rest, 60, seed=0),
        Stratified(rest, 60, seed=0, complement=True),
    ]
    seen = [i for part in parts for i in members(part())]
    assert sorted(seen) == list(range(200))


def test_36_of_ten_classes_are_three_or_four_of_each():
    extra = set()
    for seed in range(20):
        counts = np.bincount(Few(SOURCE, 36, seed)().labels, minlength=10)
        assert sorted(counts.tolist()) == [3] * 4 + [4] * 6
        extra.add(tuple(counts.tolist()))
    assert len(extra) > 10  # which classes have four is drawn as well


@pytest.mark.parametrize("kind", [Few, Stratified])
def test_draws_depend_on_the_seed_alone(kind):
    again = members(kind(SOURCE, 36, seed=4)())
    assert again == members(kind(SOURCE, 36, seed=4)())
    draws = {tuple(members(kind(SOURCE, 36, seed=s)())) for s in range(10)}
    assert len(draws) == 10


def test_draws_are_uniform_over_a_class():
    source = numbered(np.zeros(20, int))
    counts = np.zeros(20)
    for seed in range(1000):
        counts[members(Few(source, 5, seed)())] += 1
    # Each is drawn 250 times on average; 5 standard deviations are 68.
    assert np.all(np.abs(counts - 250) < 68)


def test_draws_are_the_same_in_every_version():
    """The committed results name seeds, and mean these examples."""
    assert members(Few(SOURCE, 10, seed=0)()) == [
        64,
        73,
        76,
        92,
        117,
        142,
        151,
        170,
        188,
        197,
    ]
    assert members(Stratified(SOURCE, 8, seed=0)()) == [
        37,
        64,
        73,
        76,
        92,
        113,
        151,
        170,
    ]


def test_left_out_classes_are_gone_and_all_others_are_there():
    rest = WithoutClasses(SOURCE, classes=(3, 7))()
    assert rest.num_classes == 10
    assert members(rest) == [i for i, k in enumerate(SOURCE.labels) if k not in (3, 7)]


def test_selections_work_on_records_without_loading_them():
    records = Records(SOURCE, dict, 10)

    def config():
        return records

    few, same = Few(config, 36, seed=1)(), Few(SOURCE, 36, seed=1)()
    assert [int(few[i]["inputs"][0]) for i in range(36)] == members(same)
    assert few.num_classes == 10


def test_selections_are_values_that_configs_can_compare():
    def config():
        return SOURCE

    assert Few(config, 36, seed=1) == Few(config, 36, seed=1)
    assert hash(Few(config, 36, seed=1)) == hash(Few(config, 36, seed=1))
    assert Few(config, 36, seed=1) != Few(config, 36, seed=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Few(SOURCE, 60), "Few: num_examples must .* got 60 with .*4: 5"),
        (Few(SOURCE, 0), "Few: num_examples must be at least 1"),
        (Stratified(SOURCE, 201), "size of the source, 200, got 201"),
        (Stratified(SOURCE, 0), "num_examples must lie between 1"),
        (WithoutClasses(SOURCE, (3, 11)), r"classes must occur .* got \[11\]"),
    ],
)
def test_draws_that_are_impossible_say_why(config, message):
    with pytest.raises(ValueError, match=message):
        config()
