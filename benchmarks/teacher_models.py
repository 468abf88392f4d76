"""The models of `teacher.py`: a decoder that teaches a smaller one."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from distilljax import make_distill_step, models, objectives
from distilljax.sharding import batch_axes, tree_shardings

TX = optax.adam(1e-3)
OBJECTIVE = objectives.LogitKD(temperature=2.0)
VOCAB, ROWS, TIME = 2048, 16, 64


def decoder(width: int, layers: int, heads: int = 8) -> models.DecoderConfig:
    """A small language model."""
    return models.DecoderConfig(
        vocab_size=VOCAB,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        ffn_width=4 * width,
    )


TEACHER, STUDENT = decoder(256, 4), decoder(128, 2)


def make_batch(rows: int = ROWS, time: int = TIME) -> dict[str, np.ndarray]:
    """Random tokens."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, time), np.int32)
    return {"tokens": tokens, "labels": np.roll(tokens, -1, axis=1)}


def on_mesh(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """A model by the rules of its kind."""
    state = nnx.state(module)
    rules = models.DECODER_RULES
    nnx.update(module, jax.device_put(state, tree_shardings(state, mesh, rules)))
    return module


def step_of(teacher: Any, mesh: Mesh, **options: Any) -> Any:
    """The student's step, compiled for a mesh, with the teacher in it or not."""
    student = nnx.eval_shape(lambda: STUDENT(nnx.Rngs(1)))
    make = partial(
        make_distill_step, OBJECTIVE, teacher, student=student, tx=TX, **options
    )

    def init():
        return make().init(STUDENT(nnx.Rngs(1)))

    shapes = jax.eval_shape(init)
    shardings = tree_shardings(shapes, mesh, models.DECODER_RULES)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )
    return make(state_shardings=shardings, batch_axes=batch_axes(mesh)), state
