"""Where the teacher runs: in the student's program, beside it, or on other devices.

    python benchmarks/teacher.py                 # prints JSON; two minutes
    python benchmarks/teacher.py --out benchmarks/results/teacher.json

`programs`: a decoder as the teacher of a smaller one, on the same eight simulated
devices, as one program with one sharding, as one with two, and as two programs: what is
sent between devices, and the memory of one device, of what XLA has compiled. `overlap`:
the time of a step with the teacher in it, and with the teacher on another device.

Two cores are no two accelerators, and the CPU's backend runs the programs that one
thread sends one after the other, whatever their devices: here, and only here, the
student's steps are sent by a thread of their own. `threads` is real work, each program
on one thread of XLA, and has as much overlap as the machine leaves it; `waiting` has
programs that sleep, which stand for devices that are busy without the host: it shows
the order of dispatch and what the queue costs, and nothing of any hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from distilljax import Outputs, make_distill_step, models, objectives
from distilljax.metrics import write_atomically
from distilljax.sharding import (
    batch_axes,
    batch_sharding,
    mesh_from_string,
    tree_shardings,
)
from distilljax.teachers import StreamedTeacher
from distilljax.teachers.placed import within
from distilljax.workdir import machine, today, versions

TX = optax.adam(1e-3)
OBJECTIVE = objectives.LogitKD(temperature=2.0)
VOCAB, ROWS, TIME = 2048, 16, 64


def decoder(width: int, layers: int, heads: int = 8) -> models.DecoderConfig:
    """A small language model."""
    return models.DecoderConfig(
        vocab_size=VOCAB,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        ffn_width=4 * width,
    )


TEACHER, STUDENT = decoder(256, 4), decoder(128, 2)


def make_batch(rows: int = ROWS, time: int = TIME) -> dict[str, np.ndarray]:
    """Random tokens."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, time), np.int32)
    return {"tokens": tokens, "labels": np.roll(tokens, -1, axis=1)}


def on_mesh(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """A model by the rules of its kind."""
    state = nnx.state(module)
    rules = models.DECODER_RULES
    nnx.update(module, jax.device_put(state, tree_shardings(state, mesh, rules)))
    return module


# --- what is compiled -----------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def collectives(text: str) -> dict[str, dict[str, int]]:
    """How many of each kind, and the bytes of their results on one device.

    One in a loop counts once: the layers here are no loop, and the loss is one of few
    turns.
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for match in COLLECTIVE.finditer(text):
        counts[match[2]] += 1
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
            size = prod(int(n) for n in shape.split(",") if n)
            sizes[match[2]] += BYTES.get(dtype, 4) * size
    return {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in counts}


def described(compiled: Any) -> dict[str, Any]:
    """Collectives and memory of one program, on one device."""
    memory = compiled.memory_analysis()
    found = collectives(compiled.as_text())
    return {
        "collectives": found,
        "collective_bytes": sum(kind["bytes"] for kind in found.values()),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }


def step_of(teacher: Any, mesh: Mesh, **options: Any) -> Any:
    """The student's step, compiled for a mesh, with the teacher in it or not."""
    student = nnx.eval_shape(lambda: STUDENT(nnx.Rngs(1)))
    make = partial(
        make_distill_step, OBJECTIVE, teacher, student=student, tx=TX, **options
    )

    def init():
        return make().init(STUDENT(nnx.Rngs(1)))

    shapes = jax.eval_shape(init)
    shardings = tree_shardings(shapes, mesh, models.DECODER_RULES)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )
    return make(state_shardings=shardings, batch_axes=batch_axes(mesh)), state


def programs(student_mesh: str, teacher_mesh: str) -> dict[str, Any]:
    """One program, one with two shardings, and two, on the same eight devices."""
    here, there = mesh_from_string(student_mesh), mesh_from_string(teacher_mesh)
    batch = jax.device_put(make_batch(), batch_sharding(here))
    found: dict[str, Any] = {"student_mesh": student_mesh, "teacher_mesh": teacher_mesh}
    with jax.set_mesh(here):
        for name, mesh, options in (
            ("inline", here, {}),
            ("own_sharding", there, {"teacher_forward": within(there, None)}),
        ):
            step, state = step_of(on_mesh(TEACHER(nnx.Rngs(0)), mesh), here, **options)
            lowered = step.pure.lower(state, step.teacher_state, batch)
            found[name] = described(lowered.compile())
        streamed = StreamedTeacher(
            on_mesh(TEACHER(nnx.Rngs(0)), there),
            mesh=there,
            sharding=batch_sharding(here),
            example=batch,
        )
        step, state = step_of(None, here, teacher_head=streamed.head)
        sent = streamed.with_outputs(batch)
        lowered = step.pure.lower(state, step.teacher_state, sent)
        student = described(lowered.compile())
        teacher = described(streamed.lower(batch)[None].compile())
    total = student["collective_bytes"] + teacher["collective_bytes"]
    found["two_programs"] = {
        "student": student,
        "teacher": teacher,
        "collective_bytes": total,
        "bytes_per_token": streamed.bytes_per_token,
        "logits_bytes_per_token": 4 * VOCAB,
    }
    return found


