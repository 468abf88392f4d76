"""SmolLM2 on Austen: from the run folders to JSON, a table and a figure.

    distilljax cache configs/lm/smollm2_austen.py --out runs/lm/austen_store \
        --kind sampled
    distilljax train configs/lm/smollm2_austen.py --workdir runs/lm/austen_cached \
        --arms kept_labels,kept_cached,scratch_labels,scratch_cached --seeds 0
    python benchmarks/smollm2_austen.py runs/lm/austen_cached

Writes benchmarks/results/smollm2_austen.json and docs/figures/smollm2_austen.png, and
prints the table of docs/language_models.md. Every number is that of a results.json,
or of a store's manifest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from distilljax.metrics import write_atomically
from distilljax.workdir import read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/smollm2_austen.json"
FIGURE = ROOT / "docs/figures/smollm2_austen.png"
ARMS = {
    "kept_untrained": "8 of 30 layers, as they are",
    "kept_labels": "8 of 30 layers, from the text",
    "kept_distilled": "8 of 30 layers, from the teacher",
    "kept_cached": "8 of 30 layers, from the teacher's store",
    "scratch_labels": "11.8 M from scratch, from the text",
    "scratch_distilled": "11.8 M from scratch, from the teacher",
    "scratch_cached": "11.8 M from scratch, from the teacher's store",
}
COLORS = {"labels": "#b5541c", "distilled": "#1f5fa8", "cached": "#1f5fa8"}
NUMBERS = (
    "nll", "perplexity", "bits_per_byte", "kl_to_teacher", "agreement", "ece",
    "accuracy", "parameters", "flops_per_example",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        type=Path,
        help="what was --workdir; seeds that it has not stay as in the results",
    )
    parser.add_argument(
        "--online",
        type=Path,
        help="runs whose teacher was in the step; else those of the results stay",
    )
    parser.add_argument(
        "--stores",
        type=Path,
        nargs="*",
        default=[],
        help="what was --out of `distilljax cache`; else those of the results stay",
    )
    args = parser.parse_args()
    found = collect(args.runs)
    before = read_json(RESULTS) if RESULTS.exists() else {}
    found["arms"] = joined(before, found)
    found["stores"] = list(map(_store, args.stores)) or before.get("stores", [])
    online = None if args.online is None else collect(args.online)
    found["online"] = online or before.get("online")
    write_atomically(RESULTS, json.dumps(found, indent=1) + "\n")
    print("\n".join([*table(found), "", *samples(found)]))
    draw(found)
    print(f"wrote {RESULTS.relative_to(ROOT)} and {FIGURE.relative_to(ROOT)}")


def collect(runs: Path) -> dict[str, Any]:
    """The numbers, samples and validation curves of every arm and seed there is."""
    arms: dict[str, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    for path in sorted(runs.glob("*/seed_*/results.json")):
        last = read_json(path)
        arm = arms.setdefault(last["arm"], {"seeds": {}})
        arm["seeds"][last["seed"]] = _of(last, "student") | {
            "steps": last["steps"],
            "train_seconds": last["train_seconds"],
            "selected": last["selected"],
            "date": last["date"],
            "machine": last["machine"],
            "validation": _curve(path.with_name("metrics.jsonl")),
        }
    if not arms:
        raise SystemExit(f"smollm2_austen: {runs} must hold finished runs, got none.")
    shared = ("date", "versions", "machine", "num_examples", "teacher_fingerprint")
    return {
        "format": 1,
        **{name: last[name] for name in shared},
        "teacher": _of(last, "teacher"),
        "arms": {name: arms[name] for name in ARMS if name in arms},
    }


def joined(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """All seeds of all arms: those just read, and others of the same teacher."""
    arms = found["arms"]
    if before.get("teacher_fingerprint") != found["teacher_fingerprint"]:
        return arms
    named = {name: arms[name]["seeds"] for name in arms}
    made = {key: before[key] for key in ("date", "machine")}
    for name, arm in before["arms"].items():
        kept = {int(seed): made | x for seed, x in arm["seeds"].items()}
        named[name] = kept | named.get(name, {})
    return {
        name: {"seeds": dict(sorted(named[name].items()))}
        for name in ARMS
        if name in named
    }


def _store(folder: Path) -> dict[str, Any]:
    """Of a store's manifest, what was kept and how many bytes a position took."""
    manifest = read_json(folder / "manifest.json")
    counts, logits = manifest["counts"], manifest["signal"]["logits"]
    return {
        "kind": logits["kind"],
        "options": logits["options"],
        "positions": counts["positions"],
        "bytes_per_position": counts["bytes"] / counts["positions"],
    }


