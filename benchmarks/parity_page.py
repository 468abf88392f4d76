"""docs/parity.md, from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Results = dict[str, Any]

INTRODUCTION = """\
# Parity with other packages

Every loss of `distilljax.losses` against those that others have, on the same random
inputs: values, and gradients with respect to all arrays of the student. This page is
made by `benchmarks/parity.py` from
[parity.json](../benchmarks/results/parity.json); a test fails if they disagree, or if
our side no longer gives the numbers there.

```bash
make parity
```

That makes an environment of its own for PyTorch, torchdistill and TRL, lets them
compute there, with PyTorch's autograd for the gradients, and compares.

- **Inputs** are normal numbers that float32 holds exactly; the worst of {seeds} seeds
  is shown. A difference of values is relative to the value, one of gradients to their
  largest entry; where the reference is 0 it is absolute.
- **The reference** is the peer in float64. Where its formula is not that of its paper,
  and where there is no peer, it is the paper's formula in NumPy float64, with a
  gradient by central differences of sixth order (to 1e-11 or so) or in closed form.
- **Limits**: {float64:.0e} in float64; in float32, where ours is held against the
  *float64* reference, {float32:.1e}, which is 16 units in the last place. The run fails
  if a pair exceeds them, and if a peer that is said to differ no longer does.
- **Factors**: ours are means over positions, by `masked_mean`, without any factor. What
  the peer's number is in these units stands in bold.
"""

AFTER_AGREEING = """\
In float32 the peer's own distance from its float64 stands beside ours. A compiled sum
runs in order on this machine, PyTorch's in pairs: the 1,728 terms of `rkd_angle` cost
us a digit.
"""

BEFORE_DIFFERING = """\
Ours is held against the paper's formula here. The numbers are those of the first seed,
in units of the formula, and ours is shown with the factor to those units.
"""

BEFORE_ALONE = """\
Neither PyTorch, nor torchdistill, nor TRL has these, so that ours is held against the
paper's formula alone.
"""


def render(results: Results) -> str:
    """The whole page."""
    groups: dict[str, list[dict[str, Any]]] = {"agree": [], "differ": [], "alone": []}
    for case in results["cases"]:
        key = "alone" if case["peer"] is None else "agree"
        groups["differ" if case["differs"] else key].append(case)
    parts = [
        INTRODUCTION.format(seeds=len(results["seeds"]), **results["tolerance"]),
        summary(groups),
        "## Pairs that agree",
        agreeing(groups["agree"]),
        AFTER_AGREEING,
        "## Peers that differ from their paper",
        BEFORE_DIFFERING,
        differing(groups["differ"]),
        "## Losses without a peer",
        BEFORE_ALONE,
        alone(groups["alone"]),
        "## Public names without a row",
        "\n".join(f"- `{name}`: {why}." for name, why in results["exempt"].items()),
        "## Where it was run",
        environment(results),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def summary(groups: dict[str, list[dict[str, Any]]]) -> str:
    """How many of what."""
    wrong = [
        case["name"]
        for cases in groups.values()
        for case in cases
        if case["verdict"].startswith("not ")
    ]
    losses = {case["loss"] for cases in groups.values() for case in cases}
    counts = {key: len(cases) for key, cases in groups.items()}
    text = (
        f"**{len(losses)} losses in {sum(counts.values())} comparisons**: "
        f"{counts['agree']} pairs that agree, {counts['differ']} peers that differ "
        f"from their paper (ours does not), {counts['alone']} losses without a peer."
    )
    if wrong:
        return f"{text} **Not as expected:** {'; '.join(wrong)}."
    return f"{text} All of it came out as expected."


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def agreeing(cases: list[dict[str, Any]]) -> str:
    """One row for each pair."""
    head = ["loss", "peer", "peer = **factor** × ours", "float64: value, gradient"]
    head += ["float32: ours", "float32: peer"]
    return table(
        head,
        (
            [
                call(case),
                called(case),
                f"**{case['factor']}**. {case['why']}".removesuffix(". "),
                *(
                    gaps(case["gaps"].get(key))
                    for key in ("float64", "float32", "peer")
                ),
            ]
            for case in cases
        ),
    )


def differing(cases: list[dict[str, Any]]) -> str:
    """One row for each peer that computes something else."""
    head = ["loss", "peer", "what the peer does", "what the paper says"]
    head += ["peer", "paper", "**factor** × ours"]
    head += ["ours from paper: value, gradient", "peer from paper"]
    rows = []
    for case in cases:
        example = case["examples"][0]
        theirs = f"`{case['error']}`" if case["error"] else number(example["peer"])
        ours = number(example["ours"] / case["factor_value"])
        rows.append(
            [
                call(case),
                called(case),
                case["differs"],
                case["why"],
                theirs,
                number(example["reference"]),
                f"**{case['factor']}** × {ours}",
                *(gaps(case["gaps"].get(key)) for key in ("float64", "peer")),
            ]
        )
    return table(head, rows)


def alone(cases: list[dict[str, Any]]) -> str:
    """One row for each loss that has a formula only."""
    return table(
        ["loss", "why", "float64: value, gradient", "float32"],
        (
            [
                call(case),
                case["why"],
                *(gaps(case["gaps"].get(key)) for key in ("float64", "float32")),
            ]
            for case in cases
        ),
    )


def call(case: dict[str, Any]) -> str:
    """A loss of ours with its options, as code."""
    options = arguments(case["options"] | case["own"])
    return f"`{case['loss']}({options})`" if options else f"`{case['loss']}`"


def called(case: dict[str, Any]) -> str:
    """A peer with the options that ours does not have."""
    peer, theirs = case["peer"], arguments(case["theirs"])
    return f"{peer} (`{theirs}`)" if theirs else peer


def arguments(options: dict[str, Any]) -> str:
    """As in a call."""
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def gaps(sizes: dict[str, float] | None) -> str:
    """A difference of values and one of gradients, if both sides have an answer."""
    if sizes is None:
        return "–"
    return f"{size(sizes['value'])}, {size(sizes['gradient'])}"


def size(value: float) -> str:
    """Of a difference: two digits."""
    return "0" if value == 0 else f"{value:.1e}" if value < 0.1 else f"{value:.2g}"


def number(value: float) -> str:
    """Six digits."""
    return f"{value:.6g}"


def environment(results: Results) -> str:
    """Date, machine, versions."""
    found = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    return (
        f"- Date: {results['date']}.\n"
        f"- Machine: {found['num_devices']} {found['device']} ({found['cpu']}, "
        f"{found['cpu_cores']} cores), {found['system']}.\n"
        f"- Versions: {versions}."
    )
