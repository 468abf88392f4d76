"""A store of a teacher's signal: bytes on disk, speed of reading, waiting, and kills.

    python benchmarks/store.py                    # prints JSON; some ten minutes
    python benchmarks/store.py --out benchmarks/results/store.json

`coding` is what `store_coding.py` measures: one core, random classes. `disk` writes
whole stores by `caching.cache`, of a teacher with 151,936 classes that is as sure as a
language model (some 12 different classes in 50 draws), and reads batches of them as a
run does: from the index of the examples to padded arrays. `waiting` is the share of the
time that the loop of the language-model benchmark spends in getting its batches from a
store. `kills` ends a writer by SIGKILL at 20 random moments, and compares the store
that is finished at last with one that was written without a stop.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import lm_steps
import numpy as np
import store_coding
from flax import nnx

from distilljax import Outputs, make_distill_step, objectives, students
from distilljax.caching import cache
from distilljax.config import Config
from distilljax.data import Loader, prefetch_to_device
from distilljax.data.text import ByteTokenizer, Packed, Texts, Tokenized
from distilljax.metrics import write_atomically
from distilljax.models import DecoderConfig
from distilljax.sharding import batch_sharding, mesh_from_string
from distilljax.teachers import CachedTeacher, Hidden, Sampled, TopK
from distilljax.workdir import machine, today, versions

CLASSES = 151_936
GRID = (1.0, 2.0, 4.0)
KINDS = {
    "sampled_50": Sampled(50),
    "top_32": TopK(32, GRID),
    "top_128": TopK(128, GRID),
    "hidden_64_float32": Hidden(),
}
# What the writers that are killed write: records alone, and a file of the head's too.
KILLED = {"sampled_50": KINDS["sampled_50"], "hidden": KINDS["hidden_64_float32"]}
TEACHER = DecoderConfig(
    vocab_size=CLASSES, width=64, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=64, ffn_width=64, tied=False,
)  # fmt: skip
# As sharp as gives some 12 different ids.
SURE = 6.5
# Rows that are a piece of one document, or many short documents: bytes, and how many.
TEXTS = {"long": (700, 48), "short": (13, 3000)}


def texts(kind: str, seed: int = 0) -> Tokenized:
    size, count = TEXTS[kind]
    rng = np.random.default_rng(seed)
    found = ["".join(map(chr, rng.integers(97, 123, size))) for _ in range(count)]
    return Tokenized(Texts(tuple(found)), ByteTokenizer())


@dataclass(frozen=True)
class Sure:
    """A teacher's forward whose distributions are as sharp as those of real ones."""

    scale: float = 5.6

    def __call__(self, model: Any, batch: Any) -> Outputs:
        """A head whose logits have this standard deviation, nearly."""
        head = model(batch["tokens"], batch["positions"], batch["segment_ids"]).logits
        hidden = head.hidden / jax.numpy.std(head.hidden, axis=-1, keepdims=True)
        size = jax.numpy.std(head.kernel) * TEACHER.width**0.5
        scaled = hidden * (self.scale / size)
        return Outputs(replace(head, hidden=scaled))


def config(kind: str, sure: float = 5.6) -> Config:
    return Config(
        name="store",
        student=replace(TEACHER, width=64),
        teacher=students.Untrained(TEACHER),
        teacher_forward=Sure(sure),
        objective=objectives.LogitKD(),
        data=Packed(texts(kind), 256),
        loader=Loader(batch_size=32),
        steps=1,
        eval_batch_size=4,
    )


def disk(kind: str, signal_kind: Any, folder: Path, **how: float) -> dict[str, float]:
    """Bytes per position of a store, and positions per second of reading it."""
    run = config(kind, **how)
    begun = time.perf_counter()
    manifest = cache(run, folder, logits=signal_kind)
    seconds = time.perf_counter() - begun
    counts = manifest["counts"]
    source = run.data()
    found = {
        "positions": counts["positions"],
        "units": counts["units"],
        "bytes_per_position": counts["bytes"] / counts["positions"],
        "written_per_second_with_the_teacher": counts["positions"] / seconds,
        "coding_kl": manifest["coding_kl"],
    }
    signals = CachedTeacher(str(folder))().of(source)
    batches = run.loader(source, seed=0)
    signals.outputs(next(batches))  # opens the shards
    best = 0.0
    for _ in range(5):
        batch = next(batches)
        begun = time.process_time()
        outputs = signals.outputs(batch)
        seconds = time.process_time() - begun
        best = max(best, batch["loss_mask"].sum() / seconds)
    if hasattr(outputs.logits, "log_weights"):
        used = outputs.logits.log_weights[batch["loss_mask"]] > -np.inf
        found["different_ids"] = float(used.sum(-1).mean())
    return {**found, "read_per_cpu_second": float(best)}


