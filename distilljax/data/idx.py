"""MNIST and Fashion-MNIST from their original idx files, compressed or not."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from distilljax._checks import fail
from distilljax.data.sources import Arrays, Source, subset

_CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}
# Where scripts/fetch_assets.sh unpacks each data set.
_FETCHED = {
    "mnist": "mnist/package/data",
    "fashion_mnist": "deb/usr/share/datasets/fashion-mnist",
}
_FETCH = "Fetch the files with scripts/fetch_assets.sh."
_SPLIT = re.compile(r"(train|test)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@dataclass(frozen=True)
class Idx:
    """28x28 grey images and labels, with the element spec that TFDS gives them.

    Attributes:
      directory: Holds the idx files, or is what ``scripts/fetch_assets.sh`` filled.
      dataset: Which data set; both have the same file names.
      split: "train" or "test", or a part: "train[:5000]", "train[-10%:]".

    Example:
      >>> config = Idx("assets", "fashion_mnist", split="train[:5000]")
      >>> config.num_classes, config.class_names[9]    # known without the files
      (10, 'Ankle boot')

    Reference: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to
    document recognition", Proc. IEEE 1998. Xiao, Rasul, Vollgraf, "Fashion-MNIST",
    arXiv 2017.
    """

    directory: str
    dataset: Literal["mnist", "fashion_mnist"] = "mnist"
    split: str = "train"

    @property
    def num_classes(self) -> int:
        """10, for both."""
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The digits, or the articles of clothing."""
        return _CLASS_NAMES[self.dataset]

    def __call__(self) -> Source:
        """Read both files; the images are uint8 [examples, 28, 28, 1]."""
        if self.dataset not in _CLASS_NAMES:
            fail(
                "Idx",
                "dataset",
                f"be one of {sorted(_CLASS_NAMES)}",
                repr(self.dataset),
                "Other idx files: read_idx.",
            )
        match = _SPLIT.fullmatch(self.split)
        if match is None:
            fail(
                "Idx",
                "split",
                'be "train" or "test", with a slice such as [:5000] or [-10%:] or none',
                repr(self.split),
                "Other selections are dataclasses: Slice, Stratified, Few.",
            )
        prefix = {"train": "train", "test": "t10k"}[match[1]]
        images_path = self._find(f"{prefix}-images", 3)
        labels_path = self._find(f"{prefix}-labels", 1)
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels):
            fail(
                "Idx",
                str(labels_path),
                f"have as many labels as there are images, {len(images)}",
                len(labels),
                _FETCH,
            )
        source = Arrays(images[..., None], labels, self.num_classes, self.class_names)
        if match[2] is None and match[3] is None:
            return source
        part = slice(_bound(match[2], len(source)), _bound(match[3], len(source)))
        return subset(source, np.arange(len(source))[part])

    def _find(self, stem: str, axes: int) -> Path:
        root = Path(self.directory)
        folders = [root, root / _FETCHED[self.dataset], root / self.dataset]
        names = [f"{stem}{dash}idx{axes}-ubyte" for dash in "-."]
        for folder in folders:
            for name in names:
                for path in (folder / name, folder / f"{name}.gz"):
                    if path.is_file():
                        return path
        return fail(
            "Idx",
            "directory",
            f"hold {names[0]} or {names[0]}.gz of {self.dataset}",
            f"{root} ({'without it' if root.is_dir() else 'no such directory'})",
            _FETCH,
        )


def read_idx(path: str | Path, axes: int) -> UInt8[np.ndarray, "*shape"]:
    """The bytes of one idx file as an array; ``.gz`` is decompressed.

    Format: two zero bytes, 8 (for uint8), the number of axes; the length of each axis
    as a big-endian uint32; the values in C order.

    Args:
      path: The file.
      axes: How many axes it must have: 3 for images, 1 for labels.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
      ...     file.flush()
      ...     read_idx(file.name, 1).tolist()
      [7, 9]
    """
    path = Path(path)
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            fail("read_idx", str(path), "be a complete gzip file", error, _FETCH)
    header = 4 + 4 * axes
    if len(data) < header or data[:4] != bytes([0, 0, 8, axes]):
        fail(
            "read_idx",
            str(path),
            f"begin with the magic number 0x0000080{axes}",
            f"0x{data[:4].hex()}",
            f"It is not an idx file of {axes}-axis uint8 values. {_FETCH}",
        )
    shape = struct.unpack(f">{axes}I", data[4:header])
    if len(data) != header + math.prod(shape):
        fail(
            "read_idx",
            str(path),
            f"have {header + math.prod(shape)} bytes, for the shape {shape}",
            len(data),
            f"It is truncated or damaged. {_FETCH}",
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _bound(text: str | None, length: int) -> int | None:
    """A bound of a slice as an index; per cent are rounded to the closest example."""
    if text is None:
        return None
    if text.endswith("%"):
        return round(int(text[:-1]) * length / 100)
    return int(text)
