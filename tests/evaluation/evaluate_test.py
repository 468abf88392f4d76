"""The evaluator: sums over batches that lose nothing, and heads measured in chunks."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from distilljax.evaluation.evaluate import Evaluator, _measure_all
from distilljax.losses import LinearHead
from distilljax.sharding import mesh_from_string


class _Scaled(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, inputs):
        return inputs * self.scale[...]


def test_batches_are_added_in_float64():
    """After an NLL of 2^24, float32 would not count any NLL of 1."""
    one = float(np.log(np.e - 1))  # log(1 + e^one) = 1
    rows = [[0.0, 2.0**24], *[[0.0, one]] * 5]
    batches = [
        {
            "inputs": jnp.array([row], jnp.float32),
            "labels": jnp.array([0]),
            "loss_mask": jnp.array([True]),
        }
        for row in rows
    ]
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    student = _Scaled()
    _, params, rest = nnx.split(student, nnx.Param, ...)
    found = Evaluator(student, None, mesh=mesh)(params, rest, None, batches)
    assert found.student["nll"] * 6 == pytest.approx(2**24 + 5, abs=1e-2)
    assert found.student["num_examples"] == 6


@pytest.mark.parametrize("axes", [None, "data=2,fsdp=2,tensor=2", "data=8"])
def test_a_head_is_measured_in_chunks(monkeypatch, axes):
    """Chunks of 3 for 10 positions: what fills up the last one counts nowhere."""
    monkeypatch.setattr("distilljax.losses._heads.default_chunk", lambda *_: 3)
    rng = np.random.default_rng(0)
    shapes = ((10, 4), (4, 6), (10, 5), (5, 6))
    h, k, teacher_h, teacher_k = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes
    )
    student, teacher = LinearHead(h, k), LinearHead(teacher_h, teacher_k)
    labels = jnp.asarray(rng.integers(0, 6, 10))
    where = jnp.arange(10) < 8
    on_mesh = jax.set_mesh(mesh_from_string(axes)) if axes else contextlib.nullcontext()
    with on_mesh:
        found = jax.jit(_measure_all)(student, teacher, labels, where)
    whole = (student.logits(), teacher.logits())
    expected = jax.jit(_measure_all)(*whole, labels, where)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected
    )
