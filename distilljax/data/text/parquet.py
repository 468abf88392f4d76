"""Documents in Parquet files, read by row groups where they are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Int64

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

# Parquet is compressed by row groups: one row costs as much as all of its group.
_GROUPS_KEPT = 2


@dataclass(frozen=True)
class Parquet:
    """A document in each row of a column: a text, or a list of messages.

    Attributes:
      paths: The files, in order; a pattern such as ``data/*.parquet`` is sorted.
      field: Name of the column.
      errors: "strict" stops at texts that are no UTF-8, "replace" puts U+FFFD there.

    Example:
      >>> Parquet(("data/*.parquet",), field="content").field  # a config opens nothing
      'content'
    """

    paths: tuple[str, ...]
    field: str = "text"
    errors: Errors = "strict"

    def __call__(self) -> Documents:
        """Read the footers; rows are read when they are asked for."""
        check_errors("Parquet", self.errors)
        files = [PlannedFile("Parquet", p) for p in expand("Parquet", self.paths)]
        groups = [
            np.array([metadata.row_group(i).num_rows for i in range(count)], np.int64)
            for metadata in (self._metadata(file) for file in files)
            for count in (metadata.num_row_groups,)
        ]
        return ParquetRows(files, groups, self.field, self.errors)

    def _metadata(self, file: PlannedFile) -> Any:
        found = _opened(file)
        names = found.schema_arrow.names
        if self.field not in names:
            fail(
                "Parquet",
                file.path,
                f"have the column {self.field!r}",
                f"the columns {names}",
                "Pass field=.",
            )
        return found.metadata


class ParquetRows:
    """The documents of a `Parquet`."""

    def __init__(
        self,
        files: list[PlannedFile],
        groups: list[Int64[np.ndarray, " groups"]],
        field: str,
        errors: Errors,
    ):
        self._files, self._field, self._errors = files, field, errors
        self._where = [
            (f, g) for f, sizes in enumerate(groups) for g in range(len(sizes))
        ]
        sizes = np.concatenate([np.zeros(0, np.int64), *groups])
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._first = np.cumsum([0, *(int(sizes.sum()) for sizes in groups)])
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """Of the bytes of all files, and of how they are read."""
        files = [file.fingerprint() for file in self._files]
        return digest("Parquet", files, self._field, self._errors)

    def __len__(self) -> int:
        """How many rows there are."""
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Document:
        """The document of row ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        group = int(np.searchsorted(self._ends, index, side="right"))
        value = self._column(group)[index - int(self._starts[group])].as_py()
        value = self._decoded(value, index)
        if value is None:
            fail(
                "Parquet",
                self.where(index),
                f"have a value in the column {self._field!r}",
                "null",
                "Leave such rows out of the file.",
            )
        return checked_document("Parquet", value, index, self.where, self._errors)

    def where(self, index: int) -> str:
        """The file, and the row in it, counted from 0."""
        which = int(np.searchsorted(self._first, index, side="right")) - 1
        return f"{self._files[which].path}, row {index - int(self._first[which])}"

    def _decoded(self, value: Any, index: int) -> Any:
        """Bytes as text, also those inside of messages, without fields that are null.

        A column gives every message every field: a template that asks whether there
        are tool calls must not find them where there are none.
        """
        if isinstance(value, dict):
            return {
                name: self._decoded(inner, index)
                for name, inner in value.items()
                if inner is not None or name == "content"
            }
        if isinstance(value, list):
            return [self._decoded(inner, index) for inner in value]
        if not isinstance(value, bytes):
            return value
        try:
            return value.decode(errors=self._errors)
        except UnicodeDecodeError as error:
            return fail(
                "Parquet",
                self.where(index),
                "be UTF-8",
                f"the byte 0x{value[error.start]:02x} at offset {error.start} of it",
                'Pass errors="replace", or leave this row out.',
            )

    def _column(self, group: int) -> Any:
        """The column of a row group, as bytes; of the last few, from memory."""
        with self._lock:
            if group not in self._kept:
                which, number = self._where[group]
                self._files[which].check()
                self._kept[group] = _read(self._files[which], number, self._field)
                while len(self._kept) > _GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes read the rows themselves."""
        state = {k: v for k, v in self.__dict__.items() if k != "_lock"}
        return state | {"_kept": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = threading.Lock()


def _read(file: PlannedFile, group: int, field: str) -> Any:
    import pyarrow

    try:
        column = _opened(file).read_row_group(group, columns=[field]).column(0)
    except (pyarrow.ArrowException, OSError) as error:
        _damaged(file, error)
    # as bytes: pyarrow itself would not say where the text is that is no UTF-8
    return column.cast(_as_bytes(column.type))


def _as_bytes(kind: Any) -> Any:
    """A type of Arrow, with bytes for the texts in it."""
    import pyarrow
    from pyarrow import types

    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pyarrow.struct([f.with_type(_as_bytes(f.type)) for f in fields])
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if types.is_large_list(kind):
        inner = kind.value_field.with_type(_as_bytes(kind.value_type))
        return pyarrow.large_list(inner)
    return kind


def _opened(file: PlannedFile) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        _damaged(file, error)


def _damaged(file: PlannedFile, error: Exception) -> NoReturn:
    fail(
        "Parquet",
        file.path,
        "be a whole Parquet file",
        f"{file.size} bytes ({str(error).splitlines()[0]})",
        "It is damaged or cut short: write or copy it again.",
    )
