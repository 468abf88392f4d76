"""Model FLOPs: per weight and token 6 of the student, 2 of the teacher; attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from distilljax import models, objectives
from distilljax.config import Config, load_experiment
from distilljax.pair import Student, Teacher, model_flops
from distilljax.sharding import mesh_from_string

TINY = Path(__file__).parent / "cli" / "tiny.py"
ROWS, TIME = 4, 64
SHAPE = models.DecoderConfig(
    vocab_size=512, width=32, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8,
    ffn_width=64,
)  # fmt: skip


def made(config: Config, *, taught: bool = True) -> tuple[Student, Teacher | None]:
    mesh = mesh_from_string("data=1", jax.devices()[:1])
    with jax.set_mesh(mesh):
        teacher = Teacher.load(config, mesh) if taught else None
        return Student(config, teacher, mesh), teacher


def matrices(module: nnx.Module) -> int:
    """Weights of matrix products; those of embeddings are looked up."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return sum(
        x.size for path, x in leaves if x.ndim > 1 and "embed" not in str(path).lower()
    )


def test_of_a_network_it_is_two_and_six_per_weight():
    config = load_experiment(TINY).config(0)
    student, teacher = made(config)
    batch = {
        "inputs": jax.ShapeDtypeStruct((16, 8), jnp.float32),
        "labels": jax.ShapeDtypeStruct((16,), jnp.int32),
    }
    found = model_flops(student, teacher, batch)
    assert found.student == 6 * (8 * 16 + 16 * 3)
    assert found.teacher == 2 * (8 * 12 + 12 * 3)
    assert found.both == found.student + found.teacher
    assert model_flops(student, None, batch).teacher == 0
    # per example, whatever the batch
    twice = {
        name: jax.ShapeDtypeStruct((32, *x.shape[1:]), x.dtype)
        for name, x in batch.items()
    }
    assert model_flops(student, teacher, twice) == found


def decoder_config(**changes) -> Config:
    config = load_experiment(TINY).config(0)
    return replace(
        config,
        student=SHAPE,
        teacher=lambda mesh=None, rules=(): SHAPE(nnx.Rngs(1)),
        objective=objectives.LogitKD(),
        **changes,
    )


TOKENS = {"tokens": jax.ShapeDtypeStruct((ROWS, TIME), jnp.int32)}


@pytest.mark.parametrize("remat", [False, True])
def test_of_a_decoder_the_head_and_attention_count_and_remat_does_not(remat):
    """The head is multiplied out in the loss, and is the models' all the same."""
    policy = jax.checkpoint_policies.nothing_saveable
    shape = replace(SHAPE, remat=policy) if remat else SHAPE
    student, teacher = made(replace(decoder_config(), student=shape))
    found = model_flops(student, teacher, TOKENS)
    weights = matrices(SHAPE(nnx.Rngs(0))) + (0 if not SHAPE.tied else 512 * 32)
    # queries by keys and weights by values, of which at least the causal half counts
    attention = SHAPE.num_layers * 2 * 2 * TIME * 4 * 8
    low, high = 2 * weights + attention / 2, 2 * weights + attention
    assert low <= found.teacher / TIME <= high
    assert found.student == 3 * found.teacher


def test_weights_that_are_frozen_get_no_gradient():
    """Of the last layer alone: forward, backward, and a part of the last third."""
    config = load_experiment(TINY).config(0)
    last = nnx.All(nnx.Param, nnx.PathContains(1))
    student, _ = made(replace(config, trainable=last), taught=False)
    batch = {"inputs": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    share = (16 * 3 + 3) / (8 * 16 + 16 + 16 * 3 + 3)
    found = model_flops(student, None, batch).student
    assert found == pytest.approx((2 + share) * 2 * (8 * 16 + 16 * 3))
