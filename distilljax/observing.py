"""What a run says of itself while it trains: lines, rates, events, traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from distilljax.config import Config
from distilljax.events import Events
from distilljax.metrics import Writer, open_writers
from distilljax.throughput import Meter
from distilljax.tracing import Steps, Trace, trace_steps
from distilljax.trackers import TrackerWriter

Log = Callable[[str, dict[str, Any]], None]
Advance = Callable[[int], None]

# The name of a file in the workdir that asks for a trace.
ASK = "PROFILE"


class Observer:
    """The observer of one run in one process; all but process 0 are silent.

    Args:
      workdir: Folder of the run.
      config: Its config.
      meter: Where its time is counted.
      seconds: Time spent in this run, over all its parts.
      trackers: Modules to log to, by name; see `trackers.load_trackers`.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        meter: Meter,
        seconds: Callable[[], float],
        trackers: Mapping[str, Any],
    ):
        self.meter = meter
        self._workdir, self._config = workdir, config
        self._seconds, self._trackers = seconds, trackers
        self._events: Events | None = None
        self._writers: tuple[Writer, ...] = ()
        self._first = self._last = 0

    @contextlib.contextmanager
    def observe(
        self,
        saved: Any,
        title: str | None,
        start: int,
        profile: Steps,
        *,
        began: float,
        origin: str | None,
    ) -> Iterator[tuple[Log, Advance, Trace]]:
        """Functions for the loop; what ends it, for whatever reason, is an event.

        Args:
          saved: The config as JSON.
          title: Name in the progress bar.
          start: The step before the first one.
          profile: Which steps are traced.
          began: When this process took the run up, on `time.monotonic`.
          origin: The checkpoint of another run that this one goes on from.
        """
        self._first = self._last = start
        steps, workdir = self._config.steps, self._workdir
        profiles = workdir / "profile"
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                more = {} if origin is None else {"origin": origin}
                self._events = Events(workdir / "events.jsonl", start, began, **more)
                name = title or self._config.name
                self._writers = open_writers(workdir, name, steps, start)
                for tracker in self._trackers.values():
                    filed = TrackerWriter(tracker, workdir, self._config.name, saved)
                    self._writers += (filed,)
                for writer in self._writers:
                    stack.callback(writer.close)
            chosen = profile if jax.process_index() == 0 else False
            ask = workdir / ASK if jax.process_index() == 0 else None
            tracing = trace_steps(profiles, start, steps, chosen, ask=ask)
            trace = stack.enter_context(tracing)
            self.meter.begin()
            try:
                yield self._log, self._advance, trace
            except BaseException as error:
                self._stop(type(error).__name__)
                raise
            self._stop("done" if self._last == steps else "stopped")

    def _stop(self, reason: str) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):  # of a full disk: that is said already
                self._events.add("stop", step=self._last, reason=reason, **self._time())

    def _time(self) -> dict[str, float]:
        return {"productive": round(self.meter.productive, 3)}

    def _log(self, split: str, record: dict[str, Any]) -> None:
        if not record or not self._writers:
            return
        if split == "train":
            record = {**record, **self.meter.rates(record)}
            record["goodput"] = self.goodput()
        record = {"seconds": self._seconds(), "split": split, **record}
        for writer in self._writers:
            writer.write(record)

    def _advance(self, step: int) -> None:
        self._last = step
        if step == self._first + 1:
            self.meter.started()
            if self._events is not None:
                self._events.add("first_step", step=step)
        for writer in self._writers:
            writer.advance(step)

    def saved(self, step: int) -> Callable[[], None]:
        """What is to be called when the checkpoint of this step is written.

        Args:
          step: The step that is saved now.
        """
        time_now = self._time()

        def then() -> None:
            if self._events is not None:
                self._events.add("checkpoint", step=step, **time_now)

        return then

    def goodput(self) -> float | None:
        """The share of the time since the first start that was spent on steps."""
        if self._events is None:
            return None
        return self._events.goodput(self.meter.productive)

    def summary(self) -> dict[str, Any]:
        """For the results: FLOPs of an example, and the goodput over all restarts."""
        flops = self.meter.flops
        counted = None
        if flops is not None:
            counted = {"teacher": flops.teacher, "student": flops.student}
        return {
            "flops_per_example": counted,
            "num_devices": self.meter.num_devices,
            "goodput": self.goodput(),
        }
