"""The step against a plain hand-written one: time, memory, compilations, end to end.

    python benchmarks/step.py                 # prints JSON; two to three minutes
    python benchmarks/step.py --out benchmarks/results/step.json

Everything is a ratio measured in one process, ours and theirs in turn, so that a busy
machine slows both. The hand-written step has the same models and returns the same
metrics. Time is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from distilljax import data, make_distill_step, models, objectives, optimizers
from distilljax.config import Config
from distilljax.metrics import write_atomically
from distilljax.train import train
from distilljax.workdir import machine, today, versions

TEMPERATURE, CE_WEIGHT = 4.0, 0.1
TX = optax.adam(1e-3)

CASES = {
    "mlp_digits_batch_100": {
        "teacher": models.MLP(64, (512, 512), 10),
        "student": models.MLP(64, (64,), 10),
        "shape": (100, 8, 8, 1),
        "steps": 300,
    },
    "convnet_28x28_batch_256": {
        "teacher": models.ConvNet(10, (32, 64)),
        "student": models.ConvNet(10, (16, 32)),
        "shape": (256, 28, 28, 1),
        "steps": 6,
    },
}


def make_batch(shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """Random images and labels."""
    rng = np.random.default_rng(0)
    return {
        "inputs": jnp.asarray(rng.random(shape, np.float32)),
        "labels": jnp.asarray(rng.integers(0, 10, shape[0])),
    }


def hand_written(student: nnx.Module, teacher: nnx.Module) -> tuple[Callable, Any, Any]:
    """What one writes without a framework, with the metrics that ours returns."""
    student.train()
    teacher = nnx.merge(*nnx.split(teacher))
    teacher.eval()
    graphdef, params, rest = nnx.split(student, nnx.Param, ...)
    frozen_def, frozen = nnx.split(teacher)

    def step(state, frozen, batch):
        params, rest, opt_state = state
        v = nnx.merge(frozen_def, frozen, copy=True)(batch["inputs"])
        log_p1 = jax.nn.log_softmax(v)
        log_p = jax.nn.log_softmax(v / TEMPERATURE)
        n = v.shape[0]

        def loss_fn(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            z = model(batch["inputs"])
            log_q = jax.nn.log_softmax(z / TEMPERATURE)
            kd = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
            log_q1 = jax.nn.log_softmax(z)
            ce = -jnp.sum(jnp.take_along_axis(log_q1, batch["labels"][:, None], 1))
            loss = (TEMPERATURE**2 * kd + CE_WEIGHT * ce) / n
            new_rest = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])
            return loss, (new_rest, kd, ce, log_q1)

        (loss, (rest, kd, ce, log_q1)), grads = jax.value_and_grad(
            loss_fn, has_aux=True
        )(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        top = jnp.argmax(log_q1, -1)
        sums = {
            "kd": kd,
            "ce": ce,
            "kl": jnp.sum(jnp.exp(log_p1) * (log_p1 - log_q1)),
            "accuracy": jnp.sum(top == batch["labels"]),
            "agreement": jnp.sum(top == jnp.argmax(log_p1, -1)),
            "student_entropy": -jnp.sum(jnp.exp(log_q1) * log_q1),
            "teacher_entropy": -jnp.sum(jnp.exp(log_p1) * log_p1),
        }
        metrics = {name: (x, jnp.float32(n)) for name, x in sums.items()}
        metrics["loss"] = (loss, jnp.float32(1))
        metrics["grad_norm"] = (optax.tree.norm(grads), jnp.float32(1))
        return (params, rest, opt_state), metrics

    params, rest = jax.tree.map(
        jnp.copy, (nnx.to_pure_dict(params), nnx.to_pure_dict(rest))
    )
    state = (params, rest, TX.init(params))
    return jax.jit(step, donate_argnums=0), state, nnx.to_pure_dict(frozen)


def rounds_of(
    runners: dict[str, Callable[[], Any]], steps: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds per step of each runner in each round; the runners take turns."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        order = list(runners) if number % 2 else list(reversed(runners))
        for name in order:
            start = time.perf_counter()
            for _ in range(steps):
                last = runners[name]()
            jax.block_until_ready(last)
            if number:  # the first round compiles
                times[name].append((time.perf_counter() - start) / steps)
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over the rounds of the ratio within a round."""
    pairs = zip(times[a], times[b], strict=True)
    return statistics.median(x / y for x, y in pairs)


