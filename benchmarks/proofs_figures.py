"""The figures of docs/proofs.md, each drawn from the JSON of the results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from drawing import BLUE, FAINT, GREY, ORANGE, PINK, STYLE, TEACHER, YELLOW
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from proofs_plan import CALIBRATED, ORACLE

from distilljax.evaluation.plot_layout import grid, left_labels

Results = dict[str, Any]
HARD, SOFT, OTHER = GREY, BLUE, ORANGE
DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}


def values_of(
    results: Results, experiment: str, arm: str, key: str
) -> dict[int, float]:
    """One measure of an arm, by seed; runs that lack it are left out."""
    runs = results["experiments"].get(experiment, {}).get("runs", [])
    return {
        run["seed"]: run[key]
        for run in runs
        if run["arm"] == arm and run.get(key) is not None
    }


def draw(results: Results) -> dict[str, Figure]:
    """All figures that there is data for, by the name of their file."""
    figures: dict[str, Callable[[Results], Figure | None]] = {
        "proofs_soft_targets": soft_targets,
        "proofs_missing_class": missing_class,
        "proofs_temperature": temperature,
        "proofs_patient_teacher": patient_teacher,
        "proofs_full": full_protocol,
    }
    with mpl.rc_context(STYLE):
        drawn = {name: make(results) for name, make in figures.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def paired(
    axis: Axes,
    columns: Sequence[tuple[str, dict[int, float], str]],
    decimals: int = 0,
    apart_after: int | None = None,
) -> None:
    """Columns (label, value by seed, colour); a line joins the runs of one seed.

    No line crosses from column `apart_after` to the next: they are other experiments.
    """
    spots: list[dict[int, float]] = []
    for x, (_, values, color) in enumerate(columns):
        seeds = sorted(values)
        # Side by side, so that equal numbers do not hide each other.
        width = min(0.36, 0.07 * max(len(seeds) - 1, 0))
        shifts = np.linspace(-width / 2, width / 2, len(seeds)) if seeds else []
        spots.append({s: x + shift for s, shift in zip(seeds, shifts, strict=True)})
        axis.scatter(
            [spots[x][s] for s in seeds],
            [values[s] for s in seeds],
            s=24,
            color=color,
            alpha=0.9,
            lw=0,
            zorder=2,
        )
        if seeds:
            mean = float(np.mean([values[s] for s in seeds]))
            axis.plot([x - 0.3, x + 0.3], [mean, mean], color=color, lw=2.4, zorder=3)
            axis.annotate(
                f"{mean:.{decimals}f}",
                (x + 0.33, mean),
                color=color,
                fontsize=9,
                fontweight="bold",
                va="center",
                zorder=4,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
    for x in range(len(columns) - 1):
        (_, left, _), (_, right, _) = columns[x], columns[x + 1]
        if x == apart_after:
            continue
        for seed in sorted(left.keys() & right.keys()):
            ends = [spots[x][seed], spots[x + 1][seed]]
            axis.plot(ends, [left[seed], right[seed]], color=FAINT, lw=1, zorder=1)
    axis.set_xticks(range(len(columns)), [label for label, _, _ in columns])
    axis.set_xlim(-0.5, len(columns) - 0.25)
    axis.margins(y=0.1)
    axis.grid(axis="y", color="#EEEEEE", lw=0.8)
    axis.set_axisbelow(True)


def soft_targets(results: Results) -> Figure | None:
    """Errors by arm, seed by seed, with the teachers."""
    panels = []
    for dataset, title in DATASETS.items():
        name = f"{dataset}/soft_targets"
        arms = (
            ("hard\nlabels", "hard_labels", HARD),
            ("labels and\nteacher, T=4", "kd_t4", OTHER),
            ("teacher alone,\nT=20", "soft_t20", SOFT),
        )
        columns = [
            (label, values_of(results, name, arm, "errors"), color)
            for label, arm, color in arms
        ]
        if any(values for _, values, _ in columns):
            teacher = values_of(results, name, "soft_t20", "teacher_errors")
            panels.append((title, [*columns, ("their\nteacher", teacher, TEACHER)]))
    if not panels:
        return None
    figure, axes = grid(len(panels), width=4.6, height=3.9, columns=2)
    for axis, (title, columns) in zip(axes, panels, strict=True):
        paired(axis, columns)
        axis.set_title(title)
    left_labels(axes, "errors of 10,000 test images")
    return figure


def missing_class(results: Results) -> Figure | None:
    """Recall of the missing class, before and after one bias is moved."""
    panels = []
    for dataset, title in DATASETS.items():
        name = f"{dataset}/missing_class"
        columns = []
        for who, arm, color in (
            ("hard labels", "hard_labels", HARD),
            ("soft targets", "soft_t20", SOFT),
        ):
            for what, suffix in (
                ("", ""),
                ("\nlabel-free\nbias", CALIBRATED),
                ("\noracle\nbias", ORACLE),
            ):
                recall = values_of(results, name, arm + suffix, "focus_recall")
                percent = {seed: 100 * value for seed, value in recall.items()}
                columns.append((who + what, percent, color))
        if any(values for _, values, _ in columns):
            panels.append((title, columns))
    if not panels:
        return None
    figure, axes = grid(len(panels), width=6.4, height=3.8, columns=2, share_y=True)
    for axis, (title, columns) in zip(axes, panels, strict=True):
        paired(axis, columns, decimals=1, apart_after=2)
        axis.axvspan(-0.5, 2.5, color="#F6F6F6", zorder=0, lw=0)
        axis.set_ylim(-4, 104)
        axis.tick_params(axis="x", labelsize=8.5)
        axis.set_title(f"{title}: class 3, absent from the transfer set")
    left_labels(axes, "recall of the missing class, %")
    return figure


def temperature(results: Results) -> Figure | None:
    """Errors of students of three widths by temperature."""
    name = "mnist/temperature"
    panels = []
    for width in (10, 30, 300):
        arms = [("labels", "hard", HARD)]
        arms += [(f"T = {t}", f"t{t}", SOFT) for t in (1, 2, 3, 4, 8, 20)]
        columns = [
            (label, values_of(results, name, f"w{width}_{arm}", "errors"), color)
            for label, arm, color in arms
        ]
        if any(values for _, values, _ in columns):
            panels.append((f"784-{width}-{width}-10", columns))
    if not panels:
        return None
    figure, axes = grid(len(panels), width=4.6, height=3.7)
    for axis, (title, columns) in zip(axes, panels, strict=True):
        paired(axis, columns)
        axis.set_title(title)
    left_labels(axes, "errors of 10,000 test images")
    return figure


def patient_teacher(results: Results) -> Figure | None:
    """Errors by what the teacher sees, after a short and after a long time."""
    name = "mnist/patient_teacher"
    arms = (
        ("labels", "hard_labels", HARD),
        ("labels, no\nshifts", "hard_labels_plain", HARD),
        ("no\naugmentation", "no_augmentation", YELLOW),
        ("independent\nviews", "independent", OTHER),
        ("fixed\ntarget", "fixed_target", PINK),
        ("consistent\nviews", "consistent", SOFT),
    )
    panels = []
    for title, suffix in (
        ("300 updates (30 epochs)", "_short"),
        ("3,000 updates (300 epochs)", ""),
    ):
        columns = [
            (label, values_of(results, name, arm + suffix, "errors"), color)
            for label, arm, color in arms
        ]
        if any(values for _, values, _ in columns):
            panels.append((title, columns))
    if not panels:
        return None
    figure, axes = grid(len(panels), width=5.2, height=3.8, columns=2, share_y=True)
    for axis, (title, columns) in zip(axes, panels, strict=True):
        paired(axis, columns)
        axis.set_title(title)
    left_labels(axes, "errors of 10,000 test images")
    return figure


def full_protocol(results: Results) -> Figure | None:
    """The full protocol beside the paper's numbers."""
    ours = [
        ("hard labels", "hard_labels", "hard_labels", "errors", HARD),
        ("soft targets, T = 20", "soft_t20", "soft_t20", "errors", SOFT),
        ("teacher", "teacher", "soft_t20", "teacher_errors", TEACHER),
    ]
    measured = [
        values_of(results, "mnist/full", arm, key) for _, _, arm, key, _ in ours
    ]
    if not any(measured):
        return None
    paper = results["anchors"]["full"]
    figure, (axis,) = grid(1, width=7.0, height=2.9)
    for row, ((_, key, _, _, color), values) in enumerate(
        zip(ours, measured, strict=True)
    ):
        bars = [(-0.19, v, color, "here") for v in list(values.values())[:1]]
        bars.append((0.19, paper[key], FAINT, "2015"))
        for offset, value, shade, who in bars:
            axis.barh(row + offset, value, height=0.34, color=shade)
            text = f"{value:.0f}  {who}"
            axis.text(value + 1.5, row + offset, text, va="center", fontsize=9)
    axis.set_yticks(range(len(ours)), [label for label, *_ in ours])
    axis.invert_yaxis()
    axis.set_xlabel("errors of 10,000 test images, one run each")
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.14)
    axis.set_title("All 60,000 images; light bars: Hinton, Vinyals and Dean 2015")
    return figure
