"""An experiment in tables: what report.md and report.html both show."""

from __future__ import annotations

from distilljax.evaluation.arms import COST, QUALITY, Arm, Metric, speed_ratio
from distilljax.evaluation.comparison import Comparison, Experiment
from distilljax.evaluation.formatting import (
    MISSING,
    better_of,
    decimals_of,
    fixed,
    interval,
    p_value,
    percent_decimals,
    quantity,
    short,
    signed,
    with_spread,
)
from distilljax.evaluation.more_tables import Cell, Table, text_tables
from distilljax.evaluation.statistics import PairedDifference, Spread, wilson_interval

_MEDIAN, _P90 = "latency_ms.median", "latency_ms.p90"
MAX_CLASSES = 20
"""A table of more classes is no longer read; report.json has them all."""


def tables(experiment: Experiment) -> list[Table]:
    """Quality, paired differences, cost, recall and forgetting, as far as known."""
    found = [
        _quality(experiment),
        _what_differs(experiment),
        _differences(experiment),
        _tests(experiment),
        _recall(experiment),
        _forgetting(experiment),
        *text_tables(experiment),
        _cost(experiment),
        _budget(experiment),
    ]
    return [table for table in found if table is not None and table.rows]


def _models(experiment: Experiment) -> list[Arm]:
    teacher = [] if experiment.teacher is None else [experiment.teacher]
    return [*teacher, *experiment.arms]


def _heading(metric: Metric, *, difference: bool = False) -> str:
    unit = metric.unit.replace("%", "points") if difference else metric.unit
    unit = f", {unit}" if unit else ""
    return f"{metric.label}{unit} {'↑' if metric.higher_is_better else '↓'}"


def _once(arm: Arm, value: Spread | None) -> Spread | None:
    """One teacher for all seeds is one value, not a mean without spread."""
    if value is None or arm.name != "teacher" or len(set(value.values)) > 1:
        return value
    # Not the mean, whose last bit may round 98.25 up where it is rounded down alone.
    return Spread(value.values[0], None, value.values[:1])


def _seeds(arm: Arm) -> str:
    """How many runs; a teacher whose NLL never differs is one model for all of them."""
    shared = arm.name == "teacher" and len(arm.runs) > 1
    nll = arm.metrics.get("nll")
    shared = shared and nll is not None and len(set(nll.values)) == 1
    return "the same" if shared else str(len(arm.runs))


def _quality(experiment: Experiment) -> Table:
    models = _models(experiment)
    columns = []
    for metric in experiment.quality:
        values = [_once(arm, arm.metrics[metric.key]) for arm in models]
        sizes = [x for v in values if v is not None for x in (v.mean, v.sd or 0.0)]
        decimals = decimals_of(metric, sizes, experiment.num_examples)
        columns.append([with_spread(metric, value, decimals) for value in values])
    header = [_heading(metric) for metric in experiment.quality]
    note = (
        f"On {experiment.num_examples:,} {_examples(experiment)} of "
        f"{experiment.split}: mean ± standard deviation over seeds."
    )
    if experiment.quality[0].key == "accuracy":
        columns.insert(1, [_errors(arm) for arm in models])
        header.insert(1, "errors")
        note += (
            " A single model shows the 95 % Wilson interval of its accuracy instead, "
            "which is the luck of the examples only."
        )
    rows = tuple(
        tuple(map(Cell, (arm.name, *cells, _seeds(arm))))
        for arm, *cells in zip(models, *columns, strict=True)
    )
    return Table("Quality", note, ("model", *header, "seeds"), rows)


def _examples(experiment: Experiment) -> str:
    """What is counted: of a language model, the tokens that it predicts."""
    of_text = any(metric.key == "perplexity" for metric in experiment.quality)
    return "tokens" if of_text else "examples"


def _errors(arm: Arm) -> str:
    """Errors as a count, such as "90.8 ± 3.2 of 400", or "23 of 400 (...)"."""
    accuracy = _once(arm, arm.metrics["accuracy"])
    if accuracy is None:
        return MISSING
    total = arm.runs[0].num_examples
    wrong = total * (1 - accuracy.mean)
    if accuracy.sd is not None:
        return f"{fixed(wrong, 1)} ± {fixed(total * accuracy.sd, 1)} of {total:,}"
    if not 0 <= accuracy.mean <= 1:
        return MISSING
    low, high = wilson_interval(total * accuracy.mean, total)
    decimals = percent_decimals(total)
    ends = f"{fixed(100 * low, decimals)} to {fixed(100 * high, decimals)} %"
    return f"{fixed(wrong, 0)} of {total:,} (right: {ends})"


