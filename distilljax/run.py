"""The parts of one run; `train.train` is the order in which they act."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
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
from distilljax.metrics import NonFiniteError, write_atomically
from distilljax.not_finite import why_not_finite
from distilljax.observing import Advance, Log, Observer
from distilljax.pair import model_flops
from distilljax.programs import Programs, batch_shapes, uses_teacher
from distilljax.resuming import Resume, restore_other
from distilljax.sharding import batch_sharding
from distilljax.teachers import StreamedTeacher
from distilljax.teachers.placed import teacher_meshes
from distilljax.throughput import Meter
from distilljax.together import Clock
from distilljax.tracing import Steps, Trace
from distilljax.vocabulary import check_same_tokens, one_vocabulary
from distilljax.workdir import read_json, remove_half_written, versions

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
        resume: Resume = "auto",
        trackers: Mapping[str, Any] | None = None,
    ):
        self.resume, self.trackers = resume, trackers or {}
        self.mesh = mesh
        self.saved, self.workdir, self.arm = saved, workdir, arm
        self.programs = programs
        self.began = time.monotonic()
        self.seconds_before = 0.0
        self.origin: str | None = None
        self.clock = Clock(config.checkpoint_every_secs)
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
        shapes = batch
        self.iterator.set_state(before)
        self.num_classes = self.student.num_classes(batch)
        self.check_labels("data", self.source)
        self.student.check(self.config, self.num_classes, batch)
        if self.provider is not None:
            batch = self.provider.shapes(batch)
        self.training.check(batch)
        self.observe_with(shapes)
        parts = {"validation": self.config.validation, "test": self.config.test}
        for name, part in (parts | (self.config.other_tests or {})).items():
            if part is not None:
                source = self.open(part)
                next(self.config.loader.eval_batches(source, batch_size=1))
                check_same_tokens(name, source, self.source)
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

    def observe_with(self, batch: Any) -> None:
        """Count what a batch takes, and on how many chips; before the loop.

        Args:
          batch: Its shapes.
        """
        config, streamed = self.config, isinstance(self.provider, StreamedTeacher)
        asked = uses_teacher(config) and (self.provider is None or streamed)
        flops = None
        if jax.process_index() == 0:
            flops = model_flops(self.student, self.teacher if asked else None, batch)
        own = teacher_meshes(config.teacher, config.mesh, self.mesh)
        devices = {d for m in (self.mesh, *own.values()) for d in m.devices.flat}
        kind = jax.devices()[0].device_kind
        self.meter = Meter(flops, len(devices), kind)
        self.observer = Observer(
            self.workdir, config, self.meter, self.seconds, self.trackers
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
        """The state of the newest good checkpoint, of another run's, or a new one."""
        found = self.checkpoints.restore_newest(self.training.like)
        if found is None and isinstance(self.resume, Path):
            self.origin, found = restore_other(self.resume, self.training.like)
        if found is None:
            return self.training.init(self.config.seed), 0
        step, state, meta = found
        if step > self.config.steps:
            who, remedy = "this run", "Choose another folder for a shorter run."
            if self.origin is not None:
                who = "the run of --resume"
                remedy = (
                    "Ask for more steps, or name an earlier one of its checkpoints: "
                )
                remedy += "--resume RUN/checkpoints/STEP."
            rule = f"be at least {step}, which {who} has made"
            fail("train", "--steps", rule, self.config.steps, remedy)
        self.check_teacher(meta["teacher"])
        self.iterator.set_state(meta["data"])
        self.seconds_before = meta["seconds"]
        self.origin = self.origin or meta.get("origin")
        return state, step

    def begin(self, state: Any, start: int) -> None:
        """Write the config down; set results of fewer steps aside.

        What another run has made is saved at once: the run is then one of its own.
        """
        if jax.process_index() == 0:
            remove_half_written(self.workdir)
            if isinstance(self.provider, StreamedTeacher):
                note = f"note: {self.provider.described()}"
                print(note, file=sys.stderr, flush=True)
            write_atomically(
                self.workdir / "config.json", json.dumps(self.saved, indent=1) + "\n"
            )
            for name in ("results.json", "predictions.npz"):
                if (old := self.workdir / name).exists():
                    old.replace(self.workdir / f"previous_{name}")
        if self.origin is not None and self.checkpoints.latest() is None:
            self.save(start, state, self.iterator.get_state(), None, wait=True)

    def batches(self, mesh: Mesh) -> Any:
        """Pairs of a batch on the devices and its index; resumable."""
        sharding = batch_sharding(mesh)
        sent = prefetch_to_device(self.iterator, sharding, check=self.check_batch)
        return sent if self.provider is None else self.provider.on_devices(sent)

    # --- inside the loop --------------------------------------------------------------

    def seconds(self) -> float:
        """Time spent in this run, over all its parts."""
        return self.seconds_before + time.monotonic() - self.began

    @contextlib.contextmanager
    def observe(
        self, title: str | None, start: int, profile: Steps
    ) -> Iterator[tuple[Log, Advance, Trace]]:
        """Functions that log a split's record, count a step, and trace one.

        A step that is not finite ends the run here, with what is known about it.
        """
        with self.observer.observe(
            self.saved, title, start, profile, began=self.began, origin=self.origin
        ) as functions:
            try:
                yield functions
            except NonFiniteError as error:
                why = why_not_finite(error, self.source, self.num_classes)
                error.args = (f"{error.args[0]} {why} {self.last_good()}",)
                raise

    def read(self, batches: Any, step: int) -> Any:
        """The next batch, or an error that says for which step it was read."""
        asked = getattr(batches, "teacher_seconds", 0.0)
        begun = time.perf_counter()
        try:
            return next(batches)
        except ValueError as error:
            raise ValueError(
                f"{error} This was read ahead of step {step}. {self.last_good()}"
            ) from error
        finally:
            seconds = time.perf_counter() - begun
            if hasattr(batches, "teacher_seconds"):
                asked = batches.teacher_seconds - asked
                self.meter.add("teacher", asked)
                seconds -= asked
            self.meter.add("data", seconds)

    def last_good(self) -> str:
        """Which checkpoint a run that cannot go on has left."""
        latest = self.checkpoints.latest()
        if latest is None:
            return "No checkpoint was written before it."
        return f"The checkpoint of step {latest} is from before it, and good."

    def validate(self, log: Log, step: int, state: Any) -> dict[str, float] | None:
        """Measures on the validation split, if there is one."""
        if self.config.validation is None:
            return None
        source = self.open(self.config.validation)
        with self.meter.spent("evaluation"):
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
        """True if a checkpoint is due: by steps, by the clock, or as the best."""
        due = step % self.config.checkpoint_every_steps == 0
        logged = step % self.config.log_every_steps == 0 or numbers is not None
        due = self.clock.due(waiting=logged) or due
        return due or self.checkpoints.improves(step, numbers)

    def save(
        self,
        step: int,
        state: Any,
        data: Any,
        numbers: dict[str, float] | None,
        wait: bool = False,
    ) -> None:
        """Start writing a checkpoint of all but the teacher, or `wait` for it."""
        meta = {
            "data": data,
            "teacher": self.taught_by,
            "seconds": self.seconds(),
            "origin": self.origin,
            "objective_has_params": self.training.step.has_params,
            "config": self.saved,
            "versions": versions(),
        }
        with self.meter.spent("checkpoint"):
            then = self.observer.saved(step)
            self.checkpoints.save(step, state, meta, numbers, then=then, wait=wait)
        self.clock.restart()
