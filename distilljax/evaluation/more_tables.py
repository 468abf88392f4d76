"""Tables of what a config measures beyond its test data: other data, and probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distilljax.evaluation.arms import LANGUAGE, QUALITY, Arm, Metric
from distilljax.evaluation.comparison import Experiment
from distilljax.evaluation.formatting import decimals_of, shorten, with_spread
from distilljax.evaluation.statistics import spread

MAX_SAMPLE = 300
"""Letters of a sample that are shown; results.json has them all."""


@dataclass(frozen=True)
class Cell:
    """Text of a cell; `tone` is "better", "worse" or empty."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table; the first cell of each row is its name."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def text_tables(experiment: Experiment) -> list[Table]:
    """Other test data, and the texts of probes, where runs have them."""
    return [table for table in (_others(experiment), _texts(experiment)) if table.rows]


def _others(experiment: Experiment) -> Table:
    """One row for each model on each of the further test sets."""
    measured = _by_model(experiment, lambda run, who: (run.other_tests or {}, who))
    names = dict.fromkeys(
        name for found in measured.values() for tests, _ in found for name in tests
    )
    of_text = any(metric.key == "perplexity" for metric in experiment.quality)
    metrics = LANGUAGE if of_text else QUALITY
    rows = []
    for name in names:
        summaries = {
            model: [tests[name][who] for tests, who in found if name in tests]
            for model, found in measured.items()
        }
        columns = [_column(metric, list(summaries.values())) for metric in metrics]
        for model, *cells in zip(summaries, *columns, strict=True):
            rows.append(tuple(map(Cell, (name, model, *cells))))
    header = [f"{m.label}{f', {m.unit}' if m.unit else ''}" for m in metrics]
    return Table(
        "Other test data",
        "What none of the arms was compared by: mean ± standard deviation over seeds.",
        ("data", "model", *header),
        tuple(rows),
    )


def _column(metric: Metric, models: Sequence[list[Any]]) -> list[str]:
    found = [[metric.read(summary) for summary in model] for model in models]
    known = [[v for v in values if v is not None] for values in found]
    spreads = [spread(values) if values else None for values in known]
    sizes = [s.mean for s in spreads if s is not None]
    decimals = decimals_of(metric, sizes, 1)
    return [with_spread(metric, s, decimals) for s in spreads]


def _texts(experiment: Experiment) -> Table:
    """What each model wrote, of its first seed."""
    probes = _by_model(
        experiment, lambda run, who: (getattr(run, who) or {}).get("probes") or {}
    )
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for model, found in probes.items():
        for probe, said in (found[0] if found else {}).items():
            for prompt, text in said.items():
                if isinstance(text, str):
                    rows.setdefault((probe, prompt), {})[model] = text
    return Table(
        "Samples",
        "Of the first seed, from the same prompts.",
        ("prompt", "model", "text"),
        tuple(
            (
                Cell(prompt),
                Cell(model),
                Cell(_shown(text)),
            )
            for (_, prompt), texts in rows.items()
            for model, text in texts.items()
        ),
    )


def _shown(text: str) -> str:
    return shorten(" ".join(text.split()), MAX_SAMPLE)


def _by_model(experiment: Experiment, read: Any) -> dict[str, list[Any]]:
    """What a function of (run, "student" or "teacher") finds, by the model's name."""

    def of(arm: Arm, who: str) -> list[Any]:
        return [read(run, who) for run in arm.runs]

    found = {}
    if experiment.teacher is not None:
        # one frozen teacher says the same for all seeds
        found["teacher"] = of(experiment.teacher, "teacher")[:1]
    return found | {arm.name: of(arm, "student") for arm in experiment.arms}