def _of(results: dict[str, Any], who: str) -> dict[str, Any]:
    measured = results[who]
    return {
        "test": {name: measured[name] for name in NUMBERS},
        "other_tests": {
            name: {key: found[who].get(key) for key in NUMBERS[:6]}
            for name, found in results["other_tests"].items()
        },
        "samples": measured["probes"]["samples"],
    }


def _curve(path: Path) -> list[tuple[int, float, float]]:
    """Step, NLL and KL to the teacher, of each validation."""
    records = map(json.loads, path.read_text().splitlines())
    return [
        (r["step"], r["nll"], r["kl_to_teacher"])
        for r in records
        if r["split"] == "validation"
    ]


def table(found: dict[str, Any]) -> list[str]:
    """Means and standard deviations over the seeds, as Markdown."""
    lines = [
        "| | parameters | perplexity | bits per byte | KL to teacher | agreement "
        "| calibration error | glosses | Python's help |",
        "|---" + "|---:" * 8 + "|",
    ]
    rows = {"teacher, SmolLM2-135M in 4 bits": [found["teacher"]]}
    for name, arm in found["arms"].items():
        rows[ARMS[name]] = list(arm["seeds"].values())
    for name, seeds in rows.items():

        def of(*keys: str, digits: int = 1, by: float = 1.0, seeds: Any = seeds) -> str:
            values = []
            for value in seeds:
                for key in keys:
                    value = value[key]
                values.append(by * (value or 0.0))
            shown = f"{statistics.mean(values):,.{digits}f}"
            if len(set(values)) > 1:
                shown += f" ± {statistics.stdev(values):,.{digits}f}"
            return shown

        taught = [of("test", "kl_to_teacher", digits=3)]
        taught += [of("test", "agreement", by=100) + " %"]
        cells = [
            of("test", "parameters", by=1e-6) + " M",
            of("test", "perplexity"),
            of("test", "bits_per_byte", digits=3),
            *(["", ""] if name.startswith("teacher") else taught),
            of("test", "ece", by=100) + " %",
            of("other_tests", "glosses", "perplexity"),
            of("other_tests", "python", "perplexity"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def samples(found: dict[str, Any], length: int = 72) -> list[str]:
    """How each goes on after one of the prompts, with its first seed, as Markdown."""
    texts = {"teacher, SmolLM2-135M in 4 bits": found["teacher"]["samples"]}
    for name, arm in found["arms"].items():
        texts[ARMS[name]] = next(iter(arm["seeds"].values()))["samples"]
    prompt = next(iter(found["teacher"]["samples"]))
    lines = [f"| | {prompt} ... |", "|---|---|"]
    for name, said in texts.items():
        shown = said[prompt][:length].replace("\n", "⏎").replace("|", "\\|")
        lines.append(f"| {name} | {shown.strip()} ... |")
    return lines


def draw(found: dict[str, Any]) -> None:
    """Validation NLL over the steps: what one budget brings, with and without it."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"kept": "8 of 30 layers", "scratch": "11.8 M parameters from scratch"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for how, color in COLORS.items():
            arm = found["arms"].get(f"{kind}_{how}")
            for seed in (arm or {"seeds": {}})["seeds"].values():
                steps, nll, _ = zip(*seed["validation"], strict=True)
                axis.plot(steps, nll, "o-", color=color, lw=1.8, ms=4)
            if arm:  # named once, beside the last of its lines
                offset = {"xytext": (6, 0), "textcoords": "offset points"}
                where = (steps[-1], nll[-1])
                axis.annotate(how, where, color=color, va="center", **offset)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.25)
    axes[0].set_ylabel("validation NLL, nats per token")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
