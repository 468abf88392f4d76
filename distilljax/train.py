"""The loop, read top to bottom: ``train(config, workdir)``.

Notebooks call it, and so does the command line. A run that was stopped, killed or
preempted goes on where its last checkpoint was; one that is finished says so.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distilljax.checkpoints import Checkpoints, preempted
from distilljax.config import Config, to_json
from distilljax.data import prefetch_to_device
from distilljax.evaluation.evaluate import Evaluation
from distilljax.metrics import NonFiniteError, Window, open_writers, write_atomically
from distilljax.programs import Programs
from distilljax.sharding import batch_sharding, mesh_from_string
from distilljax.workdir import claim, machine, read_json, today, versions


def train(
    config: Config,
    workdir: str | Path,
    *,
    programs: Programs | None = None,
    title: str | None = None,
    arm: str = "default",
    profile: bool = False,
) -> dict[str, Any]:
    """Train a student and measure it; resume if the folder has a part of this run.

    Args:
      config: What to do.
      workdir: Folder of the run; created, or taken up again.
      programs: Compiled programs to share with other runs of this process.
      title: Name in the progress bar.
      arm: Name of the variant, for the report.
      profile: Write an XProf trace of 10 steps to `workdir/profile`.

    Returns:
      What is in `results.json`; `{"stopped_at": step}` if the run was told to stop.

    Raises:
      ValueError: the config, the data or the folder cannot be used; nothing is changed.
      NonFiniteError: the loss is nan or inf; the last checkpoint is from before it.
    """
    workdir = Path(workdir)
    programs = Programs() if programs is None else programs
    mesh = mesh_from_string(config.mesh)
    with claim(workdir, config), jax.set_mesh(mesh), stop_requested() as stop:
        run = _Run(config, workdir, programs, mesh, arm)
        if (done := run.finished()) is not None:
            return done
        state, start = run.restore_or_init()
        writers = open_writers(workdir, title or config.name, config.steps, start)
        batches = prefetch_to_device(run.iterator, run.sharding)
        window = Window()
        update = run.training.update
        try:
            with _profile(workdir / "profile", profile) as trace:
                for step in range(start + 1, config.steps + 1):
                    trace(step - start)
                    batch, index = next(batches)
                    state, metrics = update(state, batch)
                    window.add(step, metrics, index, len(index))
                    last = step == config.steps
                    if step % config.log_every_steps == 0 or last:
                        run.log(writers, "train", window.flush())
                    stopping = stop.is_set() or preempted(step)
                    numbers = None
                    if step % config.eval_every_steps == 0 or last:
                        numbers = run.validate(writers, step, state)
                    if run.saves(step, numbers) or last or stopping:
                        # what is saved is known to be finite
                        run.log(writers, "train", window.flush())
                        run.save(step, state, batches, numbers)
                    if stopping and not last:
                        return {"stopped_at": step}
            return run.results(state)
        except NonFiniteError as error:
            raise run.explain(error) from error
        finally:
            run.checkpoints.close()
            for writer in writers:
                writer.close()


class _Run:
    """The parts of one run. `train` above is the order in which they act."""

    def __init__(
        self, config: Config, workdir: Path, programs: Programs, mesh: Any, arm: str
    ):
        self.config, self.workdir, self.mesh, self.arm = config, workdir, mesh, arm
        self.programs = programs
        self.started = time.perf_counter()
        self.seconds_before = 0.0
        self.sharding = batch_sharding(mesh)
        self.process = {
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        self.source = programs.source(config.data)
        self.teacher = programs.teacher(config, mesh)
        self.student = programs.student(config, mesh)
        self.iterator = config.loader(self.source, seed=config.seed, **self.process)
        self.training = programs.training(config, mesh)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            select=config.select,
            mode=config.select_mode,
            keep_last=config.keep_last,
        )

    # --- before the loop --------------------------------------------------------------

    def finished(self) -> dict[str, Any] | None:
        """The results of a run that already has all its steps."""
        path = self.workdir / "results.json"
        if path.exists():
            results = read_json(path)
            if results["steps"] == self.config.steps:
                return {**results, "already_finished": True}
        return None

    def restore_or_init(self) -> tuple[Any, int]:
        """The state of the newest checkpoint, or a new one."""
        step = self.checkpoints.latest()
        if step is None:
            return self.training.init(self.config.seed), 0
        state, meta = self.checkpoints.restore(step, self.training.like)
        expected = None if self.teacher is None else self.teacher.fingerprint
        if meta["teacher"] != expected:
            raise ValueError(
                f"train: --workdir must resume with its teacher {meta['teacher']}, got "
                f"{expected}. Restore that teacher, or choose another folder."
            )
        self.iterator.set_state(meta["data"])
        self.seconds_before = meta["seconds"]
        return state, step

    # --- inside the loop --------------------------------------------------------------

    def seconds(self) -> float:
        """Time spent in this run, over all its parts."""
        return self.seconds_before + time.perf_counter() - self.started

    def log(self, writers: Any, split: str, record: dict[str, Any]) -> None:
        """Give a record to every writer."""
        if record:
            for writer in writers:
                writer.write({"seconds": self.seconds(), "split": split, **record})

    def evaluate(self, source: Any, state: Any) -> Evaluation:
        """The student (its moving average, if it has one) on a source."""
        params = state.params if state.ema is None else state.ema
        batches = self.config.loader.eval_batches(
            source, batch_size=self.config.eval_batch_size, **self.process
        )
        teacher_state = None if self.teacher is None else self.teacher.state
        return self.student.evaluator(
            params,
            state.rest,
            teacher_state,
            (batch for batch, _ in prefetch_to_device(batches, self.sharding)),
        )

    def validate(
        self, writers: Any, step: int, state: Any
    ) -> dict[str, float] | None:
        """Measures on the validation split, if there is one."""
        if self.config.validation is None:
            return None
        source = self.programs.source(self.config.validation)
        found = self.evaluate(source, state).student
        numbers = {k: v for k, v in found.items() if isinstance(v, float)}
        self.log(writers, "validation", {"step": step, **numbers})
        return numbers

    def saves(self, step: int, numbers: dict[str, float] | None) -> bool:
        """True if a checkpoint is due: by the clock, or because it may be the best."""
        may_be_best = numbers is not None and self.config.select is not None
        return may_be_best or step % self.config.checkpoint_every_steps == 0

    def save(
        self, step: int, state: Any, batches: Any, numbers: dict[str, float] | None
    ) -> None:
        """Start writing a checkpoint of everything but the teacher."""
        meta = {
            "data": batches.get_state(),
            "teacher": None if self.teacher is None else self.teacher.fingerprint,
            "seconds": self.seconds(),
            "config": to_json(self.config),
            "versions": versions(),
        }
        self.checkpoints.save(step, state, meta, numbers)

    def explain(self, error: NonFiniteError) -> NonFiniteError:
        """Say which examples, whether they are the cause, and what is still good."""
        latest = self.checkpoints.latest()
        index = [] if error.index is None else error.index.tolist()
        bad = [
            i
            for i in index
            if not np.all(np.isfinite(np.asarray(self.source[i]["inputs"], np.float64)))
        ]
        cause = (
            f"The inputs of examples {bad} of the training data are not finite: "
            "remove them."
            if bad
            else "All inputs of that batch are finite: lower the learning rate, clip "
            "the gradient (--optimizer.clip-norm 1), or check the loss."
        )
        good = (
            "No checkpoint was written before it."
            if latest is None
            else f"The checkpoint of step {latest} is from before it, and good."
        )
        error.args = (f"{error.args[0]} Examples of the batch: {index}. {cause} {good}",)
        return error

    # --- after the loop ---------------------------------------------------------------

    def results(self, state: Any) -> dict[str, Any]:
        """Measure the best checkpoint on test data, and write it down."""
        best_step, value = self.selected()
        if best_step != int(state.step):
            state, _ = self.checkpoints.restore(best_step, self.training.like)
        results = {
            "format": 1,
            "name": self.config.name,
            "arm": self.arm,
            "seed": self.config.seed,
            "baseline": self.config.baseline,
            "description": self.config.description,
            "expected": self.config.expected,
            "focus_classes": list(self.config.focus_classes),
            "steps": self.config.steps,
            "examples_seen": self.config.steps * self.config.loader.batch_size,
            "train_seconds": self.seconds(),
            "selected": {
                "step": best_step,
                "metric": self.config.select and f"validation/{self.config.select}",
                "value": value,
            },
            "versions": versions(),
            "machine": machine(),
            "date": today(),
        }
        if self.config.test is not None:
            source = self.programs.source(self.config.test)
            measured, predictions = self.measure("test", source, state)
            results |= measured
            if jax.process_index() == 0:
                write_atomically(self.workdir / "predictions.npz", predictions)
        if jax.process_index() == 0:
            text = json.dumps(results, indent=1) + "\n"
            write_atomically(self.workdir / "results.json", text)
        return results

    def selected(self) -> tuple[int, float | None]:
        """The best checkpoint and its measure, or the last, as the config says."""
        self.checkpoints.wait()
        return self.checkpoints.best() or (self.config.steps, None)

    def measure(
        self, split: str, source: Any, state: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Quality and cost of student and teacher on a split; predictions as npz."""
        found = self.evaluate(source, state)
        params = state.params if state.ema is None else state.ema
        example = next(self.config.loader.eval_batches(source, batch_size=1))["inputs"]
        student = {**found.student, **self.student.cost(state, params, example)}
        teacher = None
        if self.teacher is not None and found.teacher is not None:
            costs = self.student.teacher_cost(self.teacher, example)
            teacher = {**found.teacher, **costs}
        arrays = {"labels": found.labels, "student": found.student_predictions}
        if found.teacher_predictions is not None:
            arrays["teacher"] = found.teacher_predictions
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        names = getattr(source, "class_names", None) or ()
        return {
            "split": split,
            "num_examples": found.student["num_examples"],
            "class_names": [str(name) for name in names],
            "student": student,
            "teacher": teacher,
        }, buffer.getvalue()