# --- what overlaps --------------------------------------------------------------------


def busy(seconds: float, events: list[Any], name: str, x: Any) -> Any:
    """The same, after a while in which the host has nothing to do."""

    def wait(x):
        start = time.perf_counter()
        time.sleep(seconds)
        events.append((name, start, time.perf_counter()))
        return np.asarray(x)

    # the loop keeps the program off the host's own thread
    y = jax.lax.fori_loop(0, 2, lambda _, y: jnp.sin(y @ jnp.eye(y.shape[-1])), x)
    return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x + 0 * y)


def waiting(teacher_ms: float, student_ms: float, steps: int) -> dict[str, Any]:
    """Programs that sleep, on two devices: the order of dispatch, and the queue."""
    here, there = (mesh_from_string("data=1", [d]) for d in jax.devices()[:2])
    events: list[Any] = []
    weight = jnp.ones(())

    def teach(weight: Any, batch: Any) -> Outputs:
        return Outputs(
            busy(teacher_ms / 1e3, events, "teacher", batch["inputs"] * weight)
        )

    @jax.jit
    def train(total: Any, logits: Any) -> Any:
        return total + busy(student_ms / 1e3, events, "student", logits).sum()

    @jax.jit
    def both(total: Any, batch: Any) -> Any:
        return train(total, teach(jnp.ones(()), batch).logits)

    batch = jax.device_put(
        {"inputs": np.ones((8, 64), np.float32)}, batch_sharding(here)
    )
    streamed = StreamedTeacher(weight, teach, mesh=there, sharding=batch_sharding(here))

    def inline(count: int) -> None:
        total = jnp.zeros(())
        for _ in range(count):
            total = both(total, batch)
            jax.block_until_ready(total)

    def outside(count: int) -> None:
        held = [jax.device_put(jnp.zeros(()), here.devices.item())]

        def step(logits: Any) -> Any:
            held[0] = train(held[0], logits)
            return held[0]

        with Sender() as sender:
            for sent in streamed(batch for _ in range(count)):
                sender.send(partial(step, sent["teacher"].logits))

    def teacher(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(streamed.with_outputs(batch)["teacher"])

    def student(count: int) -> None:
        total = jax.device_put(jnp.zeros(()), here.devices.item())
        for _ in range(count):
            total = jax.block_until_ready(train(total, batch["inputs"]))

    runs = {"inline": inline, "streamed": outside}
    found = timed(runs | {"teacher": teacher, "student": student}, steps)
    events.clear()
    outside(steps)
    both_busy = overlapping(events)
    starts = {
        name: [a for n, a, _ in events if n == name] for name in ("teacher", "student")
    }
    ends = [b for n, _, b in events if n == "student"]
    ahead = [starts["teacher"][i + 1] < ends[i] for i in range(steps - 1)]
    ideal = max(found["teacher_ms"], found["student_ms"])
    return {
        "teacher_sleeps_ms": teacher_ms,
        "student_sleeps_ms": student_ms,
        **found,
        "ideal_ms": ideal,
        "streamed_to_ideal": round(found["streamed_ms"] / ideal, 3),
        "teacher_started_before_the_student_ended": round(sum(ahead) / len(ahead), 3),
        "both_busy": round(both_busy, 3),
    }


class Sender:
    """Sends the student's steps from a thread of its own; one is on its way."""

    def __enter__(self) -> Sender:
        """Begin."""
        self._thread = ThreadPoolExecutor(1)
        self._last: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the last one."""
        self.wait()
        self._thread.shutdown()

    def wait(self) -> Any:
        """What the last one has returned."""
        found, self._last = self._last and self._last.result(), None
        return found

    def send(self, step: Callable[[], Any]) -> None:
        """Wait for the one before, and send the next."""
        self.wait()
        self._last = self._thread.submit(lambda: jax.block_until_ready(step()))


def overlapping(events: list[Any]) -> float:
    """The share of the shorter one's time in which both were busy."""
    spans = {
        name: [(a, b) for n, a, b in events if n == name]
        for name in ("teacher", "student")
    }
    shared = sum(
        max(0.0, min(b, d) - max(a, c))
        for a, b in spans["teacher"]
        for c, d in spans["student"]
    )
    return shared / min(sum(b - a for a, b in span) for span in spans.values())


def timed(runs: dict[str, Callable[[int], None]], steps: int) -> dict[str, float]:
    """Milliseconds per step: the median of five turns each."""
    for run in runs.values():
        run(2)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):
        for name, run in runs.items():
            start = time.perf_counter()
            run(steps)
            times[name].append(1e3 * (time.perf_counter() - start) / steps)
    return {f"{name}_ms": round(statistics.median(t), 3) for name, t in times.items()}


