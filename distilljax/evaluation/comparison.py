"""Each arm against its baseline, in pairs of runs that share a seed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distilljax._checks import fail
from distilljax.evaluation.arms import (
    COST,
    Arm,
    Metric,
    class_recall,
    make_arm,
    quality_of,
    teacher_of,
)
from distilljax.evaluation.differences import Difference, is_taught, what_differs
from distilljax.evaluation.runs import Run
from distilljax.evaluation.single import describe_single, is_single
from distilljax.evaluation.statistics import (
    PairedDifference,
    mcnemar,
    paired_difference,
)

MIN_PAIRS = 3
"""Fewer pairs say too little about the spread for any claim."""


@dataclass(frozen=True)
class Pooled:
    """McNemar's counts over the test predictions of all pairs.

    Attributes:
      gained: Predictions that the arm has right and its baseline wrong.
      lost: The reverse.
      total: Predictions compared.
      p_value: Of the exact test.
    """

    gained: int
    lost: int
    total: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """An arm against the arm that it names as its baseline.

    Attributes:
      arm: Name of the arm.
      baseline: Name of its baseline.
      seeds: Seeds that both have.
      metric: What the verdict is about.
      differences: Arm minus baseline, by metric; None where a run lacks the metric.
      recall: Arm minus baseline in the recall of each focus class.
      pooled: McNemar's test, where all runs saved their predictions.
      differs: Everything in which the two differ.
      baseline_taught: Whether the baseline was taught by a teacher, too.
    """

    arm: str
    baseline: str
    seeds: tuple[int, ...]
    metric: Metric
    differences: dict[str, PairedDifference | None]
    recall: dict[int, PairedDifference]
    pooled: Pooled | None
    differs: tuple[Difference, ...]
    baseline_taught: bool

    @property
    def unfair(self) -> tuple[str, ...]:
        """Why the two are not comparable; empty if they are."""
        return tuple(str(d) for d in self.differs if d.kind == "unfair")

    @property
    def other_data(self) -> bool:
        """Whether the arm was trained on other data than its baseline."""
        return any(d.kind == "training data" for d in self.differs)

    @property
    def verdict(self) -> str:
        """What the differences allow to say, in the same words for either sign."""
        found = self.headline
        if self.unfair:
            return "not a fair comparison"
        if found is None or found.n < MIN_PAIRS:
            return "too few pairs for a claim"
        if not found.excludes_zero:
            return "no difference shown"
        better = (found.mean > 0) == self.metric.higher_is_better
        return "helped" if better else "hurt"

    @property
    def headline(self) -> PairedDifference | None:
        """The difference that the verdict is about."""
        return self.differences[self.metric.key]


@dataclass(frozen=True)
class Experiment:
    """All arms of one experiment, and what a reader must know about them.

    Attributes:
      name: Name of the experiment.
      descriptions: From the configs; with the arm's name where the arms differ.
      split: Split that it was evaluated on.
      num_examples: Examples of that split.
      class_names: Names of the classes.
      focus_classes: Classes whose recall is shown apart.
      quality: What models are compared by, the headline first.
      teacher: The teacher, once for each seed; None if no run had one.
      arms: Baselines first.
      comparisons: One for each arm that names a baseline with runs.
      notes: What is missing, unfair or uneven.
      single: What to say of one model by itself; empty for any other experiment.
    """

    name: str
    descriptions: tuple[str, ...]
    split: str
    num_examples: int
    class_names: list[str]
    focus_classes: list[int]
    quality: tuple[Metric, ...]
    teacher: Arm | None
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    single: str = ""


def compare(runs: Sequence[Run]) -> list[Experiment]:
    """Group runs by experiment and arm, and compare each arm with its baseline.

    Args:
      runs: Runs of any experiments, each (name, arm, seed) once.

    Returns:
      One experiment for each name: those that show a difference, those that show none,
      those without comparison, each in the order of the names.
    """
    names = {run.name for run in runs}
    experiments = sorted(
        (_experiment([run for run in runs if run.name == name]) for name in names),
        key=lambda e: (_says_little(e), natural_key(e.name)),
    )
    teachers = [(e.name, e.teacher) for e in experiments if e.teacher is not None]
    return [
        replace(e, single=describe_single(e.arms[0].runs[0], teachers))
        if is_single([run for arm in e.arms for run in arm.runs])
        else e
        for e in experiments
    ]


def _says_little(experiment: Experiment) -> int:
    """0 for a difference in either direction: what shows none is a control of those."""
    verdicts = {c.verdict for c in experiment.comparisons}
    return 0 if verdicts & {"helped", "hurt"} else 1 if verdicts else 2


def natural_key(text: str) -> list[tuple[float, str]]:
    """Sort key that puts "T = 4" before "T = 20".

    Example:
      >>> sorted(["T = 20", "T = 4", "hard"], key=natural_key)
      ['T = 4', 'T = 20', 'hard']
    """
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(p), "") if i % 2 else (-1.0, p) for i, p in enumerate(parts)]


def _experiment(runs: list[Run]) -> Experiment:
    first = runs[0]
    _check_same_classes(runs)
    focus = sorted({label for run in runs for label in run.focus_classes})
    students = [run.student for run in runs]
    quality = quality_of(students, (run.headline for run in runs))
    baselines = {run.baseline for run in runs}
    names = sorted(
        {run.arm for run in runs},
        key=lambda arm: (arm not in baselines, natural_key(arm)),
    )
    arms = tuple(
        make_arm(name, [run for run in runs if run.arm == name], focus, quality=quality)
        for name in names
    )
    taught = {run.seed: run for run in reversed(runs) if run.teacher is not None}
    teacher = None
    if taught:
        by_seed = [taught[seed] for seed in sorted(taught)]
        teacher = make_arm("teacher", by_seed, focus, teacher_of, quality)
    comparisons, missing = _comparisons(arms, focus, quality)
    return Experiment(
        name=first.name,
        descriptions=_descriptions(arms),
        split=first.split,
        num_examples=first.num_examples,
        class_names=first.class_names,
        focus_classes=focus,
        quality=quality,
        teacher=teacher,
        arms=arms,
        comparisons=tuple(comparisons),
        notes=(*missing, *_notes(runs, arms)),
    )


def _descriptions(arms: Sequence[Arm]) -> tuple[str, ...]:
    """What the arms say of themselves: once, if all say the same."""
    said = {arm.name: {run.description: None for run in arm.runs} for arm in arms}
    if len({tuple(texts) for texts in said.values()}) == 1:
        return tuple(text for text in said[arms[0].name] if text)
    return tuple(
        f"{name}: {text}" for name, texts in said.items() for text in texts if text
    )


def _check_same_classes(runs: list[Run]) -> None:
    first = runs[0]
    for run in runs:
        if run.class_names != first.class_names:
            fail(
                "report",
                str(run.path),
                f"have the class_names of {first.path} (both are {run.name!r})",
                f"{run.class_names} and {first.class_names}",
                "Give an experiment on other classes another name.",
            )


def _comparisons(
    arms: tuple[Arm, ...], focus: list[int], quality: tuple[Metric, ...]
) -> tuple[list[Comparison], list[str]]:
    """Every arm with its baseline, and what stands in the way of some."""
    by_name = {arm.name: arm for arm in arms}
    comparisons, notes = [], []
    for arm in arms:
        named = sorted({run.baseline for run in arm.runs if run.baseline})
        for name in named:
            if name not in by_name:
                notes.append(
                    f"{arm.name}: its baseline, {name!r}, has no finished run: nothing "
                    "shows what the teacher was worth."
                )
                continue
            theirs = {run.seed: run for run in by_name[name].runs}
            pairs = [
                (run, theirs[run.seed])
                for run in arm.runs
                if run.baseline == name and run.seed in theirs
            ]
            if not pairs:
                notes.append(f"{arm.name} and {name}: no seed in common, no pairs.")
                continue
            unpaired = sorted(set(arm.seeds) ^ set(theirs))
            if unpaired:
                seeds = ", ".join(map(str, unpaired))
                notes.append(
                    f"{arm.name} and {name}: seeds {seeds} have no partner, and are "
                    "left out of the difference."
                )
            if any(run.config is None for pair in pairs for run in pair):
                notes.append(
                    f"{arm.name} and {name}: without config.json beside each of their "
                    "results, only their budgets and sizes were compared."
                )
            comparisons.append(_compare_pairs(arm.name, name, pairs, focus, quality))
    runs = [run for arm in arms for run in arm.runs]
    if not any(run.baseline for run in runs) and not is_single(runs):
        notes.append(
            "No arm names a baseline: nothing here shows what the teacher was worth."
        )
    return comparisons, notes


def _compare_pairs(
    arm: str,
    baseline: str,
    pairs: list[tuple[Run, Run]],
    focus: list[int],
    quality: tuple[Metric, ...],
) -> Comparison:
    differences: dict[str, PairedDifference | None] = {}
    for metric in (*quality, *COST):
        ours = [metric.read(run.student) for run, _ in pairs]
        theirs = [metric.read(run.student) for _, run in pairs]
        differences[metric.key] = _difference(ours, theirs)
    recall = {}
    for label in focus:
        ours = [class_recall(run.student, label) for run, _ in pairs]
        theirs = [class_recall(run.student, label) for _, run in pairs]
        if (difference := _difference(ours, theirs)) is not None:
            recall[label] = difference
    return Comparison(
        arm=arm,
        baseline=baseline,
        seeds=tuple(run.seed for run, _ in pairs),
        metric=quality[0],
        differences=differences,
        recall=recall,
        pooled=_pool_predictions(pairs),
        differs=what_differs(pairs),
        baseline_taught=any(is_taught(run) for _, run in pairs),
    )


def _difference(
    ours: list[float | None], theirs: list[float | None]
) -> PairedDifference | None:
    first = [value for value in ours if value is not None]
    second = [value for value in theirs if value is not None]
    if len(first) < len(ours) or len(second) < len(theirs):
        return None
    return paired_difference(first, second)


def _pool_predictions(pairs: list[tuple[Run, Run]]) -> Pooled | None:
    """McNemar's counts, if every pair predicted the same examples in the same order."""
    gained = lost = total = 0
    for run, other in pairs:
        ours, theirs = run.predictions(), other.predictions()
        if ours is None or theirs is None:
            return None
        labels = ours["labels"]
        if labels.shape != theirs["labels"].shape or (labels != theirs["labels"]).any():
            return None
        right, other_right = ours["student"] == labels, theirs["student"] == labels
        gained += int((right & ~other_right).sum())
        lost += int((~right & other_right).sum())
        total += labels.size
    return Pooled(gained, lost, total, mcnemar(gained, lost))


