"""Whether the other processes are still there: a process that waits for one that was
killed would wait for ever."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from typing import Any

_KEY = "distilljax/alive/{}"
_DONE, _FAILED = "done", "failed"
# What a collective raises when a process of it has gone, in the words of gloo, NCCL and
# the coordination service; none of them says which.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|remote process|unavailable", re.I
)


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
        self._answered = time.monotonic()

    def run(self) -> None:
        """Until `leave`, or until one of the others is silent for too long."""
        beat = 0
        while not self._over.is_set():
            beat += 1
            gone = None
            try:
                self._say(str(beat))
                gone = self._gone()
                self._answered = time.monotonic()
            except Exception as error:  # noqa: BLE001  whatever the store raises
                if time.monotonic() - self._answered > self._timeout:
                    gone = 0, str(error).splitlines()[0]
            if gone is not None and not self._over.is_set():
                with contextlib.suppress(Exception):
                    self._say(_FAILED)
                self._end(*gone)
            self._over.wait(min(5.0, self._timeout / 4))

    def await_cause(self, error: BaseException) -> None:
        """If it is that another process has gone, let `run` say which, and end this.

        The collective fails at once, and the other is known to be gone later: by its
        last word, or by its silence.
        """
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            self.join(self._timeout + 10)

    def leave(self, code: int) -> None:
        """Tell the others that this process ends, and whether as it should.

        With an error it ends here: at its end JAX would wait for the others, which wait
        for this one.
        """
        self._over.set()
        with contextlib.suppress(Exception):  # process 0 may have gone before
            self._say(_DONE if code == 0 else _FAILED)
        if code != 0:
            sys.stdout.flush()
            sys.stderr.flush()
            if self._process == 0:  # the others read it here
                self._wait_for_others(min(15.0, self._timeout))
            os._exit(code)

    def _wait_for_others(self, seconds: float) -> None:
        """Until all have ended, or they have had the time to."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline:
                said = self._client.key_value_dir_get(_KEY.format(""))
                if sum(word in (_DONE, _FAILED) for _, word in said) > len(self._seen):
                    return
                time.sleep(0.2)

    def _say(self, word: str) -> None:
        self._client.key_value_set(
            _KEY.format(self._process), word, allow_overwrite=True
        )

    def _gone(self) -> tuple[int, str] | None:
        """The first process that has failed or is silent for too long; and why."""
        now = time.monotonic()
        said = self._client.key_value_dir_get(_KEY.format(""))
        words = {int(key.rsplit("/", 1)[-1]): word for key, word in said}
        for other, (last, when) in self._seen.items():
            word = words.get(other, "")
            if word == _FAILED:
                return other, "an error there, which it has printed"
            if word not in ("", last):
                self._seen[other] = (word, now)
            elif word != _DONE and now - when > self._timeout:
                return other, f"nothing since {self._timeout:.0f} s"
        return None

    def _end(self, other: int, got: str) -> None:
        print(
            f"error: distilljax: process {other} of {len(self._seen) + 1} must "
            f"answer within {self._timeout:.0f} s, got {got}. It failed, was killed, "
            "or its machine is gone; this process ends too. The same command on all "
            "goes on from the last checkpoint; --peer-timeout-secs waits longer.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
