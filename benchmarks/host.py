"""What a step costs the host, from 1 to 64 devices: reading, sending, starting it.

    python benchmarks/host.py                    # prints JSON; some three minutes
    python benchmarks/host.py --out benchmarks/results/host.json

Whole runs of `train`, of this file's `config`, over 1, 2, 4, ... simulated devices and
one batch of the same size, each in a process of its own. Counted is the CPU time of the
thread that runs the loop, by which a TPU would be kept waiting: that of a run with more
steps minus that of one with fewer, per step. What the devices compute is done by other
threads, but for a small program on a single device, which is done at once and counts.

`plain` is the same of a loop written by hand for the same model: `jax.device_put` of a
batch, a jitted step with donated state. JAX itself spends time on each device, for the
buffers of all arrays that a step returns; what is ours is the difference.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from distilljax import data, models, objectives, optimizers
from distilljax.config import Config, load_experiment
from distilljax.metrics import write_atomically
from distilljax.programs import Programs
from distilljax.train import train
from distilljax.workdir import machine, today, versions

DEVICES = (1, 2, 4, 8, 16, 32, 64)
FEW, MANY = 20, 220
NEVER = 10**6


@dataclass(frozen=True)
class Noise:
    """Inputs and labels without any meaning."""

    def __call__(self) -> data.Arrays:
        """The same for all runs."""
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(4096, 16)).astype(np.float32)
        return data.Arrays(inputs, rng.integers(0, 10, 4096), 10)


def config(seed: int = 0) -> Config:
    """A student, trained on labels, that takes the devices next to nothing."""
    return Config(
        name="host",
        student=models.MLP(num_features=16, hidden=(16,), num_classes=10),
        objective=objectives.CrossEntropy(),
        optimizer=optimizers.AdamW(learning_rate=1e-3),
        data=Noise(),
        loader=data.Loader(batch_size=512),
        mesh="data=-1",
        steps=FEW,
        log_every_steps=NEVER,
        eval_every_steps=NEVER,
        checkpoint_every_steps=NEVER,
        seed=seed,
    )


def ours(rounds: int) -> list[float]:
    """Microseconds of the loop's thread for a step, on the devices that there are."""
    programs = Programs()
    made = load_experiment(Path(__file__)).config(0)  # by a name that a run can save

    def seconds(steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.thread_time()
            train(replace(made, steps=steps), folder, programs=programs)
            return time.thread_time() - start

    seconds(FEW)  # compiles
    return [1e6 * (seconds(MANY) - seconds(FEW)) / (MANY - FEW) for _ in range(rounds)]


def plain(rounds: int) -> list[float]:
    """The same of a loop by hand."""
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    rng = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": rng.normal(size=(16, 16)), "bias": np.zeros(16)},
        "output": {"kernel": rng.normal(size=(16, 10)), "bias": np.zeros(10)},
    }
    params = jax.device_put(jax.tree.map(np.float32, params), whole)
    optimizer = optax.adamw(1e-3)
    state = jax.device_put((params, optimizer.init(params)), whole)
    source = Noise()()

    def loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        hidden, output = params["hidden"], params["output"]
        hidden = jax.nn.relu(inputs @ hidden["kernel"] + hidden["bias"])
        logits = hidden @ output["kernel"] + output["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    def seconds(state: Any, steps: int) -> tuple[Any, float]:
        start = time.thread_time()
        for i in range(steps):
            at = slice(512 * (i % 8), 512 * (i % 8 + 1))
            batch = source.inputs[at], source.labels[at]
            state, value = step(state, jax.device_put(batch, rows))
            # as in `train`: simulated devices run one step at a time
            jax.block_until_ready(value)
        return state, time.thread_time() - start

    state, _ = seconds(state, FEW)  # compiles
    found = []
    for _ in range(rounds):
        state, spent = seconds(state, MANY - FEW)
        found.append(1e6 * spent / (MANY - FEW))
    return found


def measure(rounds: int) -> dict[str, Any]:
    """All numbers of devices, each in a process of its own."""
    found: dict[str, dict[str, list[float]]] = {"ours": {}, "plain": {}}
    for devices in DEVICES:
        done = subprocess.run(
            [sys.executable, __file__, "--here", "--rounds", str(rounds)],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
            },
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        of_both = json.loads(done.stdout.splitlines()[-1])
        print(f"{devices} devices: {of_both}", file=sys.stderr)
        for name, values in of_both.items():
            found[name][str(devices)] = values
    middle = {
        name: {devices: statistics.median(x) for devices, x in values.items()}
        for name, values in found.items()
    }
    return {
        "host_us": found,
        "middle_us": middle,
        "ours_64_to_1": middle["ours"]["64"] / middle["ours"]["1"],
        "plain_64_to_1": middle["plain"]["64"] / middle["plain"]["1"],
        "ours_to_plain_at_64": middle["ours"]["64"] / middle["plain"]["64"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps({"plain": plain(args.rounds), "ours": ours(args.rounds)}))
        return
    load = os.getloadavg()[0]
    found = measure(args.rounds)
    found |= {
        "load_before": load,
        "date": today(),
        "machine": machine(),
        "versions": versions(),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if args.out is not None:
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()