def compare(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Our pure step and our NNX adapter against the hand-written step."""
    batch = make_batch(case["shape"])
    teacher = case["teacher"](nnx.Rngs(1))
    objective = objectives.LogitKD(temperature=TEMPERATURE, ce_weight=CE_WEIGHT)
    student = case["student"](nnx.Rngs(0))
    step = make_distill_step(objective, teacher, student=student, tx=TX)
    plain, plain_state, frozen = hand_written(case["student"](nnx.Rngs(0)), teacher)
    module = case["student"](nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, TX, wrt=nnx.Param)
    held = {"ours": step.init(student), "plain": plain_state}

    def ours():
        held["ours"], metrics = step.pure(held["ours"], step.teacher_state, batch)
        return metrics

    def theirs():
        held["plain"], metrics = plain(held["plain"], frozen, batch)
        return metrics

    same = jax.tree.leaves(jax.device_get((ours(), theirs())))
    half = len(same) // 2
    np.testing.assert_allclose(sorted(same[:half]), sorted(same[half:]), rtol=1e-3)
    memory = {
        "ours": step.pure.lower(held["ours"], step.teacher_state, batch),
        "plain": plain.lower(held["plain"], frozen, batch),
    }
    temp = {
        name: lowered.compile().memory_analysis().temp_size_in_bytes
        for name, lowered in memory.items()
    }
    with jax.transfer_guard("disallow"):
        times = rounds_of({"ours": ours, "plain": theirs}, case["steps"], rounds)
    compilations = step.pure._cache_size()
    # The adapter's work does not depend on the batch: one example, so that the time of
    # the models does not drown it.
    one = jax.tree.map(lambda x: x[:1], batch)

    def bare():
        held["ours"], metrics = step.pure(held["ours"], step.teacher_state, one)
        return metrics

    runners = {"nnx": lambda: step(module, optimizer, one), "ours": bare}
    nnx_times = rounds_of(runners, 50, rounds)
    extra = [a - b for a, b in zip(nnx_times["nnx"], nnx_times["ours"], strict=True)]
    return {
        "step_us": {k: round(1e6 * statistics.median(v), 1) for k, v in times.items()},
        "time_ratio": round(ratio(times, "ours", "plain"), 4),
        "temp_bytes": temp,
        "temp_ratio": round(temp["ours"] / max(temp["plain"], 1), 4),
        "compilations": compilations,
        "transfer_guard_in_loop": "disallow",  # a transfer would have raised
        "nnx_adapter_overhead_us": round(1e6 * statistics.median(extra), 1),
    }


def end_to_end(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """`train` with data, logging, evaluation and checkpoints against the bare step."""
    shape = case["shape"]
    rng = np.random.default_rng(0)
    source = data.Arrays(
        rng.integers(0, 256, (10 * shape[0], *shape[1:])).astype(np.uint8),
        rng.integers(0, 10, 10 * shape[0]),
        num_classes=10,
    )
    objective = objectives.LogitKD(temperature=TEMPERATURE, ce_weight=CE_WEIGHT)
    student = case["student"](nnx.Rngs(0))
    teacher = Untrained(case["teacher"])
    step = make_distill_step(objective, teacher(), student=student, tx=TX)
    batch, state = make_batch(shape), step.init(student)

    def bare(state):
        for _ in range(steps):
            state, _ = step.pure(state, step.teacher_state, batch)
        return jax.block_until_ready(state)

    _SOURCE.append(source)
    config = Config(
        name="benchmark",
        student=case["student"],
        objective=objective,
        teacher=teacher,
        data=the_source,
        loader=data.Loader(batch_size=shape[0], scale=255.0),
        optimizer=optimizers.AdamW(1e-3),
        steps=steps,
        log_every_steps=max(steps // 10, 1),
        checkpoint_every_steps=max(steps // 2, 1),
        eval_every_steps=steps,
    )
    state = bare(state)  # compiles
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        state = bare(state)
        bare_rate = steps * shape[0] / (time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            train(config, folder)
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        windows = [r for r in records if r["split"] == "train"][1:]  # 1st compiles
        seconds = windows[-1]["seconds"] - records[0]["seconds"]
        done = (windows[-1]["step"] - records[0]["step"]) * shape[0]
        rates.append((done / seconds, bare_rate))
    return {
        "train_examples_per_second": round(statistics.median(r[0] for r in rates)),
        "bare_examples_per_second": round(statistics.median(r[1] for r in rates)),
        "ratio": round(statistics.median(a / b for a, b in rates), 3),
    }


@dataclass(frozen=True)
class Untrained:
    """A teacher that has learnt nothing: what it costs is what a trained one costs."""

    model: Any
    """The spec of its module."""

    def __call__(self, mesh: Any = None, rules: Any = ()) -> nnx.Module:
        """The module, on one device."""
        del mesh, rules
        return self.model(nnx.Rngs(1))


_SOURCE: list[Any] = []


def the_source() -> Any:
    """The random images of the benchmark (a config names its data by import path)."""
    return _SOURCE[-1]


def import_seconds(rounds: int = 7) -> dict[str, float]:
    """Wall seconds of a fresh interpreter that imports one of them; the least."""
    best = {"flax.nnx": float("inf"), "distilljax": float("inf")}
    for _ in range(rounds):
        for name in best:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            best[name] = min(best[name], time.perf_counter() - start)
    extra = best["distilljax"] - best["flax.nnx"]
    return {name: round(s, 3) for name, s in best.items()} | {"extra": round(extra, 3)}


def main() -> None:
    """Run all, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each pair")
    parser.add_argument("--steps", type=int, default=300, help="steps end to end")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    found: dict[str, Any] = {"date": today(), "machine": machine()}
    found["versions"] = versions()
    found["step"] = {name: compare(case, args.rounds) for name, case in CASES.items()}
    found["end_to_end"] = {
        "mlp_digits_batch_100": end_to_end(CASES["mlp_digits_batch_100"], 3000),
        "convnet_28x28_batch_256": end_to_end(
            CASES["convnet_28x28_batch_256"], args.steps
        ),
    }
    found["import_seconds"] = import_seconds()
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()
