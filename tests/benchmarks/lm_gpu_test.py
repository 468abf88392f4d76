"""The language models of real sizes are built and traced without a byte of theirs."""

from __future__ import annotations

import argparse
import importlib
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
lm_gpu = importlib.import_module("lm_gpu")
steps = importlib.import_module("lm_gpu_steps")
PAIRS = steps.PAIRS


@pytest.mark.parametrize("name", PAIRS)
def test_the_sizes_are_those_that_are_named(name):
    pair = PAIRS[name]
    student, teacher = steps.sizes(pair)
    assert 0.4e9 < student < 1.0e9
    assert 1.0e9 < teacher < 8.0e9
    assert pair.student.vocab_size == pair.teacher.vocab_size >= 128_000
    for config in (pair.student, pair.teacher):
        leaves = jax.tree.leaves(steps.params_of(steps.abstract(config)))
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
        assert {str(x.dtype) for x in leaves} == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_both_steps_are_traced_by_shapes_alone(name):
    pair = PAIRS[name]
    found = {step: steps.traced(step, pair) for step in steps.STEPS}
    student, teacher = steps.sizes(pair)
    for case in found.values():
        assert case["loss"] == "float32"
        assert case["teacher_bytes"] == 2 * teacher
        # parameters and two moments, and some counters
        assert case["state_bytes"] == pytest.approx(3 * 2 * student, abs=64)


def test_mfu_counts_the_student_thrice_and_logits_once():
    pair = steps.SMALL
    tokens = pair.batch * pair.time
    student, teacher = steps.sizes(pair)
    unread = pair.teacher.vocab_size * pair.teacher.width  # its embedding is looked up
    least = tokens * (2 * (teacher - unread) + 6 * student)
    assert least < steps.model_flops(pair) < 1.3 * least


def test_both_steps_compute_the_same_in_bfloat16():
    runs = {name: steps.ready_step(name, steps.SMALL) for name in steps.STEPS}
    assert runs["ours"][1]["parameters"] == runs["plain"][1]["parameters"]
    losses = {name: [run() for _ in range(3)] for name, (run, _) in runs.items()}
    np.testing.assert_allclose(losses["ours"], losses["plain"], rtol=5e-3)
    assert losses["ours"][2] < losses["ours"][0]


def test_values_are_those_of_their_name():
    """As another package computes them, and other ones for another name."""
    shape = (2, steps.PERIOD)
    rng = np.random.default_rng(zlib.crc32(b"student/x"))
    some = np.float32(0.02) * rng.standard_normal(steps.PERIOD, np.float32)
    found = steps.values("student/x", shape)
    np.testing.assert_array_equal(found, np.stack([some, some]))
    assert not np.array_equal(found, steps.values("teacher/x", shape))
    np.testing.assert_array_equal(steps.values("x", (3,)), np.ones(3))


@pytest.mark.slow
def test_a_small_pair_is_run_by_processes():
    found = lm_gpu.compare("small", argparse.Namespace(rounds=1, peers=None))
    assert found["variants"].keys() == steps.STEPS.keys()
    for case in found["variants"].values():
        assert case["peak_bytes"] > 0
        assert case["mfu"] is None  # a CPU is in no table
        assert case["tokens_per_second"] > 0


def test_a_variant_that_does_not_run_is_an_answer():
    assert "does not run" in lm_gpu.measured([sys.executable, "-c", ""], 1)["error"]
    case = {"parameters": [1, 2]}
    pair = {"a": case | {"first_loss": 1.0}, "b": case | {"first_loss": 1.1}}
    with pytest.raises(ValueError, match="first losses differ"):
        lm_gpu.check_equal("x", pair, [1, 2])
