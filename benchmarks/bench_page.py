"""docs/benchmarks.md, from the JSON alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench_plan import Benchmark
from bench_rows import ROWS, Found, Row, megabytes, settings

INTRODUCTION = """\
# Benchmarks

Every benchmark of the project, made by `benchmarks/bench.py` from the files of
`benchmarks/results`; a test fails if they disagree. A goal was set before the first
measurement, or is held by a test since; what is missed is marked.

```bash
make bench
make bench QUICK=1
python benchmarks/bench.py --list
python benchmarks/bench.py --only step,lm
python benchmarks/bench.py --page
```

`make bench` runs all that the machine can run, for hours; `QUICK=1` runs small forms of
them, in minutes, whose numbers are not kept here. What cannot run is skipped, with the
reason and the command that would change it; `--list` says so beforehand. A benchmark
that was run today on the same machine, versions and sources is not run again.
`make bench-peers` makes the environments of the other packages.
"""

BESIDE_PLAIN = """\
## Beside hand-written JAX

Ratios to a step, or a loss, that is written by hand in plain JAX and computes the same:
below 1 is better.
"""

BESIDE_OTHERS = """\
## Beside other packages

One step of online distillation of a small language model, as ratios to the hand-written
JAX step in the same setting; all have the same weights and tokens, and losses must
agree. `benchmarks/lm.py` describes how it is measured. The losses are compared one by
one in [parity](parity.md).
"""

NAMES = {
    "plain": "hand-written JAX",
    "ours": "**distilljax**",
    "ours_bare": "**distilljax**, `diagnostics=False`",
    "torch_compile": "PyTorch, `torch.compile`",
    "liger": "PyTorch + Liger",
    "pytorch": "PyTorch, eager",
    "trl_gkd": "TRL GKD's loss",
    "trl_chunked": "TRL DistillationTrainer's loss",
    "tunix": "Tunix' strategy",
}


def render(benchmarks: Sequence[Benchmark], results: Path) -> str:
    """The whole page."""
    found = {
        b.name: json.loads((results / b.results).read_text())
        for b in benchmarks
        if (results / b.results).exists()
    }
    # What was traced for want of a device was not measured.
    found = {name: x for name, x in found.items() if "traced_only" not in x}
    rows = {name: list(ROWS[name](x)) for name, x in found.items()}
    parts = [
        INTRODUCTION,
        summary(benchmarks, found, rows),
        BESIDE_PLAIN,
        beside_plain(rows),
        BESIDE_OTHERS,
        beside_others(found.get("lm")),
        on_a_gpu(found.get("lm_gpu")),
        *(section(b, found.get(b.name), rows.get(b.name, [])) for b in benchmarks),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; all but the first column to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def summary(
    benchmarks: Sequence[Benchmark], found: dict[str, Found], rows: dict[str, list[Row]]
) -> str:
    """A line for each benchmark."""
    lines = []
    for b in benchmarks:
        link = f"[{b.name}](#{b.name})"
        if b.name not in found:
            lines.append((link, "not run", "", ""))
            continue
        goals = [r.met for r in rows[b.name] if r.met is not None]
        missed = goals.count(False)
        word = f"**{missed}**" if missed else "0"
        lines.append((link, dates(found[b.name]), str(goals.count(True)), word))
    return table(("", "measured", "goals met", "missed"), lines)


def verdict(row: Row) -> str:
    """In a word."""
    return {None: "", True: "met", False: "**missed**"}[row.met]


def beside_plain(rows: dict[str, list[Row]]) -> str:
    """Of all benchmarks that have such ratios."""
    lines = [
        (f"{name}, {r.what}", r.value, r.goal, verdict(r))
        for name, found in rows.items()
        for r in found
        if r.plain
    ]
    return table(("", "ratio", "goal", ""), lines)


def beside_others(found: Found | None) -> str:
    """Every variant of every setting."""
    if found is None:
        return "Not run."
    ratios = ("time", "cpu", "peak", "peak_trimmed")
    lines = [
        (
            f"{at}: {NAMES.get(name, name)}",
            case.get("version", ""),
            *(f"{case[f'{key}_ratio']:.2f}" for key in ratios),
            f"{case['first_step_cpu_seconds']:.1f} s",
        )
        for at, cases in settings(found)
        for name, case in cases.items()
    ]
    peaks = ("peak memory", "the same, trimmed")
    head = ("", "version", "time", "CPU time", *peaks, "first step, CPU")
    text = table(head, lines)
    before, after = (found["load_average"][when][0] for when in ("before", "after"))
    held = found["exact"]["vocabulary"]["temp_bytes"]
    return (
        f"{text}\n\nTrimmed is the peak of a step after `malloc_trim`: what compilers "
        "have freed, and glibc keeps, is a good part of the other. The load "
        f"average of the machine was {before:.1f} before and "
        f"{after:.1f} after; under load, CPU time says more than time. In the setting "
        f"of a large vocabulary the compiler gives our program "
        f"{megabytes(held['ours'])} of temporary memory, and the hand-written one "
        f"{megabytes(held['plain'])}."
    )


def on_a_gpu(found: Found | None) -> str:
    """Every variant of every pair."""
    if found is None:
        return (
            "At real sizes on a GPU, against a hand-written JAX step and PyTorch with "
            "Liger: **not run**, see [lm_gpu](#lm_gpu)."
        )
    lines = []
    for name, pair in found["pairs"].items():
        for who, case in pair["variants"].items():
            start = (f"{name}: {NAMES.get(who, who)}", case.get("version", ""))
            if "error" in case:
                lines.append((*start, case["error"], "", "", ""))
                continue
            mfu = "" if case["mfu"] is None else f"{case['mfu']:.2f}"
            lines.append((
                *start, f"{1000 * case['seconds']:,.0f} ms",
                f"{case['tokens_per_second']:,}", mfu, megabytes(case["peak_bytes"]),
            ))  # fmt: skip
    head = ("", "version", "step", "tokens per second", "MFU", "peak memory")
    return f"At real sizes, in bfloat16. {place(found)}\n\n{table(head, lines)}"


def section(benchmark: Benchmark, found: Found | None, rows: list[Row]) -> str:
    """One benchmark: what, how, where, and all its numbers."""
    command = f"python benchmarks/bench.py --only {benchmark.name}"
    parts = [f"## {benchmark.name}", benchmark.measures]
    if found is None:
        needs = [f"{need.reason}: `{need.command}`" for need in benchmark.full.needs]
        lacks = "".join(f"\n- {word}" for word in needs)
        why = "\n\nIt is skipped as long as:\n" + lacks if lacks else ""
        word = f"**Not run.** `{command}` runs it."
        if benchmark.quick is not None and not benchmark.quick.needs and lacks:
            word += f" `{command} --quick` runs a small form of it anywhere."
        return "\n\n".join([*parts, word + why])
    parts.append(f"`{command}`, `benchmarks/{benchmark.script}`. {place(found)}")
    if benchmark.page:
        parts.append(
            f"More of it is in [{Path(benchmark.page).stem}]({benchmark.page})."
        )
    if any(r.plain for r in rows):
        parts.append("Its ratios are [above](#beside-hand-written-jax).")
    numbers = [(r.what, r.value, r.goal, verdict(r)) for r in rows if not r.plain]
    if numbers:
        parts.append(table(("", "measured", "goal", ""), numbers))
    return "\n\n".join(parts)


def dates(found: Found) -> str:
    """The first and the last day of a file."""
    days = sorted({one["date"] for one in _parts(found)})
    return " to ".join(dict.fromkeys([days[0], days[-1]]))


def place(found: Found) -> str:
    """When and where it was measured, and with which versions."""
    machines: list[str] = []
    versions: dict[str, list[str]] = {}
    for one in _parts(found):
        for machine in _listed(one.get("machines", one.get("machine", []))):
            machines.append(words(machine))
        for all_ in _listed(one["versions"]):
            for name, version in all_.items():
                versions.setdefault(name, []).append(version)
    where = "; ".join(dict.fromkeys(machines))
    with_ = ", ".join(
        f"{n} {' and '.join(dict.fromkeys(v))}" for n, v in versions.items()
    )
    return f"Measured {dates(found)}{f' on {where}' if where else ''}, with {with_}."


def words(machine: dict[str, Any]) -> str:
    """A machine, in words."""
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    return f"{device}{machine['cpu']}, {machine['cpu_cores']} cores"


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _parts(found: Found) -> list[Found]:
    """A file, or the cases of one that is measured case by case."""
    return [found] if "date" in found else list(found["cases"].values())
