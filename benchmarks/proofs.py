"""Rerun the published experiments, judge them, and write docs/proofs.md.

    scripts/fetch_assets.sh assets
    python benchmarks/proofs.py

Runs the `distilljax train` commands of `proofs_plan` in order; a stopped one is taken
up again, and finished runs say so. Then reads all results (`proofs_collect`, where the
rule for claims stands), moves the bias of the missing class (`proofs_calibration`), and
writes

    benchmarks/results/proofs.json    every number       docs/figures/proofs_*.png
    docs/proofs.md                    the tables between its markers

A part of the runs is enough: what is missing is said.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import proofs_figures
import proofs_page
from proofs_collect import collect
from proofs_plan import PROOFS, REPOSITORY, Proof

from distilljax.evaluation.plots import save
from distilljax.metrics import write_atomically

CAPTIONS = {
    "proofs_soft_targets": "Errors by arm; a line joins the runs of one seed.",
    "proofs_missing_class": "Recall of the missing class before and after one bias.",
    "proofs_temperature": "Errors of students of three widths by temperature.",
    "proofs_patient_teacher": "Errors by what the teacher sees, short and long.",
    "proofs_full": "The full protocol beside the numbers of the paper.",
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    chosen = [p for p in PROOFS if args.only is None or p.name in args.only]
    runs, assets, out = args.runs.resolve(), args.assets.resolve(), args.out.resolve()
    with stage(runs, assets):
        if not args.collect_only:
            for proof in chosen:
                train(proof)
        # Always all of them: the page is whole, whatever was run last.
        results = collect(PROOFS, Path("runs"))
    results["note"] = args.note
    publish(results, out, docs=args.docs.resolve())
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=Path, default=REPOSITORY / "runs", help="folder of all runs")
    add("--assets", type=Path, default=REPOSITORY / "assets", help="fetched data")
    add("--only", nargs="+", choices=[p.name for p in PROOFS], help="train only these")
    add("--collect-only", action="store_true", help="train nothing")
    add("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    add("--docs", type=Path, default=REPOSITORY / "docs", help="has proofs.md")
    add("--note", default="", help="what a reader of the times should know")
    args = parser.parse_args(argv)
    if not args.assets.is_dir():
        parser.error(
            f"--assets {args.assets} is not there; run scripts/fetch_assets.sh"
        )
    args.runs.mkdir(parents=True, exist_ok=True)
    return args


@contextlib.contextmanager
def stage(runs: Path, assets: Path) -> Iterator[None]:
    """A folder where `runs` and `assets` are what they are in the configs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("runs").symlink_to(runs)
        Path("assets").symlink_to(assets)
        yield


def train(proof: Proof) -> None:
    """Run one command of the plan in the current folder; stop if it fails."""
    print(f"$ {proof.command}", flush=True)
    _, *words = shlex.split(proof.command)
    words = [str(proof.config) if word.endswith(".py") else word for word in words]
    subprocess.run([sys.executable, "-m", "distilljax", *words], check=True)


def publish(results: dict[str, Any], out: Path, docs: Path) -> None:
    """Write the JSON, the figures and the page; each file whole or not at all."""
    figures = proofs_figures.draw(results)
    results["figures"] = {name: CAPTIONS[name] for name in figures}
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        image = io.BytesIO()
        save(figure, image)
        write_atomically(docs / "figures" / f"{name}.png", image.getvalue())
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    write_atomically(out / "proofs.json", text)
    page = docs / "proofs.md"
    write_atomically(page, proofs_page.fill(page.read_text(), json.loads(text)))
    for name, found in results["experiments"].items():
        done = found["expected_runs"] - len(found["missing_runs"])
        print(f"{name}: {done} of {found['expected_runs']} runs")
    print(f"wrote {out / 'proofs.json'} and {page}")


if __name__ == "__main__":
    sys.exit(main())
