"""The language models of `lm_gpu.py`, of real sizes, and its steps in JAX."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from distilljax import make_distill_step, objectives
from distilljax.chips import chip_of
from distilljax.evaluation.flops import count_flops
from distilljax.models import DecoderConfig

TX = optax.adamw(1e-4, weight_decay=1e-4)
PERIOD = 1_048_573
"""Random values of an array, repeated; a prime, so that no two rows are the same."""


def shape(
    classes: int, width: int, layers: int, heads: tuple[int, int, int], ffn: int,
    tied: bool = True,
) -> DecoderConfig:  # fmt: skip
    """A decoder in bfloat16; heads are those of queries, of keys, and their size."""
    return DecoderConfig(
        vocab_size=classes,
        width=width,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        ffn_width=ffn,
        tied=tied,
        param_dtype=jnp.bfloat16,
    )


@dataclass(frozen=True)
class Pair:
    """A student, its teacher, and the tokens of a step."""

    teacher: DecoderConfig
    student: DecoderConfig
    batch: int = 4
    time: int = 2048


# The widths of published models, without their biases and norms of queries; the student
# has the vocabulary of the teacher.
PAIRS = {
    # Llama-3.2-1B, and the body of Qwen2.5-0.5B
    "1B to 0.5B": Pair(
        shape(128_256, 2048, 16, (32, 8, 64), 8192),
        shape(128_256, 896, 24, (14, 2, 64), 4864),
    ),
    # Qwen2.5-7B, and the body of Qwen3-0.6B
    "7B to 0.6B": Pair(
        shape(152_064, 3584, 28, (28, 4, 128), 18_944, tied=False),
        shape(152_064, 1024, 28, (16, 8, 128), 3072),
    ),
}

SMALL = Pair(
    shape(512, 64, 2, (4, 2, 16), 96, tied=False),
    shape(512, 32, 2, (2, 1, 16), 64),
    batch=2,
    time=64,
)
"""Runs anywhere, and says nothing of any speed."""


def abstract(config: DecoderConfig) -> nnx.Module:
    """The module, with shapes for arrays."""
    return nnx.eval_shape(lambda: config(nnx.Rngs(0)))


def params_of(module: nnx.Module) -> Any:
    """The parameters as nested dicts."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def names_of(module: nnx.Module, who: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters, as another package is told them."""
    return {
        "/".join([who, *(str(getattr(key, "key", key)) for key in keys)]): x.shape
        for keys, x in jax.tree_util.tree_leaves_with_path(params_of(module))
    }


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same in every package: by the name of the parameter, in float32."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    size = int(np.prod(shape))
    some = 0.02 * rng.standard_normal(min(size, PERIOD), np.float32)
    return np.resize(some, size).reshape(shape)


def filled(config: DecoderConfig, who: str) -> nnx.Module:
    """The module with its values, one array after the other."""
    module = abstract(config)
    graphdef, state = nnx.split(module)
    names = iter(names_of(module, who))

    def made(x: Any) -> jax.Array:
        return jnp.asarray(values(next(names), x.shape)).astype(x.dtype)

    return nnx.merge(graphdef, jax.tree.map(made, state))


def tokens_of(pair: Pair) -> np.ndarray:
    """Random ones."""
    shape = (pair.batch, pair.time)
    return np.random.default_rng(0).integers(0, pair.student.vocab_size, shape)


