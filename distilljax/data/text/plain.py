"""Documents in files of plain text: whole files, their paragraphs or their lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64

from distilljax._checks import fail
from distilljax.data.text.documents import (
    Document,
    Documents,
    Errors,
    check_errors,
    digest,
)
from distilljax.data.text.files import PlannedFile, decode, expand
from distilljax.data.text.spans import BOM, Pieces, line_spans, where_in

Unit = Literal["file", "paragraph", "line"]
# A line with nothing on it, and the break before it.
_BLANK = re.compile(rb"\n[ \t\r]*(?=\n)")


@dataclass(frozen=True)
class TextFiles:
    """Files of plain text in UTF-8.

    Attributes:
      paths: The files, in order; a pattern such as ``books/*.txt`` is sorted.
      unit: What one document is: a whole "file", a "paragraph" (what stands between
        blank lines) or a "line". Blank lines are no documents; an empty file is one,
        and is dropped and counted where rows are packed.
      errors: "strict" stops at bytes that are no UTF-8, "replace" puts U+FFFD there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/a.txt"
      ...     with open(path, "w") as file:
      ...         _ = file.write("VOLUME I\\n\\nEmma Woodhouse,\\nhandsome\\n")
      ...     documents = TextFiles((path,), unit="paragraph")()
      ...     documents[1], documents.where(1).removeprefix(folder)
      ('Emma Woodhouse,\\nhandsome', '/a.txt:3')
    """

    paths: tuple[str, ...]
    unit: Unit = "file"
    errors: Errors = "strict"

    def __call__(self) -> Documents:
        """Note the files; they are read when a document is asked for."""
        check_errors("TextFiles", self.errors)
        if self.unit not in ("file", "paragraph", "line"):
            fail(
                "TextFiles",
                "unit",
                'be "file", "paragraph" or "line"',
                repr(self.unit),
                "It says what one document is.",
            )
        files = [PlannedFile("TextFiles", p) for p in expand("TextFiles", self.paths)]
        find = {"file": _whole, "paragraph": _paragraphs, "line": line_spans}
        return PlainTexts(Pieces(files, find[self.unit]), self.unit, self.errors)


class PlainTexts:
    """The documents of a `TextFiles`."""

    def __init__(self, pieces: Pieces, unit: Unit, errors: Errors):
        self._pieces, self._unit, self._errors = pieces, unit, errors

    @property
    def fingerprint(self) -> str:
        """Of the bytes of all files, and of how they are read."""
        content = self._pieces.fingerprint
        return digest("TextFiles", content, self._unit, self._errors)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self._pieces)

    def __getitem__(self, index: int) -> Document:
        """Document ``index``, without the line break at its end."""
        file, start, stop = self._pieces[index]
        data = file.read(start, stop)
        return decode("TextFiles", data, file, start, self._errors).rstrip("\r\n")

    def where(self, index: int) -> str:
        """The file, and the line where the document begins, counted from 1."""
        file, start, _ = self._pieces[index]
        return file.path if self._unit == "file" else where_in(file, start)


def _whole(file: PlannedFile) -> Int64[np.ndarray, "documents 2"]:
    start = len(BOM) if file.read(0, len(BOM)) == BOM else 0
    return np.array([[start, file.size]], np.int64)


def _paragraphs(file: PlannedFile) -> Int64[np.ndarray, "documents 2"]:
    """What stands between blank lines; the file is in memory while they are found."""
    start = int(_whole(file)[0, 0])
    data = file.read(start)
    spans, begin = [], 0
    for blank in [*_BLANK.finditer(data), None]:
        end = len(data) if blank is None else blank.start()
        piece = data[begin:end]
        if piece.strip():
            skipped = len(piece) - len(piece.lstrip(b"\r\n"))
            spans.append((start + begin + skipped, start + end))
        begin = end if blank is None else blank.end()
    return np.array(spans, np.int64).reshape(-1, 2)
