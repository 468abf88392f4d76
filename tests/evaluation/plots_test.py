"""What the figures show, read back from matplotlib; labels that do not collide."""

from __future__ import annotations

import io

import numpy as np
import pytest

from distilljax.evaluation import plots
from distilljax.evaluation.comparison import compare
from distilljax.evaluation.plot_layout import apart, tick
from distilljax.evaluation.runs import find_runs


@pytest.fixture
def experiment(write_run, tmp_path):
    for seed, (hard, soft) in enumerate([(105, 91), (107, 92), (102, 89)]):
        focus = {"focus_classes": [3], "seed": seed}
        write_run(arm="hard labels", errors=hard, baseline=None, blind=3, **focus)
        write_run(errors=soft, **focus)
    return compare(find_runs([tmp_path])[0])[0]


def _figures(experiment):
    drawn = plots.draw(experiment, plots.arm_colors([experiment]))
    return {key: figure for key, _, figure in drawn}


def test_all_five_are_drawn_and_are_pngs(experiment):
    drawn = plots.draw(experiment, plots.arm_colors([experiment]))
    keys = [key for key, _, _ in drawn]
    assert keys == ["pairs", "curves", "forgetting", "reliability", "cost"]
    for _, _, figure in drawn:
        buffer = io.BytesIO()
        plots.save(figure, buffer)
        assert buffer.getvalue().startswith(b"\x89PNG")
        assert len(buffer.getvalue()) > 5000


def test_paired_dots_join_the_right_seeds(experiment):
    (axis,) = _figures(experiment)["pairs"].axes
    arms = {arm.name: arm for arm in experiment.arms}
    expected = [
        [100 * run.student["accuracy"] for run in arms[name].runs]
        for name in ("hard labels", "soft targets")
    ]
    lines = [line.get_ydata() for line in axis.lines if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(np.array(lines[:3]).T, expected)
    assert "helped" in axis.get_title(loc="left")


def test_no_gridline_is_painted_over_the_teacher(experiment):
    figures = _figures(experiment)
    for axis in (figures["pairs"].axes[0], figures["curves"].axes[0]):
        (teacher,) = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert axis.yaxis.get_zorder() < teacher.get_zorder()  # its grid is drawn there


def test_forgetting_bars_are_the_counts(experiment):
    figure = _figures(experiment)["forgetting"]
    for axis, arm in zip(figure.axes, experiment.arms, strict=True):
        gained, lost = arm.per_class["gained"], arm.per_class["lost"]
        assert gained is not None
        assert lost is not None
        widths = [bar.get_width() for bar in axis.patches][:20]
        np.testing.assert_allclose(widths[:10], gained)
        np.testing.assert_allclose(widths[10:], np.negative(lost))
        assert f"+{sum(gained):.1f} −{sum(lost):.1f}" in axis.get_title(loc="left")


def test_learning_curves_are_means_over_seeds(experiment):
    accuracy = _figures(experiment)["curves"].axes[0]
    *curves, teacher = accuracy.lines
    np.testing.assert_allclose(teacher.get_ydata(), 97.0)
    assert "teacher, test" in [text.get_text() for text in accuracy.texts]
    for line, arm in zip(curves, experiment.arms, strict=True):
        values = [
            [100 * e["accuracy"] for e in run.curves if e["split"] == "validation"]
            for run in arm.runs
        ]
        np.testing.assert_allclose(line.get_ydata(), np.mean(values, axis=0))
    assert len(accuracy.collections) == 2  # one band for each arm


def test_figures_without_data_are_left_out(write_run, tmp_path):
    write_run(teacher_errors=None, with_files=False)
    (alone,) = compare(find_runs([tmp_path])[0])
    assert list(_figures(alone)) == ["reliability"]


def test_axes_of_accuracy_end_at_100_percent(write_run, tmp_path):
    for seed, (hard, soft) in enumerate([(2, 0), (3, 1), (1, 0)]):
        common = {"seed": seed, "teacher_errors": 0}
        write_run(arm="hard labels", errors=hard, baseline=None, **common)
        write_run(errors=soft, **common)
    (good,) = compare(find_runs([tmp_path])[0])
    figures = _figures(good)
    axes = [*figures["pairs"].axes, figures["curves"].axes[0], *figures["cost"].axes]
    assert len(axes) == 4
    for axis in axes:
        low, high = axis.get_ylim()
        assert low < 99.25  # the least accuracy of all; nothing is cut at that end
        assert high == 100
    # The dots at 100 % are whole, and the teacher's name is under its line.
    assert not any(dots.get_clip_on() for dots in axes[0].collections)
    (name,) = [text for text in axes[0].texts if text.get_text() == "teacher"]
    assert name.get_verticalalignment() == "top"


def test_an_arm_keeps_its_colour(experiment, write_run, tmp_path):
    write_run(name="another", arm="soft targets", root=tmp_path / "other")
    write_run(name="another", arm="a first arm", root=tmp_path / "other")
    other = compare(find_runs([tmp_path / "other"])[0])[0]
    colors = plots.arm_colors([experiment, other])
    assert colors["hard labels"] == plots.BASELINE_GREYS[0]
    assert colors["soft targets"] == plots.PALETTE[0]
    assert colors["a first arm"] == plots.PALETTE[1]


def test_labels_are_pushed_apart_in_their_order():
    heights = [0.5, 0.5, 0.51, 0.9]
    placed = apart(heights, 0.07)
    assert np.all(np.diff(placed) > 0.07 - 1e-6)
    assert placed[3] == 0.9
    assert np.mean(placed[:3]) == pytest.approx(np.mean(heights[:3]), abs=1e-6)


def test_ticks():
    assert [tick(x) for x in (0.02, 5, 2000, 1.5e6)] == ["0.02", "5", "2 k", "1.5 M"]
