"""Numbers and schedules. What is protected: a schedule that breaks a rule of its field
is found before a run, wherever in the objective it is; rounding at its end is no fault.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import optax
import pytest

from distilljax import losses
from distilljax._schedules import check_schedules
from distilljax.objectives import (
    TAID,
    ContrastiveKD,
    CrossEntropy,
    FeatureKD,
    HardDistillation,
    LogitKD,
    MultiTeacher,
    RelationKD,
    SelfDistillation,
    Sum,
)
from distilljax.optimizers import Linear, WarmupCosine

DOWN = Linear(4.0, 0.0, num_steps=10)
CROWD = ContrastiveKD("h", "h", 2, 2, temperature=DOWN)


def late(step):
    """A fault of a few steps, deep in a run."""
    return jnp.where(abs(step - 600) < 10, jnp.nan, 1.0)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (LogitKD(temperature=DOWN), "LogitKD: temperature at step 10 must be positive"),
        (
            LogitKD(temperature=optax.linear_schedule(4.0, -1.0, 500)),
            r"temperature at step 4\d\d must be positive and finite, got -0\.0",
        ),
        (
            LogitKD(ce_weight=late),
            r"ce_weight at step (59|60)\d must be finite",
        ),
        (
            TAID(interpolation=Linear(0.0, 2.0, num_steps=1000)),
            r"TAID: interpolation at step 50\d must lie in \[0, 1\], got 1\.0",
        ),
        (TAID(num_steps=9, temperature=DOWN), "TAID: temperature at step 10"),
        (CROWD, "ContrastiveKD: temperature at step 10"),
        (
            HardDistillation(kd_weight=lambda step: -step),
            "kd_weight at step 1 must lie",
        ),
        (FeatureKD({"h": "h"}, weight=late), "FeatureKD: weight at step"),
        (
            RelationKD({"h": "h"}, losses.dist, weight=late),
            "RelationKD: weight at",
        ),
        (Sum({"a": CrossEntropy()}, {"a": late}), r"Sum: weights\['a'\] at step"),
        (
            Sum({"a": MultiTeacher(LogitKD(temperature=DOWN))}),
            "LogitKD: temperature at",
        ),
        (SelfDistillation(LogitKD(temperature=DOWN)), "LogitKD: temperature at"),
        (LogitKD(kd_weight=lambda step: jnp.ones(2)), "at step 0 must be a scalar"),
    ],
)
def test_a_schedule_keeps_to_the_rule_of_its_field(objective, message):
    with pytest.raises(ValueError, match=message):
        check_schedules(objective, 1000)


def test_schedules_that_keep_to_them_pass():
    def cosine(step):  # ends at 0 but for rounding, from below
        return 0.5 * (1 + jnp.cos(math.pi * step / 1000)) - 1e-8

    good = Sum(
        {
            "soft": LogitKD(temperature=Linear(4.0, 1.0, 1000), kd_weight=cosine),
            "taid": TAID(interpolation=Linear(0.4, 1.0, num_steps=1000)),
            "own": lambda student, teacher, batch: {},
        },
        {"soft": WarmupCosine(1.0, 1000, 10), "taid": lambda step: 2.0},
    )
    for num_steps in (1, 1000, 10**6):
        check_schedules(good, num_steps)
    check_schedules(LogitKD(temperature=DOWN), 9)  # it never gets to 0


def test_objectives_of_ones_own_are_looked_into():
    @dataclass(frozen=True)
    class Halved:
        inner: LogitKD

    with pytest.raises(ValueError, match="LogitKD: temperature at step 10"):
        check_schedules(Halved(LogitKD(temperature=DOWN)), 10)
