"""What a model costs: parameters, bytes, FLOPs, latency and throughput, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LATENCY_CALLS = 50
THROUGHPUT_BATCH = 256


def cost(
    forward: Callable[[Any, Any], Any], state: Any, params: Any, example: Any
) -> dict[str, Any]:
    """Size and speed of a forward pass on the current device.

    Args:
      forward: `(state, inputs) -> logits`, in inference mode.
      state: All arrays of the model.
      params: Those of them that are parameters.
      example: One input, shape [1, ...].

    Returns:
      `parameters` (count), `bytes` (of all arrays), `flops_per_example` (counted by the
      compiler for batch 1, which sees a scanned layer once), `latency_ms` at batch 1
      (median and 90th percentile over 50 calls, each waited for), `throughput` in
      examples per second at batch 256 (best of 5).
    """
    arrays = [
        x
        for x in jax.tree.leaves(state)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    compiled = jax.jit(forward)
    analysis = compiled.lower(state, example).compile().cost_analysis() or {}
    jax.block_until_ready(compiled(state, example))
    times = []
    for _ in range(LATENCY_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(state, example))
        times.append(1e3 * (time.perf_counter() - start))
    many = np.repeat(np.asarray(example), THROUGHPUT_BATCH, axis=0)
    jax.block_until_ready(compiled(state, many))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(compiled(state, many))
        best = min(best, time.perf_counter() - start)
    return {
        "parameters": int(sum(x.size for x in jax.tree.leaves(params))),
        "bytes": int(sum(x.size * x.dtype.itemsize for x in arrays)),
        "flops_per_example": float(analysis.get("flops", float("nan"))),
        "latency_ms": {
            "batch": 1,
            "median": float(np.median(times)),
            "p90": float(np.percentile(times, 90)),
        },
        "throughput": {
            "batch": THROUGHPUT_BATCH,
            "examples_per_second": THROUGHPUT_BATCH / best,
        },
    }
