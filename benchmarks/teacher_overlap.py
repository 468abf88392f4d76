"""What of `teacher.py` is time: a step with its teacher, and with one elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from teacher_models import STUDENT, TEACHER, make_batch, on_mesh, step_of

from distilljax import Outputs
from distilljax.sharding import batch_sharding, mesh_from_string
from distilljax.teachers import StreamedTeacher


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
    """Milliseconds per step: the median of five turns each.

    What more steps take than a few: the first batch has to wait for its teacher, and no
    step is there to wait meanwhile.
    """
    few = max(steps // 4, 1)
    for run in runs.values():
        run(2)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):
        for name, run in runs.items():
            start = time.perf_counter()
            run(few)
            middle = time.perf_counter()
            run(few + steps)
            seconds = time.perf_counter() - middle - (middle - start)
            times[name].append(1e3 * seconds / steps)
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
