"""The figures of a report: one function each, all drawn with matplotlib's Agg backend.

Colours are Okabe and Ito's, which the colour-blind tell apart; an arm keeps its colour
in all figures of a report, baselines are grey and the teacher is black.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distilljax.evaluation.arms import Arm
from distilljax.evaluation.comparison import Comparison, Experiment
from distilljax.evaluation.formatting import (
    decimals_of,
    fixed,
    scaled,
    shorten,
    signed,
)
from distilljax.evaluation.plot_layout import (
    grid,
    label_ends,
    left_labels,
    wrap,
)
from distilljax.evaluation.plots_cost import axis_label, quality_and_cost, quality_axis
from distilljax.evaluation.plots_speed import throughput

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BASELINE_GREYS = ("#767676", "#A08C6C")
TEACHER = "#222222"
INK = "#333333"
FAINT = "#D9D9D9"
MAX_CLASSES = 20

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def arm_colors(experiments: Sequence[Experiment]) -> dict[str, str]:
    """One colour for each arm name of a report, whatever the experiment."""
    baselines = dict.fromkeys(c.baseline for e in experiments for c in e.comparisons)
    others = dict.fromkeys(
        arm.name for e in experiments for arm in e.arms if arm.name not in baselines
    )
    colors = {n: BASELINE_GREYS[i % 2] for i, n in enumerate(baselines)}
    colors |= {n: PALETTE[i % len(PALETTE)] for i, n in enumerate(others)}
    return colors | {"teacher": TEACHER}


def draw(
    experiment: Experiment, colors: Mapping[str, str]
) -> list[tuple[str, str, Figure]]:
    """All figures an experiment has data for: (key, caption, figure)."""
    figures = []
    label = experiment.quality[0].label
    name = label[:1].upper() + label[1:]
    curves = "Learning curves"
    if not experiment.single:
        curves += ": mean over seeds; the band is one standard deviation"
    if experiment.teacher is not None:
        curves += f"; the dashed line is the teacher on {experiment.split}"
    with mpl.rc_context(STYLE):
        for key, caption, make in (
            (
                "pairs",
                f"{name} of each seed, from the baseline to the arm; one line is one "
                "pair. The diamond is the mean.",
                paired_dots,
            ),
            (
                "curves",
                f"{curves}.",
                learning_curves,
            ),
            (
                "forgetting",
                "Examples gained and lost against the teacher, by class: mean over "
                "seeds.",
                forgetting,
            ),
            (
                "reliability",
                "Reliability: how often a prediction of some confidence is right. On "
                "the diagonal, confidence is honest; below it, too high. Larger dots "
                "hold more predictions, of all seeds.",
                reliability,
            ),
            (
                "cost",
                f"{name} against what a model costs: mean and standard deviation over "
                "seeds.",
                quality_and_cost,
            ),
            (
                "speed",
                "Throughput of the training, mean over seeds, and where the time of "
                "the host went: “step” is sending steps and waiting for the devices.",
                throughput,
            ),
        ):
            figure = make(experiment, colors)
            if figure is not None:
                figures.append((key, caption, figure))
    return figures


def save(figure: Figure, file: Any) -> None:
    """Write a PNG, of 1.6 pixels to a CSS pixel, without a date or version in it."""
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(file, format="png", dpi=160, metadata={"Software": None})


def paired_dots(experiment: Experiment, colors: Mapping[str, str]) -> Figure | None:
    """One panel for each comparison: a line for each seed, from baseline to arm."""
    comparisons = experiment.comparisons
    if not comparisons:
        return None
    arms = {arm.name: arm for arm in experiment.arms}
    figure, axes = grid(len(comparisons), width=2.6, height=3.4, share_y=True)
    for axis, c in zip(axes, comparisons, strict=False):
        before, after = (
            [
                scaled(c.metric, c.metric.read(run.student) or 0.0)
                for run in arms[n].runs
                if run.seed in c.seeds
            ]
            for n in (c.baseline, c.arm)
        )
        # Side by side, so that seeds with as many errors do not hide each other.
        shift = 0.035 * (np.arange(len(before)) - (len(before) - 1) / 2)
        for x, low, high in zip(shift, before, after, strict=True):
            axis.plot([x, 1 + x], [low, high], color=FAINT, lw=1.2, zorder=1)
        for x, values, name in ((0, before, c.baseline), (1, after, c.arm)):
            color = colors[name]
            dots = {"s": 30, "color": color, "zorder": 2, "lw": 0, "clip_on": False}
            axis.scatter(x + shift, values, **dots)
            mark = {"marker": "D", "s": 52, "zorder": 3, "edgecolor": "white"}
            mark |= {"clip_on": False}
            offset = -0.3 if x == 0 else 0.3
            axis.scatter([x + offset], [np.mean(values)], color=color, **mark)
        if (level := _teacher_level(experiment)) is not None:
            axis.axhline(level, color=TEACHER, lw=1, ls=(0, (4, 3)), zorder=0.9)
        axis.margins(y=0.12)
        axis.set_xlim(-0.6, 1.6)
        axis.set_xticks([0, 1], [wrap(c.baseline), wrap(c.arm)])
        axis.set_title(_difference_title(c), fontsize=9.5)
        axis.grid(axis="y", color="#EEEEEE", lw=0.8)
        axis.set_axisbelow(True)
    for axis in axes:
        quality_axis(axis, experiment)
        _teacher_label(axis, experiment)
    left_labels(axes, axis_label(experiment))
    return figure


def _difference_title(c: Comparison) -> str:
    """The verdict over the picture, so that nobody has to read it out of dots."""
    d, metric = c.headline, c.metric
    if d is None:
        return c.verdict
    decimals = 1 if metric.unit == "%" else decimals_of(metric, [d.mean], 1)
    unit = metric.unit.replace("%", "points")
    text = f"{signed(metric, d.mean, decimals)} {unit}".rstrip()
    if d.low is not None and d.high is not None:
        low, high = (signed(metric, end, decimals) for end in (d.low, d.high))
        text += f" [{low}, {high}]"
    return f"{text}\n{c.verdict}{', other data' * c.other_data}"


def _teacher_level(experiment: Experiment) -> float | None:
    teacher, metric = experiment.teacher, experiment.quality[0]
    level = None if teacher is None else teacher.metrics[metric.key]
    return None if level is None else scaled(metric, level.mean)


def _teacher_label(axis: Axes, experiment: Experiment) -> None:
    """The word on its line; below it where the title would be in the way."""
    level = _teacher_level(experiment)
    if level is None:
        return
    low, high = axis.get_ylim()
    above = high - level > 0.06 * (high - low)
    axis.annotate(
        "teacher",
        (0.5, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2 if above else -3),
        textcoords="offset points",
        fontsize=8.5,
        ha="center",
        va="bottom" if above else "top",
        color=TEACHER,
    )


def learning_curves(experiment: Experiment, colors: Mapping[str, str]) -> Figure | None:
    """What models are compared by, and a loss; training's where there is no other."""
    panels, headline = [], experiment.quality[0]
    first = headline.key if headline.key in ("nll", "accuracy") else "loss"
    others = ("kl_to_teacher", "kl", "nll", "loss")
    for names in ((first,), tuple(name for name in others if name != first)):
        found = [
            (split, name)
            for split in ("validation", "train")
            for name in names
            if any(_series(arm, split, name) is not None for arm in experiment.arms)
        ]
        panels += found[:1]
    if not panels:
        return None
    figure, axes = grid(len(panels), width=4.1, height=3.2, columns=2)
    for axis, (split, name) in zip(axes, panels, strict=False):
        scale = 100 if name == "accuracy" else 1
        ends = []
        for arm in experiment.arms:
            series = _series(arm, split, name)
            if series is None:
                continue
            steps, values = series[0], scale * series[1]
            mean, color = values.mean(axis=0), colors[arm.name]
            axis.plot(steps, mean, color=color, lw=1.8, clip_on=False)
            if len(values) > 1:
                sd = values.std(axis=0, ddof=1)
                band = {"color": color, "alpha": 0.18, "lw": 0}
                axis.fill_between(steps, mean - sd, mean + sd, **band)
            ends.append((float(mean[-1]), arm.name, color))
        unit = {"accuracy": ", %", "loss": ""}.get(name, ", nats")
        label = name.replace("kl_to_teacher", "KL to teacher").replace("kl", "KL")
        if name == headline.key:
            if (level := _teacher_level(experiment)) is not None:
                axis.axhline(level, color=TEACHER, lw=1, ls=(0, (4, 3)), zorder=0.9)
                ends.append((level, f"teacher, {experiment.split}", TEACHER))
            quality_axis(axis, experiment)
        axis.set_title(f"{split} {label}{unit}")
        axis.set_xlabel("step")
        axis.grid(axis="y", color="#EEEEEE", lw=0.8)
        axis.set_axisbelow(True)
        label_ends(axis, ends)
    return figure


