"""Every statistic against SciPy's own and against published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from distilljax.evaluation import (
    mcnemar,
    paired_difference,
    sign_test,
    spread,
    wilson_interval,
)

# Student's own data of 1908: hours of sleep gained by two drugs in ten patients.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_student_1908():
    result = paired_difference(DRUG_2, DRUG_1)
    # R: t.test(extra ~ group, data = sleep, paired = TRUE)
    assert result.mean == pytest.approx(1.58)
    assert result.low == pytest.approx(0.7001142, abs=1e-6)
    assert result.high == pytest.approx(2.4598858, abs=1e-6)
    assert result.t_p_value == pytest.approx(0.002833, abs=1e-6)
    assert (result.positive, result.negative, result.n) == (9, 0, 10)
    assert result.sign_p_value == 2 / 2**9  # the tie is dropped
    assert result.excludes_zero


@pytest.mark.parametrize("n", [2, 3, 5, 40])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_paired_difference_equals_scipy(n, confidence):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.3, 1, n), rng.normal(0, 1, n)
    result = paired_difference(a.tolist(), b.tolist(), confidence=confidence)
    reference = stats.ttest_rel(a, b)
    low, high = reference.confidence_interval(confidence)
    np.testing.assert_allclose(
        [result.low, result.high, result.t_p_value],
        [low, high, reference.pvalue],
        rtol=1e-10,
    )
    assert result.excludes_zero == (low > 0 or high < 0)


def test_one_pair_has_no_interval():
    result = paired_difference([2.0], [1.0])
    assert (result.mean, result.sd, result.low, result.high) == (1.0, None, None, None)
    assert result.t_p_value is None
    assert not result.excludes_zero


def test_equal_differences_have_no_p_value():
    result = paired_difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (result.low, result.high, result.sd) == (1.0, 1.0, 0.0)
    assert result.t_p_value is None
    same = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert not same.excludes_zero
    assert same.sign_p_value == 1.0


def test_spread():
    values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]
    result = spread(values)
    assert result.mean == 5.0
    assert result.sd == pytest.approx(math.sqrt(32 / 7))
    assert result.values == tuple(values)
    assert spread([3.0]).sd is None
    assert math.isnan(spread([1.0, math.nan]).mean)


@pytest.mark.parametrize(("k", "m"), [(0, 0), (0, 5), (3, 9), (7, 7), (1, 400)])
def test_sign_test_equals_scipys_binomial(k, m):
    expected = stats.binomtest(k, k + m, 0.5).pvalue if k + m else 1.0
    assert sign_test(k, m) == pytest.approx(expected, rel=1e-10)
    assert sign_test(m, k) == sign_test(k, m)


def test_mcnemar_approaches_chi_squared_for_large_counts():
    # Agresti's approval ratings: 150 and 86 changed their mind; chi2 = 17.36.
    chi_squared = (150 - 86) ** 2 / (150 + 86)
    assert chi_squared == pytest.approx(17.36, abs=0.01)
    corrected = stats.chi2.sf((abs(150 - 86) - 1) ** 2 / 236, 1)
    assert mcnemar(150, 86) == pytest.approx(corrected, rel=0.12)
    assert mcnemar(150, 86) == pytest.approx(stats.binomtest(86, 236).pvalue)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (377, 400)])
def test_wilson_equals_scipy(k, n):
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(k, n), expected, atol=1e-12)


def test_wilson_covers_as_often_as_it_says():
    """Exact coverage at n = 50, averaged over p, is near the nominal 95 %."""
    n, k = 50, np.arange(51)
    ends = np.array([wilson_interval(int(i), n) for i in k])
    coverage = [
        stats.binom.pmf(k, n, p)[(ends[:, 0] <= p) & (p <= ends[:, 1])].sum()
        for p in np.linspace(0.02, 0.98, 97)
    ]
    assert 0.94 < np.mean(coverage) < 0.96


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference([1.0, 2.0], [1.0]), "one value for each of the 2"),
        (lambda: paired_difference([1.0], [1.0], confidence=1.0), "confidence"),
        (lambda: spread([]), "at least one number"),
        (lambda: sign_test(-1, 2), "at least 0"),
        (lambda: wilson_interval(5, 4), "5 of 4"),
        (lambda: wilson_interval(0, 0), "0 of 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
