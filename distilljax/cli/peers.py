"""Whether the other processes are still there: a process that waits for one that was
killed would wait for ever."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Set
from typing import Any, NoReturn

_KEY = "distilljax/alive/{}"
# A last word; one that ends because of another says "lost 2 nothing since 60 s".
_DONE, _FAILED, _LOST_ONE = "done", "failed", "lost "
# What a collective raises when a process of it has gone, in the words of gloo, NCCL and
# the coordination service; none of them says which.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|remote process|unavailable", re.I
)


# What the other program of `LastWords` does.
_WITNESS = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"


class LastWords:
    """Words that another program prints if this process ends without `withdraw`.

    Killed, or aborted by a library of C++, it can say nothing itself; its end of a pipe
    is closed then.

    Args:
      words: What is printed to stderr.
    """

    def __init__(self, words: str):
        # in a session of its own: what is sent to this one's group does not reach it
        self._witness = subprocess.Popen(
            [sys.executable, "-ISc", _WITNESS, words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.withdraw)

    def withdraw(self) -> None:
        """Let nothing be said: this process ends in order, or has said why it ends."""
        atexit.unregister(self.withdraw)
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self._witness.communicate(b"withdrawn", timeout=5)


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
        self._every = min(5.0, timeout_secs / 4)
        self._seen: dict[int, tuple[str, float]] = {
            other: ("", time.monotonic()) for other in range(count) if other != process
        }
        self._over = threading.Event()
        self._answered = time.monotonic()
        self._last_words: LastWords | None = None

    def start(self) -> None:
        """Watch, and be watched by a program that speaks for this one at the last."""
        self._last_words = LastWords(
            f"error: distilljax: process {self._process} of {len(self._seen) + 1} "
            "ended before it could say why. It was killed, or its runtime aborted, as "
            "it may when another process is gone, and does when that is process 0, the "
            "coordinator; what is printed above may tell. The same command on all goes "
            "on from the last checkpoint."
        )
        super().start()

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
                self._end(*gone)
            self._over.wait(self._every)

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
            self._exit(code)

    def _exit(self, code: int, lost: int | None = None) -> NoReturn:
        """End here; process 0 when the others, but for a lost one, have read why."""
        if self._last_words is not None:  # first: gloo may abort it while it waits
            self._last_words.withdraw()
        if self._process == 0:
            self._wait_for(self._seen.keys() - {lost}, 3 * self._every)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _wait_for(self, others: Set[int], seconds: float) -> None:
        """Until these have said their last word, or have had the time to."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline:
                words = self._words()
                if not any(words.get(other, "0").isdigit() for other in others):
                    return
                time.sleep(0.2)

    def _say(self, word: str) -> None:
        self._client.key_value_set(
            _KEY.format(self._process), word, allow_overwrite=True
        )

    def _words(self) -> dict[int, str]:
        said = self._client.key_value_dir_get(_KEY.format(""))
        return {int(key.rsplit("/", 1)[-1]): word for key, word in said}

    def _gone(self) -> tuple[int, str] | None:
        """The first process that has failed or is silent for too long; and why."""
        now = time.monotonic()
        words = self._words()
        for other, (last, when) in self._seen.items():
            word = words.get(other, "")
            if word == _FAILED:
                return other, "an error there, which it has printed"
            if word.startswith(_LOST_ONE):
                lost, got = word.removeprefix(_LOST_ONE).split(" ", 1)
                return int(lost), got
            if word not in ("", last):
                self._seen[other] = (word, now)
            elif word != _DONE and now - when > self._timeout:
                return other, f"nothing since {self._timeout:.0f} s"
        return None

    def _end(self, other: int, got: str) -> NoReturn:
        print(
            f"error: distilljax: process {other} of {len(self._seen) + 1} must "
            f"answer within {self._timeout:.0f} s, got {got}. It failed, was killed, "
            "or its machine is gone; this process ends too. The same command on all "
            "goes on from the last checkpoint; --peer-timeout-secs waits longer.",
            file=sys.stderr,
            flush=True,
        )
        with contextlib.suppress(Exception):
            self._say(f"{_LOST_ONE}{other} {got}")
        self._exit(1, lost=other)
