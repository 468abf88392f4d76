"""Faults that pass: a mounted bucket or a network's disk does not answer for a moment.

What is small and is written again whole is tried again here, `patiently`; whoever
writes much (`Checkpoints`) asks `is_passing` and goes on without.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

_NAMES = (
    "EIO", "EAGAIN", "EBUSY", "EINTR", "ENOTEMPTY", "ESTALE", "ETIMEDOUT", "ECONNRESET",
    "ECONNABORTED", "ENETUNREACH", "EREMOTEIO",
)  # fmt: skip
# Not every system has all of them.
_PASSING = tuple(getattr(errno, name) for name in _NAMES if hasattr(errno, name))
_WORDS = tuple(os.strerror(number) for number in _PASSING)
WAITS_SECS = (0.1, 0.3, 1.0, 3.0)


def is_passing(error: BaseException | None) -> bool:
    """True if an error, or one that it came from, may be gone the next time.

    A full disk and missing rights stay. Of an error that a library has put into words
    of its own, the system's words tell.

    Args:
      error: What was raised.

    Example:
      >>> is_passing(OSError(errno.EIO, "Input/output error"))
      True
      >>> is_passing(OSError(errno.ENOSPC, "No space left on device"))
      False
    """
    while error is not None:
        if isinstance(error, TimeoutError):
            return True
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno in _PASSING
        if any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def patiently(
    operation: Callable[[], Result],
    waits_secs: Sequence[float] = WAITS_SECS,
    passing: Callable[[BaseException], bool] = is_passing,
) -> Result:
    """What an operation returns, tried again after faults that may pass.

    Args:
      operation: Does the same when it is called again after it has failed.
      waits_secs: How long to wait before each further try.
      passing: Which errors may be gone the next time.

    Raises:
      Exception: that of the last try, or one that will not pass.
    """
    for wait in waits_secs:
        try:
            return operation()
        # libraries put the system's error into words of their own
        except (OSError, ValueError, RuntimeError) as error:
            if not passing(error):
                raise
        time.sleep(wait)
    return operation()


_APPENDING = threading.Lock()


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file of this process: whole, at once, from any thread.

    The file is opened each time: what is written to a mounted bucket appears in it when
    it is closed.

    Args:
      path: The file; made if it is not there.
      line: Without its end.

    Raises:
      OSError: it could not be written, after several tries if the fault may pass.
    """
    data = f"{line}\n".encode()
    size: int | None = None

    def write() -> None:
        nonlocal size
        with path.open("ab", buffering=0) as file:
            if size is None:
                size = file.tell()
            elif file.tell() > size:
                file.truncate(size)  # what a try before this one has written of it
            left = memoryview(data)
            while left:  # of a full disk the first write takes what there is room for
                left = left[file.write(left) :]

    with _APPENDING:
        patiently(write)


def note(text: str) -> None:
    """Tell who runs this, beside what is asked for.

    Args:
      text: A sentence.
    """
    print(f"note: {text}", file=sys.stderr, flush=True)


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or what it is.

    Args:
      error: What was raised.
    """
    return (str(error) or type(error).__name__).splitlines()[0]


__all__ = ["WAITS_SECS", "append_line", "is_passing", "note", "patiently", "reason_of"]
