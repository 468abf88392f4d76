"""Objectives on eight devices are those on one. What is protected:

projections, learned variances and averages are trained to the same numbers wherever
they lie, with microbatches too; they and their moments lie where the rules say; a queue
holds the same rows in the same order, and TAID goes the same way; relations are those
of the whole batch, and not of a shard; there is one compilation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax import losses
from distilljax.objectives import (
    TAID,
    ContrastiveKD,
    CrossEntropy,
    FeatureKD,
    LogitKD,
    SelfDistillation,
    Sum,
)
from distilljax.sharding import Rule
from distilljax.students import Projection
from tests.meshes import assert_close, assert_placed, pieces, sharded


class Net(nnx.Module):
    """A hidden layer and a head."""

    def __init__(self, width, seed):
        rngs = nnx.Rngs(seed)
        self.inner = nnx.Linear(8, width, rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.inner(x)))


STUDENT, TEACHER = Net(16, 0), Net(32, 1)
BATCH = {
    "inputs": jax.random.normal(jax.random.key(0), (16, 8)),
    "labels": jnp.arange(16) % 4,
    "loss_mask": jnp.arange(16) % 5 != 1,  # uneven over any split
}

LABELS = CrossEntropy()
# What has no more to do with the batch than the mean over its examples.
BY_EXAMPLE = Sum(
    {
        "labels": LABELS,
        "hint": FeatureKD({"inner": "inner"}, projection=Projection(16, 32)),
        "noisy": FeatureKD(
            {"inner": "inner"},
            loss=losses.variational_information,
            projection=Projection(16, 32),
            variance=2.0,
        ),
        "taid": TAID(num_steps=4, rate=0.5),
        "average": SelfDistillation(LogitKD(temperature=2.0)),
    }
)
CROWD = Sum(
    {
        "labels": LABELS,
        "crowd": ContrastiveKD("inner", "inner", 16, 32, width=8, queue_size=32),
    }
)

MESHES = {
    "data=8": (),
    "data=2,fsdp=4": (),
    "data=2,fsdp=2,tensor=2": (
        Rule("inner/kernel", (None, "tensor")),
        Rule("projection/kernel", ("fsdp", "tensor")),
        Rule("raw_scale", ("tensor",)),
        Rule("queue/features", ("fsdp", None)),
    ),
}
# What one device has of a projection's kernel, [16, 32], and of the variances, [32].
KERNEL_PIECES = dict(zip(MESHES, [(16, 32), (16, 8), (8, 16)], strict=True))
SCALE_PIECES = dict(zip(MESHES, [(32,), (8,), (16,)], strict=True))


def on(mesh, objective, **kwargs):
    return sharded(mesh, objective, TEACHER, STUDENT, BATCH, MESHES[mesh], **kwargs)


@functools.cache
def on_one_device(objective_name):
    objective = {"by example": BY_EXAMPLE, "crowd": CROWD}[objective_name]
    args = ("data=1", objective, TEACHER, STUDENT, BATCH)
    return sharded(*args, devices=1, ema_decay=0.8)[:2]


def assert_same(found, expected):
    """State, optimizer and average included, and metrics."""
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        ("data=8", 2),
        ("data=2,fsdp=4", 2),
        ("data=2,fsdp=2,tensor=2", 1),
        ("data=2,fsdp=2,tensor=2", 2),
    ],
)
def test_what_is_learned_by_example(mesh, accumulate):
    state, metrics, shardings = on(
        mesh, BY_EXAMPLE, accumulate=accumulate, ema_decay=0.8
    )
    assert_same((state, metrics), on_one_device("by example"))
    assert_placed(state, shardings)
    assert float(state.objective_state["taid"]["t"]) > 0.5
    adam = state.opt_state[0]
    for tree in (state.params, state.ema, adam.mu, adam.nu):
        own = tree["objective"]
        assert set(own) == {"hint", "noisy"}
        kernels = [part["inner"]["projection"]["kernel"] for part in own.values()]
        assert [pieces(kernel) for kernel in kernels] == [{KERNEL_PIECES[mesh]}] * 2
        assert pieces(own["noisy"]["inner"]["raw_scale"]) == {SCALE_PIECES[mesh]}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_queue_and_the_crowd_in_it(mesh):
    """Rivals are those of all shards, and of all batches before."""
    state, metrics, shardings = on(mesh, CROWD, ema_decay=0.8)
    expected, _ = on_one_device("crowd")
    assert_same((state, metrics), on_one_device("crowd"))
    assert_placed(state, shardings)
    queue = state.objective_state["crowd"]["queue"]
    assert int(queue.count) == 32  # once round: three times 13 rows
    assert int(queue.pointer) == 3 * 13 - 32
    np.testing.assert_allclose(
        queue.features, expected.objective_state["crowd"]["queue"].features, atol=1e-6
    )
