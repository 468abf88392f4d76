"""From the tensors of a file to the parameters of a module, and back.

Everything that does not fit is found before the first array is read, and told at once.
A process reads the pieces that its devices hold, one parameter after another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from distilljax.models.pretrained._tables import (
    Index,
    Row,
    Shape,
    Table,
    Transform,
)
from distilljax.sharding import Rule, tree_shardings
from distilljax.typing import path_of

# What of a module is in a file.
STORED = (nnx.Param, nnx.BatchStat)
# So many of each kind of fault are named.
NAMED = 8


@runtime_checkable
class Source(Protocol):
    """Named tensors, of which pieces can be read."""

    where: str
    """What messages call it."""

    def tensors(self) -> Mapping[str, tuple[Shape, Any]]:
        """Shape and dtype of each tensor, by name."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """A piece of a tensor."""
        ...


class Found(NamedTuple):
    """Where a parameter is in the files."""

    name: str
    row: Row


def fill(
    module: nnx.Module,
    source: Source,
    table: Table,
    *,
    rules: Sequence[Rule] = (),
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> None:
    """Give a module without arrays (`nnx.eval_shape`) those of the source, in place.

    Batch statistics keep the type that they are computed in, whatever `dtype` is.
    """
    state = nnx.state(module, STORED)
    statistics = _flat(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
    pure = nnx.to_pure_dict(state)
    wanted = _flat(pure)
    found = match(source, table, expand(module, wanted))
    if mesh is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        shardings = dict.fromkeys(wanted, one)
    else:
        shardings = _flat(tree_shardings(pure, mesh, rules))
    arrays = {}
    for path, like in wanted.items():
        kind = like.dtype if path in statistics else dtype
        arrays[path] = _array(path, like, shardings[path], found, source, kind)
    leaves = [arrays[path] for path in wanted]
    pure = jax.tree.unflatten(jax.tree.structure(pure), leaves)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(module, state)


def expand(module: nnx.Module, wanted: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes by path, with the layers of a stack one by one."""
    shapes = {}
    for path, like in wanted.items():
        for i in range(like.shape[0]) if _is_stacked(path) else [None]:
            shapes[_of_layer(path, i)] = like.shape if i is None else like.shape[1:]
    return shapes


def match(
    source: Source, table: Table, shapes: Mapping[str, Shape]
) -> dict[str, Found]:
    """Which tensor each parameter is; raises with all that does not fit."""
    found: dict[str, Found] = {}
    unexpected, wrong = [], []
    for name, (shape, _) in source.tensors().items():
        pairs = ((row.path_of(name), row) for row in table.rows)
        path, row = next(((p, row) for p, row in pairs if p), ("", None))
        if row is not None and path in shapes:
            found[path] = Found(name, row)
            ours, theirs = row.transform.shape(shapes[path]), tuple(shape)
            if ours != theirs:
                wrong.append(f"{name} {theirs} instead of {ours}")
        elif not re.fullmatch(table.ignored, name):
            unexpected.append(name)
    missing = [_name(table, path) for path in shapes if path not in found]
    faults = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    if any(names for _, names in faults):
        raise ValueError(
            "load_pretrained: the tensors must be those of the model that the config "
            f"describes, got in {source.where}: "
            + "; ".join(_listed(kind, names) for kind, names in faults if names)
            + ". Check that the config and the weights are of the same model, and that "
            "every file of it is there."
        )
    return found


def _name(table: Table, path: str) -> str:
    names = (row.name_of(path) for row in table.rows)
    return next((name for name in names if name), path)


def _listed(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{kind}: {', '.join(names[:NAMED])}{more}"


def _array(
    path: str,
    like: Any,
    sharding: Any,
    found: Mapping[str, Found],
    source: Source,
    dtype: Any,
) -> jax.Array:
    """A parameter, of which each device gets its piece."""
    layers = like.shape[0] if _is_stacked(path) else None
    first = found[_of_layer(path, None if layers is None else 0)]
    kind = np.dtype(dtype or source.tensors()[first.name][1])

    def piece(at: Found, index: Index) -> np.ndarray:
        whole = _bounded(index, like.shape[like.ndim - len(index) :])
        return at.row.transform.piece(lambda i: source.read(at.name, i), whole)

    def of_device(index: Any) -> np.ndarray:
        if layers is None:
            return np.ascontiguousarray(piece(first, index), dtype=kind)
        numbers = range(layers)[index[0]]
        # one layer after another, so that only one is held twice
        out = np.empty((len(numbers), *_size(index[1:], like.shape[1:])), kind)
        for i, number in enumerate(numbers):
            out[i] = piece(found[_of_layer(path, number)], index[1:])
        return out

    return jax.make_array_from_callback(like.shape, sharding, of_device, dtype=kind)


def _bounded(index: Index, shape: Shape) -> Index:
    return tuple(
        slice(*i.indices(size)[:2]) for i, size in zip(index, shape, strict=True)
    )


def _size(index: Index, shape: Shape) -> Shape:
    return tuple(i.stop - i.start for i in _bounded(index, shape))


def tensors_of(
    module: nnx.Module, table: Table
) -> Iterator[tuple[str, jax.Array, Transform]]:
    """Name and array of each tensor that a module is in a file, and the way back."""
    for path, x in _flat(nnx.to_pure_dict(nnx.state(module, STORED))).items():
        for i in range(x.shape[0]) if _is_stacked(path) else [None]:
            ours = _of_layer(path, i)
            named = ((row.name_of(ours), row) for row in table.rows)
            name, row = next(((n, row) for n, row in named if n), (None, None))
            if name is None or row is None:
                raise ValueError(
                    "save_pretrained: the parameters must be those that the format has "
                    f"names for, got {ours}. Merge adapters, or save the model with "
                    "distilljax.checkpoints."
                )
            yield name, x if i is None else x[i], row.transform


def _flat(tree: Any) -> dict[str, Any]:
    return {path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _is_stacked(path: str) -> bool:
    """Whether the first axis of a parameter counts layers."""
    return re.match(r"layers/\D", path) is not None


def _of_layer(path: str, number: int | None) -> str:
    """`layers/mlp/kernel` of layer 3 is `layers/3/mlp/kernel`."""
    return path if number is None else path.replace("layers/", f"layers/{number}/", 1)
