"""Examples of one's own in ArrayRecord files: the fastest random access on disk."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from distilljax._checks import fail
from distilljax.data.sources import Example, Records, Source

_MAGIC = b"DJX1"


def encode_example(example: Example) -> bytes:
    """One example as bytes.

    Format: the four bytes ``DJX1``; the length of the header as a little-endian uint32;
    the header, a JSON object from the name of each field to ``[dtype, shape]``; then
    the values of the fields, in the header's order, little-endian and in C order.

    Args:
      example: A dict of arrays or numbers.

    Example:
      >>> encode_example({"labels": np.uint8(3)})
      b'DJX1\\x15\\x00\\x00\\x00{"labels":["|u1",[]]}\\x03'
    """
    arrays = {name: np.asarray(value) for name, value in example.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            fail(
                "encode_example",
                name,
                "be a number or an array of numbers",
                array.dtype,
                "Decode images and tokenise text before writing.",
                TypeError,
            )
    arrays = {
        n: np.ascontiguousarray(a, a.dtype.newbyteorder("<")).reshape(a.shape)
        for n, a in arrays.items()
    }
    layout = {name: [a.dtype.str, list(a.shape)] for name, a in arrays.items()}
    header = json.dumps(layout, separators=(",", ":")).encode()
    values = b"".join(array.tobytes() for array in arrays.values())
    return _MAGIC + struct.pack("<I", len(header)) + header + values


def decode_example(record: bytes) -> Example:
    """The example that `encode_example` wrote; its arrays are read-only.

    Example:
      >>> decode_example(encode_example({"inputs": np.arange(3.0)}))["inputs"].tolist()
      [0.0, 1.0, 2.0]
    """
    if record[:4] != _MAGIC or len(record) < 8:
        fail(
            "decode_example",
            "record",
            "begin with DJX1",
            repr(record[:4]),
            "Write the file with write_array_record; files of TFDS are read by Tfds.",
        )
    (length,) = struct.unpack_from("<I", record, 4)
    fields, size = _layout(record[8 : 8 + length])
    if len(record) != 8 + length + size:
        fail(
            "decode_example",
            "record",
            f"have {8 + length + size} bytes",
            len(record),
            "It is damaged: write the file again.",
        )
    return {
        name: np.frombuffer(record, dtype, count, 8 + length + offset).reshape(shape)
        for name, dtype, count, offset, shape in fields
    }


@lru_cache(maxsize=64)  # the records of a file have one header, mostly
def _layout(header: bytes) -> tuple[list[Any], int]:
    fields, offset = [], 0
    for name, (dtype, shape) in json.loads(header).items():
        count = math.prod(shape)
        fields.append((name, np.dtype(dtype), count, offset, tuple(shape)))
        offset += count * np.dtype(dtype).itemsize
    return fields, offset


def write_array_record(path: str | Path, examples: Iterable[Example]) -> int:
    """Write examples to an ArrayRecord file; return how many.

    The file appears under its name when it is complete: a crash leaves no half file
    that a later run would read. One record is one group, which is what makes random
    reads fast (16 times faster than groups of 1,024, at the price of a larger file).

    Args:
      path: The file; its directory is made.
      examples: Dicts with ``inputs`` and whatever else a batch shall have; a source is
        one too.

    Example:
      >>> import tempfile
      >>> directory = tempfile.TemporaryDirectory()
      >>> path = f"{directory.name}/train.array_record"
      >>> two = [{"inputs": np.zeros(2), "labels": k} for k in (4, 2)]
      >>> write_array_record(path, two)
      2
      >>> [int(example["labels"]) for example in ArrayRecord((path,))()]
      [4, 2]
      >>> directory.cleanup()
    """
    return write_records(path, (encode_example(example) for example in examples))


def write_records(path: str | Path, records: Iterable[bytes]) -> int:
    """Write bytes to an ArrayRecord file; return how many records there were.

    As with `write_array_record`, the file appears when it is complete. The same records
    give the same file, byte for byte.

    Args:
      path: The file; its directory is made.
      records: One after the other.
    """
    writers: Any = importlib.import_module("array_record.python.array_record_module")

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    writer = writers.ArrayRecordWriter(str(partial), "group_size:1")
    try:
        count = 0
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except RuntimeError as error:
        if "No space left on device" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
    finally:
        if writer.is_open():
            writer.close()
        partial.unlink(missing_ok=True)
    return count


def open_records(path: str | Path) -> Any:
    """The records of an ArrayRecord file: ``records[i]``, ``__getitems__``, a length.

    Args:
      path: The file.
    """
    from array_record.python import array_record_data_source  # heavy

    return array_record_data_source.ArrayRecordDataSource([str(path)])


@dataclass(frozen=True)
class ArrayRecord:
    """Examples in files that `write_array_record` wrote.

    Attributes:
      paths: The files, in order.
      num_classes: How many classes there are, where known.
      class_names: One name for each class, where known.

    Example:
      >>> config = ArrayRecord(("train-0.array_record", "train-1.array_record"), 10)
      >>> config.num_classes    # a config opens nothing
      10
    """

    paths: tuple[str, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()

    def __call__(self) -> Source:
        """Open the files; records are read when they are asked for."""
        from array_record.python import array_record_data_source  # heavy

        if isinstance(self.paths, str) or not self.paths:
            fail(
                "ArrayRecord",
                "paths",
                "be a tuple of at least one file",
                repr(self.paths),
                'For one file, write ("train.array_record",).',
                TypeError,
            )
        for path in self.paths:
            if "://" not in path and not Path(path).is_file():
                fail(
                    "ArrayRecord",
                    "paths",
                    "be files that exist",
                    path,
                    "Write it with write_array_record.",
                )
        try:
            records = array_record_data_source.ArrayRecordDataSource(list(self.paths))
            if len(records):
                decode_example(records[0])
        except (RuntimeError, IndexError) as error:
            fail(
                "ArrayRecord",
                "paths",
                "be complete ArrayRecord files",
                f"{', '.join(self.paths)}: {error}",
                "Write them again with write_array_record.",
            )
        num_classes = self.num_classes or len(self.class_names) or None
        return Records(records, decode_example, num_classes, self.class_names)
