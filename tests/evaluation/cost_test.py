"""What a model costs: counts that are exact, and ratios that a busy machine keeps."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from distilljax.evaluation import cost
from distilljax.evaluation.arms import make_arm, speed_ratio
from distilljax.evaluation.cost import Model, costs
from distilljax.evaluation.runs import find_runs


def _linear(width: int) -> Model:
    state = {"kernel": jnp.ones((8, width)), "seen": jnp.zeros((), jnp.int32)}
    params = {"kernel": state["kernel"]}
    return Model(lambda state, x: x @ state["kernel"], state, params)


def test_sizes_and_keys():
    traces = []

    def forward(state, x):
        traces.append(x.shape)
        return x @ state["kernel"]

    student = Model(forward, _linear(4).state, _linear(4).params)
    found = costs({"student": student, "teacher": _linear(64)}, np.ones((1, 8)))
    assert traces == [(1, 8), (256, 8)]  # each compiled once
    assert found["student"]["parameters"] == 32
    assert found["student"]["bytes"] == 4 * 32 + 4
    assert found["student"]["flops_per_example"] == pytest.approx(2 * 32, abs=8)
    for model in found.values():
        assert 0 < model["latency_ms"]["median"] <= model["latency_ms"]["p90"]
        assert model["throughput"]["examples_per_second"] > 0
    for key in ("latency_ms", "throughput"):
        assert found["teacher"][key]["to_teacher"] is None
        ratio = found["student"][key]["to_teacher"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


def test_without_a_teacher_there_is_no_ratio():
    found = costs({"student": _linear(4)}, np.ones((1, 8)))
    assert found["student"]["latency_ms"]["to_teacher"] is None


class _Timed:
    """A compiled model on a machine that is busier every ten calls."""

    def __init__(self, seconds: float, clock: list[float], calls: list[int]):
        self.seconds, self.clock, self.calls = seconds, clock, calls

    def __call__(self, state, inputs):
        self.clock[0] += self.seconds * (1 + self.calls[0] // 10)
        self.calls[0] += 1

    def cost_analysis(self):
        return {}


def test_the_ratio_is_within_rounds(monkeypatch):
    """Timed one after the other, a student four times faster would seem slower."""
    clock, calls = [0.0], [0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cost, "_compile", lambda model, inputs: model.forward)
    found = costs(
        {
            "teacher": Model(_Timed(4.0, clock, calls), {}, {}),
            "student": Model(_Timed(1.0, clock, calls), {}, {}),
        },
        np.ones((1, 8)),
    )
    for key, ratio in (("latency_ms", 0.25), ("throughput", 4.0)):
        same = {"low": ratio, "median": ratio, "high": ratio}
        assert found["student"][key]["to_teacher"] == pytest.approx(same)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([(0.4, 0.5, 0.6), (0.5, 0.7, 0.9)], 0.6),
        ([(1.1, 1.5, 2.0)], 1.5),
        ([(0.4, 0.5, 1.1)], None),  # below the resolution
        ([(0.4, 0.5, 0.6), (1.2, 1.3, 1.4)], None),  # the runs disagree
        ([(0.4, 0.5, 0.6), None], None),  # timed alone
        ([None], None),
    ],
)
def test_a_ratio_below_the_resolution_is_left_out(
    write_run, tmp_path, ratios, expected
):
    for seed in range(len(ratios)):
        write_run(seed=seed)
    runs = find_runs([tmp_path])[0]
    for run, ratio in zip(runs, ratios, strict=True):
        if ratio is not None:
            ratio = dict(zip(("low", "median", "high"), ratio, strict=True))
        run.student["latency_ms"]["to_teacher"] = ratio
    found = speed_ratio(make_arm("student", runs, []), "latency_ms")
    assert found == (None if expected is None else pytest.approx(expected))
