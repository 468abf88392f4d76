"""Finished runs on disk: ``results.json``, checked, and the files beside it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from distilljax._checks import fail

FORMAT = 1

_NUMBER = (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "arm": (str,),
    "seed": (int,),
    "baseline": (str, type(None)),
    "description": (str,),
    "expected": (str, type(None)),
    "split": (str,),
    "num_examples": (int,),
    "class_names": (list,),
    "focus_classes": (list,),
    "headline": (str, type(None)),
    "steps": (int,),
    "examples_seen": _NUMBER,
    "train_seconds": (*_NUMBER, type(None)),
    "selected": (dict, type(None)),
    "student": (dict,),
    "teacher": (dict, type(None)),
    "other_tests": (dict, type(None)),
    "versions": (dict,),
    "machine": (dict,),
    "date": (str,),
}


@dataclass(frozen=True)
class Run:
    """One trained model and its evaluation: a ``results.json`` of format 1.

    The fields are the keys of the file (see docs/report.md), and:

    Attributes:
      path: The file.
      curves: Lines of ``metrics.jsonl`` beside it, in the order of their steps.
      config: The ``config.json`` beside it; None without one.
    """

    path: Path
    curves: tuple[dict[str, Any], ...]
    config: dict[str, Any] | None
    name: str
    arm: str
    seed: int
    baseline: str | None
    description: str
    expected: str | None
    split: str
    num_examples: int
    class_names: list[str]
    focus_classes: list[int]
    headline: str | None
    steps: int
    examples_seen: float
    train_seconds: float | None
    selected: dict[str, Any] | None
    student: dict[str, Any]
    teacher: dict[str, Any] | None
    other_tests: dict[str, Any] | None
    versions: dict[str, Any]
    machine: dict[str, Any]
    date: str

    def predictions(self) -> dict[str, np.ndarray] | None:
        """Arrays ``labels``, ``student``, perhaps ``teacher``; None without a file."""
        path = self.path.with_name("predictions.npz")
        if not path.exists():
            return None
        try:
            # Opened here: np.load leaves a torn archive open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                loaded = {key: arrays[key] for key in arrays.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            _broken(path, "be readable arrays", error)
        if not {"labels", "student"} <= loaded.keys():
            _broken(path, "hold labels and student", sorted(loaded))
        if loaded["labels"].shape != loaded["student"].shape:
            shapes = loaded["labels"].shape, loaded["student"].shape
            _broken(path, "hold one prediction for each label", shapes)
        return loaded


def find_runs(workdirs: Sequence[str | Path]) -> tuple[list[Run], list[Path]]:
    """All finished runs below some folders, and the folders of unfinished ones.

    A folder with ``metrics.jsonl`` but no ``results.json`` is a run that has not
    finished.

    Args:
      workdirs: Folders to search, at any depth; overlapping ones count once.

    Returns:
      The runs sorted by name, arm and seed, and the unfinished folders.

    Raises:
      ValueError: A folder is missing, a file is broken, or two runs claim the same
        name, arm and seed.
    """
    results: set[Path] = set()
    started: set[Path] = set()
    for workdir in map(Path, workdirs):
        if not workdir.is_dir():
            fail(
                "report",
                "workdirs",
                "be folders that exist",
                workdir,
                "Pass the --workdir of `distilljax train`.",
            )
        root = workdir.resolve()
        results.update(root.rglob("results.json"))
        started.update(path.parent for path in root.rglob("metrics.jsonl"))
    found = {path: read_run(path) for path in sorted(results)}
    runs = [run for run in found.values() if run is not None]
    results = {path for path, run in found.items() if run is not None}
    seen: dict[tuple[str, str, int], Path] = {}
    for run in runs:
        other = seen.setdefault((run.name, run.arm, run.seed), run.path)
        if other != run.path:
            fail(
                "report",
                "workdirs",
                "hold each run once",
                f"{run.name}, {run.arm}, seed {run.seed} in {other} and {run.path}",
                "Remove one of them, or report them apart.",
            )
    runs.sort(key=lambda run: (run.name, run.arm, run.seed))
    return runs, sorted(started - {path.parent for path in results})


def read_run(path: Path) -> Run | None:
    """Read and check one ``results.json``; errors name the file and the field.

    None for a run whose config has no test data: there is nothing to compare.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        _broken(path, "be a JSON file", error)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        got = (
            record.get("format") if isinstance(record, dict) else type(record).__name__
        )
        _broken(path, f"have format {FORMAT}", got)
    if "student" not in record and "steps" in record:
        return None
    if "split" not in record and "probes" in record.get("student", ()):
        record |= {"split": "probes alone", "num_examples": 0, "class_names": []}
    for field, kinds in _FIELDS.items():
        if type(None) in kinds:
            record.setdefault(field, None)
        if field not in record:
            _broken(path, f"have the field {field!r}", sorted(record))
        value = record[field]
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = " or ".join(
                "null" if k is type(None) else k.__name__ for k in kinds
            )
            _broken(path, f"have {names} in {field!r}", repr(value))
    record |= {who: _numbers(record[who]) for who in ("student", "teacher")}
    names = record["class_names"] or _numbered(record["student"].get("per_class"))
    record["class_names"] = [str(name) for name in names]
    _check_evaluated(path, "student", record["student"], record)
    if record["teacher"] is not None:
        _check_evaluated(path, "teacher", record["teacher"], record)
    for label in record["focus_classes"]:
        if not isinstance(label, int) or not 0 <= label < len(record["class_names"]):
            _broken(path, "have classes that exist in 'focus_classes'", repr(label))
    curves = _read_curves(path.with_name("metrics.jsonl"))
    config = _read_config(path.with_name("config.json"))
    fields = {field: record[field] for field in _FIELDS}
    return Run(path=path, curves=curves, config=config, **fields)


