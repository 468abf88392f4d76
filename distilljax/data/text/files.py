"""Files that are read in pieces, and must not change while they are."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from pathlib import Path
from typing import Any, NoReturn

from distilljax._checks import fail

# The digest of a larger file is kept in the cache, by its path, size and time.
_SMALL = 2**20
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def cache_directory(chosen: str | None = None) -> Path:
    """Where tokens and digests are kept between runs.

    Args:
      chosen: A folder of one's own; None: $DISTILLJAX_CACHE, or ``distilljax`` in the
        user's cache folder.

    Example:
      >>> str(cache_directory("/data/cache"))
      '/data/cache'
    """
    if chosen is not None:
        return Path(chosen)
    if folder := os.environ.get("DISTILLJAX_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / (
        "distilljax"
    )


def expand(function: str, paths: Any) -> tuple[str, ...]:
    """The files of ``paths``, in order; a pattern such as ``data/*.jsonl`` is sorted.

    Args:
      function: Who asks, for messages.
      paths: Files, and patterns of files.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for name in ("b.txt", "a.txt"):
      ...         _ = (Path(folder) / name).write_text("")
      ...     [Path(p).name for p in expand("Jsonl", (f"{folder}/*.txt",))]
      ['a.txt', 'b.txt']
    """
    if isinstance(paths, str) or not paths:
        fail(
            function,
            "paths",
            "be a tuple of at least one file",
            repr(paths),
            'For one file, write ("train.jsonl",).',
            TypeError,
        )
    found: list[str] = []
    for path in paths:
        if path.endswith(_COMPRESSED):
            fail(
                function,
                "paths",
                "be files that are not compressed",
                path,
                "Decompress it: a document in the middle cannot be read by itself.",
            )
        matches = [path] if Path(path).is_file() else sorted(glob.glob(path))
        matches = [match for match in matches if Path(match).is_file()]
        if not matches:
            fail(
                function,
                "paths",
                "be files that exist, or a pattern of some",
                path,
                "Check the path; it is relative to where the command runs.",
            )
        found += matches
    return tuple(found)


class PlannedFile:
    """A file as it was when it was planned; reading it after a change is an error.

    What was found in it (where its lines begin, how long its documents are) would be
    wrong for other bytes. The file is opened for each read, which costs some 15 us: of
    ten thousand files, none is held open.

    Attributes:
      path: The file.
      size: Its bytes.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "a.txt"
      ...     _ = path.write_text("Emma Woodhouse")
      ...     PlannedFile("TextFiles", str(path)).read(5, 10)
      b'Woodh'
    """

    def __init__(self, function: str, path: str):
        self.path = path
        self._function = function
        status = os.stat(path)
        self.size, self._modified = status.st_size, status.st_mtime_ns

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop``, or to the end; from any thread."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                self._check(os.fstat(file.fileno()))
                file.seek(start)
                stop = self.size if stop is None else stop
                parts = [b""]
                # one call reads at most 2 GiB
                while start < stop and (part := file.read(stop - start)):
                    parts.append(part)
                    start += len(part)
                return parts[1] if len(parts) == 2 else b"".join(parts)
        except FileNotFoundError:
            return self._changed("nothing: it was removed")

    def check(self) -> None:
        """The file has the size and the time that it had."""
        try:
            self._check(os.stat(self.path))
        except FileNotFoundError:
            self._changed("nothing: it was removed")

    def _check(self, status: os.stat_result) -> None:
        if status.st_size != self.size:
            self._changed(f"{status.st_size} bytes where {self.size} were")
        if status.st_mtime_ns != self._modified:
            self._changed("as many bytes, written later")

    def _changed(self, how: str) -> NoReturn:
        fail(
            self._function,
            self.path,
            "stay as it was when it was planned",
            how,
            "Write new data to a new file; this one has to be opened again.",
        )

    def fingerprint(self) -> str:
        """A digest of all its bytes; kept in the cache for large files."""
        key = f"{Path(self.path).resolve()}\n{self.size}\n{self._modified}"
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        kept = cache_directory() / "digests" / name
        if self.size > _SMALL:
            with contextlib.suppress(OSError):
                return kept.read_text()
        state = hashlib.blake2b(digest_size=16)
        for start in range(0, self.size, 2**24):
            state.update(self.read(start, min(start + 2**24, self.size)))
        found = state.hexdigest()
        if self.size > _SMALL:
            with contextlib.suppress(OSError):  # it is only slower without
                kept.parent.mkdir(parents=True, exist_ok=True)
                partial = kept.with_name(f".{name}.{os.getpid()}")
                partial.write_text(found)
                partial.replace(kept)
        return found


def decode(
    function: str, data: bytes, file: PlannedFile, start: int, errors: str
) -> str:
    """Bytes of a file as text; an error names the file and the byte.

    Args:
      function: Who reads, for the message.
      data: The bytes.
      file: Where they are from.
      start: Where in it they begin.
      errors: "strict", or "replace" to put U+FFFD in the place of what is no UTF-8.

    Example:
      >>> decode("TextFiles", b"caf\\xe9", PlannedFile("", "/dev/null"), 0, "replace")
      'caf\ufffd'
    """
    try:
        return data.decode(errors=errors)
    except UnicodeDecodeError as error:
        return fail(
            function,
            file.path,
            "be UTF-8",
            f"the byte 0x{data[error.start]:02x} at offset {start + error.start} "
            f"({error.reason})",
            'Convert it with iconv, or pass errors="replace".',
        )