def _what_differs(experiment: Experiment) -> Table:
    rows = []
    for c in experiment.comparisons:
        name = f"{c.arm} − {c.baseline}"
        for d in c.differs:
            cells = (name, d.what, d.arm, d.baseline, d.kind)
            rows.append(tuple(map(Cell, cells)))
            name = ""
    return Table(
        "What differs",
        "Between the configs of an arm and its baseline, and in what was measured. "
        "Teaching is what is compared; other training data shares the credit with it; "
        "anything else makes a comparison unfair. Where the seed decides a value, it "
        "is that of the first pair.",
        ("arm − baseline", "what", "arm", "baseline", "counts as"),
        tuple(rows),
    )


def _differences(experiment: Experiment) -> Table:
    rows = []
    for c in experiment.comparisons:
        name = f"{c.arm} − {c.baseline}"
        for metric in experiment.quality:
            difference = c.differences[metric.key]
            if difference is not None:
                cells = _difference_cells(metric, difference, experiment, c)
                rows.append(
                    (Cell(name), Cell(_heading(metric, difference=True)), *cells)
                )
                name = ""
    return Table(
        "Paired differences",
        "Arm minus baseline with the same seed: mean, 95 % Student-t interval, and how "
        "many pairs are better.",
        ("arm − baseline", "measure", "difference", "95 % interval", "pairs better"),
        tuple(rows),
    )


def _difference_cells(
    metric: Metric,
    difference: PairedDifference,
    experiment: Experiment,
    c: Comparison,
) -> tuple[Cell, ...]:
    sizes = [difference.mean, difference.sd or 0.0]
    decimals = decimals_of(metric, sizes, experiment.num_examples)
    # No colour may claim more than the verdict does.
    tone = ""
    if difference.excludes_zero and c.verdict in ("helped", "hurt"):
        improved = (difference.mean > 0) == metric.higher_is_better
        tone = "better" if improved else "worse"
    return (
        Cell(signed(metric, difference.mean, decimals), tone),
        Cell(interval(metric, difference, decimals)),
        Cell(better_of(metric, difference)),
    )


def _tests(experiment: Experiment) -> Table | None:
    if experiment.quality[0].key != "accuracy":
        return None
    rows = []
    for c in experiment.comparisons:
        accuracy, won, lost, pooled = c.headline, MISSING, MISSING, None
        if c.pooled is not None:
            won, lost = f"{c.pooled.gained:,}", f"{c.pooled.lost:,}"
            pooled = c.pooled.p_value
        cells = (
            f"{c.arm} − {c.baseline}",
            p_value(accuracy.t_p_value if accuracy else None),
            p_value(accuracy.sign_p_value if accuracy else None),
            p_value(pooled),
            won,
            lost,
            str(len(c.seeds)),
        )
        rows.append(tuple(map(Cell, cells)))
    return Table(
        "Tests of the accuracy",
        "Two-sided p values. McNemar's test counts the single predictions, over all "
        "pairs, that only the arm (won) or only its baseline (lost) has right; it "
        "repeats each test example once for each seed, so its p is optimistic.",
        (
            "arm − baseline",
            "paired t",
            "signs",
            "McNemar",
            "won",
            "lost",
            "pairs",
        ),
        tuple(rows),
    )


def _recall(experiment: Experiment) -> Table | None:
    if not experiment.focus_classes:
        return None
    share = QUALITY[0]
    rows = []
    for label in experiment.focus_classes:
        for arm in _models(experiment):
            recall = _once(arm, arm.recall.get(label))
            counts = arm.per_class
            right = MISSING
            if counts["correct"] is not None and counts["count"] is not None:
                decimals = 0 if recall is not None and recall.sd is None else 1
                right = fixed(counts["correct"][label], decimals)
                right = f"{right} of {fixed(counts['count'][label], 0)}"
            change = [
                f"{signed(share, c.recall[label].mean, 1)} "
                f"({interval(share, c.recall[label], 1)})"
                for c in experiment.comparisons
                if c.arm == arm.name and label in c.recall
            ]
            name = experiment.class_names[label]
            cells = (name, arm.name, with_spread(share, recall, 1), right)
            rows.append(tuple(map(Cell, (*cells, "; ".join(change) or MISSING))))
    return Table(
        "Recall of the classes in focus",
        "Of the examples of the class, how many are recognised; the difference is to "
        "the arm's baseline, in pairs.",
        ("class", "model", "recall, %", "right", "difference, points"),
        tuple(rows),
    )


