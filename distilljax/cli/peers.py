"""Whether the other processes are still there: a process that waits for one that was
killed would wait for ever."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any

_KEY = "distilljax/alive/{}"
_DONE = "done"


class Peers(threading.Thread):
    """Tell the others that this process lives, and end it when one of them does not.

    Each writes a number that grows to the key-value store of `jax.distributed`, which
    process 0 has, and reads those of the others. A collective that waits for a dead
    process cannot be interrupted, so this one is ended from here.

    Args:
      client: Of `jax.distributed`.
      process: Which of the processes this is.
      count: How many there are.
      timeout_secs: For how long one of them may be silent.
    """

    def __init__(self, client: Any, process: int, count: int, timeout_secs: float):
        super().__init__(name="distilljax-peers", daemon=True)
        self._client, self._process = client, process
        self._timeout = timeout_secs
        self._seen: dict[int, tuple[str, float]] = {
            other: ("", time.monotonic()) for other in range(count) if other != process
        }
        self._over = threading.Event()

    def run(self) -> None:
        """Until `leave`, or until one of the others is silent for too long."""
        beat = 0
        while not self._over.is_set():
            beat += 1
            try:
                self._say(str(beat))
                silent = self._silent()
            except Exception as error:  # noqa: BLE001  whatever the store raises
                if not self._over.is_set():
                    self._end(0, str(error).splitlines()[0])
                return
            if silent is not None and not self._over.is_set():
                self._end(silent, f"nothing since {self._timeout:.0f} s")
                return
            self._over.wait(min(5.0, self._timeout / 4))

    def leave(self) -> None:
        """Tell the others that this process has ended as it should."""
        self._over.set()
        with contextlib.suppress(Exception):  # process 0 may have gone before
            self._say(_DONE)

    def _say(self, word: str) -> None:
        self._client.key_value_set(
            _KEY.format(self._process), word, allow_overwrite=True
        )

    def _silent(self) -> int | None:
        """The first process from which nothing came for too long."""
        now = time.monotonic()
        for other, (last, when) in self._seen.items():
            word = self._read(other)
            if word not in ("", last):
                self._seen[other] = (word, now)
            elif word != _DONE and now - when > self._timeout:
                return other
        return None

    def _read(self, other: int) -> str:
        try:
            return self._client.key_value_try_get(_KEY.format(other))
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return ""  # it has not begun yet
            raise

    def _end(self, other: int, got: str) -> None:
        print(
            f"error: distilljax: process {other} of {len(self._seen) + 1} must "
            f"answer within {self._timeout:.0f} s, got {got}. It was killed, or its "
            "machine is gone, and this process ends too. The same command everywhere "
            "goes on from the last checkpoint; --peer-timeout-secs waits longer.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
