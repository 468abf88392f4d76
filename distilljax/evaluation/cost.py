"""What models cost: parameters, bytes, FLOPs, latency and throughput, measured.

A machine that is busy now and idle a second later makes two timings incomparable. So
models are timed in turn, and what is compared is their ratio within a round.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distilljax.evaluation.flops import count_flops

LATENCY_ROUNDS, LATENCY_CALLS = 10, 5
THROUGHPUT_ROUNDS, THROUGHPUT_CALLS = 5, 1
THROUGHPUT_BATCH = 256
# Of examples that are rows of tokens, as many as have this many together.
THROUGHPUT_TOKENS = 2048
# A call that takes longer is repeated less often.
SLOW_SECONDS, SLOW_ROUNDS = 0.2, 3


@dataclass(frozen=True)
class Model:
    """A model to be measured.

    Attributes:
      forward: `(state, batch) -> logits`, or predictions, in inference mode.
      state: All arrays of the model.
      params: Those of them that are parameters.
    """

    forward: Callable[[Any, Any], Any]
    state: Any
    params: Any


def costs(models: Mapping[str, Model], example: Any) -> dict[str, dict[str, Any]]:
    """Size and speed of forward passes on the current device.

    Args:
      models: By name. If one is the "teacher", the others are compared with it.
      example: One example, as a batch of 1: a dict of arrays [1, ...].

    Returns:
      For each model `parameters` (count), `bytes` (of all arrays), `flops_per_example`
      (of `count_flops` at batch 1),
      `latency_ms` at batch 1 (median and 90th percentile over 50 calls, each waited
      for) and `throughput` in examples per second at batch 256, or at 2,048 tokens
      (best of 5). Both have `to_teacher`: median, 10th and 90th percentile, over the
      rounds, of the ratio to the teacher in the same round; None for the teacher
      itself, or without one. What takes more than .2 s is called 3 times.
    """
    example = jax.tree.map(np.asarray, example)
    size = THROUGHPUT_BATCH
    if "tokens" in example:
        size = max(1, THROUGHPUT_TOKENS // example["tokens"].shape[1])
    many = jax.tree.map(lambda x: np.repeat(x, size, axis=0), example)
    single = {name: _compile(model, example) for name, model in models.items()}
    seconds = _time(single, models, example, LATENCY_ROUNDS, LATENCY_CALLS)
    batched = {name: _compile(model, many) for name, model in models.items()}
    batch_seconds = _time(batched, models, many, THROUGHPUT_ROUNDS, THROUGHPUT_CALLS)
    latency = {name: np.median(times, axis=1) for name, times in seconds.items()}
    speed = {n: size / times.min(1) for n, times in batch_seconds.items()}
    return {
        name: {
            **_size(model, example),
            "latency_ms": {
                "batch": 1,
                "median": 1e3 * float(np.median(seconds[name])),
                "p90": 1e3 * float(np.percentile(seconds[name], 90)),
                "to_teacher": _to_teacher(name, latency),
            },
            "throughput": {
                "batch": size,
                "examples_per_second": float(speed[name].max()),
                "to_teacher": _to_teacher(name, speed),
            },
        }
        for name, model in models.items()
    }


def _compile(model: Model, batch: Any) -> Any:
    with _its_mesh(model.state):
        return jax.jit(model.forward).lower(model.state, batch).compile()


def _its_mesh(state: Any) -> Any:
    """The mesh on which a model lies: a teacher's may be another than the student's."""
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(state))
    meshes = (s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding))
    mesh: Any = next(meshes, None)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _size(model: Model, example: Any) -> dict[str, Any]:
    arrays = [
        x
        for x in jax.tree.leaves(model.state)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    return {
        "parameters": int(sum(x.size for x in jax.tree.leaves(model.params))),
        "bytes": int(sum(x.size * x.dtype.itemsize for x in arrays)),
        "flops_per_example": count_flops(model.forward, model.state, example),
    }


def _time(
    compiled: Mapping[str, Any],
    models: Mapping[str, Model],
    batch: Any,
    rounds: int,
    calls: int,
) -> dict[str, np.ndarray]:
    """Seconds of each call [rounds, calls]: in each round, each model has its turn."""

    def call(name: str) -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled[name](models[name].state, batch))
        return time.perf_counter() - start

    for name in models:
        call(name)  # warms up
    if max(map(call, models)) > SLOW_SECONDS:
        rounds, calls = SLOW_ROUNDS, 1
    seconds = {name: np.empty((rounds, calls)) for name in models}
    for round_ in range(rounds):
        for name in models if round_ % 2 else reversed(list(models)):
            seconds[name][round_] = [call(name) for _ in range(calls)]
    return seconds


def _to_teacher(name: str, rounds: dict[str, np.ndarray]) -> dict[str, float] | None:
    """The ratio within each round; what slows both cancels."""
    if name == "teacher" or "teacher" not in rounds:
        return None
    low, median, high = np.percentile(rounds[name] / rounds["teacher"], (10, 50, 90))
    return {"median": float(median), "low": float(low), "high": float(high)}
