"""The statistics of a comparison: spread over seeds, pairs, signs and counts.

All of it is on the host in float64. The distributions come from ``scipy.special``,
which JAX already needs; ``scipy.stats`` would cost half a second at import.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from distilljax._checks import check_between, fail


@dataclass(frozen=True)
class Spread:
    """The mean of some runs and how far they lie from it.

    Attributes:
      mean: Arithmetic mean.
      sd: Sample standard deviation (n - 1 below); None for a single value.
      values: The values themselves, in the order given.
    """

    mean: float
    sd: float | None
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many values."""
        return len(self.values)


@dataclass(frozen=True)
class PairedDifference:
    """Treatment minus baseline, pair by pair.

    Attributes:
      mean: Mean difference.
      sd: Sample standard deviation of the differences; None for one pair.
      low: Lower end of the Student-t interval of the mean; None for one pair.
      high: Upper end.
      confidence: Coverage of the interval, such as 0.95.
      n: Number of pairs.
      positive: Pairs with a difference above 0.
      negative: Pairs with a difference below 0.
      t_p_value: Two-sided p of the paired t test; None for one pair, or if all the
        differences are equal (t is then not defined).
      sign_p_value: Two-sided p of the sign test.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    confidence: float
    n: int
    positive: int
    negative: int
    t_p_value: float | None
    sign_p_value: float

    @property
    def excludes_zero(self) -> bool:
        """True if there is an interval, and 0 lies outside it."""
        return (
            self.low is not None
            and self.high is not None
            and (self.low > 0 or self.high < 0)
        )


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation, in the unit of the values.

    Formula: ``sd = sqrt(sum_i (x_i - mean)^2 / (n - 1))``.

    Args:
      values: At least one number. nan is not dropped: it makes the result nan.

    Example:
      >>> result = spread([1.0, 2.0, 3.0])
      >>> result.mean, result.sd, result.n
      (2.0, 1.0, 3)

    Reference:
      R. A. Fisher, "Statistical Methods for Research Workers", 1925, chapter 3.
    """
    array = _sample("spread", "values", values)
    sd = float(array.std(ddof=1)) if array.size > 1 else None
    return Spread(float(array.mean()), sd, tuple(array.tolist()))


def paired_difference(
    treatment: Sequence[float], baseline: Sequence[float], *, confidence: float = 0.95
) -> PairedDifference:
    """Mean of treatment minus baseline, with its Student-t interval.

    In the unit of the values. Runs that share seed, split and order share much of their
    luck, and it cancels in the difference: hence pairs, and not two separate means.

    Formula, with d the n differences and t the quantile of Student's t with n - 1
    degrees of freedom: ``mean(d) +- t[(1 + confidence) / 2] sd(d) / sqrt(n)``.

    Args:
      treatment: One number for each pair.
      baseline: The partner of each, in the same order.
      confidence: Coverage of the interval, in (0, 1).

    Numerics:
      Assumes differences that are roughly normal and independent. Equal differences
      give an interval without width, and no p value.

    Example:
      >>> result = paired_difference([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])   # 1, 2, 3
      >>> result.mean, result.sd, result.positive
      (2.0, 1.0, 3)
      >>> round(result.low, 3), round(result.high, 3)    # 2 -+ 4.303 / sqrt(3)
      (-0.484, 4.484)

    Reference:
      Student, "The Probable Error of a Mean", Biometrika 6, 1908.
    """
    first = _sample("paired_difference", "treatment", treatment)
    second = _sample("paired_difference", "baseline", baseline)
    check_between("paired_difference", "confidence", confidence, 1e-6, 1 - 1e-6)
    if first.size != second.size:
        fail(
            "paired_difference",
            "baseline",
            f"have one value for each of the {first.size} of treatment",
            second.size,
            "Keep only the seeds that both arms have.",
        )
    difference = first - second
    n, mean = difference.size, float(difference.mean())
    positive, negative = int((difference > 0).sum()), int((difference < 0).sum())
    sd = low = high = p_value = None
    if n > 1:
        sd = float(difference.std(ddof=1))
        error = sd / math.sqrt(n)
        half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * error
        low, high = mean - half, mean + half
        if error > 0:
            p_value = float(2 * special.stdtr(n - 1, -abs(mean) / error))
    return PairedDifference(
        mean=mean,
        sd=sd,
        low=low,
        high=high,
        confidence=confidence,
        n=n,
        positive=positive,
        negative=negative,
        t_p_value=p_value,
        sign_p_value=sign_test(positive, negative),
    )


