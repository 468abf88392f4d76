"""Checkpoints: everything a run needs to go on, and nothing of the teacher.

The only module that knows Orbax. A checkpoint is the pytree of `DistillState`, written
by all processes, each its shards; and its meta, JSON: the position in the data, the
fingerprint of the teacher, versions. Writing is asynchronous; a checkpoint appears
under its final name only when it is complete. Then process 0 reads it back, and writes
down what its files are: of a newest one that is damaged, a run goes on from the one
before.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from distilljax.manifests import NAME, check_writable, damage, set_aside, write_manifest
from distilljax.patience import is_passing, note, patiently, reason_of
from distilljax.saved_arrays import (
    DamagedError,
    UnlikeError,
    as_written,
    check_same_arrays,
    explained,
    is_unread,
    read_alone,
    shapes_of,
    unreadable,
)
from distilljax.together import agreed

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
        self._verifying: threading.Thread | None = None
        self._failure: tuple[int, Any, Callable[[], None], Exception] | None = None
        self._failures_in_a_row = 0
        if not read_only and jax.process_index() == 0:
            check_writable(self._directory)
        self._keep_last = keep_last
        self._checkpointer = read_alone(self._open)
        self._best = max(self._ranks(), default=None)

    def _open(self) -> Any:
        keep: Any = ocp.training.preservation_policies
        decide: Any = ocp.training.save_decision_policies
        best = keep.BestN(
            get_metric_fn=self._rank, n=1, keep_checkpoints_without_metrics=False
        )
        policies = [keep.LatestN(self._keep_last), *([best] if self._select else [])]
        context = ocp.Context()
        context.array.saving.use_compression = False  # of floats it takes time alone
        # of a folder that a thread could not make, others would hear after 20 minutes
        context.async_options.create_directories_asynchronously = False
        return ocp.training.Checkpointer(
            str(self._directory),
            context=context,
            # the loop decides when: after the losses are known to be finite
            save_decision_policy=decide.FixedIntervalPolicy(1),
            preservation_policy=keep.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=not self._read_only,  # of killed runs
        )

    def _rank(self, numbers: Numbers) -> Any:
        """Larger is better; of equals the first, which took the least training."""
        value = self._sign * numbers[str(self._select)]
        return (-math.inf if math.isnan(value) else value, -numbers["step"])

    def _ranks(self) -> list[tuple[float, float]]:
        known = self._checkpointer
        measured: list[Any] = read_alone(lambda: [x.metrics for x in known.checkpoints])
        return [self._rank(m) for m in measured if m and self._select in m]

    def improves(self, step: int, numbers: Numbers | None) -> bool:
        """True if a checkpoint with these numbers would be the best so far."""
        if self._failure is not None:
            self._join()  # the best so far may be what was not written
        if self._select is None or numbers is None:
            return False
        return self._best is None or self._rank({**numbers, "step": step}) > self._best

    def save(
        self,
        step: int,
        state: Any,
        meta: Meta,
        numbers: Numbers | None = None,
        *,
        then: Callable[[], None] = lambda: None,
        wait: bool = False,
    ) -> None:
        """Start writing a checkpoint, when the one before is written and verified.

        The arrays may be donated as soon as this returns: while memory of a device is
        borrowed for writing (on CPU), XLA gives the next step another buffer.

        Of a single process, what may have been a fault of the moment (a mounted bucket
        that did not answer) is told, and this checkpoint stands for the one that was
        not written; the third in a row is an error.

        Args:
          step: The number of updates that the state has seen.
          state: A pytree of arrays.
          meta: Whatever else is to be restored, as JSON.
          numbers: Measures on the validation split, if this checkpoint may be selected.
          then: Called by another thread when it is written and verified.
          wait: Return when it is written and verified, and try again if that fails.
        """
        self._join()
        metrics = None if numbers is None else {**numbers, "step": step}
        if self.improves(step, numbers):
            self._best = self._rank({**(numbers or {}), "step": step})
        arrays = shapes_of(jax.tree.map(as_written, state))

        def start() -> None:
            try:
                written = self._checkpointer.save_checkpointables_async(
                    step, {"state": state}, metrics=metrics, custom_metadata=meta
                ).result
            except OSError as error:
                # of several processes the others wait for this one
                if jax.process_count() > 1 or not is_passing(error):
                    self._not_written(step, error)
                self._failure = step, arrays, then, error
                return
            self._verifying = threading.Thread(
                target=self._verify, args=(step, written, arrays, then), daemon=True
            )
            self._verifying.start()

        if wait:
            self._failures_in_a_row = 0
        start()
        while wait and not self._join():
            time.sleep(RETRY_SECS * self._failures_in_a_row)
            if step in self.steps():  # it was written, and only to be read back
                self._verify(step, lambda: None, arrays, then)
            else:
                start()

    def _verify(
        self,
        step: int,
        written: Callable[[], Any],
        arrays: Any,
        then: Callable[[], None],
    ) -> Exception | None:
        """Read a checkpoint back when it is complete; in a thread of its own."""
        try:
            written()
            if jax.process_index() == 0:
                self._read_back(step, arrays)
            self._failures_in_a_row = 0
        # whatever it is, it is raised where the loop will see it
        except Exception as error:  # noqa: BLE001
            self._failure = step, arrays, then, error
            return error
        try:
            then()
        except OSError as error:  # of what is said of it; the checkpoint is whole
            note(f"step {step} is saved, and could not be noted ({reason_of(error)}).")
        return None

    def _read_back(self, step: int, arrays: Any) -> None:
        folder = self._directory / str(step)

        def read() -> Any:
            found = ocp.checkpointables_metadata(str(folder))
            if not (shapes := shapes_of(found.metadata["state"])):
                raise DamagedError("one without any array")
            return shapes

        if patiently(read, passing=is_unread) != arrays:
            raise UnlikeError("one of other arrays than were written")
        write_manifest(folder)

    def _join(self) -> bool:
        """Wait for the last checkpoint; False after a fault that may pass, and told."""
        if self._verifying is not None:
            self._verifying.join()
            self._verifying = None
        if self._failure is None:
            return True
        (step, arrays, then, error), self._failure = self._failure, None
        self._failures_in_a_row += 1
        many = self._failures_in_a_row >= MAX_FAILURES or jax.process_count() > 1
        if many or not is_unread(error):
            self._not_written(step, error)
        for _ in range(2):  # it raises the error once more, and closes after that
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                self._checkpointer.close()
        self._checkpointer = patiently(self._open)
        self._best = max(self._ranks(), default=None)
        if step in self.steps():
            # what failed came after it was complete
            again = self._verify(step, lambda: None, arrays, then)
            if again is None:
                return True
            error, self._failure = again, None
            if not is_unread(error):
                self._not_written(step, error)
        note(
            f"the checkpoint of step {step} was not written and read back "
            f"({reason_of(error)[:200]}). The run goes on, and ends if that happens "
            f"{MAX_FAILURES} times in a row."
        )
        return False

    def _not_written(self, step: int, error: Exception) -> NoReturn:
        raise ValueError(
            f"Checkpoints: the checkpoint {self._directory / str(step)} must be "
            f"written, and be readable after that, got an error: {reason_of(error)}. "
            "Make room, or see that the folder can be written: the same command goes "
            "on from the checkpoint before."
        ) from error

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

    def steps(self) -> list[int]:
        """The steps on disk, the newest first."""
        return sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)

    def restore_newest(self, like: Any) -> tuple[int, Any, Meta] | None:
        """Step, state and meta of the newest checkpoint that is whole; None if none is.

        Newer ones that are damaged are set aside, in a folder beside this one, and it
        is said so. If all are damaged, nothing is touched.

        Args:
          like: As for `restore`.
        """
        damaged: dict[int, DamagedError] = {}
        for step in self.steps():
            try:
                state, meta = self._load(step, like)
            except DamagedError as error:
                # the others of several processes may have read theirs
                if jax.process_count() > 1 and not error.agreed:
                    break
                damaged[step] = error
            except UnlikeError:
                break
            else:
                self._set_aside(damaged, step)
                return step, state, meta
        newest = self.latest()
        return None if newest is None else (newest, *self.restore(newest, like))

    def _set_aside(self, damaged: Mapping[int, Exception], good: int) -> None:
        if jax.process_index() == 0:
            for step, error in damaged.items():
                folder = self._directory / str(step)
                set_aside(folder, f"{error}", good, move=not self._read_only)
        if damaged and not self._read_only:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._checkpointer.reload()
            self._best = max(self._ranks(), default=None)

    def restore(self, step: int, like: Any) -> tuple[Any, Meta]:
        """The state of a step, onto the shardings of `like`, and its meta.

        Args:
          step: A step on disk.
          like: The state, or `jax.ShapeDtypeStruct`s with shardings; another mesh than
            that of the saved run is fine.
        """
        rule = "be complete and of this student and optimizer"
        with explained(self._directory / str(step), rule, self._read_only):
            return self._load(step, like)

    def _load(self, step: int, like: Any) -> tuple[Any, Meta]:
        """As `restore`; it tells what is damaged from what is of another model."""
        folder = self._directory / str(step)
        wrong = damage(folder) if jax.process_index() == 0 else None
        if agreed(wrong is not None):
            raise DamagedError(wrong or "damage that process 0 has found", agreed=True)

        def read() -> tuple[Any, Meta]:
            try:
                found = self._checkpointer.checkpointables_metadata(step)
                meta = found.custom_metadata
                if not isinstance(meta, dict) or not meta:
                    raise DamagedError("one without its metadata")
                check_same_arrays(found.metadata["state"], like)
                state = self._checkpointer.load_checkpointables(step, {"state": like})
            except UnlikeError:
                raise
            except (ValueError, KeyError, OSError, TypeError) as error:
                raise DamagedError(unreadable(folder)) from error
            return state["state"], meta

        # Where its files are known to be as they were written, what cannot be read is
        # to be read again, whatever the reason is.
        known = patiently((folder / NAME).exists)
        return read_alone(read, is_unread if known else is_passing)

    def restore_student(self, step: int, like: Any) -> Any:
        """Only the student, for evaluation or to be a teacher.

        Args:
          step: A step on disk.
          like: A dict with some of the fields of `DistillState`, of the student alone:
            parameters of the objective, which lie beside it, are not read.
        """
        folder, rule = self._directory / str(step), "be complete and of this model"
        with explained(folder, rule, self._read_only):
            return read_alone(partial(_student_in, folder, like), is_unread)

    def wait(self) -> None:
        """Return when what was started is written and verified; raise if it is not."""
        if self._verifying is not None:
            self._verifying.join()
        failed = self._failure
        if not self._join() and failed is not None:
            self._not_written(failed[0], failed[-1])
        self._checkpointer.wait()

    def close(self) -> None:
        """Wait, and let go of the directory."""
        ending = sys.exc_info()[0] is not None  # what ended the run is to be seen
        if self._verifying is not None:
            self._verifying.join()
        try:
            self._checkpointer.close()
        except (OSError, ValueError, RuntimeError):
            if self._failure is None and not ending:
                raise
        if not ending and self._failure is not None:
            step, *_, error = self._failure
            self._not_written(step, error)


def _student_in(folder: Path, like: Any) -> Any:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            meta = ocp.checkpointables_metadata(str(folder)).custom_metadata
            if not isinstance(meta, dict) or not meta:
                raise DamagedError("one without its metadata")
            inside = {"params", "ema"} if meta.get("objective_has_params") else set()
            wanted = {k: {"student": x} if k in inside else x for k, x in like.items()}
            found = ocp.load_checkpointables(str(folder), {"state": wanted})["state"]
    except UnlikeError:
        raise
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise DamagedError(unreadable(folder)) from error
    return {k: x["student"] if k in inside else x for k, x in found.items()}


MAX_FAILURES = 3
RETRY_SECS = 3.0