def threads(steps: int) -> dict[str, Any]:
    """Real models on two devices, each program on one thread."""
    here, there = (mesh_from_string("data=1", [d]) for d in jax.devices()[:2])
    rows = batch_sharding(here)
    batch = jax.device_put(make_batch(8), rows)
    held: dict[str, Any] = {}

    def prepare(name: str, teacher: Any, **options: Any) -> Any:
        step, shapes = step_of(teacher, here, **options)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        init = jax.jit(lambda: step.init(STUDENT(nnx.Rngs(1))), out_shardings=shardings)
        held[name] = init()
        return step

    with jax.set_mesh(here):
        whole = prepare("inline", on_mesh(TEACHER(nnx.Rngs(0)), here))
        streamed = StreamedTeacher(
            on_mesh(TEACHER(nnx.Rngs(0)), there),
            mesh=there,
            sharding=rows,
            example=batch,
        )
        part = prepare("streamed", None, teacher_head=streamed.head)
        once = streamed.with_outputs(batch)

        def update(name: str, step: Any, batch: Any) -> Any:
            with jax.set_mesh(here):  # a context is one of its thread
                held[name], metrics = step.pure(held[name], step.teacher_state, batch)
            return metrics

        def train(name: str, step: Any, batches: Iterator[Any]) -> None:
            with Sender() as sender:
                for batch in batches:
                    sender.send(partial(update, name, step, batch))

        def teacher_alone(count: int) -> None:
            for _ in range(count):
                jax.block_until_ready(streamed.with_outputs(batch)["teacher"])

        runs: dict[str, Callable[[int], None]] = {
            "inline": lambda n: train("inline", whole, (batch for _ in range(n))),
            "streamed": lambda n: train(
                "streamed", part, streamed(batch for _ in range(n))
            ),
            "teacher": teacher_alone,
            "student": lambda n: train("streamed", part, (once for _ in range(n))),
        }
        found = timed(runs, steps)
    ideal = max(found["teacher_ms"], found["student_ms"])
    return {
        **found,
        "ideal_ms": ideal,
        "streamed_to_ideal": round(found["streamed_ms"] / ideal, 3),
        "inline_to_streamed": round(found["inline_ms"] / found["streamed_ms"], 3),
        "bytes_per_token": streamed.bytes_per_token,
    }


PARTS: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
    "programs": (
        8,
        lambda: {
            "fsdp_and_tensor": programs("fsdp=8", "tensor=8"),
            "data_and_tensor": programs("data=8", "tensor=8"),
        },
    ),
    "overlap": (
        2,
        lambda: {
            "waiting": [waiting(20, 20, 40), waiting(10, 30, 40), waiting(30, 10, 40)],
            "threads": threads(10),
        },
    ),
}


def run_apart(part: str) -> dict[str, Any]:
    """A part in a process of its own, which has its own number of devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(PARTS[part][0]),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }
    command = [sys.executable, __file__, "--part", part]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    """Run all, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, help="one of them, in this process")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.part is not None:
        print(json.dumps(PARTS[args.part][1]()))
        return
    found: dict[str, Any] = {"date": today(), "machine": machine()}
    found["versions"] = versions()
    found |= {part: run_apart(part) for part in PARTS}
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, text)


if __name__ == "__main__":
    main()
