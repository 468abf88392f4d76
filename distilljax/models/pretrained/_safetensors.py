"""Directories of safetensors files, read piece by piece and written in parts."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from distilljax._checks import fail
from distilljax.models.pretrained._tables import Index, Shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsSource:
    """The tensors of one or many files in a directory, but for those of some names."""

    def __init__(self, directory: Path, ignored: str = r"(?!)"):
        self.where = str(directory)
        self._files, self._ignored = _files(directory), ignored

    @functools.cached_property
    def _tensors(self) -> dict[str, tuple[Path, Shape, Any]]:
        found = {}
        for path, named in self._files.items():
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118  not a mapping
                    elsewhere = named.get(name, path.name) != path.name
                    if elsewhere or re.fullmatch(self._ignored, name):
                        continue
                    piece = file.get_slice(name)
                    kind = DTYPES.get(piece.get_dtype())
                    if kind is None:
                        fail(
                            "load_pretrained",
                            f"the tensor {name}",
                            f"be of a type of {', '.join(DTYPES)}",
                            f"{piece.get_dtype()} in {path}",
                            "Load a file that is not quantised, or a GGUF file.",
                        )
                    found[name] = (path, tuple(piece.get_shape()), jnp.dtype(kind))
        return found

    def tensors(self) -> Mapping[str, tuple[Shape, Any]]:
        """Shape and dtype of each tensor, by name."""
        return {name: (shape, kind) for name, (_, shape, kind) in self._tensors.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """A piece of a tensor."""
        # opened for each piece: the pages of a file that stays mapped stay in memory
        with _open(self._tensors[name][0]) as file:
            return file.get_slice(name)[index]


def _files(directory: Path) -> dict[Path, Mapping[str, str]]:
    """Each file, and which file the index says that a tensor is in."""
    # first, as transformers does: others are the same in another layout, or older
    if (whole := directory / WEIGHTS).exists():
        return {whole: {}}
    index = directory / INDEX
    if index.exists():
        try:
            named = dict(json.loads(index.read_text())["weight_map"])
            names = sorted(set(named.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(
                "load_pretrained",
                str(index),
                "be JSON with a weight_map",
                f"{type(error).__name__}: {error}",
                "It may have been cut short: fetch it again.",
            )
        files = [directory / name for name in names]
        if missing := [path.name for path in files if not path.exists()]:
            fail(
                "load_pretrained",
                "the directory",
                f"have every file that {INDEX} names",
                f"{directory} without {', '.join(missing)}",
                "Fetch the rest.",
            )
        return dict.fromkeys(files, named)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        fail(
            "load_pretrained",
            "the directory",
            "have weights in *.safetensors",
            str(directory),
            "Convert other weights first, with save_pretrained of transformers.",
        )
    return {path: {} for path in files}


def _open(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        fail(
            "load_pretrained",
            str(path),
            "be a whole safetensors file",
            f"one that cannot be read ({error})",
            "It may have been cut short: fetch it again.",
        )


def write(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> None:
    """Write tensors in files of at most `max_bytes`, with an index if they are many.

    The directory has none yet. If one cannot be written, all are removed: the next try
    finds a clean place.
    """
    try:
        _write(directory, tensors, max_bytes)
    except BaseException:
        for path in directory.glob("*.safetensors*"):
            path.unlink(missing_ok=True)
        raise


def _write(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> None:
    from safetensors.numpy import save_file

    parts: list[Path] = []
    held: dict[str, np.ndarray] = {}
    where: dict[str, int] = {}
    total = 0

    def flush() -> None:
        parts.append(directory / f"part-{len(parts)}.safetensors")
        save_file(held, parts[-1], metadata={"format": "pt"})
        held.clear()

    for name, x in tensors:
        if held and sum(y.nbytes for y in held.values()) + x.nbytes > max_bytes:
            flush()
        held[name], where[name] = x, len(parts)
        total += x.nbytes
    flush()
    if len(parts) == 1:
        parts[0].rename(directory / WEIGHTS)
        return
    names = [
        f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))
    ]
    for part, name in zip(parts, names, strict=True):
        part.rename(directory / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[i] for name, i in where.items()},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