def _notes(runs: list[Run], arms: tuple[Arm, ...]) -> list[str]:
    """What else a reader must know before believing a table."""
    notes = []
    for arm in arms:
        if len(arm.runs) == 1 and not is_single(runs):
            notes.append(
                f"{arm.name}: one seed only, so no spread: the next seed may differ."
            )
        for field, name in (("steps", "training steps"), ("num_examples", "examples")):
            values = sorted({getattr(run, field) for run in arm.runs})
            if len(values) > 1:
                listed = ", ".join(f"{value:,}" for value in values)
                notes.append(f"{arm.name}: its seeds differ in {name} ({listed}).")
    if not any(run.teacher for run in runs) and not is_single(runs):
        notes.append("No teacher was evaluated: no KL, agreement or forgetting.")
    for seed in sorted({run.seed for run in runs}):
        accuracies = {
            run.teacher["accuracy"]
            for run in runs
            if run.seed == seed and run.teacher and "accuracy" in run.teacher
        }
        if len(accuracies) > 1:
            listed = " and ".join(f"{100 * a:.2f} %" for a in sorted(accuracies))
            notes.append(f"Seed {seed}: the arms had different teachers ({listed}).")
    for run in runs:
        metric = str((run.selected or {}).get("metric", ""))
        if metric.split("/")[0] == run.split:
            notes.append(
                f"{run.arm}, seed {run.seed}: its checkpoint was selected by {metric}, "
                "on the split it is evaluated on: its numbers are too good."
            )
    if len({json.dumps(run.machine, sort_keys=True) for run in runs}) > 1:
        notes.append("The runs are from different machines: do not compare times.")
    return notes