def _forgetting(experiment: Experiment) -> Table | None:
    known = [arm for arm in experiment.arms if arm.per_class["gained"] is not None]
    names = experiment.class_names
    if not known or experiment.teacher is None or len(names) > MAX_CLASSES:
        return None
    teacher = experiment.teacher.per_class
    changes = [[a.per_class[key] or [] for key in ("gained", "lost")] for a in known]
    decimals = max(_decimals(counts) for change in changes for counts in change)
    rows = []
    for label, name in enumerate(names):
        right = [teacher[key] for key in ("count", "correct")]
        cells = [
            name,
            *(fixed(x[label], _decimals(x)) if x else MISSING for x in right),
        ]
        cells += [
            f"+{fixed(gained[label], decimals)} −{fixed(lost[label], decimals)}"
            for gained, lost in changes
        ]
        rows.append(tuple(map(Cell, cells)))
    return Table(
        "Gained and lost against the teacher",
        "Examples of each class that the student has right and the teacher wrong (+), "
        "and the reverse (−): mean over seeds.",
        ("class", "examples", "teacher right", *(arm.name for arm in known)),
        tuple(rows),
    )


def _decimals(counts: list[float]) -> int:
    """Of mean counts: whole numbers only where all that stand together are whole."""
    return 0 if all(float(count).is_integer() for count in counts) else 1


def _cost(experiment: Experiment) -> Table:
    models = _models(experiment)
    teacher = experiment.teacher
    shown = [metric for metric in COST if metric.key != _P90]
    rows = []
    for arm in models:
        reference = None if arm is teacher else teacher
        cells = [_cost_cell(arm, metric, reference) for metric in shown]
        rows.append(tuple(map(Cell, (arm.name, *cells))))
    relative = ", and relative to the teacher" if teacher is not None else ""
    means = "" if experiment.single else f"Means over seeds{relative}. "
    return Table(
        "Cost",
        f"{means}Latency is the median at batch "
        f"{_batch(models, 'latency_ms')}, with the 90th percentile in brackets; "
        f"throughput is at batch {_batch(models, 'throughput')}. Both vary with what "
        "else the machine is doing: their ratios are within rounds in which student "
        "and teacher took turns, and are left out where the rounds do not agree.",
        (
            "model",
            *(
                f"{metric.label}, ms (p90)" if metric.key == _MEDIAN else metric.label
                for metric in shown
            ),
        ),
        tuple(rows),
    )


def _cost_cell(arm: Arm, metric: Metric, teacher: Arm | None) -> str:
    """Such as "19.2 kB (1/63)", or for a latency "0.108 (0.157), 1.3×"."""
    value = arm.metrics[metric.key]
    ratio = "" if teacher is None else _ratio(arm, teacher, metric)
    text = quantity(None if value is None else value.mean, metric.unit)
    if metric.key != _MEDIAN:
        return f"{text} ({ratio})" if ratio else text
    if value is None:
        return MISSING
    tail = arm.metrics[_P90]
    p90 = quantity(None if tail is None else tail.mean, "ms")
    text = f"{text.removesuffix(' ms')} ({p90.removesuffix(' ms')})"
    return f"{text}, {ratio}" if ratio else text


def _ratio(arm: Arm, teacher: Arm, metric: Metric) -> str:
    """Of counts, the ratio of the means; of times, that of rounds in turn."""
    value, reference = arm.metrics[metric.key], teacher.metrics[metric.key]
    if "." in metric.key:
        ratio = speed_ratio(arm, metric.key.split(".")[0])
    elif value is None or reference is None or not reference.mean:
        ratio = None
    else:
        ratio = value.mean / reference.mean
    if not ratio:
        return ""
    if ratio < 1:
        return f"1/{short(1 / ratio)}"
    return f"{short(ratio)}×"


def _budget(experiment: Experiment) -> Table:
    rows = []
    for arm in experiment.arms:
        steps = sorted({run.steps for run in arm.runs})
        seen = sorted({run.examples_seen for run in arm.runs})
        rows.append(
            (
                Cell(arm.name),
                Cell(" / ".join(f"{n:,}" for n in steps)),
                Cell(" / ".join(f"{n:,.10g}" for n in seen)),
                Cell(_mean_seconds([run.train_seconds for run in arm.runs])),
            )
        )
    return Table(
        "Training budget",
        "Of each run. The time is a mean over seeds, from start to last step with all "
        "validation; the first run of each shape in a process includes its "
        "compilation.",
        ("arm", "steps", "examples seen", "training"),
        tuple(rows),
    )


def _mean_seconds(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return quantity(sum(known) / len(known), "s") if known else MISSING


def _batch(models: list[Arm], key: str) -> str:
    evaluations = [run.student.get(key) or {} for arm in models for run in arm.runs]
    found = {e["batch"] for e in evaluations if "batch" in e}
    return "/".join(map(str, sorted(found))) or "unknown"
