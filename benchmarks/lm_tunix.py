"""The step of `lm.py` by Tunix: its strategy of logits, in two programs as its trainer.

    ENV/bin/python benchmarks/lm_tunix.py SHAPE [--small]

The models are ours: Tunix takes any module of NNX.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
from flax import nnx
from lm_steps import SHAPES, SMALL, TX, batch_of, models_of, params_of
from lm_worker import serve
from tunix.distillation.strategies.logit import LogitStrategy


def make(shape: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that makes one step after the other, and what is known of it."""
    student, teacher = models_of(shape)
    classes = SHAPES[shape]["classes"]

    def forward(model, tokens):
        return model(tokens).logits.logits()

    def labels_of(tokens):
        return jax.nn.one_hot(tokens, classes)

    strategy = LogitStrategy(forward, forward, labels_of, temperature=1.0, alpha=1.0)
    student, teacher = strategy.pre_process_models(student, teacher)
    optimizer = nnx.Optimizer(student, TX, wrt=nnx.Param)
    inputs = batch_of(shape)

    def train_step(model, optimizer, teacher_output, inputs):
        gradient = nnx.value_and_grad(strategy.get_train_loss, has_aux=True)
        (loss, metrics), grads = gradient(model, teacher_output, inputs)
        optimizer.update(model, grads)
        return loss, metrics

    compiled = nnx.jit(train_step, donate_argnames=("optimizer",))
    params = [params_of(model) for model in (student, teacher)]
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in params]
    params.clear()

    def step() -> float:
        teacher_output = strategy.get_teacher_outputs(teacher, inputs)
        loss, _ = compiled(student, optimizer, teacher_output, inputs)
        jax.block_until_ready(nnx.state(optimizer))
        return float(loss)

    return step, {"parameters": sizes, "version": metadata.version("google-tunix")}


if __name__ == "__main__":
    if "--small" in sys.argv[2:]:
        SHAPES.update(SMALL)
    serve(lambda: make(sys.argv[1]))
