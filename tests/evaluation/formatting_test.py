"""Digits: enough, not more, and the same within a column."""

from __future__ import annotations

import math

import pytest

from distilljax.evaluation.arms import QUALITY
from distilljax.evaluation.formatting import (
    decimals_of,
    fixed,
    interval,
    p_value,
    quantity,
    short,
    signed,
    with_spread,
)
from distilljax.evaluation.statistics import paired_difference, spread

ACCURACY, KL = QUALITY[:2]


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(-0.04, 1, "0.0"), (-1.25, 2, "−1.25"), (12345.6, 0, "12,346")],
)
def test_fixed(value, decimals, text):
    assert fixed(value, decimals) == text


def test_what_is_not_a_number_stays_visible():
    assert fixed(math.nan, 2) == "nan"
    assert quantity(math.inf) == "inf"
    assert with_spread(ACCURACY, spread([0.5, math.nan]), 1) == "nan ± nan"


def test_shares_follow_the_number_of_examples():
    assert decimals_of(ACCURACY, [0.5], 400) == 1
    assert decimals_of(ACCURACY, [0.5], 10_000) == 2
    assert with_spread(ACCURACY, spread([0.77, 0.78, 0.79]), 1) == "78.0 ± 1.0"
    assert with_spread(ACCURACY, None, 1) == "–"


@pytest.mark.parametrize(
    ("largest", "decimals"),
    [(0.389, 3), (0.0389, 4), (1.23, 2), (231.0, 0), (1e-9, 4), (0.0, 3)],
)
def test_nats_have_three_digits(largest, decimals):
    assert decimals_of(KL, [largest / 7, -largest], 400) == decimals


def test_a_small_value_in_a_column_of_large_ones_keeps_a_digit():
    """A KL of 0.0308 ± 0.0012 once stood there as 0.03 ± 0.00, under 1.93 ± 0.10."""
    assert decimals_of(KL, [1.93, 0.10, 0.0308, 0.0012], 400) == 3
    assert decimals_of(KL, [231.0, 1e-9], 400) == 4
    assert decimals_of(KL, [1.93, 0.0], 400) == 2


def test_intervals():
    difference = paired_difference([0.03, 0.05, 0.07], [0.02, 0.03, 0.04])
    assert signed(ACCURACY, difference.mean, 1) == "+2.0"
    assert interval(ACCURACY, difference, 1) == "−0.5 to +4.5"
    assert interval(ACCURACY, paired_difference([1.0], [0.0]), 1) == "–"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0.00"),
        (999.7, "B", "1.00 kB"),
        (301_066, "", "301 k"),
        (1.2e6, "B", "1.20 MB"),
        (16.6e6, "/s", "16.6 M/s"),
        (1234.0, "ms", "1,234 ms"),
        (None, "B", "–"),
    ],
)
def test_quantities(value, unit, text):
    assert quantity(value, unit) == text


def test_p_values_and_ratios():
    assert [p_value(p) for p in (1.0, 0.05, 1e-4, 9e-5)] == [
        "1",
        "0.05",
        "0.0001",
        "< 0.0001",
    ]
    assert [short(r) for r in (1.0, 9.94, 9.96, 1250.0)] == [
        "1.0",
        "9.9",
        "10",
        "1,250",
    ]