def evaluate(config: Config, workdir: str | Path, *, split: str) -> dict[str, Any]:
    """Measure the selected checkpoint of a run on a split; changes nothing on disk.

    Args:
      config: The config of the run.
      workdir: Its folder.
      split: `validation` or `test`.

    Returns:
      `split`, `num_examples`, `class_names`, and the measures of `student` and
      `teacher`; see `evaluation.measures.summarize` and `evaluation.cost.cost`.
    """
    workdir = Path(workdir)
    source = getattr(config, split)
    if source is None:
        raise ValueError(
            f"evaluate: --split must be one that the config has, got {split!r}. Give "
            f"the config a {split} source."
        )
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(
            f"evaluate: --workdir must hold a run, got {str(workdir)!r}. Train it first."
        )
    mesh = mesh_from_string(config.mesh)
    with jax.set_mesh(mesh):
        run = _Run(config, workdir, Programs(), mesh, "default")
        step, _ = run.selected()
        state, _ = run.checkpoints.restore(step, run.training.like)
        measured, _ = run.measure(split, source(), state)
        run.checkpoints.close()
    return {"step": step, **measured}


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: the loop saves between two steps and returns.

    With several processes the event is left alone: JAX's preemption point, which all
    processes reach at the same step, is what they act on (`checkpoints.preempted`).
    """
    event = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _profile(directory: Path, enabled: bool, first: int = 11, num_steps: int = 10):
    """A function to call with each step's number; traces a window of them."""
    running = False

    def at(step: int) -> None:
        nonlocal running
        if enabled and step == first:
            jax.profiler.start_trace(str(directory))
            running = True
        elif running and step == first + num_steps:
            jax.profiler.stop_trace()
            running = False

    try:
        yield at
    finally:
        if running:
            jax.profiler.stop_trace()
