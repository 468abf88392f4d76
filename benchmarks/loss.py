"""The fused loss against plain JAX that makes the logits: time, memory, accuracy.

    python benchmarks/loss.py                     # prints JSON; some five minutes
    python benchmarks/loss.py --out benchmarks/results/loss.json
    python benchmarks/loss.py --plan v5e:4x4 v5p:4x4x4  # compiled for TPUs, none needed

Time is a ratio measured in one process, ours and theirs in turn: the median over rounds
of the ratio within a round, so that a busy machine slows both. Memory is the growth of
the resident size of a process of its own over its level after imports and inputs. Both
are measured with the stock allocator and with huge pages, the setting equal on all
sides: faulting in the pages of logit-sized temporaries is a large part of the plain
version's time on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distilljax.losses import LinearHead, fused_divergence
from distilljax.metrics import write_atomically
from distilljax.workdir import machine, today, versions

SHAPE = {"tokens": 2048, "classes": 32000, "width": 512, "teacher_width": 1024}
LARGE = {"tokens": 8192, "classes": 128256, "width": 512, "teacher_width": 1024}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
Arrays = tuple[Any, Any, Any, Any]


def plain(h: Any, k: Any, teacher_h: Any, teacher_k: Any) -> Any:
    """What one writes without a library: logits, two log-softmaxes, a mean."""
    z = jnp.matmul(h, k, preferred_element_type=jnp.float32)
    v = jnp.matmul(teacher_h, teacher_k, preferred_element_type=jnp.float32)
    log_q = jax.nn.log_softmax(z)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(v))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def fused(
    h: Any, k: Any, teacher_h: Any, teacher_k: Any, chunk: int | None = None
) -> Any:
    """The same from the heads."""
    total, _ = fused_divergence(
        LinearHead(h, k), LinearHead(teacher_h, teacher_k), chunk_tokens=chunk
    )
    return total.sum / total.count


def products(h: Any, k: Any, teacher_h: Any, teacher_k: Any) -> tuple[Any, Any]:
    """The matrix products alone, with no softmax between them."""
    slope = h @ k + teacher_h @ teacher_k
    return slope @ k.T, h.T @ slope


def programs(chunk: int | None = None) -> dict[str, Callable]:
    """Value and gradient of each, not yet compiled."""
    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1))
    return {
        "plain": gradient(plain),
        "fused": gradient(functools.partial(fused, chunk=chunk)),
        "products": products,
    }


def shapes(
    tokens: int, classes: int, width: int, teacher_width: int, dtype: Any = jnp.float32
) -> Arrays:
    """Hidden states and kernel of student and teacher, abstract."""
    make = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    return (
        make((tokens, width)),
        make((width, classes)),
        make((tokens, teacher_width)),
        make((teacher_width, classes)),
    )


def inputs(**shape: Any) -> Arrays:
    """Random ones, with logits of standard deviation 1."""
    rng = np.random.default_rng(0)
    made = []
    for x in shapes(**shape):
        kernel = x.shape[1] == shape["classes"]
        size = x.shape[0] ** -0.5 if kernel else 1.0
        values = rng.standard_normal(x.shape, np.float32) * np.float32(size)
        made.append(jnp.asarray(values, x.dtype))
    return tuple(made)


def time_in_turn(rounds: int, chunk: int | None) -> dict[str, Any]:
    """Seconds of each by rounds; ratios are taken within a round."""
    args = inputs(**SHAPE)
    ready = {
        name: jax.jit(f).lower(*args).compile() for name, f in programs(chunk).items()
    }
    wall = {name: [] for name in ready}
    cpu = {name: [] for name in ready}
    for round_ in range(rounds + 1):
        for name, program in ready.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*args))
            if round_:  # the first one warms up
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)

    def ratio(times: dict[str, list[float]], name: str) -> float:
        pairs = zip(times[name], times["plain"], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "seconds_least": {name: round(min(t), 3) for name, t in wall.items()},
        "ratio": {name: ratio(wall, name) for name in ("fused", "products")},
        "ratio_of_least": round(min(wall["fused"]) / min(wall["plain"]), 3),
        "cpu_ratio": ratio(cpu, "fused"),
        "rounds": rounds,
    }


def peak_of(name: str, chunk: int | None) -> int:
    """Bytes by which this process has grown at most over its level with the inputs."""
    args = inputs(**SHAPE)
    program = jax.jit(programs(chunk)[name]).lower(*args).compile()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    for _ in range(2):
        jax.block_until_ready(program(*args))
    return status("VmHWM") - before


def status(key: str) -> int:
    """A size of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def temp_bytes(tokens: int, chunk: int | None = None) -> dict[str, Any]:
    """What the compiled programs hold besides arguments and results."""
    unit = 4 * tokens * LARGE["classes"]
    found = {}
    for name in ("plain", "fused"):
        args = shapes(**{**LARGE, "tokens": tokens})
        compiled = jax.jit(programs(chunk)[name]).lower(*args).compile()
        size = compiled.memory_analysis().temp_size_in_bytes
        found[name] = {"bytes": size, "logit_arrays": round(size / unit, 4)}
    return found


