"""The language models of `lm.py`, and its steps in JAX: ours and a hand-written one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from distilljax import make_distill_step, objectives
from distilljax.evaluation.flops import count_flops
from distilljax.models import Decoder, DecoderConfig

SHAPES = {
    "vocabulary": {"classes": 32000, "teacher": (256, 6), "student": (128, 4)},
    "body": {"classes": 8192, "teacher": (512, 8), "student": (256, 6)},
}
"""Classes, and width and layers of the models."""
SMALL = {
    "vocabulary": {"classes": 4096, "teacher": (128, 2), "student": (64, 1)},
    "body": {"classes": 8192, "teacher": (128, 3), "student": (64, 2)},
}
"""The same names, for a look at whether all works."""
BATCH, TIME, HEAD_DIM = 4, 256, 64
TX = optax.adamw(1e-3, weight_decay=1e-4)


def config_of(shape: str, model: str) -> DecoderConfig:
    """A decoder as Llamas are, with tied embeddings."""
    width, layers = SHAPES[shape][model]
    return DecoderConfig(
        vocab_size=SHAPES[shape]["classes"],
        width=width,
        num_layers=layers,
        num_heads=width // HEAD_DIM,
        num_kv_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        ffn_width=11 * width // 4,
    )


def models_of(shape: str) -> tuple[Decoder, Decoder]:
    """Student and teacher, untrained: what they cost is what trained ones cost."""
    student = config_of(shape, "student")(nnx.Rngs(1))
    return student, config_of(shape, "teacher")(nnx.Rngs(0))


def batch_of(shape: str) -> dict[str, jax.Array]:
    """Random tokens."""
    classes = SHAPES[shape]["classes"]
    tokens = np.random.default_rng(0).integers(0, classes, (BATCH, TIME))
    return {"tokens": jnp.asarray(tokens, jnp.int32)}


def params_of(model: nnx.Module) -> Any:
    """The parameters as nested dicts of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def export(shape: str, path: Path) -> None:
    """Parameters and tokens, for those who have no JAX."""
    arrays = {"tokens": np.asarray(batch_of(shape)["tokens"])}
    for name, model in zip(("student", "teacher"), models_of(shape), strict=True):
        for keys, x in jax.tree_util.tree_leaves_with_path(params_of(model)):
            words = [name, *(str(getattr(key, "key", key)) for key in keys)]
            arrays["/".join(words)] = np.asarray(x)
    np.savez(path, **arrays)


def hidden_states(params: Any, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    """A decoder as one writes it by hand."""
    x = params["embed"]["embedding"][tokens]
    batch, time = tokens.shape
    angles = jnp.arange(time)[:, None, None] * config.rope.frequencies(HEAD_DIM)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    mask = jnp.tril(jnp.ones((time, time), bool))

    def norm(x, scale):
        mean = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean + config.norm_eps) * scale["scale"]

    def rotated(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    for index in range(config.num_layers):
        layer = params["layers"][index]
        kernel = {k: x["kernel"] for k, x in layer["attention"].items()}
        y = norm(x, layer["attention_norm"])
        q, k, v = (
            (y @ kernel[name]).reshape(batch, time, -1, HEAD_DIM)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("btnh,bsnh->bnts", rotated(q), rotated(k))
        scores = jnp.where(mask, scores * HEAD_DIM**-0.5, -1e30)
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        x = x + out.reshape(batch, time, -1) @ kernel["out"]
        kernel = {k: x["kernel"] for k, x in layer["mlp"].items()}
        y = norm(x, layer["mlp_norm"])
        x = x + (jax.nn.silu(y @ kernel["gate"]) * (y @ kernel["up"])) @ kernel["down"]
    return norm(x, params["final_norm"])


def plain(shape: str) -> tuple[Callable, Any, Any]:
    """The step without a library: logits of both, two log-softmaxes, their KL."""
    student, teacher = models_of(shape)
    frozen = params_of(teacher)

    def log_probs(params, tokens, config):
        hidden = hidden_states(params, tokens, config)
        return jax.nn.log_softmax(hidden @ params["embed"]["embedding"].T)

    def step(state, frozen, batch):
        params, opt_state = state
        tokens = batch["tokens"]
        log_p = log_probs(frozen, tokens, teacher.config)

        def loss_of(params):
            log_q = log_probs(params, tokens, student.config)
            return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    params = params_of(student)
    return jax.jit(step, donate_argnums=0), (params, TX.init(params)), frozen


def ours(shape: str, *, diagnostics: bool = True) -> tuple[Callable, Any, Any]:
    """The step through the public interface, with all that it logs."""
    student, teacher = models_of(shape)
    step = make_distill_step(
        objectives.LogitKD(temperature=1.0, ce_weight=0.0),
        teacher,
        student=student,
        tx=TX,
        diagnostics=diagnostics,
    )
    return step.pure, step.init(student), step.teacher_state


def ours_bare(shape: str) -> tuple[Callable, Any, Any]:
    """The same without what no loss needs: as little is logged as by the others."""
    return ours(shape, diagnostics=False)


STEPS = {"plain": plain, "ours": ours, "ours_bare": ours_bare}


def loss_of(metrics: Any) -> jax.Array:
    """Of what a step returns beside the state."""
    return metrics["loss"].value if isinstance(metrics, Mapping) else metrics


def ready_step(name: str, shape: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that makes one step after the other, and the number of parameters."""
    step, state, frozen = STEPS[name](shape)
    batch = batch_of(shape)
    params = state[0] if name == "plain" else state.params
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, frozen)]
    held = [state]

    def run() -> float:
        held[0], metrics = step(held[0], frozen, batch)
        jax.block_until_ready((held[0], metrics))
        return float(loss_of(metrics))

    return run, {"parameters": sizes}


def temp_bytes(name: str, shape: str) -> int:
    """What the compiled step holds besides arguments and results."""
    step, state, frozen = STEPS[name](shape)
    compiled = step.lower(state, frozen, batch_of(shape)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def product_flops(name: str, shape: str) -> int:
    """Of all matrix products of a step, two for each multiplication and addition."""
    step, state, frozen = STEPS[name](shape)
    return count_flops(step, state, frozen, batch_of(shape))
