"""Documents in files of JSON lines, read line by line where they are asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass

from distilljax._checks import fail
from distilljax.data.text.documents import (
    Document,
    Documents,
    Errors,
    check_errors,
    checked_document,
    digest,
)
from distilljax.data.text.files import PlannedFile, decode, expand
from distilljax.data.text.spans import Pieces, line_spans, where_in


@dataclass(frozen=True)
class Jsonl:
    """One JSON object in each line, and a document in one of its fields.

    A text is a document, and so is a list of messages. Lines that are empty are
    skipped; anything else that is no object with that field is an error that names the
    file and the line. Only where the lines begin is kept in memory: 8 bytes for each.

    Attributes:
      paths: The files, in order; a pattern such as ``data/*.jsonl`` is sorted.
      field: Name of the field: "text", or "messages" for conversations.
      errors: "strict" stops at bytes that are no UTF-8, "replace" puts U+FFFD there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/a.jsonl"
      ...     with open(path, "w") as file:
      ...         _ = file.write('{"text": "Emma"}\\n\\n{"text": "Persuasion"}\\n')
      ...     documents = Jsonl((path,))()
      ...     documents[1], documents.where(1).removeprefix(folder)
      ('Persuasion', '/a.jsonl:3')
    """

    paths: tuple[str, ...]
    field: str = "text"
    errors: Errors = "strict"

    def __call__(self) -> Documents:
        """Note the files; they are read when a document is asked for."""
        check_errors("Jsonl", self.errors)
        files = [PlannedFile("Jsonl", p) for p in expand("Jsonl", self.paths)]
        return JsonLines(Pieces(files, line_spans), self.field, self.errors)


class JsonLines:
    """The documents of a `Jsonl`."""

    def __init__(self, lines: Pieces, field: str, errors: Errors):
        self._lines, self._field, self._errors = lines, field, errors

    @property
    def fingerprint(self) -> str:
        """Of the bytes of all files, and of how they are read."""
        return digest("Jsonl", self._lines.fingerprint, self._field, self._errors)

    def __len__(self) -> int:
        """How many lines have a document."""
        return len(self._lines)

    def __getitem__(self, index: int) -> Document:
        """The document of line ``index``, the empty ones not counted."""
        file, start, stop = self._lines[index]
        text = decode("Jsonl", file.read(start, stop), file, start, self._errors)
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            fail(
                "Jsonl",
                self.where(index),
                "be one JSON object",
                f"{text.strip()[:60]!r} ({error.msg} at column {error.colno})",
                "Repair or remove this line.",
            )
        if not isinstance(record, dict):
            fail(
                "Jsonl",
                self.where(index),
                "be one JSON object",
                f"{type(record).__name__} {text.strip()[:60]!r}",
                'A line looks like {"text": "..."}.',
                TypeError,
            )
        if record.get(self._field) is None:
            fail(
                "Jsonl",
                self.where(index),
                f"have the field {self._field!r}",
                f"the fields {sorted(record)}",
                "Pass field=, or repair this line.",
            )
        found = record[self._field]
        return checked_document("Jsonl", found, index, self.where, self._errors)

    def where(self, index: int) -> str:
        """The file and the line, counted from 1, empty ones included."""
        file, start, _ = self._lines[index]
        return where_in(file, start)