def accuracy() -> dict[str, float]:
    """bfloat16 heads at a KL of 0.01, against float64 of the same numbers."""
    rng = np.random.default_rng(0)
    tokens, classes, width = 256, 4000, 128
    teacher_h = rng.normal(size=(tokens, width))
    kernel = 2 * rng.normal(size=(width, classes)) / width**0.5
    h = teacher_h + 0.07 * rng.normal(size=(tokens, width))
    args = [jnp.asarray(x, jnp.bfloat16) for x in (h, kernel, teacher_h, kernel)]
    value, grads = jax.jit(programs(64)["fused"])(*args)
    h, k, teacher_h, teacher_k = (
        np.asarray(x.astype(jnp.float32), float) for x in args
    )
    log_q, log_p = (log_softmax(h @ k), log_softmax(teacher_h @ teacher_k))
    slope = (np.exp(log_q) - np.exp(log_p)) / tokens
    exact = float((np.exp(log_p) * (log_p - log_q)).sum() / tokens)
    errors = [
        np.abs(np.asarray(found.astype(jnp.float32)) - true).max() / np.abs(true).max()
        for found, true in zip(grads, (slope @ k.T, h.T @ slope), strict=True)
    ]
    return {
        "kl": round(exact, 6),
        "kl_error": abs(float(value) - exact),
        "gradient_error_of_largest": float(max(errors)),
    }


def log_softmax(x: np.ndarray) -> np.ndarray:
    """In the dtype of x."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def in_a_process(arguments: list[str], env: dict[str, str]) -> Any:
    """The JSON that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def compare(rounds: int, chunk: int | None, env: dict[str, str]) -> dict[str, Any]:
    """Time and peak memory, with one setting of the allocator for all."""
    extra = [] if chunk is None else ["--chunk", str(chunk)]
    found = in_a_process(["--time", str(rounds), *extra], env)
    peaks = {
        name: in_a_process(["--peak", name, *extra], env) for name in ("plain", "fused")
    }
    found["peak_bytes"] = peaks
    found["peak_ratio"] = round(peaks["fused"] / peaks["plain"], 3)
    return found


def plan(topology: str, tokens: int, dtype: Any) -> dict[str, Any]:
    """Compiled ahead of time for one chip of a TPU topology; needs the extra `plan`."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    device = jax.sharding.SingleDeviceSharding(found.devices[0])
    shape = {"classes": 128256, "width": 4096, "teacher_width": 8192, "dtype": dtype}
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        shapes(tokens=tokens, **shape),
    )
    sizes = {}
    for name in ("plain", "fused"):
        try:
            compiled = jax.jit(programs()[name]).lower(*args).compile()
        except jax.errors.JaxRuntimeError as error:  # does not fit: it says how much
            sizes[name] = str(error).splitlines()[0][:300]
        else:
            sizes[name] = compiled.memory_analysis().temp_size_in_bytes
    return {"topology": topology, "tokens": tokens, "dtype": dtype.__name__} | sizes


def main() -> None:
    """Run all, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--chunk", type=int, help="positions in a chunk")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--time", type=int, help="this process only times")
    parser.add_argument("--peak", help="this process only takes the peak of one")
    parser.add_argument(
        "--plan", nargs="+", help="compile for these TPU topologies instead"
    )
    args = parser.parse_args()
    if args.time is not None:
        print(json.dumps(time_in_turn(args.time, args.chunk)))
        return
    if args.peak is not None:
        print(json.dumps(peak_of(args.peak, args.chunk)))
        return
    found: dict[str, Any] = {"date": today(), "machine": machine()}
    found["versions"] = versions()
    if args.plan is not None:
        found["plan"] = [
            plan(topology, tokens, dtype)
            for topology in args.plan
            for dtype in (jnp.bfloat16, jnp.float32)
            for tokens in (1024, 4096, 32768)
        ]
    else:
        found["shape"] = SHAPE
        found["stock"] = compare(args.rounds, args.chunk, {})
        found["huge_pages"] = compare(args.rounds, args.chunk, HUGE_PAGES)
        found["temp_bytes"] = {n: temp_bytes(n) for n in (8192, 16384)}
        found["bfloat16"] = accuracy()
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()
