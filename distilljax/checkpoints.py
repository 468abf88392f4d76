"""Checkpoints: everything a run needs to go on, and nothing of the teacher.

The only module that knows Orbax. A checkpoint is the pytree of `DistillState`, written
by all processes, each its shards; and its meta, JSON: the position in the data, the
fingerprint of the teacher, versions. Writing is asynchronous; a checkpoint appears
under its final name only when it is complete.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from distilljax._checks import fail
from distilljax.typing import path_of

Meta = dict[str, Any]
Numbers = Mapping[str, float]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: Where they lie, one folder per step.
      select: Name of the metric that says which is the best; None: the newest is.
      mode: Whether the largest or the smallest value is.
      keep_last: How many of the newest stay, besides the best.
      read_only: Leave the folder as it is: another process may be writing there.
    """

    def __init__(
        self,
        directory: Path,
        *,
        select: str | None = None,
        mode: str = "max",
        keep_last: int = 1,
        read_only: bool = False,
    ):
        self._directory = directory.absolute()
        self._select = select
        self._read_only = read_only
        self._sign = 1.0 if mode == "max" else -1.0
        keep: Any = ocp.training.preservation_policies
        decide: Any = ocp.training.save_decision_policies
        best = keep.BestN(
            get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False
        )
        policies = [keep.LatestN(keep_last), *([best] if select else [])]
        self._checkpointer = ocp.training.Checkpointer(
            str(self._directory),
            # the loop decides when: after the losses are known to be finite
            save_decision_policy=decide.FixedIntervalPolicy(1),
            preservation_policy=keep.AnyPreservationPolicy(policies),
            # what a killed run left half-written
            cleanup_tmp_directories=not read_only,
        )
        self._best = max(self._ranks(), default=None)

    def _rank(self, numbers: Numbers) -> Any:
        """Larger is better; of equals the first, which took the least training."""
        value = self._sign * numbers[str(self._select)]
        return (-math.inf if math.isnan(value) else value, -numbers["step"])

    def _ranks(self) -> list[tuple[float, float]]:
        measured: list[Any] = [
            found.metrics for found in self._checkpointer.checkpoints
        ]
        return [self._rank(m) for m in measured if m and self._select in m]

    def improves(self, step: int, numbers: Numbers | None) -> bool:
        """True if a checkpoint with these numbers would be the best so far."""
        if self._select is None or numbers is None:
            return False
        return self._best is None or self._rank({**numbers, "step": step}) > self._best

    def save(
        self, step: int, state: Any, meta: Meta, numbers: Numbers | None = None
    ) -> None:
        """Start writing a checkpoint.

        The arrays may be donated as soon as this returns: while memory of a device is
        borrowed for writing (on CPU), XLA gives the next step another buffer.

        Args:
          step: The number of updates that the state has seen.
          state: A pytree of arrays.
          meta: Whatever else is to be restored, as JSON.
          numbers: Measures on the validation split, if this checkpoint may be selected.
        """
        metrics = None if numbers is None else {**numbers, "step": step}
        if self.improves(step, numbers):
            self._best = self._rank({**(numbers or {}), "step": step})
        self._checkpointer.save_checkpointables_async(
            step, {"state": state}, metrics=metrics, custom_metadata=meta
        )

    def latest(self) -> int | None:
        """The newest step on disk, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def best(self) -> tuple[int, float | None] | None:
        """The best step and its metric; the newest and None if none has a metric."""
        ranks = self._ranks()
        if ranks:
            value, minus_step = max(ranks)
            return int(-minus_step), self._sign * value
        latest = self.latest()
        return None if latest is None else (latest, None)

    def restore(self, step: int, like: Any) -> tuple[Any, Meta]:
        """The state of a step, onto the shardings of `like`, and its meta.

        Args:
          step: A step on disk.
          like: The state, or `jax.ShapeDtypeStruct`s with shardings; another mesh than
            that of the saved run is fine.
        """
        with self._explained(step, "be complete and of this student and optimizer"):
            found = self._checkpointer.checkpointables_metadata(step)
            meta = found.custom_metadata
            if not isinstance(meta, dict) or not meta:
                raise _UnlikeError("one without its metadata")
            _check_same_arrays(found.metadata["state"], like)
            state = self._checkpointer.load_checkpointables(step, {"state": like})
        return state["state"], meta

    def restore_student(self, step: int, like: Any) -> Any:
        """Only the student, for evaluation or to be a teacher.

        Args:
          step: A step on disk.
          like: A dict with some of the fields of `DistillState`, of the student alone:
            parameters of the objective, which lie beside it, are not read.
        """
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with self._explained(step, "be complete and of this model"), context:
            path = str(self._directory / str(step))
            meta = ocp.checkpointables_metadata(path).custom_metadata
            beside = isinstance(meta, dict) and meta.get("objective_has_params", False)
            inside = {"params", "ema"} if beside else set()
            wanted = {k: {"student": x} if k in inside else x for k, x in like.items()}
            found = ocp.load_checkpointables(path, {"state": wanted})["state"]
        return {k: x["student"] if k in inside else x for k, x in found.items()}

    @contextlib.contextmanager
    def _explained(self, step: int, rule: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, OSError, TypeError) as error:
            # Orbax's own words, a page about its handlers, are in the traceback
            reason = "arrays that are missing, damaged or of other shapes"
            if isinstance(error, _UnlikeError):
                reason = str(error)
            elif not (self._directory / str(step)).is_dir():
                reason = "no such folder"
            remedy = (
                "If it is damaged, delete that folder: the run goes on from the one "
                "before it, or from the start. If it is of another model, use another "
                "--workdir."
            )
            if self._read_only:
                remedy = "Restore that folder from a copy, or train that run again."
            fail(
                "Checkpoints",
                f"the checkpoint {self._directory / str(step)}",
                rule,
                reason,
                remedy,
            )

    def wait(self) -> None:
        """Return when what was started is written."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Wait, and let go of the directory."""
        self._checkpointer.close()