def waiting(folder: Path, num_steps: int = 40) -> dict[str, float]:
    """The share of a loop's time in which it has no batch yet."""
    shape = "vocabulary"
    student, teacher = lm_steps.models_of(shape)
    run = replace(
        config("long"),
        student=lm_steps.config_of(shape, "student"),
        teacher=students.Untrained(lm_steps.config_of(shape, "teacher")),
        teacher_forward=None,
        loader=Loader(batch_size=lm_steps.BATCH),
    )
    del teacher
    cache(run, folder, logits=Sampled(50))
    source, mesh = run.data(), mesh_from_string("data=-1")
    signals = CachedTeacher(str(folder))().of(source)
    optimizer = nnx.Optimizer(student, lm_steps.TX, wrt=nnx.Param)
    step = make_distill_step(objectives.LogitKD())
    with jax.set_mesh(mesh):
        joined: Any = signals.on_host(run.loader(source, seed=0))
        batches = prefetch_to_device(joined, batch_sharding(mesh))
        waited, metrics, begun = 0.0, {}, 0.0
        for number in range(num_steps + 3):
            if number == 3:  # compiled, and the queue is full
                jax.block_until_ready(metrics)
                waited, begun = 0.0, time.perf_counter()
            start = time.perf_counter()
            batch, _ = next(batches)
            waited += time.perf_counter() - start
            metrics = step(student, optimizer, batch)
        jax.block_until_ready(metrics)
        total = time.perf_counter() - begun
    return {
        "seconds_per_step": total / num_steps,
        "seconds_per_batch": waited / num_steps,
        "share": waited / total,
    }


WRITER = """
import sys
from store import KILLED, config
from dataclasses import replace
from distilljax.caching import cache
run = replace(config("long"), eval_batch_size=2)
cache(run, sys.argv[1], shard_rows=2, logits=KILLED[sys.argv[2]])
"""


def writer(out: Path, kind: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    words = [sys.executable, "-c", WRITER, str(out), kind]
    return subprocess.Popen(words, env=environment)


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.iterdir()):
        if path.name != ".lock":
            yield path.name, path.read_bytes()


def written(out: Path) -> int:
    """Shards that are complete, of a store that is not."""
    return len(list(out.glob("shard-*.json")))


def finish(out: Path, kind: str) -> None:
    if writer(out, kind).wait():
        raise SystemExit("store: the writer must end well, got an error")


def kills(folder: Path, times: int = 20) -> dict[str, Any]:
    """Kills at random moments; each store is finished then, and compared with a whole
    one."""
    for kind in KILLED:
        finish(folder / kind, kind)
    of_whole = len(list((folder / "hidden").glob("shard-*.array_record")))
    draw, found = random.Random(0), []
    while len(found) < times:
        kind = list(KILLED)[len(found) % len(KILLED)]
        killed = folder / "killed"
        process = writer(killed, kind)
        # so many shards, and somewhere within the next
        least = draw.randrange(of_whole)
        while process.poll() is None and written(killed) < least:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.02))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            shards = written(killed)
            whole = (killed / "manifest.json").exists()
            finish(killed, kind)
            same = list(files(killed)) == list(files(folder / kind))
            found.append({"kind": kind, "shards": shards, "whole": whole, "same": same})
            print(found[-1], flush=True)
        shutil.rmtree(killed, ignore_errors=True)
    return {
        "date": today(),
        "kills": len(found),
        "killed": found,
        "byte_identical": all(one["same"] for one in found),
    }


def sure(folder: Path) -> dict[str, float]:
    """A teacher with some 12 different ids in 50 draws, as language models have."""
    return disk("long", KINDS["sampled_50"], folder, sure=SURE)


def measure() -> dict[str, Any]:
    found: dict[str, Any] = {
        "format": 1, "date": today(), "versions": versions(), "machine": machine(),
        "classes": CLASSES, "grid": GRID, "disk": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for length in TEXTS:
            for kind, signal_kind in KINDS.items():
                out = folder / length / kind
                found["disk"].setdefault(length, {})[kind] = disk(
                    length, signal_kind, out
                )
                print(length, kind, found["disk"][length][kind], flush=True)
        found["disk"]["long"]["sampled_50_sure"] = sure(folder / "sure")
        found["waiting"] = waiting(folder / "waiting")
        print("waiting", found["waiting"], flush=True)
        found["kills"] = kills(folder)
        print("kills", found["kills"], flush=True)
    found["coding"] = store_coding.measure(rounds=5, num_seeds=4, rows=32)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write JSON")
    parser.add_argument("--only", choices=("kills", "sure"), help="of --out, this anew")
    args = parser.parse_args()
    if args.only:
        found = json.loads(args.out.read_text())
        with tempfile.TemporaryDirectory() as name:
            if args.only == "kills":
                found["kills"] = kills(Path(name))
            else:
                found["disk"]["long"]["sampled_50_sure"] = sure(Path(name) / "sure")
    else:
        found = measure()
    if args.out:
        write_atomically(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
