"""A config's teacher on devices of its own, or with a sharding of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distilljax.config import load_experiment
from distilljax.programs import Programs
from distilljax.teachers import Placed
from distilljax.train import train
from tests.saved import losses

TINY = Path(__file__).parents[1] / "cli" / "tiny.py"


@pytest.fixture
def tiny():
    found = load_experiment(TINY).config(0)
    return replace(
        found,
        steps=6,
        eval_every_steps=3,
        student=replace(found.student, dropout=0.0),
    )


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    found = load_experiment(TINY).config(0)
    config = replace(
        found,
        steps=6,
        eval_every_steps=3,
        student=replace(found.student, dropout=0.0),
    )
    workdir = tmp_path_factory.mktemp("inline")
    return workdir, train(config, workdir)


@pytest.mark.parametrize(
    "fields",
    [
        {"mesh": "tensor=4"},
        {"mesh": "data=2,tensor=2", "devices": "4:8", "depth": 3},
        {"mesh": "tensor=8", "devices": "all"},
        {"mesh": "tensor=8", "in_step": True},
        {"mesh": "data=2", "devices": "2:3,5:6"},
    ],
    ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items()),
)
def test_a_placed_teacher_teaches_the_same(tmp_path, tiny, inline, fields):
    teacher = Placed(tiny.teacher, **fields)
    batch = 48 if "2:3" in str(fields) else 16
    config = replace(tiny, teacher=teacher)
    if batch == 48:
        config = replace(
            config, loader=replace(tiny.loader, batch_size=12), eval_batch_size=12
        )
    results = train(config, tmp_path, programs=Programs())
    if batch == 16:
        for step, loss in losses(inline[0]).items():
            assert losses(tmp_path)[step] == pytest.approx(loss, rel=1e-5)
        for who in ("student", "teacher"):
            assert results[who]["nll"] == pytest.approx(inline[1][who]["nll"], rel=1e-5)
        assert results["teacher_fingerprint"] == inline[1]["teacher_fingerprint"]
