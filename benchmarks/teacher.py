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
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from teacher_models import TEACHER, VOCAB, make_batch, on_mesh, step_of
from teacher_overlap import threads, waiting

from distilljax.metrics import write_atomically
from distilljax.sharding import (
    batch_sharding,
    mesh_from_string,
)
from distilljax.teachers import StreamedTeacher
from distilljax.teachers.placed import within
from distilljax.workdir import machine, today, versions

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
            "waiting": [
                waiting(20, 20, 40),
                waiting(60, 60, 20),
                waiting(10, 30, 40),
                waiting(30, 10, 40),
            ],
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
