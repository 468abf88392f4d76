"""The runs of one arm, over its seeds: every number with its spread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distilljax.evaluation.runs import Run
from distilljax.evaluation.statistics import Spread, spread


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation: where it stands and how it reads.

    Attributes:
      key: Path in the evaluation, with dots.
      label: Its name in tables and figures.
      unit: "%" for a share, which is shown times 100; else the unit it has.
      higher_is_better: Which sign of a difference is an improvement.
    """

    key: str
    label: str
    unit: str
    higher_is_better: bool

    def read(self, evaluated: dict[str, Any] | None) -> float | None:
        """The value, or None where the evaluation has none."""
        value: Any = evaluated
        for part in self.key.split("."):
            value = None if value is None else value.get(part)
        return None if value is None else float(value)


QUALITY = (
    Metric("accuracy", "accuracy", "%", True),
    Metric("kl_to_teacher", "KL to teacher", "nats", False),
    Metric("agreement", "agreement", "%", True),
    Metric("ece", "calibration error", "%", False),
    Metric("nll", "NLL", "nats", False),
)
COST = (
    Metric("parameters", "parameters", "", False),
    Metric("bytes", "size", "B", False),
    Metric("flops_per_example", "FLOPs per example", "", False),
    Metric("latency_ms.median", "latency", "ms", False),
    Metric("latency_ms.p90", "latency, 90th percentile", "ms", False),
    Metric("throughput.examples_per_second", "throughput", "/s", True),
)


LANGUAGE = (
    Metric("nll", "NLL", "nats", False),
    Metric("perplexity", "perplexity", "", False),
    Metric("bits_per_byte", "bits per byte", "", False),
    *QUALITY[1:4],
    QUALITY[0],
)


def quality_of(
    students: Sequence[dict[str, Any]], headlines: Iterable[str | None] = ()
) -> tuple[Metric, ...]:
    """What students of an experiment are compared by: the headline, then the rest.

    Models of text are compared by their NLL, others by their accuracy, and all of them
    by what their config names. The numbers of probes come last; more of them is taken
    for better. What no student has is left out.
    """
    text = any("perplexity" in student for student in students)
    known = [*(LANGUAGE if text else QUALITY), *_probed(students)]
    named = set(headlines) - {None}
    headline = named.pop() if len(named) == 1 else known[0].key
    found = [m for m in known if any(m.read(s) is not None for s in students)]
    return tuple(sorted(found, key=lambda metric: metric.key != headline))


def _probed(students: Sequence[dict[str, Any]]) -> list[Metric]:
    """The numbers of probes, in the order in which they were measured."""
    names = {
        (probe, name): None
        for student in students
        for probe, found in (student.get("probes") or {}).items()
        for name, value in found.items()
        if isinstance(value, int | float)
    }
    return [Metric(f"probes.{p}.{n}", f"{p} {n}", "", True) for p, n in names]


@dataclass(frozen=True)
class Arm:
    """One arm of an experiment, or the teacher, over its seeds.

    Attributes:
      name: Name of the arm.
      runs: Its runs, by seed.
      metrics: Spread of each metric over the seeds; None if a run lacks it.
      recall: Spread of the recall of each focus class.
      per_class: Means over the seeds of the counts per class; None if a run lacks them.
      reliability: Bins pooled over the seeds: edges, count, confidence, accuracy.
    """

    name: str
    runs: tuple[Run, ...]
    metrics: dict[str, Spread | None]
    recall: dict[int, Spread]
    per_class: dict[str, list[float] | None]
    reliability: dict[str, list[Any]] | None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds, in order."""
        return tuple(run.seed for run in self.runs)


def speed_ratio(arm: Arm, key: str) -> float | None:
    """Mean ratio of an arm's `latency_ms` or `throughput` to its teacher's.

    None where no run timed both in turn, and where the rounds of any run do not agree
    (10th to 90th percentile) which of them is larger: then it is below what can be
    measured.
    """
    found = [(run.student.get(key) or {}).get("to_teacher") for run in arm.runs]
    ratios = [ratio for ratio in found if ratio]
    if not ratios or len(ratios) < len(found):
        return None
    if min(r["low"] for r in ratios) <= 1 <= max(r["high"] for r in ratios):
        return None
    return float(np.mean([r["median"] for r in ratios]))


def student_of(run: Run) -> dict[str, Any]:
    """The student's evaluation."""
    return run.student


def teacher_of(run: Run) -> dict[str, Any]:
    """The teacher's evaluation, of a run that has one."""
    assert run.teacher is not None
    return run.teacher


def make_arm(
    name: str,
    runs: Sequence[Run],
    focus_classes: Sequence[int],
    evaluated: Callable[[Run], dict[str, Any]] = student_of,
    quality: Sequence[Metric] = QUALITY,
) -> Arm:
    """Collect the evaluations of some runs, one for each seed."""
    evaluations = [evaluated(run) for run in runs]
    recalls = {
        label: [class_recall(e, label) for e in evaluations] for label in focus_classes
    }
    return Arm(
        name=name,
        runs=tuple(runs),
        metrics={
            metric.key: _spread_or_none([metric.read(e) for e in evaluations])
            for metric in (*quality, *COST)
        },
        recall={
            label: spread([v for v in values if v is not None])
            for label, values in recalls.items()
            if None not in values
        },
        per_class={
            key: _mean_counts([e["per_class"].get(key) for e in evaluations])
            for key in ("count", "correct", "gained", "lost")
        },
        reliability=_pool_bins([e.get("reliability") for e in evaluations]),
    )


def class_recall(evaluated: dict[str, Any], label: int) -> float | None:
    """Share of a class that is recognised; None if it has no examples."""
    classes = evaluated["per_class"]
    if classes.get("correct") is None or not classes["count"][label]:
        return None
    return classes["correct"][label] / classes["count"][label]


def _spread_or_none(values: list[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return spread(known) if known and len(known) == len(values) else None


def _mean_counts(counts: list[list[int] | None]) -> list[float] | None:
    known = [c for c in counts if c is not None]
    if not known or len(known) < len(counts):
        return None
    return np.mean(np.asarray(known, np.float64), axis=0).tolist()


def _pool_bins(tables: list[dict[str, Any] | None]) -> dict[str, list[Any]] | None:
    """Reliability over all examples of all seeds; None if the bins do not match."""
    known = [table for table in tables if table]
    if not known or any(table["edges"] != known[0]["edges"] for table in known):
        return None
    counts = np.asarray([table["count"] for table in known], np.float64)
    total = counts.sum(axis=0)
    pooled: dict[str, list[Any]] = {
        "edges": known[0]["edges"],
        "count": total.astype(int).tolist(),
    }
    for key in ("confidence", "accuracy"):
        # An empty bin is null in the file, and counts nothing here.
        means = [[np.nan if v is None else v for v in table[key]] for table in known]
        sums = np.where(counts > 0, counts * np.asarray(means, np.float64), 0.0)
        sums = sums.sum(axis=0)
        pooled[key] = [s / n if n else None for s, n in zip(sums, total, strict=True)]
    return pooled
