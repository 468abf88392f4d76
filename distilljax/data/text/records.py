"""Documents in ArrayRecord files, and in the data sets of TFDS."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from distilljax._checks import fail
from distilljax.data.text.documents import (
    Document,
    Documents,
    Errors,
    check_errors,
    checked_document,
    digest,
)
from distilljax.data.text.files import PlannedFile, expand
from distilljax.data.tfds import Tfds


@dataclass(frozen=True)
class ArrayRecordText:
    """A document in each record: a text, or a JSON object with one in a field.

    Attributes:
      paths: The files, in order; a pattern such as ``data/*.array_record`` is sorted.
      field: Name of the field of JSON records; None: a record is a text.
      errors: "strict" stops at bytes that are no UTF-8, "replace" puts U+FFFD there.

    Example:
      >>> ArrayRecordText(("a.array_record",)).field is None    # opens nothing
      True
    """

    paths: tuple[str, ...]
    field: str | None = None
    errors: Errors = "strict"

    def __call__(self) -> Documents:
        """Open the files; records are read when they are asked for."""
        from array_record.python import array_record_data_source  # heavy

        check_errors("ArrayRecordText", self.errors)
        paths = expand("ArrayRecordText", self.paths)
        files = [PlannedFile("ArrayRecordText", path) for path in paths]
        try:
            records = array_record_data_source.ArrayRecordDataSource(list(paths))
            if len(records):
                records[0]
        except (RuntimeError, IndexError) as error:
            fail(
                "ArrayRecordText",
                "paths",
                "be complete ArrayRecord files",
                f"{', '.join(paths)}: {error}",
                "They are damaged or cut short: write them again.",
            )
        content = digest("ArrayRecordText", [file.fingerprint() for file in files])
        return RecordTexts(
            "ArrayRecordText", records, self.field, self.errors, content, paths[0]
        )


@dataclass(frozen=True)
class TfdsText:
    """The texts of a data set of TFDS, in its array_record form.

    Attributes:
      name: Name, with config and version where wanted: "lm1b", "wikipedia/20230601.en".
      split: A split or a slice of one, in TFDS's language: "train[:1%]".
      data_dir: Folder of all data sets; None is TFDS_DATA_DIR, or what TFDS chooses.
      field: Feature with the text.
      errors: "strict" stops at bytes that are no UTF-8, "replace" puts U+FFFD there.
      download: Download and prepare the data set if it is not there.

    Example:
      >>> TfdsText("lm1b", "test").field    # a config opens nothing
      'text'
    """

    name: str
    split: str = "train"
    data_dir: str | None = None
    field: str = "text"
    errors: Errors = "strict"
    download: bool = False

    def __call__(self) -> Documents:
        """Open the data set; examples are read when they are asked for."""
        check_errors("TfdsText", self.errors)
        builder, records = Tfds(
            self.name, self.split, self.data_dir, download=self.download
        ).records("TfdsText", (self.field,))
        sizes = builder.info.splits
        lengths = list(sizes[self.split].shard_lengths) if sizes else len(records)
        content = digest("TfdsText", builder.info.full_name, self.split, lengths)
        where = f"{self.name} {self.split}"
        return RecordTexts("TfdsText", records, self.field, self.errors, content, where)


class RecordTexts:
    """Documents that are records of others: bytes, JSON, or dicts."""

    def __init__(
        self,
        function: str,
        records: Any,
        field: str | None,
        errors: Errors,
        content: str,
        origin: str,
    ):
        self._function, self._records, self._origin = function, records, origin
        self._field, self._errors, self._content = field, errors, content

    @property
    def fingerprint(self) -> str:
        """Of the records, and of how they are read."""
        return digest(self._content, self._field, self._errors)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        """The document of record ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        value: Any = self._records[index]
        if isinstance(value, bytes):
            value = self._decoded(value, index)
            if self._field is not None:
                value = self._parsed(value, index)
        if self._field is not None:
            value = value.get(self._field)
        if isinstance(value, bytes):
            value = self._decoded(value, index)
        if value is None:
            fail(
                self._function,
                self.where(index),
                f"have the field {self._field!r}",
                "none",
                "Pass field=, or leave this record out.",
            )
        return checked_document(self._function, value, index, self.where, self._errors)

    def where(self, index: int) -> str:
        """Where the records are from, and which of them it is, counted from 0."""
        return f"{self._origin}, record {index}"

    def _decoded(self, value: bytes, index: int) -> str:
        try:
            return value.decode(errors=self._errors)
        except UnicodeDecodeError as error:
            return fail(
                self._function,
                self.where(index),
                "be UTF-8",
                f"the byte 0x{value[error.start]:02x} at offset {error.start} of it",
                'Pass errors="replace", or leave this record out.',
            )

    def _parsed(self, text: str, index: int) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            fail(
                self._function,
                self.where(index),
                "be a JSON object",
                f"{text[:60]!r} ({error.msg})",
                "Leave field out if the record is the text itself.",
            )
        if not isinstance(found, dict):
            fail(
                self._function,
                self.where(index),
                "be a JSON object",
                f"{type(found).__name__} {text[:60]!r}",
                "Leave field out if the record is the text itself.",
                TypeError,
            )
        return found