def _numbers(value: Any) -> Any:
    """ "nan", "inf" and "-inf" as what they mean: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _numbered(per_class: Any) -> list[str]:
    """Names "0", "1", ... of as many classes as were counted: data may name none."""
    count = per_class.get("count") if isinstance(per_class, dict) else None
    return [str(label) for label in range(len(count))] if count else []


def _check_evaluated(
    path: Path, who: str, evaluated: dict[str, Any], record: dict[str, Any]
) -> None:
    """The numbers without which there is no table, and arrays of the right length."""
    if "accuracy" not in evaluated and "probes" in evaluated:
        evaluated["per_class"] = {"count": []}
        return
    for key in ("accuracy", "nll", "ece"):
        if not _is_number(evaluated.get(key)):
            rule = f"have a number in '{who}.{key}'"
            _broken(path, rule, repr(evaluated.get(key, "nothing")))
    classes = evaluated.get("per_class")
    if not isinstance(classes, dict) or "count" not in classes:
        _broken(path, f"have 'count' in '{who}.per_class'", repr(classes))
    num_classes = len(record["class_names"])
    for key, values in classes.items():
        if values is not None and len(values) != num_classes:
            rule = f"have {num_classes} values in '{who}.per_class.{key}'"
            _broken(path, rule, len(values))
    if classes["count"] and sum(classes["count"]) != record["num_examples"]:
        rule = f"have counts in '{who}.per_class' that sum to num_examples"
        _broken(path, rule, f"{sum(classes['count'])} and {record['num_examples']}")


def _read_curves(path: Path) -> tuple[dict[str, Any], ...]:
    """Lines of a log; a torn last line (a killed process) is left out.

    A resumed run writes some steps again: the later line counts.
    """
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            _broken(path, f"be JSON in line {number}", error)
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            _broken(path, f"have an integer 'step' in line {number}", line[:80])
        split = str(entry.get("split", "train"))
        merged = latest.get((split, entry["step"]), {}) | entry
        latest[split, entry["step"]] = merged
    return tuple(latest[key] for key in sorted(latest))


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        config = error
    if not isinstance(config, dict):
        remedy = "Restore it: nobody knows what this run was without it."
        fail("report", str(path), "be a JSON object", config, remedy)
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _broken(path: Path, rule: str, got: Any) -> NoReturn:
    """What is removed is measured anew, but for the log of the training."""
    again = "run its `distilljax train` again: it measures anew, and does not train."
    remedies = {
        "metrics.jsonl": "Remove that line: only the learning curves need it.",
        "predictions.npz": f"Remove it and the results.json beside it, and {again}",
    }
    remedy = remedies.get(path.name, f"Remove the file, and {again}")
    fail("report", str(path), rule, got, remedy)
