"""What checkpoints cost a run, and how soon one that was killed is at work again.

    python benchmarks/resume.py                  # prints JSON; some five minutes
    python benchmarks/resume.py --out benchmarks/results/resume.json

`checkpoints`: a run of this file's `config`, with an asynchronous, verified checkpoint
every 100 steps. Fifty steps with one are compared with the fifty after them, pair by
pair, so that a busy machine slows both. The devices are the CPU here, and all work for
a checkpoint is taken from the steps; `longer_steps` is the same with larger batches.
`checkpoint_ms` and `ratio` are the quartiles over the pairs.

`restart`: the command line in processes of its own, from the start of the process to
the end of its first step: a first start that compiles all, a first start with a warm
compilation cache, and one that goes on from a checkpoint after SIGKILL.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distilljax import data, models, objectives, optimizers
from distilljax.config import Config, load_experiment
from distilljax.events import read_events
from distilljax.metrics import write_atomically
from distilljax.train import train
from distilljax.workdir import machine, today, versions

EVERY = 50
NEVER = 10**6


@dataclass(frozen=True)
class Noise:
    """Inputs and labels without any meaning."""

    num_examples: int = 4096
    """How many."""

    def __call__(self) -> data.Arrays:
        """The same for all runs."""
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(self.num_examples, 256)).astype(np.float32)
        return data.Arrays(inputs, rng.integers(0, 10, self.num_examples), 10)


def config(seed: int = 0) -> Config:
    """1.3 M parameters, 16 MB with the optimizer's; a step takes 20 to 60 ms here."""
    return Config(
        name="resume",
        student=models.MLP(num_features=256, hidden=(1024, 1024), num_classes=10),
        objective=objectives.CrossEntropy(),
        optimizer=optimizers.AdamW(learning_rate=1e-4),
        data=Noise(),
        loader=data.Loader(batch_size=512),
        steps=NEVER,
        log_every_steps=EVERY,
        eval_every_steps=NEVER,
        checkpoint_every_steps=2 * EVERY,
        seed=seed,
    )


def checkpoints(pairs: int, batch_size: int = 512) -> dict[str, Any]:
    """Of one run, fifty steps after a checkpoint beside the next fifty without one."""
    # functions and classes of this file by a name that a run can save
    made = load_experiment(Path(__file__)).config(0)
    made = replace(
        made,
        loader=data.Loader(batch_size=batch_size),
        steps=2 * EVERY * (pairs + 1) + 1,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(made, folder)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = {r["step"]: r for r in map(json.loads, lines)}
    saved = range(2 * EVERY, made.steps - 2 * EVERY, 2 * EVERY)

    def seconds(after: int) -> list[float]:
        ends = [(records[s + after], records[s + after + EVERY]) for s in saved]
        return [end["seconds"] - start["seconds"] for start, end in ends]

    shares = [records[s + EVERY]["share_checkpoint"] for s in saved]
    return compared({"with": seconds(0), "without": seconds(EVERY)}) | {
        "share_checkpoint": statistics.median(shares)
    }


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and quartiles over the pairs."""
    both = list(zip(seconds["with"], seconds["without"], strict=True))
    return {
        "every_steps": EVERY,
        "seconds": seconds,
        "step_ms": 1e3 * statistics.median(seconds["without"]) / EVERY,
        "checkpoint_ms": statistics.quantiles(1e3 * (a - b) for a, b in both),
        "ratio": statistics.quantiles(b / a for a, b in both),
    }


def to_first_step(workdir: Path, cache: Path, *, kill_after: int | None) -> float:
    """Seconds from the start of a process to the end of its first step.

    Args:
      workdir: Of the run.
      cache: Where compiled programs are kept.
      kill_after: Which checkpoint to wait for before SIGKILL; None: at once.
    """
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    words = ["train", __file__, "--workdir", str(workdir), f"--steps={NEVER}"]
    before = len(read_events(workdir / "events.jsonl"))
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "distilljax", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            events = read_events(workdir / "events.jsonl")[before:]
            first = [e for e in events if e["event"] == "first_step"]
            saved = [e["step"] for e in events if e["event"] == "checkpoint"]
            if first and (kill_after is None or max(saved, default=0) >= kill_after):
                return first[0]["monotonic"] - start
            if process.poll() is not None:
                raise RuntimeError(f"the run ended by itself, with {process.poll()}")
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def restart(rounds: int) -> dict[str, Any]:
    """A first start, one with a warm cache, and one after a kill, in each round."""
    found: dict[str, list[float]] = {"cold": [], "warm": [], "restart": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            cache = root / "compiled"
            run = {"kill_after": EVERY}
            found["cold"].append(to_first_step(root / "a", cache, **run))
            # what a restart alone compiles is compiled here
            to_first_step(root / "a", cache, kill_after=None)
            found["warm"].append(to_first_step(root / "b", cache, **run))
            found["restart"].append(to_first_step(root / "b", cache, kill_after=None))
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {
        "seconds": found,
        "to_cold": middle["restart"] / middle["cold"],
        "to_warm": middle["restart"] / middle["warm"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--rounds", type=int, default=5, help="of starts")
    parser.add_argument("--pairs", type=int, default=15, help="of fifty steps each")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    found = {
        "checkpoints": checkpoints(args.pairs),
        "longer_steps": checkpoints(args.pairs, batch_size=2048),
        "restart": restart(args.rounds),
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
