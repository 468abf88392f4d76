"""Throughput, shares of the time and goodput, read back from what is drawn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from distilljax.evaluation import plots
from distilljax.evaluation.comparison import compare
from distilljax.evaluation.plots_speed import goodput_of, rates_of, shares_of
from distilljax.evaluation.runs import find_runs

# Two windows: 10 s of which 4 compile, and 30 s of which 3 wait for data.
FIRST = {"share_startup": 0.4, "share_step": 0.6, "goodput": 0.5}
SECOND = {"share_data": 0.1, "share_step": 0.9, "goodput": 0.8}


def log(path: Path, rate: float) -> None:
    """Put into a run's log what runs say of their speed."""
    lines = [
        {"step": 10, "seconds": 10.0, "examples_per_second": 1.0, **FIRST},
        {"step": 20, "seconds": 40.0, "examples_per_second": rate, **SECOND},
        {"step": 30, "seconds": 70.0, "examples_per_second": rate + 2, **SECOND},
    ]
    for file in path.rglob("metrics.jsonl"):
        text = "".join(
            json.dumps({"split": "train", "loss": 1.0, **line}) + "\n" for line in lines
        )
        file.write_text(text)


@pytest.fixture
def experiment(write_run, tmp_path):
    for seed in range(2):
        write_run(arm="hard labels", errors=105, baseline=None, seed=seed)
        write_run(errors=91, seed=seed)
    for number, folder in enumerate(sorted((tmp_path / "runs").rglob("results.json"))):
        log(folder.parent, 10.0 * number)
    return compare(find_runs([tmp_path])[0])[0]


def test_what_is_read_of_the_logs(experiment):
    for arm in experiment.arms:
        unit, steps, values = rates_of(arm)
        assert (unit, steps) == ("examples", [20, 30])  # not of the first, it compiles
        assert [b - a for a, b in values] == [2.0, 2.0]
        assert shares_of(arm) == pytest.approx(
            {
                "startup": 4 / 70,
                "data": 6 / 70,
                "step": 60 / 70,
                "teacher": 0,
                "evaluation": 0,
                "checkpoint": 0,
            }
        )
        assert goodput_of(arm) == pytest.approx(0.8)


def test_what_is_drawn(experiment):
    drawn = plots.draw(experiment, plots.arm_colors([experiment]))
    figure = {key: figure for key, _, figure in drawn}["speed"]
    rates, shares = figure.axes
    assert rates.get_title(loc="left") == "examples per second"
    for arm, line in zip(experiment.arms, rates.lines, strict=True):
        np.testing.assert_allclose(line.get_ydata(), np.mean(rates_of(arm)[2], axis=0))
    widths = [bar.get_width() for bar in shares.patches]
    assert sum(widths) == pytest.approx(100 * len(experiment.arms))
    assert max(widths) == pytest.approx(100 * 60 / 70)
    labels = [label.get_text() for label in shares.get_yticklabels()]
    assert all(label.endswith("goodput 80 %") for label in labels)
    buffer = io.BytesIO()
    plots.save(figure, buffer)
    assert len(buffer.getvalue()) > 5000


def test_runs_that_say_nothing_of_it_have_no_such_figure(write_run, tmp_path):
    write_run(arm="hard labels", errors=105, baseline=None)
    write_run(errors=91)
    experiment = compare(find_runs([tmp_path])[0])[0]
    drawn = plots.draw(experiment, plots.arm_colors([experiment]))
    assert "speed" not in [key for key, _, _ in drawn]
