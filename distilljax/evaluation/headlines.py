"""An experiment in sentences: one for each comparison, for gains and losses alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from distilljax.evaluation.arms import QUALITY, Arm, Metric
from distilljax.evaluation.comparison import MIN_PAIRS, Comparison, Experiment
from distilljax.evaluation.formatting import (
    better_of,
    decimals_of,
    fixed,
    interval,
    percent_decimals,
    scaled,
    shorten,
    signed,
)
from distilljax.evaluation.statistics import PairedDifference, Spread


@dataclass(frozen=True)
class Headline:
    """One sentence for one comparison, and its verdict as a word."""

    verdict: str
    text: str


def headlines(experiment: Experiment) -> list[Headline]:
    """Whether each arm beat its baseline, in the same words for either outcome."""
    arms = {arm.name: arm for arm in experiment.arms}
    return [
        Headline(c.verdict, _headline(c, arms, experiment))
        for c in experiment.comparisons
    ]


def expectations(experiment: Experiment) -> list[str]:
    """What the configs expect, each beside what was measured of the same arm.

    An expectation is a sentence that a person wrote, so a person has to judge it. An
    arm without a baseline that repeats another arm's has only inherited it.
    """
    claimed = {
        run.expected
        for c in experiment.comparisons
        for arm in experiment.arms
        if arm.name == c.arm
        for run in arm.runs
    }
    compared = {c.arm for c in experiment.comparisons}
    lines = []
    for arm in experiment.arms:
        texts = dict.fromkeys(run.expected for run in arm.runs if run.expected)
        for text in texts:
            if arm.name in compared or text not in claimed:
                name = f" of “{arm.name}”" if len(experiment.arms) > 1 else ""
                measured = "; ".join(_measured(arm, experiment))
                lines.append(
                    f"Expected{name}: {text.rstrip('.')}. Measured: {measured}."
                )
    return lines


def _measured(arm: Arm, experiment: Experiment) -> list[str]:
    """Accuracy, errors and recall of an arm, from its baseline's where it has one."""
    arms = {arm.name: arm for arm in experiment.arms}
    before = [arms[c.baseline] for c in experiment.comparisons if c.arm == arm.name]
    total, decimals = experiment.num_examples, percent_decimals(experiment.num_examples)

    def shares(read: Callable[[Arm], Spread | None], decimals: int) -> str:
        """Such as "83.9 % to 91.5 %"."""
        known = [spread for a in (*before[:1], arm) if (spread := read(a)) is not None]
        return " to ".join(f"{fixed(100 * s.mean, decimals)} %" for s in known)

    def errors(arm: Arm) -> str:
        accuracy = arm.metrics["accuracy"]
        wrong = total * (1 - accuracy.mean) if accuracy is not None else math.nan
        return fixed(wrong, 0 if len(arm.runs) == 1 else 1)

    if (metric := experiment.quality[0]).key != "accuracy":
        found = [a.metrics[metric.key] for a in (*before[:1], arm)]
        values = [spread.mean for spread in found if spread is not None]
        decimals = decimals_of(metric, values, total)
        texts = [fixed(scaled(metric, value), decimals) for value in values]
        return [f"{metric.label} {' to '.join(texts)}"]
    counts = " to ".join(map(errors, (*before[:1], arm)))
    accuracy = shares(lambda a: a.metrics["accuracy"], decimals)
    found = [f"accuracy {accuracy}", f"errors {counts} of {total:,}"]
    for label in experiment.focus_classes:
        recall = shares(partial(_recall, label=label), 1)
        if recall:
            found.append(f"recall on {experiment.class_names[label]} {recall}")
    return found


def _recall(arm: Arm, label: int) -> Spread | None:
    return arm.recall.get(label)


def _headline(c: Comparison, arms: dict[str, Arm], experiment: Experiment) -> str:
    ours = f"“{c.arm}”{' (other training data)' * c.other_data}"
    theirs = f"“{c.baseline}”{' (distilled itself)' * c.baseline_taught}"
    names = f"{ours} against {theirs}"
    opening = {
        "helped": f"{ours} helped against {theirs}",
        "hurt": f"{ours} hurt against {theirs}",
        "no difference shown": f"{names}: no difference shown",
        "too few pairs for a claim": f"{names}: {_pairs(len(c.seeds))}, too few for a "
        "claim",
        "not a fair comparison": f"NOT A FAIR COMPARISON: {names} "
        f"({'; '.join(shorten(x, 80) for x in c.unfair)}), so this says nothing about "
        "the teaching",
    }[c.verdict]
    sentences = [f"{opening}."]
    difference = c.headline
    if difference is not None and c.metric.key != "accuracy":
        name = c.metric.label[:1].upper() + c.metric.label[1:]
        sentences.append(_change(difference, c.metric, experiment, name) + ".")
    elif difference is not None:
        text = _change(difference, c.metric, experiment, "Accuracy")
        errors = -difference.mean * experiment.num_examples
        words = "fewer" if errors < 0 else "more"
        decimals = 0 if difference.n == 1 else 1
        count = fixed(abs(errors), decimals)
        sentences.append(
            f"{text}, {count} {words} errors of {experiment.num_examples:,}."
        )
    for label, recall in c.recall.items():
        name = f"Recall on {experiment.class_names[label]}"
        theirs, ours = arms[c.baseline].recall, arms[c.arm].recall
        levels = ""
        if label in theirs and label in ours:
            before, after = (100 * r[label].mean for r in (theirs, ours))
            levels = f": {fixed(before, 1)} % to {fixed(after, 1)} %"
        sentences.append(_change(recall, QUALITY[0], experiment, name + levels) + ".")
    return " ".join([*sentences, *_beyond_headline(c, experiment)])


def _beyond_headline(c: Comparison, experiment: Experiment) -> list[str]:
    """What else moved for certain: accuracy alone can hide a gain, or a price."""
    if c.unfair or len(c.seeds) < MIN_PAIRS:
        return []
    moved: dict[str, list[str]] = {"better": [], "worse": []}
    for metric in experiment.quality[1:]:
        difference = c.differences[metric.key]
        if difference is not None and difference.excludes_zero:
            improved = (difference.mean > 0) == metric.higher_is_better
            moved["better" if improved else "worse"].append(metric.label)
    parts = [f"{word} {', '.join(names)}" for word, names in moved.items() if names]
    return [f"Beyond {c.metric.label}: {'; '.join(parts)}."] if parts else []


def _change(
    difference: PairedDifference, metric: Metric, experiment: Experiment, name: str
) -> str:
    """Such as "Accuracy +3.5 points (95 % interval +3.1 to +4.0, without 0; ...)"."""
    sizes = [difference.mean, difference.sd or 0.0]
    decimals = decimals_of(metric, sizes, experiment.num_examples)
    mean = signed(metric, difference.mean, decimals)
    joint = "," if ":" in name else ""
    unit = metric.unit.replace("%", "points")
    text = f"{name}{joint} {mean} {unit}".rstrip()
    if difference.low is None or difference.high is None:
        return text + " (one pair: no interval)"
    ends = interval(metric, difference, decimals)
    zero = "without 0" if difference.excludes_zero else "includes 0"
    level = f"{100 * difference.confidence:g} % interval"
    better = better_of(metric, difference).replace("/", " of ")
    return f"{text} ({level} {ends}, {zero}; {better} pairs better)"


def _pairs(n: int) -> str:
    return "1 pair" if n == 1 else f"{n} pairs"
