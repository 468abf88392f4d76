"""Checkpoints: everything a run needs to go on, and nothing of the teacher.

The only module that knows Orbax. A checkpoint has two parts: `state`, the pytree of
`DistillState`, written by all processes, each its shards; and `meta`, JSON: the position
in the data, the fingerprint of the teacher, versions. Writing is asynchronous; a
checkpoint appears under its final name only when it is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from distilljax._checks import fail

Meta = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: Where they lie, one folder per step.
      select: Name of the metric that says which is the best; None: the newest is.
      mode: Whether the largest or the smallest value is.
      keep_last: How many of the newest stay, besides the best.
    """

    def __init__(
        self,
        directory: Path,
        *,
        select: str | None = "accuracy",
        mode: str = "max",
        keep_last: int = 1,
    ):
        self._directory = directory.absolute()
        self._select = select
        self._sign = 1.0 if mode == "max" else -1.0
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(keep_last)]
        if select is not None:
            keep.append(
                policies.BestN(
                    get_metric_fn=self._rank,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            # the loop decides when: after the losses are known to be finite
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
                1
            ),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,  # what a killed run left half-written
        )

    def _rank(self, metrics: Mapping[str, float]) -> float:
        return self._sign * metrics[self._select]

    def save(
        self,
        step: int,
        state: Any,
        meta: Meta,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Start writing a checkpoint; returns once the arrays are copied."""
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": state, "meta": meta},
            metrics=dict(metrics) if metrics else None,
        )

    def latest(self) -> int | None:
        """The newest step on disk, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def best(self) -> tuple[int, float | None] | None:
        """The best step and its metric; the newest and None if none has a metric."""
        ranked = [
            (self._rank(c.metrics), -c.step, c.metrics[self._select])
            for c in self._checkpointer.checkpoints
            if c.metrics and self._select in c.metrics
        ]
        if ranked:  # of equals the first: it took the least training
            _, step, value = max(ranked)
            return -step, value
        latest = self.latest()
        return None if latest is None else (latest, None)

    def restore(self, step: int, like: Any) -> tuple[Any, Meta]:
        """The state of a step, onto the shardings of `like`, and its meta.

        Args:
          step: A step on disk.
          like: The state, or `jax.ShapeDtypeStruct`s with shardings; another mesh than
            that of the saved run is fine.
        """
        path = self._directory / str(step)
        try:
            found = self._checkpointer.load_checkpointables(
                step, {"state": like, "meta": None}
            )
        except (ValueError, KeyError, OSError, TypeError) as error:
            fail(
                "Checkpoints.restore",
                "the checkpoint",
                "be complete and of this student and optimizer",
                f"{path} ({type(error).__name__}: {_first_line(error)})",
                "If it is damaged, delete this folder to resume from the one before; if "
                "it is of another config, use another --workdir.",
            )
        return found["state"], found["meta"]

    def restore_student(self, step: int, like: Any) -> Any:
        """Only some fields of the state, for evaluation or to be a teacher.

        Args:
          step: A step on disk.
          like: A dict with some of the fields of `DistillState`.
        """
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        path = self._directory / str(step)
        try:
            with context:
                found = ocp.load_checkpointables(path, {"state": like})
        except (ValueError, KeyError, OSError, TypeError) as error:
            fail(
                "Checkpoints.restore_student",
                "the checkpoint",
                "be complete and of this model",
                f"{path} ({type(error).__name__}: {_first_line(error)})",
                "Train it again, or name another workdir.",
            )
        return found["state"]

    def wait(self) -> None:
        """Return when what was started is written."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Wait, and let go of the directory."""
        self._checkpointer.close()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def preempted(step: int) -> bool:
    """True if the machines are about to go, at the same step on every process."""
    return ocp.multihost.reached_preemption(step) if jax.process_count() > 1 else False