def _series(arm: Arm, split: str, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps that all seeds logged, and the values, seeds by steps."""
    logs = []
    for run in arm.runs:
        log = {
            entry["step"]: float(entry[name])
            for entry in run.curves
            if entry.get("split", "train") == split
            and isinstance(entry.get(name), (int, float))
        }
        logs.append(log)
    steps = sorted(set.intersection(*(set(log) for log in logs)))
    if len(steps) < 2:
        return None
    values = np.array([[log[step] for step in steps] for log in logs])
    return np.array(steps), values


def reliability(experiment: Experiment, colors: Mapping[str, str]) -> Figure | None:
    """Small multiples: confidence against accuracy, one panel for each model."""
    models = [] if experiment.teacher is None else [experiment.teacher]
    models = [arm for arm in (*models, *experiment.arms) if arm.reliability]
    if not models:
        return None
    figure, axes = grid(len(models), width=2.0, height=2.45, columns=4, share_y=True)
    for axis, arm in zip(axes, models, strict=False):
        bins = arm.reliability
        assert bins is not None
        used = [i for i, n in enumerate(bins["count"]) if n]
        x = [bins["confidence"][i] for i in used]
        y = [bins["accuracy"][i] for i in used]
        share = np.array([bins["count"][i] for i in used]) / sum(bins["count"])
        color = colors[arm.name]
        axis.plot([0, 1], [0, 1], color="#AAAAAA", lw=1, zorder=0)
        axis.vlines(x, x, y, color=color, alpha=0.35, lw=1.5, zorder=1)
        sizes = 8 + 130 * np.sqrt(share)
        axis.scatter(x, y, s=sizes, color=color, lw=0, zorder=2, clip_on=False)
        ece = arm.metrics["ece"]
        error = "" if ece is None else f"\nECE {100 * ece.mean:.1f} %"
        axis.set_title(f"{shorten(arm.name, 22)}{error}", fontsize=9)
        axis.set(xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal")
        axis.set_xticks([0, 0.5, 1], ["0", "50", "100"])
        axis.set_yticks([0, 0.5, 1], ["0", "50", "100"])
        axis.set_xlabel("confidence, %")
    left_labels(axes, "right, %")
    return figure


def forgetting(experiment: Experiment, colors: Mapping[str, str]) -> Figure | None:
    """Diverging bars by class: gained to the right, lost to the left."""
    arms = [arm for arm in experiment.arms if arm.per_class["gained"] is not None]
    if not arms:
        return None
    changes = {
        arm.name: (np.array(arm.per_class["gained"]), np.array(arm.per_class["lost"]))
        for arm in arms
    }
    total = sum(gained + lost for gained, lost in changes.values())
    labels = np.argsort(-total, kind="stable")[:MAX_CLASSES]
    labels = sorted({*labels.tolist(), *experiment.focus_classes})
    height = 1.0 + 0.24 * len(labels)
    figure, axes = grid(len(arms), width=2.6, height=height, columns=3, share_y=True)
    limit = max(max(g.max(), x.max()) for g, x in changes.values()) * 1.4 or 1.0
    rows = range(len(labels))
    decimals = 0 if np.all(total == np.round(total)) and len(arms[0].runs) == 1 else 1
    for axis, (name, (gained, lost)) in zip(axes, changes.items(), strict=False):
        axis.barh(rows, gained[labels], color="#0072B2", height=0.72)
        axis.barh(rows, -lost[labels], color="#D55E00", height=0.72)
        for row, label in zip(rows, labels, strict=True):
            if label in experiment.focus_classes:
                axis.axhspan(row - 0.5, row + 0.5, color="#FFF3C4", zorder=0)
            for value, sign, side in (
                (gained[label], 1, "left"),
                (lost[label], -1, "right"),
            ):
                if value > 0:
                    text = f"{value:.{decimals}f}"
                    place = sign * (value + 0.015 * limit)
                    axis.text(place, row, text, fontsize=7.5, va="center", ha=side)
        axis.axvline(0, color="#888888", lw=0.8)
        won, gone, net = gained.sum(), lost.sum(), gained.sum() - lost.sum()
        title = f"+{fixed(won, decimals)} −{fixed(gone, decimals)}"
        title += f" (net {fixed(net, decimals, sign=True)})"
        axis.set_title(f"{shorten(name, 28)}\n{title}", fontsize=9)
        axis.set(xlim=(-limit, limit), ylim=(len(labels) - 0.5, -0.5))
        axis.set_yticks(rows, [experiment.class_names[label] for label in labels])
        axis.set_xticks([])
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("← lost      gained →", fontsize=9)
        for tick, label in zip(axis.get_yticklabels(), labels, strict=False):
            focus = label in experiment.focus_classes
            tick.set_fontweight("bold" if focus else "normal")
    left_labels(axes, "class")
    return figure
