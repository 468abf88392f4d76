"""The parts of one run; `train.train` is the order in which they act."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from distilljax._checks import fail
from distilljax.checkpoints import Checkpoints
from distilljax.config import Config
from distilljax.data import Arrays, check_signal, prefetch_to_device
from distilljax.data.prefetch import this_process
from distilljax.data.text import check_vocabulary
from distilljax.losses import SampledLogits, SparseLogits
from distilljax.metrics import (
    NonFiniteError,
    Writer,
    open_writers,
    trace_steps,
    write_atomically,
)
from distilljax.not_finite import why_not_finite
from distilljax.programs import Programs, batch_shapes
from distilljax.sharding import batch_sharding
from distilljax.teachers import StreamedTeacher
from distilljax.vocabulary import one_vocabulary
from distilljax.workdir import machine, read_json, today, versions

# What the validation split is measured by, and which value is the best; the last two
# need a teacher.
SELECTABLE = {
    "accuracy": "max",
    "nll": "min",
    "ece": "min",
    "kl_to_teacher": "min",
    "agreement": "max",
}

# Fields of the config that the report alone reads: a finished run takes new ones over.
ONLY_REPORTED = ("baseline", "description", "expected", "focus_classes", "headline")


class Run:
    """One run: what it needs, what it checks, what it writes."""

    def __init__(
        self,
        config: Config,
        saved: Any,
        workdir: Path,
        programs: Programs,
        mesh: Mesh,
        arm: str,
    ):
        self.saved, self.workdir, self.arm = saved, workdir, arm
        self.programs = programs
        self.started = time.perf_counter()
        self.seconds_before = 0.0
        self.source = programs.source(config.data, config.loader)
        self.config = config = one_vocabulary(config, programs, mesh, self.source)
        self.teacher = programs.teacher(config, mesh)
        self.student = programs.student(config, mesh)
        self.reader = this_process(batch_sharding(mesh))
        self.provider = programs.provider(config, mesh, self.source)
        self.iterator: Any = config.loader(self.source, seed=config.seed, **self.reader)
        if self.provider is not None:
            self.iterator = self.provider.on_host(self.iterator)
        self.training = programs.training(config, mesh, self.provider)

    def open(self, part: Any) -> Any:
        """A source of the config."""
        return self.programs.source(part, self.config.loader)

    # --- before the loop --------------------------------------------------------------

    def finished(self) -> dict[str, Any] | None:
        """The results of a run that already has all its steps."""
        path = self.workdir / "results.json"
        if path.exists():
            results = read_json(path)
            if results["steps"] == self.config.steps:
                # what may be null may also be left out
                self.check_teacher(results.get("teacher_fingerprint", self.taught_by))
                return {**self.described(results), "already_finished": True}
        return None

    def described(self, results: dict[str, Any]) -> dict[str, Any]:
        """Results with what only the report reads as the config has it now."""
        new = {name: self.saved[name] for name in ONLY_REPORTED}
        if results != (results | new) and jax.process_index() == 0:
            for name, old in (
                ("config.json", read_json(self.workdir / "config.json")),
                ("results.json", results),
            ):
                text = json.dumps(old | new, indent=1) + "\n"
                write_atomically(self.workdir / name, text)
        return results | new

    @property
    def max_lead(self) -> int | None:
        """Steps that the host may be ahead: what is made for them is in memory."""
        return getattr(self.provider, "depth", None)

    @property
    def taught_by(self) -> str | None:
        """The fingerprint of the teacher, if there is one."""
        if self.provider is not None:
            return self.provider.fingerprint
        return None if self.teacher is None else self.teacher.fingerprint

    def check_teacher(self, before: str | None) -> None:
        """The teacher is the one that this run began with."""
        if before != self.taught_by:
            fail(
                "train",
                "the teacher",
                f"be the one that {str(self.workdir)!r} began with, {before}",
                self.taught_by,
                "Restore that teacher, or choose another folder.",
            )

    def check(self) -> None:
        """Whatever can be found wrong before anything is computed or written."""
        before = self.iterator.get_state()
        batch = batch_shapes(next(self.iterator), self.reader["process_count"])
        self.iterator.set_state(before)
        self.num_classes = self.student.num_classes(batch)
        self.check_labels("data", self.source)
        self.student.check(self.config, self.num_classes, batch)
        if self.provider is not None:
            batch = self.provider.shapes(batch)
        self.training.check(batch)
        parts = {"validation": self.config.validation, "test": self.config.test}
        for name, part in (parts | (self.config.other_tests or {})).items():
            if part is not None:
                source = self.open(part)
                next(self.config.loader.eval_batches(source, batch_size=1))
                self.check_labels(name, source)
        known = list(SELECTABLE) if self.teacher else list(SELECTABLE)[:3]
        if self.config.select not in (None, *known):
            fail(
                "train",
                "--select",
                f"be None or one of {', '.join(known)}",
                repr(self.config.select),
                "These are measured on the validation split; what compares with a "
                "teacher needs one: of a store, CachedTeacher(..., teacher=...).",
            )
        if self.config.select and self.config.select_mode not in (
            None,
            SELECTABLE[self.config.select],
        ):
            fail(
                "train",
                "--select-mode",
                f"be {SELECTABLE[self.config.select]} for {self.config.select}",
                self.config.select_mode,
                "Leave it out: the measure says which value is the best.",
            )

    def check_labels(self, name: str, source: Any) -> None:
        """The labels of a split are classes of the student, if that is known yet.

        Transforms may make other labels: those are checked where they are read.
        """
        tokenizer = getattr(source, "tokenizer", None)
        if tokenizer is not None and self.num_classes is not None:
            check_vocabulary(tokenizer, self.num_classes)
        highest = (getattr(source, "num_classes", None) or 0) - 1
        if isinstance(source, Arrays) and source.labels is not None:
            highest = int(source.labels.max())
        if getattr(self.config.loader, "transforms", ()) or self.num_classes is None:
            return
        if highest >= self.num_classes:
            fail(
                "train",
                f"{name} labels",
                f"lie in [0, {self.num_classes}), the classes of the student",
                highest,
                "Change the student's number of classes, or leave these examples out.",
            )

    def check_batch(self, batch: dict[str, Any]) -> None:
        """The classes that a teacher's sparse signal names are the student's."""
        if self.num_classes is None:
            return
        sparse = (SparseLogits, SampledLogits)
        signals = jax.tree.leaves(
            batch.get("teacher"), is_leaf=lambda x: isinstance(x, sparse)
        )
        for signal in signals:
            if isinstance(signal, sparse):
                check_signal(signal, self.num_classes, batch.get("loss_mask"))

    def open_checkpoints(self) -> Checkpoints:
        """The checkpoints of this run."""
        self.checkpoints = Checkpoints(
            self.workdir / "checkpoints",
            select=self.config.select,
            mode=SELECTABLE.get(self.config.select or "", "max"),
            keep_last=self.config.keep_last,
        )
        return self.checkpoints

    def restore_or_init(self) -> tuple[Any, int]:
        """The state of the newest checkpoint, or a new one."""
        step = self.checkpoints.latest()
        if step is None:
            return self.training.init(self.config.seed), 0
        if step > self.config.steps:
            fail(
                "train",
                "--steps",
                f"be at least {step}, which this run has made",
                self.config.steps,
                "Choose another folder for a shorter run.",
            )
        state, meta = self.checkpoints.restore(step, self.training.like)
        self.check_teacher(meta["teacher"])
        self.iterator.set_state(meta["data"])
        self.seconds_before = meta["seconds"]
        return state, step

    def begin(self) -> None:
        """Write the config down; set results of fewer steps aside."""
        if jax.process_index() == 0:
            if isinstance(self.provider, StreamedTeacher):
                note = f"note: {self.provider.described()}"
                print(note, file=sys.stderr, flush=True)
            write_atomically(
                self.workdir / "config.json", json.dumps(self.saved, indent=1) + "\n"
            )
            for name in ("results.json", "predictions.npz"):
                if (old := self.workdir / name).exists():
                    old.replace(self.workdir / f"previous_{name}")

    def batches(self, mesh: Mesh) -> Any:
        """Pairs of a batch on the devices and its index; resumable."""
        sharding = batch_sharding(mesh)
        sent = prefetch_to_device(self.iterator, sharding, check=self.check_batch)
        return sent if self.provider is None else self.provider.on_devices(sent)

    # --- inside the loop --------------------------------------------------------------

    def seconds(self) -> float:
        """Time spent in this run, over all its parts."""
        return self.seconds_before + time.perf_counter() - self.started

    @contextlib.contextmanager
    def writers(
        self, title: str | None, start: int
    ) -> Iterator[tuple[Callable[[str, dict[str, Any]], None], Callable[[int], None]]]:
        """A function that gives a split's record to every writer; one for each step.

        A step that is not finite ends the run here, with what is known about it.
        """
        title = title or self.config.name
        writers: tuple[Writer, ...] = ()

        def log(split: str, record: dict[str, Any]) -> None:
            if record:
                for writer in writers:
                    writer.write({"seconds": self.seconds(), "split": split, **record})

        def advance(step: int) -> None:
            for writer in writers:
                writer.advance(step)

        with contextlib.ExitStack() as stack:
            writers = open_writers(self.workdir, title, self.config.steps, start)
            for writer in writers:
                stack.callback(writer.close)
            try:
                yield log, advance
            except NonFiniteError as error:
                why = why_not_finite(error, self.source, self.num_classes)
                error.args = (f"{error.args[0]} {why} {self.last_good()}",)
                raise

    def read(self, batches: Any, step: int) -> Any:
        """The next batch, or an error that says for which step it was read."""
        try:
            return next(batches)
        except ValueError as error:
            raise ValueError(
                f"{error} This was read ahead of step {step}. {self.last_good()}"
            ) from error

    def last_good(self) -> str:
        """Which checkpoint a run that cannot go on has left."""
        latest = self.checkpoints.latest()
        if latest is None:
            return "No checkpoint was written before it."
        return f"The checkpoint of step {latest} is from before it, and good."

    def profile(self, enabled: bool, start: int) -> Any:
        """A context for each step, some of which are traced if that is asked for."""
        enabled = enabled and jax.process_index() == 0
        directory = self.workdir / "profile" if enabled else None
        return trace_steps(directory, start, self.config.steps)

    def validate(
        self, log: Callable[[str, dict[str, Any]], None], step: int, state: Any
    ) -> dict[str, float] | None:
        """Measures on the validation split, if there is one."""
        if self.config.validation is None:
            return None
        source = self.open(self.config.validation)
        found = self.student.evaluate(
            self.config, *self.evaluated(state), source
        ).student
        numbers = {k: v for k, v in found.items() if isinstance(v, float)}
        log("validation", {"step": step, **numbers})
        return numbers

    def evaluated(self, state: Any) -> tuple[Any, Any]:
        """The student's parameters, or their average if it is kept; and the rest."""
        params = state.params if state.ema is None else state.ema
        return self.training.step.student_of(params), state.rest

    def saves(self, step: int, numbers: dict[str, float] | None) -> bool:
        """True if a checkpoint is due: by the clock, or as the best so far."""
        due = step % self.config.checkpoint_every_steps == 0
        return due or self.checkpoints.improves(step, numbers)

    def save(
        self, step: int, state: Any, data: Any, numbers: dict[str, float] | None
    ) -> None:
        """Start writing a checkpoint of everything but the teacher."""
        meta = {
            "data": data,
            "teacher": self.taught_by,
            "seconds": self.seconds(),
            "objective_has_params": self.training.step.has_params,
            "config": self.saved,
            "versions": versions(),
        }
        self.checkpoints.save(step, state, meta, numbers)

    # --- after the loop ---------------------------------------------------------------

    def results(self, state: Any) -> dict[str, Any]:
        """Measure the best checkpoint on test data, and write it down."""
        config = self.config
        self.checkpoints.wait()
        best_step, value = self.checkpoints.best() or (config.steps, None)
        if best_step != int(state.step):
            state, _ = self.checkpoints.restore(best_step, self.training.like)
        results = {
            "format": 1,
            "name": config.name,
            "arm": self.arm,
            "seed": config.seed,
            **{name: self.saved[name] for name in ONLY_REPORTED},
            "steps": config.steps,
            "examples_seen": config.steps * config.loader.batch_size,
            "train_seconds": self.seconds(),
            "teacher_fingerprint": self.taught_by,
            "teacher_bytes_per_token": getattr(self.provider, "bytes_per_token", None),
            "selected": {
                "step": best_step,
                "metric": None if value is None else f"validation/{config.select}",
                "value": value,
            },
            "versions": versions(),
            "machine": machine(),
            "date": today(),
        }
        if config.licenses:
            results["licenses"] = dict(config.licenses)
        predictions = None
        arrays = self.evaluated(state)
        if config.test is not None:
            source = self.open(config.test)
            measured, predictions = self.student.measure(config, *arrays, source)
            results |= {"split": "test", **measured}
        if config.probes:
            for who, found in self.student.probe(config, *arrays).items():
                results[who] = {**(results.get(who) or {}), "probes": found}
        for name, part in (config.other_tests or {}).items():
            found = self.student.quality(config, *arrays, self.open(part))
            results.setdefault("other_tests", {})[name] = found
        if jax.process_index() == 0:
            if predictions is not None:
                write_atomically(self.workdir / "predictions.npz", predictions)
            text = json.dumps(results, indent=1) + "\n"
            write_atomically(self.workdir / "results.json", text)
        return results
