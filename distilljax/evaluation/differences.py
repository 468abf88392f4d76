"""What differs between an arm and its baseline, and what that makes of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distilljax import resume
from distilljax.evaluation.runs import Run

Kind = Literal["teaching", "training data", "unfair"]

# What a comparison is about: how the student is taught, and by whom.
_TEACHING = ("objective", "teacher", "teacher_forward", "loader.teacher_view")
# Names, and the seed by which runs are paired: they change nothing that is compared.
_LABELS = ("name", "seed")
# Without a selected checkpoint, validation only draws the learning curves.
_SELECTION = ("validation", "eval_every_steps", "select", "select_mode")


@dataclass(frozen=True)
class Difference:
    """One thing in which an arm and its baseline differ, in any of their pairs.

    Attributes:
      what: Path in the config, or the name of what was measured.
      arm: What the arm has, in the first pair that differs.
      baseline: What its baseline has.
      kind: "teaching" is what a comparison is about; other "training data" shares the
        credit with it; anything else is "unfair", and leaves no verdict.
    """

    what: str
    arm: str
    baseline: str
    kind: Kind

    def __str__(self) -> str:
        """Such as "training steps 1,200 against 600"."""
        return f"{self.what} {self.arm} against {self.baseline}"


def what_differs(pairs: Sequence[tuple[Run, Run]]) -> tuple[Difference, ...]:
    """Everything in which the partners differ: the measured budget, then the configs.

    Fields that change no result (`distilljax.resume.RESUMABLE`) are left out, and so
    are the configs of runs without one.
    """
    found: dict[str, Difference] = {}
    for run, other in pairs:
        for difference in (*_measured(run, other), *_configured(run, other)):
            found.setdefault(difference.what, difference)
    order = ("unfair", "training data", "teaching")
    return tuple(sorted(found.values(), key=lambda found: order.index(found.kind)))


def is_taught(run: Run) -> bool:
    """Whether a run's objective had a teacher's outputs, as its log shows."""
    return any("teacher_entropy" in entry for entry in run.curves)


def _measured(run: Run, other: Run) -> Iterator[Difference]:
    """Unequal budgets, sizes and test sets, which the results tell without a config."""
    for what, ours, theirs in (
        ("training steps", run.steps, other.steps),
        ("examples seen", run.examples_seen, other.examples_seen),
        ("parameters", *(r.student.get("parameters") for r in (run, other))),
        ("evaluated split", run.split, other.split),
        ("evaluated examples", run.num_examples, other.num_examples),
    ):
        if None not in (ours, theirs) and ours != theirs:
            yield Difference(what, describe(ours), describe(theirs), "unfair")


def _configured(run: Run, other: Run) -> Iterator[Difference]:
    if run.config is None or other.config is None:
        return
    selects = run.config.get("select") or other.config.get("select")
    for path, ours, theirs in _changes(run.config, other.config):
        kind = _kind(path, bool(selects))
        if kind is not None:
            yield Difference(path, describe(ours), describe(theirs), kind)


def _kind(path: str, selects: bool) -> Kind | None:
    """What a field of the config decides; None if nothing that is compared."""
    top = path.split(".")[0]
    if top in _TEACHING or path in _TEACHING:
        return "teaching"
    if top == "data":
        return "training data"
    if top in _LABELS or resume.resumable(path) or (top in _SELECTION and not selects):
        return None
    return "unfair"


def _changes(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ, whole where the types do: their fields are not comparable."""
    if _alike(ours, theirs):
        for key in sorted(ours.keys() | theirs.keys()):
            inner = f"{path}.{key}" if path else key
            yield from _changes(ours.get(key), theirs.get(key), inner)
    elif resume.differences(ours, theirs):
        yield path, ours, theirs


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether both are dataclasses of one type, or plain mappings."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return False
    if {"_ref", "_partial", "_array"} & (ours.keys() | theirs.keys()):
        return False
    return ours.get("_type") == theirs.get("_type")


def describe(value: Any) -> str:
    """A part of a saved config as Python would write it, without what is not set.

    Example:
      >>> describe({"_type": "distilljax.models.mlp:MLP", "hidden": [64], "dropout": 0})
      'MLP(hidden=(64), dropout=0)'
      >>> describe({"_ref": "distilljax.losses._kl:forward_kl"}), describe(None)
      ('forward_kl', 'none')
      >>> describe(1200), describe(1e-5), describe(True)
      ('1,200', '1e-05', 'True')
    """
    if value is None:
        return "none"
    if isinstance(value, dict):
        if "_ref" in value:
            return _last_name(value["_ref"])
        if "_array" in value:
            return f"array {value['_array']}"
        if "_partial" in value:
            inner = {"": value["_partial"], **value.get("keywords", {})}
            return f"partial({_fields(inner)})"
        return f"{_last_name(value.get('_type', ''))}({_fields(value)})"
    if isinstance(value, list):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.10g}"
    return str(value)


def _fields(value: dict[str, Any]) -> str:
    # A number is set even where it is 0; False, None and empty texts are not.
    return ", ".join(
        f"{key}={describe(part)}" if key else describe(part)
        for key, part in value.items()
        if key != "_type" and (part or type(part) in (int, float))
    )


def _last_name(reference: str) -> str:
    return reference.rpartition(":")[2].rpartition(".")[2]
