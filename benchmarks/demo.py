"""Does the demo still show what the README says of it?

    make demo
    python benchmarks/demo.py runs/digits

Reads the runs of `make demo`, prints the table of the README as they give it, and exits
with 1 if an effect is gone or a number has moved by more than other versions and
processors move it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilljax.evaluation import paired_difference

REPOSITORY = Path(__file__).resolve().parents[1]
# Float32 sums in another order change the training, and five runs of 400 test digits.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Row:
    """A row of the README's table: two arms of an experiment, and what must hold."""

    text: str
    arm: str
    at_least: float
    """Lower end of the paired interval; for the control, of the teacher's help."""
    experiment: str = "few_labels"
    class_name: str | None = None
    """Recall of this class, and not accuracy."""


# The limits are those of a plain prototype: +.035 on the same labels, recall .88.
ROWS = (
    Row("36 labels; the teacher on the same 36", "soft_targets", 0.035),
    Row("36 labels; the teacher on 1,200 unlabelled digits", "transfer_set", 0.035),
    Row("no 3 to be seen; recall of 3s", "distilled", 0.88, "missing_class", "3"),
    Row("all 1,200 labels (the control)", "distilled", -0.02, "all_data"),
)


def measure(results: dict[str, Any], class_name: str | None) -> float:
    """Accuracy, or the recall of one class."""
    student = results["student"]
    if class_name is None:
        return student["accuracy"]
    k = results["class_names"].index(class_name)
    return student["per_class"]["correct"][k] / student["per_class"]["count"][k]


def values(root: Path, row: Row, arm: str) -> list[float]:
    """One number for each seed, in order."""
    paths = sorted((root / row.experiment / arm).glob("seed_*/results.json"))
    return [measure(json.loads(p.read_text()), row.class_name) for p in paths]


def written(readme: str, text: str) -> list[float]:
    """The numbers of a row of the README's table."""
    for line in readme.splitlines():
        if line.startswith(f"| {text} |"):
            cells = line.split("|", 2)[2]
            return [float(x) for x in re.findall(r"[+-]?\.\d+", cells)]
    raise SystemExit(f"README.md has no row {text!r}")


def check(row: Row, root: Path, readme: str) -> str | None:
    """Print a row; what is wrong with it, or None."""
    before, after = values(root, row, "hard_labels"), values(root, row, row.arm)
    if len(before) != 5 or len(after) != 5:
        return f"{row.text}: {len(before)} and {len(after)} runs instead of 5 each"
    found = paired_difference(after, before)
    means = [sum(before) / 5, sum(after) / 5, found.mean]
    ends = (found.low, found.high)
    numbers = [f"{x:.3f}" for x in (*means, *ends) if x is not None]
    print(f"| {row.text} | " + " | ".join(numbers) + " |")
    expected = written(readme, row.text)
    moved = [
        f"{new:.3f} and not {old:.3f}"
        for new, old in zip(means, expected, strict=False)
        if abs(new - old) > TOLERANCE
    ]
    if found.low is None or found.low < row.at_least:
        return f"{row.text}: the interval begins at {found.low} < {row.at_least}"
    return f"{row.text}: {'; '.join(moved)}" if moved else None


def main() -> int:
    """Compare; 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder of the demo, runs/digits")
    root = parser.parse_args().root
    readme = (REPOSITORY / "README.md").read_text()
    wrong = [error for row in ROWS if (error := check(row, root, readme))]
    for error in wrong:
        print(f"error: {error}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
