"""The report: runs on disk become report.md, report.html, report.json and figures.

Every number is computed by `comparison`, worded by `tables` and drawn by `plots`; this
file puts them on disk. matplotlib and jinja2 are imported only when a report is made.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilljax._checks import fail
from distilljax.evaluation import tables
from distilljax.evaluation.arms import Arm
from distilljax.evaluation.comparison import Comparison, Experiment, compare
from distilljax.evaluation.formatting import fixed
from distilljax.evaluation.headlines import expectations, headlines
from distilljax.evaluation.runs import find_runs

FORMAT = 1

_READING = (
    "An arm is compared with its baseline seed by seed, because runs that share a seed "
    "share what it decides: the initial weights and the order of the data. “What "
    "differs” lists all that the configs of the two do not share. “Helped” and “hurt” "
    "are said only if the 95 % Student-t interval of the paired difference in the "
    "first column of “Quality” leaves out 0, with at least three pairs, and if nothing "
    "differs but the teaching or, which is said, the training data. The intervals are "
    "not corrected for the number of comparisons: of twenty without any effect, one is "
    "expected to leave out 0. KL and NLL are in nats, at temperature 1. Intervals over "
    "seeds say what another seed would give on the same test examples; another test "
    "set has its own luck."
)


@dataclass(frozen=True)
class Report:
    """Where a report was written, and its sentences.

    Attributes:
      markdown: ``report.md``; its pictures are in ``figures/``.
      html: ``report.html``, one file that needs no other.
      data: ``report.json``, with every number.
      figures: The PNG files.
      headlines: One sentence for each comparison, after the experiment's name.
    """

    markdown: Path
    html: Path
    data: Path
    figures: tuple[Path, ...]
    headlines: tuple[str, ...]


def report(workdirs: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """Compare all finished runs below some folders, and write the report.

    Args:
      workdirs: Folders with runs, at any depth: each run is a ``results.json``, with
        ``metrics.jsonl`` and ``predictions.npz`` beside it where they exist.
      out: Folder for the report, made if needed; None for the first of `workdirs`.

    Returns:
      The files written. Each is written whole or not at all.

    Raises:
      ValueError: There is no run, or a file is broken (the message names it).
      ImportError: matplotlib or jinja2 is not installed.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     report([folder])
      Traceback (most recent call last):
      ValueError: report: workdirs must hold at least one results.json, got none ...
    """
    if not workdirs:
        fail("report", "workdirs", "name at least one folder", 0, _TRAIN)
    runs, unfinished = find_runs(workdirs)
    if not runs:
        folders = ", ".join(map(str, workdirs))
        got = f"none below {folders}"
        if unfinished:
            got += f" ({len(unfinished)} unfinished)"
        fail("report", "workdirs", "hold at least one results.json", got, _TRAIN)
    experiments = compare(runs)
    target = Path(workdirs[0] if out is None else out)
    (target / "figures").mkdir(parents=True, exist_ok=True)
    views = _views(experiments, target)
    context = {
        "title": "Distillation report",
        "intro": _intro(experiments),
        "experiments": views,
        "unfinished": [str(path) for path in unfinished],
        "reading": _READING,
    }
    for name in ("report.md", "report.html"):
        _write(target / name, _render(f"{name}.jinja", context).encode())
    numbers = {
        "format": FORMAT,
        "unfinished": context["unfinished"],
        "experiments": [experiment_json(experiment) for experiment in experiments],
    }
    text = json.dumps(_finite(numbers), indent=1, ensure_ascii=False, allow_nan=False)
    _write(target / "report.json", text.encode())
    return Report(
        markdown=target / "report.md",
        html=target / "report.html",
        data=target / "report.json",
        figures=tuple(f["path"] for view in views for f in view["figures"]),
        headlines=tuple(
            f"{view['name']}: {line.text}"
            for view in views
            for line in view["headlines"]
        ),
    )


_TRAIN = (
    "Run `distilljax train CONFIG --workdir W` to its end first, then "
    "`distilljax report W`."
)


def _views(experiments: list[Experiment], target: Path) -> list[dict[str, Any]]:
    """What the templates show of each experiment; the figures are written here."""
    try:
        from distilljax.evaluation import plots
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    colors = plots.arm_colors(experiments)
    views = []
    slugs: set[str] = set()
    for experiment in experiments:
        slug = _slug(experiment.name, slugs)
        lines = headlines(experiment)
        figures = []
        for key, caption, figure in plots.draw(experiment, colors):
            buffer = io.BytesIO()
            plots.save(figure, buffer)
            path = target / "figures" / f"{slug}_{key}.png"
            _write(path, buffer.getvalue())
            figures.append(
                {
                    "key": key,
                    "path": path,
                    "link": f"figures/{path.name}",
                    "caption": caption,
                    "alt": f"{experiment.name}: {caption.split(':')[0].rstrip('.')}",
                    "width": round(100 * figure.get_figwidth()),
                    "base64": base64.b64encode(buffer.getvalue()).decode(),
                }
            )
        shown = tables.tables(experiment)
        views.append(
            {
                "name": experiment.name,
                "slug": slug,
                "descriptions": experiment.descriptions,
                "expected": expectations(experiment),
                "headlines": lines,
                "verdicts": "; ".join(
                    _verdict(c, experiment) for c in experiment.comparisons
                )
                or ("a single model" if experiment.single else "no comparison"),
                "single": experiment.single,
                "notes": experiment.notes,
                "tables": shown,
                "figures": figures,
                "blocks": _blocks(shown, figures),
                "provenance": _provenance(experiment),
            }
        )
    return views


def _verdict(c: Comparison, experiment: Experiment) -> str:
    """The verdict in a word, and the recall where that moved for certain."""
    words = [f"“{c.arm}”: {c.verdict}{' (other training data)' * c.other_data}"]
    for label, recall in c.recall.items():
        if recall.excludes_zero and not c.unfair:
            points = fixed(100 * recall.mean, 1, sign=True)
            words.append(f"recall on {experiment.class_names[label]} {points} points")
    return ", ".join(words)


def _blocks(
    shown: list[tables.Table], figures: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Tables with the picture of the same numbers after them, other pictures last."""
    has_tests = any(table.title == "Tests of the accuracy" for table in shown)
    after = {
        "Tests of the accuracy": ("pairs", "curves"),
        "Paired differences": () if has_tests else ("pairs", "curves"),
        "Gained and lost against the teacher": ("forgetting", "reliability"),
        "Cost": ("cost",),
    }
    left = {figure["key"]: figure for figure in figures}
    blocks: list[dict[str, Any]] = []
    for table in shown:
        blocks.append({"table": table})
        keys = after.get(table.title, ())
        blocks += [{"figure": left.pop(key)} for key in keys if key in left]
    return blocks + [{"figure": figure} for figure in left.values()]


