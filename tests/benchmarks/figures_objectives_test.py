"""The figure of the objectives: what its page says about goals and gradients."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
figures = importlib.import_module("figures_objectives")
STEPS = 20


@pytest.fixture(scope="module")
def teacher():
    return figures.trained_teacher()


@pytest.fixture(scope="module")
def drawn(teacher):
    whole = figures.objective(STEPS)
    return *figures.taid(teacher, STEPS), figures.by_part(whole, teacher, STEPS)


def test_a_larger_rate_brings_the_share_forward(drawn):
    line, faster, schedule = drawn[0].values()
    for share in (line, faster, schedule):
        assert share[0] == pytest.approx(0.4, abs=1e-6)
        assert np.all(np.diff(share) >= 0)
    assert np.all(faster >= line)
    assert np.all(schedule[STEPS // 2 :] == 1)


def test_the_goal_is_nearer_than_the_teacher(drawn):
    plain, final, goal = drawn[1].values()
    assert plain[0] == pytest.approx(final[0], rel=1e-5)  # students start alike
    assert np.all(goal < final)


def test_the_hint_leads_until_its_schedule_ends_it(drawn):
    parts = drawn[2]
    assert parts["hint"][0] > parts["logits"][0]
    assert parts["hint"][-1] < 1e-5 < parts["logits"][-1]


def test_the_gradient_of_a_part_is_the_one_that_a_step_logs(teacher, drawn):
    """Of the labels alone, which have no parameters of their own."""
    student = figures.Net(16, 2, 2)
    run = figures.states(figures.CrossEntropy(), teacher, student, 1)
    *_, (_, logged) = run
    norm = float(logged["grad_norm"].value)
    assert drawn[2]["labels"][0] == pytest.approx(norm, rel=1e-4)


def test_three_panels_are_drawn(drawn):
    figure = figures.draw(*drawn)
    figure.canvas.draw()
    assert len(figure.axes) == 3
