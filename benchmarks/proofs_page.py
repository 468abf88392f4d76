"""The tables of docs/proofs.md, written between its markers from the JSON alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from proofs_plan import ORACLE, REPOSITORY, SIGNIFICANT

from distilljax.evaluation.formatting import MISSING, fixed, p_value

Results = dict[str, Any]

PAGE = REPOSITORY / "docs" / "proofs.md"
MARKED = re.compile(
    r"(<!-- begin (?P<name>[\w/ ]+) -->\n).*?(<!-- end (?P=name) -->)", re.S
)


def fill(page: str, results: Results) -> str:
    """The page with the text between each pair of markers made again."""

    def section(match: re.Match[str]) -> str:
        what, _, name = match["name"].partition(" ")
        if what not in SECTIONS:
            raise ValueError(
                f"fill: the markers of the page must name one of {sorted(SECTIONS)}, "
                f"got {what!r}. Correct the marker, or write that section."
            )
        return f"{match[1]}\n{SECTIONS[what](results, name)}\n\n{match[3]}"

    return MARKED.sub(section, page)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summary(results: Results, _: str) -> str:
    """Every claim in one line, with its verdict."""
    rows = []
    for name, experiment in results["experiments"].items():
        for claim in experiment["claims"]:
            if claim["expected"] == 0:
                continue
            means = [_value(claim, claim[key]) for key in ("baseline_mean", "mean")]
            rows.append(
                [
                    f"{claim['text']} ({name})",
                    " to ".join(means),
                    _pairs(claim),
                    f"**{claim['verdict']}**{_by_signs(claim)}",
                ]
            )
    missing = _missing(results)
    head = ["claim", "mean, from baseline to arm", "pairs as claimed", "verdict"]
    return "\n\n".join([*([missing] if missing else []), table(head, rows)])


def bounds(results: Results, _: str) -> str:
    """Limits written into the configs, and whether they were kept."""
    rows = []
    for name, experiment in results["experiments"].items():
        for bound in experiment["bounds"]:
            if bound["at_most"] is not None:
                limit = f"at most {bound['at_most']:g}"
            else:
                limit = f"at least {bound['at_least']:g}"
            whole = bound["worst"] == round(bound["worst"])
            worst = fixed(bound["worst"], 0 if whole else 3)
            met = "kept" if bound["met"] else "**not kept**"
            rows.append([f"{name}: {bound['text']}", limit, worst, met])
    return table(["limit", "expected", "measured", ""], rows)


def unhelpful(results: Results, _: str) -> str:
    """Where the teacher did not help, and which claims did not hold."""
    lines = []
    for name, experiment in results["experiments"].items():
        for claim in experiment["against_hard_labels"]:
            if claim["verdict"] in ("reproduced", "too few pairs"):
                continue
            lines.append(
                f"- {name}, `{claim['arm']}` against `{claim['baseline']}`: "
                f"{_difference(claim)} errors; fewer in {_pairs(claim)} pairs. "
                f"{_hurt(claim)}"
            )
        for claim in experiment["claims"]:
            if claim["expected"] and claim["verdict"] in (
                "not separated",
                "contradicted",
            ):
                lines.append(
                    f"- {name}: “{claim['text']}” is **{claim['verdict']}** "
                    f"({_difference(claim)}, {_pairs(claim)} pairs as claimed)."
                )
            if claim["expected"] == 0 and claim["verdict"] == "more":
                lines.append(
                    f"- {name}: `{claim['arm']}` has more errors than "
                    f"`{claim['baseline']}`"
                    f"{OF_WHICH[claim['measure']]} ({_difference(claim)}, "
                    f"{_pairs(claim)})."
                )
        for bound in experiment["bounds"]:
            if not bound["met"]:
                lines.append(
                    f"- {name}: {bound['text']} is {bound['worst']:.3g}, and not as "
                    "the config expects."
                )
    return "\n".join(lines) or "Nothing among the runs that are there."


OF_WHICH = {"errors": "", "errors_other_classes": " on the other classes"}


def _hurt(claim: dict[str, Any]) -> str:
    if claim["verdict"] == "contradicted":
        return f"The teacher **hurt**{_by_signs(claim)}."
    return "No help was shown."


def experiment(results: Results, name: str) -> str:
    """One experiment: what was run, each arm, each claim."""
    found = results["experiments"].get(name)
    if found is None or not found["runs"]:
        return f"Not run yet: `distilljax train configs/{name}.py`."
    done = found["expected_runs"] - len(found["missing_runs"])
    minutes = fixed(found["train_seconds"] / 60, 0)
    parts = [
        f"```bash\n{found['command']}\n```",
        f"{done} of {found['expected_runs']} runs, {minutes} minutes of training.",
        _arms(found),
    ]
    if found["claims"]:
        parts.append(_claims(found["claims"]))
    sources = dict.fromkeys(c["source"] for c in found["claims"] if c["source"])
    if sources:
        parts.append(f"Claimed by {'; '.join(sources)}.")
    gaps = [
        f"`{claim['arm']}` closes {fixed(100 * claim['gap_closed'], 0)} %"
        for claim in found["against_hard_labels"]
        if claim["gap_closed"] is not None
    ]
    if gaps:
        parts.append(
            f"Of the errors between hard labels and the teacher, {', '.join(gaps)}."
        )
    return "\n\n".join(parts)


# (key, heading, decimals, factor); a column is shown where any arm has its number.
COLUMNS = (
    ("errors", "errors", 1, 1),
    ("focus_recall", "recall of the missing class, %", 1, 100),
    ("errors_other_classes", "errors on the other classes", 1, 1),
    ("bias", "bias, nats", 2, 1),
    ("nll", "NLL, nats", 3, 1),
    ("ece", "calibration error, %", 1, 100),
    ("kl_to_teacher", "KL to teacher, nats", 3, 1),
    ("train_loss", "last training loss", 4, 1),
)


def _arms(found: dict[str, Any]) -> str:
    arms = found["arms"]
    columns = [c for c in COLUMNS if any(c[0] in arm for arm in arms.values())]
    rows = [
        [
            f"`{name}`" if ORACLE not in name else f"`{name}` (chosen on test labels)",
            str(arm["n"]),
            *[_spread(arm.get(key), digits, by) for key, _, digits, by in columns],
        ]
        for name, arm in arms.items()
    ]
    taught = {run["split"]: run.get("teacher_errors") for run in found["runs"][::-1]}
    for run in found["runs"]:
        if run.get("teacher_errors") is not None:
            taught[run["split"]] = run["teacher_errors"]
    known = [f"{e:,}" for _, e in sorted(taught.items()) if e is not None]
    text = table(["arm", "runs", *[c[1] for c in columns]], rows)
    tail = f"Mean ± standard deviation; of {found['num_examples']:,} test images."
    if known:
        tail += f" Errors of the teacher, by split: {', '.join(known)}."
    return f"{text}\n\n{tail}"


def _spread(value: dict[str, Any] | None, digits: int, factor: float) -> str:
    if value is None:
        return MISSING
    mean = fixed(factor * value["mean"], digits)
    if value["sd"] is None:
        return mean
    return f"{mean} ± {fixed(factor * value['sd'], digits)}"


def _claims(claims: list[dict[str, Any]]) -> str:
    rows = []
    for claim in claims:
        d, by_split = claim["difference"], claim["split_differences"]
        splits = ", ".join(_value(claim, v, sign=True) for v in by_split)
        rows.append(
            [
                f"{claim['text']}: `{claim['arm']}` − `{claim['baseline']}`",
                _difference(claim),
                splits if len(by_split) > 1 else MISSING,
                _pairs(claim),
                p_value(d["t_p_value"]),
                p_value(claim["mcnemar"]["p_value"]),
                claim["verdict"] + _by_signs(claim),
            ]
        )
    head = ["claim", "difference [95 %]", "by split", "pairs as claimed"]
    return table([*head, "paired t, p", "McNemar, p", "verdict"], rows)


def _by_signs(claim: dict[str, Any]) -> str:
    """Says so where the t test alone would not have been enough."""
    p = claim["difference"]["t_p_value"]
    strong = p is not None and p < SIGNIFICANT
    decided = claim["verdict"] not in ("too few pairs", "not separated")
    return " (by signs alone)" if decided and not strong else ""


def _value(claim: dict[str, Any], value: float, *, sign: bool = False) -> str:
    recall = claim["measure"] == "focus_recall"
    text = fixed((100 if recall else 1) * value, 1, sign=sign)
    return f"{text} %" if recall and not sign else text


def _difference(claim: dict[str, Any]) -> str:
    d = claim["difference"]
    text = _value(claim, d["mean"], sign=True)
    if claim["measure"] == "focus_recall":
        text += " points"
    if d["low"] is None:
        return text
    ends = [_value(claim, d[key], sign=True) for key in ("low", "high")]
    return f"{text} [{', '.join(ends)}]"


def _pairs(claim: dict[str, Any]) -> str:
    d = claim["difference"]
    if claim["expected"] == 0:
        return f"{d['negative']} less, {d['positive']} more"
    right = d["positive"] if claim["expected"] > 0 else d["negative"]
    return f"{right} of {d['n']}"


def protocol(results: Results, _: str) -> str:
    """What the saved configs say was done."""
    rows = []
    for name, found in results["experiments"].items():
        for line in found["protocol"]:
            shift = line["augmentation"]
            rows.append(
                [
                    name,
                    line["student"],
                    line["data"],
                    MISSING if shift is None else f"±{shift} px",
                    str(line["batch_size"]),
                    f"{line['updates']:,}",
                    f"{line['peak_learning_rate']:g}",
                ]
            )
    head = ["experiment", "model", "training images", "shifts", "batch", "updates"]
    return table([*head, "peak learning rate"], rows)


def environment(results: Results, _: str) -> str:
    """Date, machine, versions, time."""
    hours = fixed(results["train_seconds"] / 3600, 1)
    lines = [f"- Date of the last run: {results['date']}; {hours} hours of training."]
    lines += [
        f"- Machine: {m['num_devices']} {m['device']} ({m['cpu']}, {m['cpu_cores']} "
        f"cores), {m['system']}."
        for m in results["machines"]
    ]
    lines += [
        "- Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."
        for versions in results["versions"]
    ]
    if results.get("note"):
        lines.append(f"- {results['note']}")
    return "\n".join(lines)


def anchors(results: Results, _: str) -> str:
    """The paper's numbers beside ours; other protocols, so not to be equalled."""
    full, missing = results["anchors"]["full"], results["anchors"]["missing_class"]
    ours = _means(results, "mnist/full")
    lost = _means(results, "mnist/missing_class")
    rows = [
        [
            "60,000 images: teacher",
            str(full["teacher"]),
            ours("soft_t20", "teacher_errors"),
        ],
        ["60,000 images: hard labels", str(full["hard_labels"]), ours("hard_labels")],
        ["60,000 images: soft targets", str(full["soft_t20"]), ours("soft_t20")],
        ["no 3s: errors", str(missing["errors"]), lost("soft_t20")],
        [
            "no 3s: errors, oracle bias",
            str(missing["errors_oracle"]),
            lost("soft_t20" + ORACLE),
        ],
        [
            "no 3s: recall of 3s, %",
            fixed(100 * missing["recall"], 1),
            lost("soft_t20", "focus_recall", 100),
        ],
        [
            "no 3s: recall of 3s with the oracle bias, %",
            fixed(100 * missing["recall_oracle"], 1),
            lost("soft_t20" + ORACLE, "focus_recall", 100),
        ],
    ]
    return table(["MNIST, 10,000 test images", full["source"], "here"], rows)


def _means(results: Results, name: str) -> Callable[..., str]:
    arms = results["experiments"].get(name, {}).get("arms", {})

    def mean(arm: str, key: str = "errors", factor: float = 1) -> str:
        found = arms.get(arm, {}).get(key)
        if found is None:
            return MISSING
        digits = 0 if found["sd"] is None else 1
        return fixed(factor * found["mean"], digits)

    return mean


def figure(results: Results, name: str) -> str:
    """A figure, if it was drawn."""
    if name not in results["figures"]:
        return "No runs, no figure."
    return f"![{results['figures'][name]}](figures/{name}.png)"


def _missing(results: Results) -> str:
    lines = [
        f"{name} ({len(found['missing_runs'])} of {found['expected_runs']} runs)"
        for name, found in results["experiments"].items()
        if found["missing_runs"]
    ]
    return f"**Missing so far:** {', '.join(lines)}." if lines else ""


SECTIONS: dict[str, Callable[[Results, str], str]] = {
    "summary": summary,
    "bounds": bounds,
    "unhelpful": unhelpful,
    "experiment": experiment,
    "protocol": protocol,
    "environment": environment,
    "anchors": anchors,
    "figure": figure,
}
