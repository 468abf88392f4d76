"""The loop, read top to bottom: ``train(config, workdir)``.

Notebooks call it, and so does the command line. A run that was stopped, killed or
preempted goes on where its last checkpoint was; one that is finished says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from distilljax._checks import fail
from distilljax._schedules import check_schedules
from distilljax.checkpoints import Checkpoints
from distilljax.config import Config, to_json
from distilljax.metrics import Window, tokens_of
from distilljax.programs import Programs, check_sizes
from distilljax.results import results_of
from distilljax.resuming import Resume, check_resume
from distilljax.run import SELECTABLE, Run
from distilljax.sharding import mesh_from_string
from distilljax.teachers.placed import beside
from distilljax.together import StopSignal
from distilljax.tracing import Steps
from distilljax.trackers import load_trackers
from distilljax.vocabulary import one_vocabulary
from distilljax.workdir import check_same_student, claim, placed


def train(
    config: Config,
    workdir: str | Path,
    *,
    programs: Programs | None = None,
    title: str | None = None,
    arm: str = "default",
    profile: Steps = False,
    stop: StopSignal | None = None,
    resume: Resume = "auto",
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a student and measure it; resume if the folder has a part of this run.

    Args:
      config: What to do.
      workdir: Folder of the run; created, or taken up again.
      programs: Compiled programs to share with other runs of this process.
      title: Name in the progress bar.
      arm: Name of the variant, for the report.
      profile: Write an XProf trace to `workdir/profile`: of 10 steps, or of those from
        the first to the last that are given.
      stop: What asks the run to save and return; SIGTERM, if None.
      resume: "auto"; "never" refuses a folder with checkpoints; a `Path` is another
        run, or one of its checkpoints, from which a new folder goes on.
      trackers: Where the metrics go besides: "wandb", "trackio".

    Returns:
      What is in `results.json`; `{"stopped_at": step}` if the run was told to stop.

    Raises:
      ValueError: the config, the data or the folder cannot be used; nothing is changed.
      NonFiniteError: the loss is nan or inf; the last checkpoint is from before it.

    Example:
      >>> import tempfile
      >>> from distilljax import data, models, objectives, optimizers
      >>> folder = tempfile.TemporaryDirectory()
      >>> config = Config(
      ...     name="example",
      ...     student=models.MLP(num_features=64, hidden=(32,), num_classes=10),
      ...     objective=objectives.CrossEntropy(),
      ...     data=data.Tfds("digits", "train", data_dir=folder.name),
      ...     test=data.Tfds("digits", "test", data_dir=folder.name),
      ...     loader=data.Loader(batch_size=128, scale=16.0),
      ...     optimizer=optimizers.AdamW(learning_rate=1e-2),
      ...     steps=100,
      ... )
      >>> results = train(config, f"{folder.name}/run")
      >>> results["student"]["accuracy"] > 0.8
      True
      >>> folder.cleanup()
    """
    workdir, saved = Path(workdir), to_json(config)
    modules = load_trackers(trackers)
    check_schedules(config.objective, config.steps)
    mesh = mesh_from_string(config.mesh, **beside(config.teacher, config.mesh))
    check_sizes(config, mesh)
    listening = contextlib.nullcontext(stop) if stop else StopSignal()
    with claim(workdir, saved), jax.set_mesh(mesh), listening as stop:
        check_resume(resume, workdir, saved)
        programs = programs or Programs()
        run = Run(config, saved, workdir, programs, mesh, arm, resume, modules)
        if (done := run.finished()) is not None:
            return done
        run.check()
        with contextlib.closing(run.open_checkpoints()):
            state, start = run.restore_or_init()
            run.begin(state, start)
            batches = run.batches(mesh)
            update = run.training.update
            window = Window(run.reader["process_count"], run.max_lead)
            with run.observe(title, start, profile) as (log, advance, trace):
                for step in range(start + 1, config.steps + 1):
                    batch, index = run.read(batches, step)
                    with trace(step, state):
                        state, metrics = update(state, batch)
                    log("train", window.read())  # of steps before this one
                    window.add(step, metrics, index, tokens_of(batch))
                    advance(step)
                    last = step == config.steps
                    leaving = stop.reached() or last
                    validates = step % config.eval_every_steps == 0 or last
                    if step % config.log_every_steps == 0 or validates:
                        window.close((state.params, state.ema))
                    if validates:  # what is validated and saved is known to be finite
                        log("train", window.read())
                    numbers = run.validate(log, step, state) if validates else None
                    if run.saves(step, numbers) or leaving:
                        window.close((state.params, state.ema))
                        log("train", window.read())
                        run.save(step, state, batches.get_state(), numbers, leaving)
                    if leaving and not last:
                        return {"stopped_at": step}
            return results_of(run, state)


def evaluate(
    config: Config,
    workdir: str | Path,
    *,
    split: str,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Measure the selected checkpoint of a run on a split; changes nothing on disk.

    Args:
      config: The config of the run; its data may be other data.
      workdir: Its folder.
      split: `validation` or `test`.
      programs: Compiled programs to share with other calls.

    Returns:
      `step`, `split`, `num_examples`, `class_names`, and the measures of `student` and
      `teacher`; see `evaluation.measures.summarize` and `evaluation.cost.cost`.

    Example:
      >>> import tempfile
      >>> from distilljax import data, models, objectives
      >>> folder = tempfile.TemporaryDirectory()
      >>> digits = data.Tfds("digits", "train", data_dir=folder.name)
      >>> config = Config(
      ...     name="example",
      ...     student=models.MLP(num_features=64, hidden=(32,), num_classes=10),
      ...     objective=objectives.CrossEntropy(),
      ...     data=digits,
      ...     validation=data.Tfds("digits", "validation", data_dir=folder.name),
      ...     loader=data.Loader(batch_size=128, scale=16.0),
      ...     steps=10,
      ... )
      >>> _ = train(config, f"{folder.name}/run")
      >>> evaluate(config, f"{folder.name}/run", split="validation")["num_examples"]
      197
      >>> folder.cleanup()
    """
    root = Path(workdir) / "checkpoints"
    part = getattr(config, split)
    if part is None:
        fail(
            "evaluate",
            "--split",
            "be one that the config has",
            repr(split),
            f"Give the config a {split} source.",
        )
    mesh = mesh_from_string(config.mesh, **beside(config.teacher, config.mesh))
    check_sizes(config, mesh)
    best = None
    if root.is_dir():
        checkpoints = Checkpoints(
            root,
            select=config.select,
            mode=SELECTABLE.get(config.select or "", "max"),
            read_only=True,
        )
        best = checkpoints.best()
    if best is None:
        fail(
            "evaluate",
            "--workdir",
            "hold a run with a checkpoint",
            repr(str(workdir)),
            "Train it first.",
        )
    check_same_student(Path(workdir), to_json(config))
    programs = programs or Programs()
    with jax.set_mesh(mesh):
        source = programs.source(part, config.loader)
        config = one_vocabulary(config, programs, mesh, source)
        student = programs.student(config, mesh)
        field = "params" if config.ema_decay is None else "ema"
        like = placed(student.arrays(field), mesh, config.student_rules)
        found = Checkpoints(root, read_only=True).restore_student(best[0], like)
        measured, _ = student.measure(config, found[field], found["rest"], source)
    return {"step": best[0], "split": split, **measured}
