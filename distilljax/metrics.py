"""What a run writes while it trains: windows of means, to disk and to the terminal.

The loop never waits for a number: metrics stay on the devices until a window is full.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from distilljax.patience import append_line, note, patiently, reason_of
from distilljax.typing import Metrics

Record = dict[str, Any]


def max_lead() -> int:
    """How many steps the host may be ahead of the devices: each holds a batch there.

    None on simulated devices: they share one pool of threads, and steps in flight, each
    waiting for the others of its collective, would starve each other for ever.

    Example:
      >>> max_lead() == (8 if jax.device_count() == 1 else 0)     # on a CPU
      True
    """
    simulated = jax.default_backend() == "cpu" and jax.device_count() > 1
    return 0 if simulated else 8


class Window:
    """The metrics of the steps since the last `close`, still on the devices.

    Args:
      num_readers: How many processes, or groups of them, read rows of their own.
      lead: How many steps the host may be ahead, if that is fewer than `max_lead`.
    """

    def __init__(self, num_readers: int = 1, lead: int | None = None):
        self._num_readers = num_readers
        self._pending: list[tuple[int, Metrics, np.ndarray]] = []
        self._closed: tuple[list[Any], tuple[int, int], Any] | None = None
        self._examples, self._tokens = 0, 0
        self._since = time.perf_counter()
        self._max_lead = max_lead() if lead is None else min(max_lead(), lead)

    def add(
        self,
        step: int,
        metrics: Metrics,
        index: np.ndarray,
        tokens_per_example: int = 0,
    ) -> None:
        """Remember a step, and the examples of this process's rows of its batch.

        Waits for the step `max_lead` before this one; nothing is fetched.
        """
        self._pending.append((step, metrics, index))
        self._examples += len(index) * self._num_readers
        self._tokens += len(index) * self._num_readers * tokens_per_example
        if len(self._pending) > self._max_lead:
            jax.block_until_ready(self._pending[-1 - self._max_lead][1])

    def close(self, params: Any = None) -> None:
        """End the window here: `read` tells what is in it. Nothing is waited for.

        Args:
          params: What its last step has made, which no loss has seen yet.
        """
        if self._pending:
            counted = self._examples, self._tokens
            self._closed = self._pending, counted, _all_finite(params)
            self._pending, self._examples, self._tokens = [], 0, 0

    def read(self) -> Record:
        """Fetch, check and average the window that was closed; empty if none was.

        To be called when a further step was sent, so that the devices have something
        to do meanwhile.

        Raises:
          NonFiniteError: a loss or a gradient is nan or inf; names the first such step.
            Or else the parameters are, after the last one.
        """
        if self._closed is None:
            return {}
        (pending, counted, finite), self._closed = self._closed, None
        steps, metrics, indices = zip(*pending, strict=True)
        fetched, finite = jax.device_get((list(metrics), finite))
        for step, found, index in zip(steps, fetched, indices, strict=True):
            for name in ("loss", "grad_norm"):
                if not np.isfinite(found[name].sum):
                    raise NonFiniteError(name, found[name].sum, step, index)
        if not finite:
            raise NonFiniteError("params", "nan or inf", steps[-1], indices[-1])
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        self._since = now
        examples, tokens = counted
        rates = {"examples_per_second": examples / seconds}
        if tokens:
            rates["tokens_per_second"] = tokens / seconds
        arrays = np.stack([m.array for m in fetched])
        sums, counts = arrays.sum(axis=0, dtype=np.float64)
        means = (sums / np.maximum(counts, 1e-30)).tolist()
        named = dict(zip(fetched[0].names, means, strict=True))
        return {"step": steps[-1], **named, **rates}


def tokens_of(batch: Any) -> int:
    """How many tokens an example of a batch has, padding included; 0 without tokens.

    Example:
      >>> tokens_of({"tokens": np.zeros((4, 256), int)}), tokens_of({"inputs": 0})
      (256, 0)
    """
    return batch["tokens"].shape[1] if "tokens" in batch else 0


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    """True if every array is finite: one flag, wherever the arrays lie."""
    found = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.stack([jnp.asarray(True), *found]).all()


class NonFiniteError(FloatingPointError):
    """Loss, gradient or parameters are nan or inf: training stops, nothing is saved.

    Attributes:
      step: The update at which it happened.
      index: Positions in the source of the examples of that batch (this process's).
    """

    def __init__(self, name: str, value: Any, step: int, index: np.ndarray):
        self.step = step
        self.index = index
        super().__init__(f"train: {name} must be finite, got {value} at step {step}.")


@runtime_checkable
class Writer(Protocol):
    """Where records go: one dict per window or evaluation."""

    def write(self, record: Record) -> None:
        """Take a record with `step`, `seconds`, `split` and the metrics by name."""

    def advance(self, step: int) -> None:
        """Know that a step was made; most wait for the next record."""

    def close(self) -> None:
        """Flush and let go."""


class JsonlWriter(Writer):
    """One JSON object per line. What lies beyond `resume_step` is from a killed run."""

    def __init__(self, path: Path, resume_step: int):
        kept = []
        if path.exists():
            for line in patiently(path.read_text).splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # cut off by a kill
                    continue
                if record["step"] <= resume_step:
                    kept.append(line + "\n")
            write_atomically(path, "".join(kept))
        self._path = path

    def write(self, record: Record) -> None:
        """Append one line; nan and inf as null, so that any reader reads it."""
        clean = {
            k: None if isinstance(v, float) and not np.isfinite(v) else v
            for k, v in record.items()
        }
        append_line(self._path, json.dumps(clean))

    def close(self) -> None:
        """Nothing: each line is written at once."""


class TensorBoardWriter(Writer):
    """Scalars for TensorBoard, in the run's folder.

    A thread writes them. One that has met a fault of the disk is gone without a word,
    and would be waited for: another file is begun then.
    """

    def __init__(self, directory: Path, resume_step: int):
        self._directory = directory
        # what lies beyond is from a killed run: TensorBoard drops it
        self._open(resume_step + 1)

    def _open(self, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        # room for all of a record: who puts more into a full queue, waits
        self._writer = SummaryWriter(
            str(self._directory), purge_step=first_step, max_queue=10_000
        )
        self._events: Any = self._writer.file_writer.event_writer  # pyright: ignore

    def _is_alive(self) -> bool:
        return self._events._worker is not None and self._events._worker.is_alive()

    def write(self, record: Record) -> None:
        """One scalar per metric, under its split."""
        if not self._is_alive():
            note(f"a file in {self._directory} could not be written; another is begun.")
            self._let_go()
            try:
                patiently(lambda: self._open(record["step"]))
            except OSError:  # metrics.jsonl has the same; the next record tries again
                return
        for name, value in record.items():
            if isinstance(value, float) and name != "seconds":
                tag = f"{record['split']}/{name}"
                self._writer.add_scalar(tag, value, record["step"])

    def _let_go(self) -> None:
        # what nobody reads any more is not to be waited for at the end of the process;
        # who closes a file waits for the thread that reads it
        self._events._event_queue.cancel_join_thread()

    def close(self) -> None:
        """Close the event file."""
        self._let_go()
        if not self._is_alive():
            return
        try:
            patiently(self._writer.close)
        except (OSError, ValueError) as error:
            what = f"the last lines for TensorBoard in {self._directory}"
            note(f"{what} could not be written ({reason_of(error)}).")


# Steps of a small student take less than drawing where they are.
BAR_INTERVAL_SECS = 0.1


class ConsoleWriter(Writer):
    """A progress bar on a terminal, plain lines on any other text stream."""

    def __init__(self, title: str, num_steps: int, start: int, stream: Any):
        self._title = title
        self._num_steps = num_steps
        self._stream = stream
        self._bar = _progress_bar(stream) if stream.isatty() else None
        if self._bar is not None:
            self._shown = {"train": "", "validation": ""}
            self._task = self._bar.add_task(
                title, total=num_steps, completed=start, **self._shown
            )
            self._bar.start()
            self._drawn = time.monotonic()

    def advance(self, step: int) -> None:
        """Move the bar; called after every step, and cheap. Nothing is fetched."""
        if self._bar is None or time.monotonic() < self._drawn + BAR_INTERVAL_SECS:
            return
        self._bar.update(self._task, completed=step)
        self._drawn = time.monotonic()

    def write(self, record: Record) -> None:
        """Show the record: what matters most in the bar, all of it in a line."""
        if self._bar is None:
            where = f"{self._title}  step {record['step']}/{self._num_steps}"
            line = f"{where}  {format_record(record)}"
            print(line, file=self._stream, flush=True)
            return
        # no room for more: the rest is in metrics.jsonl and in TensorBoard
        if record["split"] == "train":
            self._shown["train"] = f"loss {record['loss']:.4f}"
        elif "accuracy" in record:
            self._shown["validation"] = f"val accuracy {record['accuracy']:.4f}"
        self._bar.update(self._task, completed=record["step"], **self._shown)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()


def _progress_bar(stream: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    # A narrow terminal cuts the title, and nothing else.
    title = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", table_column=title),
        BarColumn(bar_width=12),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[train]}"),
        TextColumn("{task.fields[validation]}"),
        TimeRemainingColumn(),
        console=Console(file=stream),
        expand=True,
    )


def format_record(record: Mapping[str, Any]) -> str:
    """The metrics of a record in one line.

    Example:
      >>> format_record({"step": 5, "split": "train", "loss": 0.12345, "kl": 3e-5})
      'train loss 0.1235  kl 3.000e-05'
    """
    skip = ("step", "seconds", "split")
    # of each there are several, and `distilljax watch` shows them
    beside = ("share_", "flops_", "memory_")
    shown = [
        f"{k} {v:.4f}" if v == 0 or 1e-3 <= abs(v) < 1e4 else f"{k} {v:.3e}"
        for k, v in record.items()
        if k not in skip and not k.startswith(beside) and isinstance(v, int | float)
    ]
    return f"{record['split']} " + "  ".join(shown)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: under another name first, then renamed."""
    data = content.encode() if isinstance(content, str) else content
    patiently(lambda: _write_once(path, data))


def _write_once(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_writers(
    workdir: Path, title: str, num_steps: int, start: int
) -> tuple[Writer, ...]:
    """The writers of a run; none on processes other than the first."""
    if jax.process_index() != 0:
        return ()
    return (
        JsonlWriter(workdir / "metrics.jsonl", start),
        TensorBoardWriter(workdir / "tensorboard", start),
        ConsoleWriter(title, num_steps, start, sys.stderr),
    )