def _intro(experiments: list[Experiment]) -> str:
    num_runs = sum(len(arm.runs) for e in experiments for arm in e.arms)
    seeds = {run.seed for e in experiments for arm in e.arms for run in arm.runs}
    counts = (
        _plural(len(experiments), "experiment"),
        _plural(num_runs, "finished run"),
        _plural(len(seeds), "seed"),
    )
    compared = (
        " Each student is shown beside its teacher, and compared with the arm that it "
        "names as its baseline; “What differs” lists all in which these two do."
    )
    return f"{', '.join(counts)}." + compared * any(e.comparisons for e in experiments)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _provenance(experiment: Experiment) -> str:
    """Dates, versions and machine; the last run speaks for versions that are alike."""
    runs = [run for arm in experiment.arms for run in arm.runs]
    dates = sorted({run.date for run in runs})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    parts = [f"Run on {when}."]
    for title, records in (
        ("Versions", [run.versions for run in runs]),
        ("Machine", [run.machine for run in runs]),
    ):
        values = {key: _values(records, key) for record in records for key in record}
        if values:
            listed = ", ".join(f"{key} {value}" for key, value in values.items())
            parts.append(f"{title}: {listed}.")
    selected = {(run.selected or {}).get("metric") or "last step" for run in runs}
    parts.append(
        f"Checkpoint evaluated: {', '.join(_best(m) for m in sorted(selected))}."
    )
    return " ".join(parts)


def _best(metric: str) -> str:
    return metric if metric == "last step" else f"best {metric}"


def _values(records: Sequence[Mapping[str, Any]], key: str) -> str:
    return " / ".join(dict.fromkeys(str(record.get(key, "?")) for record in records))


def experiment_json(experiment: Experiment) -> dict[str, Any]:
    """Every number of an experiment, as JSON values: shares are 0 to 1, not percent."""
    shared = (
        "name",
        "descriptions",
        "split",
        "num_examples",
        "class_names",
    )
    fields = (*shared, "focus_classes", "notes", "single")
    models = [] if experiment.teacher is None else [experiment.teacher]
    lines = headlines(experiment)
    return {field: getattr(experiment, field) for field in fields} | {
        "expected": expectations(experiment),
        "teacher": _arm_json(models[0]) if models else None,
        "arms": [_arm_json(arm) for arm in experiment.arms],
        "comparisons": [
            dataclasses.asdict(c)
            | {"unfair": c.unfair, "verdict": c.verdict, "headline": line.text}
            for c, line in zip(experiment.comparisons, lines, strict=True)
        ],
    }


def _arm_json(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "seeds": arm.seeds,
        "metrics": {
            key: None if value is None else dataclasses.asdict(value)
            for key, value in arm.metrics.items()
        },
        "recall": {key: dataclasses.asdict(value) for key, value in arm.recall.items()},
        "per_class": arm.per_class,
        "reliability": arm.reliability,
        "runs": [str(run.path) for run in arm.runs],
    }


def _finite(value: Any) -> Any:
    """nan and inf are no JSON: they become the strings that say so."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _render(template: str, context: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: re.sub(r"[|]", r"\\|", text)
    return environment.get_template(template).render(context)


def _missing(error: ModuleNotFoundError) -> ImportError:
    return ImportError(
        f"report: {error.name} must be installed, got no such module. "
        'Run `pip install "distilljax[report]"`.'
    )


def _slug(name: str, taken: set[str]) -> str:
    """A file name for an experiment, unlike all before it."""
    base = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "experiment"
    slug, number = base, 2
    while slug in taken:
        slug, number = f"{base}_{number}", number + 1
    taken.add(slug)
    return slug


def _write(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
