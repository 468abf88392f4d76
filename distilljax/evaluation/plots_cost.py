"""Quality against cost, and the axis on which quality stands in every figure."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distilljax.evaluation.arms import speed_ratio
from distilljax.evaluation.comparison import Experiment
from distilljax.evaluation.formatting import scaled
from distilljax.evaluation.plot_layout import (
    grid,
    label_points,
    left_labels,
    log_axis,
    percent_axis,
    widen_log,
)


def axis_label(experiment: Experiment) -> str:
    """What models are compared by, and its unit."""
    metric = experiment.quality[0]
    return f"{metric.label}, {metric.unit}" if metric.unit else metric.label


def quality_axis(axis: Axes, experiment: Experiment) -> None:
    """Ticks in percent, for a share."""
    if experiment.quality[0].unit == "%":
        percent_axis(axis)


def quality_and_cost(
    experiment: Experiment, colors: Mapping[str, str]
) -> Figure | None:
    """Quality over parameters and over latency, both logarithmic; one model has none.

    A single dot is no comparison, and latencies that were not timed in turn, or whose
    rounds do not agree, are none either.
    """
    metric = experiment.quality[0]
    models = [] if experiment.teacher is None else [experiment.teacher]
    models += experiment.arms
    parameters = [arm.metrics["parameters"] for arm in models]
    latencies = [
        1.0 if arm is experiment.teacher else speed_ratio(arm, "latency_ms")
        for arm in models
    ]
    panels = []
    if any(parameters):
        sizes = [None if size is None else size.mean for size in parameters]
        panels.append(("parameters", sizes))
    if experiment.teacher is not None and None not in latencies:
        panels.append(("latency at batch 1, against the teacher's", latencies))
    if not panels or len(models) < 2:
        return None
    figure, axes = grid(len(panels), width=4.1, height=3.0, columns=2, share_y=True)
    drawn = []
    for axis, (label, costs) in zip(axes, panels, strict=False):
        points = []
        for arm, x in zip(models, costs, strict=True):
            found = arm.metrics[metric.key]
            if found is None or not x:
                continue
            y, color = scaled(metric, found.mean), colors[arm.name]
            axis.plot(x, y, "o", ms=4.5, color=color, clip_on=False)
            if found.sd is not None:
                bar = {"fmt": "none", "elinewidth": 1.2, "capsize": 3}
                bar["yerr"] = scaled(metric, found.sd)
                axis.errorbar(x, y, ecolor=color, **bar)
            points.append((x, y, arm.name, color))
        log_axis(axis)
        axis.margins(x=0.12, y=0.12)
        axis.set_xlabel(label)
        axis.grid(color="#EEEEEE", lw=0.8)
        axis.set_axisbelow(True)
        if points:
            widen_log(axis, [x for x, *_ in points])
        drawn.append(points)
    # Names are placed by the limits, which the panels share.
    for axis, points in zip(axes, drawn, strict=False):
        quality_axis(axis, experiment)
        label_points(axis, points)
    left_labels(axes, axis_label(experiment))
    return figure
