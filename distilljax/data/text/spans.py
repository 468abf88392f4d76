"""Where the documents of text files begin and end, found when one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64

from distilljax.data.text.files import PlannedFile

# How some programs begin a file in UTF-8.
BOM = b"\xef\xbb\xbf"


class Pieces:
    """Pieces of several files, in order, by where they begin and end.

    A run that finds its tokens on disk asks for no document, and so no file is read.

    Attributes:
      files: The files.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile() as f:
      ...     _ = f.write(b"one\\n\\ntwo\\n"), f.flush()
      ...     lines = Pieces([PlannedFile("", f.name)], line_spans)
      ...     file, start, stop = lines[1]
      ...     file.read(start, stop)
      b'two'
    """

    def __init__(
        self,
        files: list[PlannedFile],
        find: Callable[[PlannedFile], Int64[np.ndarray, "pieces 2"]],
    ):
        self.files, self._find = files, find

    @property
    def fingerprint(self) -> list[str]:
        """Of the bytes of each file."""
        return [file.fingerprint() for file in self.files]

    @cached_property
    def _found(self) -> tuple[Int64[np.ndarray, "pieces 2"], Any]:
        spans = [self._find(file) for file in self.files]
        which = np.repeat(np.arange(len(spans)), [len(s) for s in spans])
        return np.concatenate(spans), which

    def __len__(self) -> int:
        """How many there are."""
        return len(self._found[0])

    def __getitem__(self, index: int) -> tuple[PlannedFile, int, int]:
        """The file of piece ``index``, its first byte there, and the one after it."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        spans, which = self._found
        start, stop = spans[index].tolist()
        return self.files[which[index]], start, stop


def line_spans(file: PlannedFile) -> Int64[np.ndarray, "lines 2"]:
    """Where each line that is not empty begins and ends, without its line break.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile() as f:
      ...     _ = f.write(b"one\\r\\n\\r\\ntwo"), f.flush()
      ...     line_spans(PlannedFile("", f.name)).tolist()
      [[0, 4], [7, 10]]
    """
    ends = np.concatenate([*_breaks(file), np.array([file.size])])
    starts = np.concatenate([[0], ends[:-1] + 1])
    if file.size >= 3 and file.read(0, 3) == BOM:
        starts[0] = 3
    keep = ends > starts
    for row in np.flatnonzero(ends - starts == 1):
        keep[row] = file.read(int(starts[row]), int(ends[row])) != b"\r"
    return np.stack([starts, ends], axis=1)[keep].astype(np.int64)


def where_in(file: PlannedFile, offset: int) -> str:
    """The file, and the line at a byte of it, counted from 1.

    Example:
      >>> where_in(PlannedFile("", "/dev/null"), 0)
      '/dev/null:1'
    """
    pieces = range(0, offset, 2**24)
    breaks = (file.read(a, min(a + 2**24, offset)).count(b"\n") for a in pieces)
    return f"{file.path}:{1 + sum(breaks)}"


def _breaks(file: PlannedFile) -> Iterator[Any]:
    """The offsets of all line breaks, for pieces of the file."""
    for start in range(0, file.size, 2**24):
        data = file.read(start, min(start + 2**24, file.size))
        yield np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + start