def hidden_states(params: Any, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    """A decoder as one writes it by hand for a GPU: attention is that of cuDNN."""
    x = params["embed"]["embedding"][tokens]
    batch, time = tokens.shape
    angles = jnp.arange(time)[:, None, None] * config.rope.frequencies(config.head_dim)
    cos, sin = (f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    kernel_of = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def norm(x, scale):
        mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(mean + config.norm_eps)
        return y.astype(x.dtype) * scale["scale"]

    def rotated(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    for index in range(config.num_layers):
        layer = params["layers"][index]
        kernel = {k: x["kernel"] for k, x in layer["attention"].items()}
        y = norm(x, layer["attention_norm"])
        q, k, v = (
            (y @ kernel[name]).reshape(batch, time, -1, config.head_dim)
            for name in ("query", "key", "value")
        )
        out = jax.nn.dot_product_attention(
            rotated(q), rotated(k), v, is_causal=True, implementation=kernel_of
        )
        x = x + out.reshape(batch, time, -1) @ kernel["out"]
        kernel = {k: x["kernel"] for k, x in layer["mlp"].items()}
        y = norm(x, layer["mlp_norm"])
        x = x + (jax.nn.silu(y @ kernel["gate"]) * (y @ kernel["up"])) @ kernel["down"]
    return norm(x, params["final_norm"])


def log_probs(params: Any, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    """In float32, of logits that are made."""
    tied = config.tied
    kernel = params["embed"]["embedding"].T if tied else params["head"]["kernel"]
    hidden = hidden_states(params, tokens, config)
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits)


def plain(
    pair: Pair, student: nnx.Module, teacher: nnx.Module
) -> tuple[Callable, Callable[[], Any], Any]:
    """The step without a library."""

    def step(state, frozen, batch):
        params, opt_state = state
        log_p = log_probs(frozen, batch["tokens"], pair.teacher)

        def loss_of(params):
            log_q = log_probs(params, batch["tokens"], pair.student)
            return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def init(params):
        return params, TX.init(params)

    made = jax.jit(step, donate_argnums=0)
    return made, lambda: _on(init, params_of(student)), params_of(teacher)


def ours(
    pair: Pair, student: nnx.Module, teacher: nnx.Module
) -> tuple[Callable, Callable[[], Any], Any]:
    """The step through the public interface, with all that it logs."""
    del pair
    objective = objectives.LogitKD(temperature=1.0, ce_weight=0.0)
    step = make_distill_step(objective, teacher, student=student, tx=TX)
    graphdef, state = nnx.split(student)

    def init(state):
        return step.init(nnx.merge(graphdef, state))

    return step.pure, lambda: _on(init, state), step.teacher_state


def _on(init: Callable[[Any], Any], given: Any) -> Any:
    """The state; of shapes, its shapes."""
    if isinstance(jax.tree.leaves(given)[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(init, given)
    return init(given)


STEPS = {"plain": plain, "ours": ours}


def traced(name: str, pair: Pair) -> dict[str, Any]:
    """What a step makes of its shapes; nothing is allocated."""
    student, teacher = abstract(pair.student), abstract(pair.teacher)
    step, init, frozen = STEPS[name](pair, student, teacher)
    state = init()
    tokens = jax.ShapeDtypeStruct((pair.batch, pair.time), jnp.int32)

    def made(state, frozen, batch):
        after, metrics = step(state, frozen, batch)
        return after, loss_of(metrics)

    after, loss = jax.eval_shape(made, state, frozen, {"tokens": tokens})
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (state, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name}: a step changes the shapes of its state")
    sizes = {"state_bytes": held(state), "teacher_bytes": held(frozen)}
    return {"loss": str(loss.dtype)} | sizes


def loss_of(metrics: Any) -> jax.Array:
    """Of what a step returns beside the state."""
    return metrics["loss"].value if isinstance(metrics, Mapping) else metrics


def held(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def sizes(pair: Pair) -> list[int]:
    """Parameters of student and teacher."""
    models = (abstract(config) for config in (pair.student, pair.teacher))
    return [sum(x.size for x in jax.tree.leaves(params_of(m))) for m in models]


def model_flops(pair: Pair) -> int:
    """What MFU counts: the teacher once, the student thrice, with their logits."""
    tokens = jax.ShapeDtypeStruct((pair.batch, pair.time), jnp.int32)

    def forward(config: DecoderConfig) -> int:
        graphdef, state = nnx.split(abstract(config))
        return count_flops(
            lambda s, t: nnx.merge(graphdef, s)(t).logits.logits(), state, tokens
        )

    return forward(pair.teacher) + 3 * forward(pair.student)


def ready_step(name: str, pair: Pair) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that makes one step after the other, and what is known of it."""
    student, teacher = filled(pair.student, "student"), filled(pair.teacher, "teacher")
    step: Any
    step, init, frozen = STEPS[name](pair, student, teacher)
    held_ = [init()]
    del student, teacher
    batch = {"tokens": jnp.asarray(tokens_of(pair), jnp.int32)}
    compiled = step.lower(held_[0], frozen, batch).compile()
    memory = compiled.memory_analysis()
    program = (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip

    def run() -> float:
        held_[0], metrics = compiled(held_[0], frozen, batch)
        jax.block_until_ready((held_[0], metrics))
        return float(loss_of(metrics))

    return run, {"parameters": sizes(pair), "program_bytes": program}


def device_peak() -> dict[str, int]:
    """The most that was allocated on the device, where it says so."""
    found = jax.local_devices()[0].memory_stats() or {}
    return {"peak_bytes": found["peak_bytes_in_use"]} if found else {}


def peak_flops() -> float | None:
    """Of the device, in bfloat16; None if it is in no table."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.peak_flops
