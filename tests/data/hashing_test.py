from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilljax.data.hashing import (
    derive_key,
    random_bits,
    random_integers,
    random_uniform,
)


def test_splitmix64_matches_its_published_test_vector():
    bits = random_bits(1234567, np.arange(5))
    assert bits.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**62))
def test_bits_depend_on_the_counter_and_not_on_the_batch_around_it(key, counter):
    alone = random_bits(key, np.array([counter]))
    among = random_bits(key, np.array([counter + 7, counter, 3]))
    assert alone[0] == among[1]


def test_counters_never_collide():
    assert len(np.unique(random_bits(3, np.arange(100_000)))) == 100_000


def test_keys_of_different_purposes_and_seeds_differ():
    parts = [(s, p, e) for s in range(-2, 9) for p in ("a", "b") for e in range(9)]
    assert len({derive_key(*p) for p in parts}) == len(parts)
    assert derive_key("ab") != derive_key("a", "b")
    assert derive_key(1, 2) != derive_key(2, 1)
    assert derive_key("a long name of a purpose") != derive_key("a long name")


def test_keys_are_the_same_in_every_version():
    """Changing them would change the data of every run that is resumed."""
    assert derive_key(0, "order", 0) == 9064834248379596512
    assert derive_key(-1) == derive_key(2**64 - 1)


def test_uniform_numbers_are_uniform_and_independent_between_draws():
    seeds = random_bits(0, np.arange(100_000))
    u, v = random_uniform(seeds, 0), random_uniform(seeds, 1)
    assert u.min() >= 0
    assert u.max() < 1
    histogram = np.histogram(u, bins=20, range=(0, 1))[0]
    # Chi-squared with 19 degrees of freedom: 43.8 is its 0.999 quantile.
    assert ((histogram - 5000) ** 2 / 5000).sum() < 43.8
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.01
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 4), (5, 260)])
def test_integers_cover_their_range_and_stay_in_it(low, high):
    drawn = random_integers(random_bits(1, np.arange(20_000)), low, high)
    assert np.unique(drawn).tolist() == list(range(low, high))