class _UnlikeError(ValueError):
    """What a checkpoint is instead of what is asked for."""


def _check_same_arrays(saved: Any, like: Any) -> None:
    """Say which arrays differ; Orbax would read for a while, and then say less."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_of(path): tuple(x.shape) for path, x in leaves}

    def as_written(x: Any) -> Any:
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.eval_shape(jax.random.key_data, x) if key else x

    have, want = shapes(saved), shapes(jax.tree.map(as_written, like))
    wrong = [f"no {path}" for path in want.keys() - have.keys()]
    wrong += [f"{path}, which is not expected" for path in have.keys() - want.keys()]
    wrong += [
        f"{path} of shape {have[path]} instead of {want[path]}"
        for path in have.keys() & want.keys()
        if have[path] != want[path]
    ]
    if not have:
        raise _UnlikeError("one without any array")
    if wrong:
        raise _UnlikeError(f"one that has {'; '.join(sorted(wrong)[:5])}")


# Preemption is agreed on by a number that all processes count alike, over all runs.
_SYNC_POINTS = itertools.count(1)


class StopSignal:
    """Whether SIGTERM has asked this program to save and go.

    In one process a handler of our own sets a flag, which the loop reads between two
    steps. With several, the signal may reach only some of them: JAX's preemption
    service tells all, and lets them see it at the same step.

    Example:
      >>> with StopSignal() as stop:
      ...     before = stop.reached()
      ...     signal.raise_signal(signal.SIGTERM)
      ...     before, stop.reached()
      (False, True)
    """

    def __init__(self):
        self._flag = threading.Event()
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        """Listen, if this is the main thread of a single process."""
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signal back to who had it."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @property
    def requested(self) -> bool:
        """True once `reached` was, or the signal came since."""
        return self._flag.is_set()

    def reached(self) -> bool:
        """True from the step on at which to save and go; ask once in each step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            next(_SYNC_POINTS)
        ):
            self._flag.set()
        return self._flag.is_set()
