"""What a token of a teacher's sparse signal takes on disk, in time, and in nats.

    python benchmarks/store_coding.py             # prints JSON; half a minute
    python benchmarks/store_coding.py --out benchmarks/results/store_coding.json

Bytes are those of random classes of a vocabulary of 151,936, which no coding of sets
can make much smaller. Speeds are those of one core: records are written one by one, and
read by the batch, as a training run does; the best of several rounds. The cost is the
KL between the signal and what is read of it, the tail as one class, at each
temperature of the grid, over rows that fall as Zipf's law from very peaked to flat.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distilljax.metrics import write_atomically
from distilljax.teachers import SampledCoding, TopKCoding
from distilljax.workdir import machine, today, versions

NUM_CLASSES = 151_936
GRID = (1.0, 2.0, 4.0)
BATCHES = {"long": (64, 256), "short": (1024, 12)}  # records, positions of each
SAMPLED = {"num_samples": 50, "num_distinct": 12}
KINDS = {
    "sampled": SampledCoding(NUM_CLASSES, SAMPLED["num_samples"]),
    **{
        f"top{k}_{values}": TopKCoding(NUM_CLASSES, k, GRID, values)
        for k in (32, 128)
        for values in ("log8", "bfloat16", "float32")
    },
}
OWN_TEMPERATURES = {"very peaked": 0.05, "peaked": 0.2, "as is": 1.0, "flat": 10.0}


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    largest = x.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - largest).sum(-1)) + largest[..., 0]


def distinct(rng: np.random.Generator, rows: int, k: int) -> np.ndarray:
    """So many different classes in each row, all sets equally likely."""
    ids = rng.integers(0, NUM_CLASSES, (rows, k))
    while True:
        ordered = np.sort(ids, axis=1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not again.any():
            return ids
        ids[again] = rng.integers(0, NUM_CLASSES, (again.sum(), k))


def inputs(coding: Any, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """What a record of random classes is made of."""
    if isinstance(coding, SampledCoding):
        ids = distinct(rng, rows, SAMPLED["num_distinct"])
        more = SAMPLED["num_samples"] - ids.shape[1]
        again = rng.integers(0, ids.shape[1], (rows, more))
        return (np.hstack([ids, np.take_along_axis(ids, again, axis=1)]),)
    z = 3 * rng.normal(size=(rows, coding.k + 1))
    z = (z - log_sum_exp(z)[:, None]).astype(np.float32)
    tail = z[:, -1:] / np.array(GRID, np.float32) + np.float32([0, 1, 2])
    return distinct(rng, rows, coding.k), z[:, :-1], tail


def best_secs(work: Callable[[], Any], rounds: int) -> float:
    """The least of several times."""
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times[1:])


def size_and_speed(coding: Any, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Bytes of a token, and tokens a second both ways."""
    rng = np.random.default_rng(0)
    num_records, rows = shape
    batch = [inputs(coding, rng, rows) for _ in range(num_records)]
    records = [coding.encode(*parts) for parts in batch]
    positions = np.full(num_records, rows)
    tokens = num_records * rows
    encode = best_secs(lambda: [coding.encode(*parts) for parts in batch], rounds)
    decode = best_secs(lambda: coding.decode(records, positions), rounds)
    return {
        "bytes_per_token": round(sum(map(len, records)) / tokens, 2),
        "encode_tokens_per_sec": round(tokens / encode, -2),
        "decode_tokens_per_sec": round(tokens / decode, -2),
    }


def signal(rng: np.random.Generator, rows: int, own: float, k: int) -> Any:
    """Classes, log-probabilities and tails of rows that fall as Zipf's law."""
    z = -rng.uniform(0.8, 1.6, (rows, 1)) * np.log(1 + np.arange(NUM_CLASSES))
    z += rng.uniform(0, 1.5, (rows, 1)) * rng.normal(size=z.shape)
    z /= own
    z -= log_sum_exp(z)[:, None]
    ids = np.argpartition(-z, k - 1, axis=1)[:, :k]
    ids.sort(axis=1)
    log_probs = np.take_along_axis(z, ids, axis=1).astype(np.float32)
    np.put_along_axis(z, ids, -np.inf, axis=1)
    tails = [log_sum_exp(z / temperature) for temperature in GRID]
    return ids, log_probs, np.stack(tails, axis=1).astype(np.float32)


def divergence(true: list[np.ndarray], read: list[np.ndarray], g: int) -> np.ndarray:
    """KL at a temperature of the grid, of k classes and the tail."""
    both = []
    for log_probs, log_tail in (true, read):
        x = np.hstack([np.float64(log_probs) / GRID[g], log_tail[:, g : g + 1]])
        both.append(x - log_sum_exp(x)[:, None])
    log_p, log_q = both
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def cost(coding: TopKCoding, num_seeds: int, rows: int) -> dict[str, Any]:
    """KL in nats, mean and largest, at each temperature, by how peaked rows are."""
    found = {}
    for name, own in OWN_TEMPERATURES.items():
        kls: list[list[np.ndarray]] = [[] for _ in GRID]
        for seed in range(num_seeds):
            ids, *true = signal(np.random.default_rng(seed), rows, own, coding.k)
            record = coding.encode(ids, *true)
            _, *read = coding.decode([record], np.array([rows]))
            for g, found_at in enumerate(kls):
                found_at.append(divergence(true, read, g))
        found[name] = {
            str(temperature): {
                "mean": float(f"{np.mean(kl):.2g}"),
                "max": float(f"{np.max(kl):.2g}"),
            }
            for temperature, kl in zip(GRID, kls, strict=True)
        }
    return found


def measure(rounds: int, num_seeds: int, rows: int) -> dict[str, Any]:
    """All kinds, by name."""
    found: dict[str, Any] = {}
    for kind, coding in KINDS.items():
        found[kind] = {
            name: size_and_speed(coding, shape, rounds)
            for name, shape in BATCHES.items()
        }
        if isinstance(coding, TopKCoding) and coding.values != "float32":
            found[kind]["kl"] = cost(coding, num_seeds, rows)
    return found


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32, help="for each seed")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    found: dict[str, Any] = {"date": today(), "machine": machine()}
    found["versions"] = versions()
    found["num_classes"], found["temperatures"] = NUM_CLASSES, GRID
    found["sampled"] = SAMPLED
    found["batches"] = BATCHES
    found["kinds"] = measure(args.rounds, args.seeds, args.rows)
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()
