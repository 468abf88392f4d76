"""Numbers as text: as many digits as they deserve, a true minus sign, units."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distilljax.evaluation.arms import Metric
from distilljax.evaluation.statistics import PairedDifference, Spread

MISSING = "–"
_PREFIXES = ("", "k", "M", "G", "T", "P")


def fixed(value: float, decimals: int, *, sign: bool = False) -> str:
    """A number with so many decimals; no negative zero, and "nan" stays visible.

    Example:
      >>> fixed(-0.04, 1), fixed(2.5, 2, sign=True), fixed(-1.0, 0)
      ('0.0', '+2.50', '−1')
    """
    if not math.isfinite(value):
        return str(value)
    rounded = round(value, decimals) + 0.0
    text = (
        f"{rounded:+,.{decimals}f}" if sign and rounded else f"{rounded:,.{decimals}f}"
    )
    return text.replace("-", "−")


def percent_decimals(num_examples: int) -> int:
    """One decimal below 1,000 examples, where one is over 0.1 points; then two."""
    return 1 if num_examples < 1000 else 2


def decimals_of(metric: Metric, values: Sequence[float], num_examples: int) -> int:
    """Decimals for a column, so that all of its cells share them.

    A share follows the number of examples; another quantity gets three significant
    digits at its largest value, one at its smallest, and at most four decimals.
    """
    if metric.unit == "%":
        return percent_decimals(num_examples)
    sizes = [abs(v) for v in values if math.isfinite(v) and v]
    if not sizes:
        return 3
    at_largest = 2 - math.floor(math.log10(max(sizes)))
    at_smallest = -math.floor(math.log10(min(sizes)))
    # of a few nats, hundredths count
    least = 2 if metric.unit == "nats" and max(sizes) < 100 else 0
    return min(4, max(least, at_largest, at_smallest))


def scaled(metric: Metric, value: float) -> float:
    """A share as a percentage; anything else as it is."""
    return 100 * value if metric.unit == "%" else value


def with_spread(metric: Metric, value: Spread | None, decimals: int) -> str:
    """Mean and standard deviation over the seeds, such as "77.3 ± 0.8"."""
    if value is None:
        return MISSING
    text = fixed(scaled(metric, value.mean), decimals)
    if value.sd is None:
        return text
    return f"{text} ± {fixed(scaled(metric, value.sd), decimals)}"


def signed(metric: Metric, value: float, decimals: int) -> str:
    """A difference, such as "+3.6"; a share in points."""
    return fixed(scaled(metric, value), decimals, sign=True)


def interval(metric: Metric, value: PairedDifference, decimals: int) -> str:
    """Both ends of an interval, such as "+3.3 to +3.8"; one pair has none."""
    if value.low is None or value.high is None:
        return MISSING
    ends = (value.low, value.high)
    return " to ".join(signed(metric, end, decimals) for end in ends)


def better_of(metric: Metric, value: PairedDifference) -> str:
    """How many pairs improved, such as "5/5"."""
    better = value.positive if metric.higher_is_better else value.negative
    return f"{better}/{value.n}"


def p_value(value: float | None) -> str:
    """A p value with two digits; very small ones as a bound.

    Example:
      >>> p_value(0.0625), p_value(1e-9), p_value(None)
      ('0.062', '< 0.0001', '–')
    """
    if value is None:
        return MISSING
    if value < 1e-4:
        return "< 0.0001"
    return f"{value:.2g}"


def quantity(value: float | None, unit: str = "") -> str:
    """A size with three digits and a decimal prefix, such as "1.24 MB" or "436 k".

    Example:
      >>> quantity(1_243_000, "B"), quantity(436_116), quantity(0.0712, "ms")
      ('1.24 MB', '436 k', '0.0712 ms')
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1 and unit != "ms":
        value, power = value / 1000, power + 1
    number = f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:,.0f}"
    suffix = _PREFIXES[power] + unit
    separator = "" if suffix.startswith("/") or not suffix else " "
    return f"{number}{separator}{suffix}"


def short(ratio: float) -> str:
    """A ratio of at least 1: two digits, or whole, such as "3.9" or "125"."""
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:,.0f}"


def shorten(text: str, width: int = 24) -> str:
    """A text on one line, cut with an ellipsis."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