def sign_test(positive: int, negative: int) -> float:
    """Two-sided p value of the exact sign test (a probability).

    Formula, with n = positive + negative and ties dropped:
    ``min(1, 2 P[Binomial(n, 1/2) <= min(positive, negative)])``.

    Args:
      positive: Pairs where the treatment is higher.
      negative: Pairs where it is lower.

    Numerics:
      Exact for any n. Five pairs of one sign give 0.0625: fewer than six pairs cannot
      reach 0.05.

    Example:
      >>> sign_test(9, 0)                                       # 2 / 2^9
      0.00390625
      >>> sign_test(0, 0)
      1.0

    Reference:
      J. Arbuthnott, "An Argument for Divine Providence", Philosophical Transactions 27,
      1710; W. Dixon, A. Mood, "The Statistical Sign Test", JASA 41, 1946.
    """
    for argument, value in (("positive", positive), ("negative", negative)):
        if value < 0:
            fail("sign_test", argument, "be at least 0", value, "Pass a count.")
    total = positive + negative
    if total == 0:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(positive, negative), total, 0.5)))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p value of McNemar's exact test on paired predictions (a probability).

    Of the examples on which exactly one of two classifiers is right, either should win
    half, if they are equally good. Formula: the sign test of `gained` against `lost`.

    Args:
      gained: Examples that the first classifier gets right and the second wrong.
      lost: Examples where it is the reverse.

    Numerics:
      Exact binomial at every count, so no correction for continuity is needed. Examples
      must be independent: predictions pooled over seeds repeat each test example, which
      makes the p value too small when the examples, not the seeds, are the lottery.

    Example:
      >>> round(mcnemar(8, 2), 4)                               # 2 (1 + 10 + 45) / 1024
      0.1094

    Reference:
      Q. McNemar, "Note on the Sampling Error of the Difference Between Correlated
      Proportions or Percentages", Psychometrika 12, 1947; exact form: T. Dietterich,
      "Approximate Statistical Tests", Neural Computation 10, 1998, section 3.1.
    """
    return sign_test(gained, lost)


def wilson_interval(
    successes: float, total: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval for a proportion, such as an accuracy or a recall (0 to 1).

    Formula, with p = successes / total, n = total and z the normal quantile::

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Args:
      successes: How many were right, in [0, total].
      total: How many there were, at least 1.
      confidence: Coverage, in (0, 1).

    Numerics:
      Stays in [0, 1], and has width also at 0 and at `total`.

    Example:
      >>> low, high = wilson_interval(0, 10)
      >>> round(low, 4), round(high, 4)                # 3.8415 / (10 + 3.8415)
      (0.0, 0.2775)

    Reference:
      E. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
      JASA 22, 1927.
    """
    if total < 1 or not 0 <= successes <= total:
        fail(
            "wilson_interval",
            "successes",
            "lie in [0, total] with total at least 1",
            f"{successes} of {total}",
            "Pass counts of the same examples.",
        )
    check_between("wilson_interval", "confidence", confidence, 1e-6, 1 - 1e-6)
    z = float(special.ndtri((1 + confidence) / 2))
    p, scale = successes / total, 1 + z * z / total
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _sample(function: str, argument: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        fail(
            function,
            argument,
            "be a sequence of at least one number",
            f"shape {array.shape}",
            "Pass one value for each run.",
        )
    return array
