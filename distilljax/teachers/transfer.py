"""Arrays from the devices of one mesh to those of another, never through the host.

`jax.device_put` goes that way only where every shard of the result is a shard of what
is sent; otherwise it fetches the whole array, waits for it, and sends it again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distilljax._checks import fail
from distilljax.sharding import batch_axes

REMEDY = (
    "Give the teacher devices of every process (2 of each 4, say: "
    '--teacher.devices "2:4,6:8"), or its own sharding on all devices, in the '
    "student's program (--teacher.in-step)."
)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices of a mesh: each holds rows that no other has.

    Over `tensor` too, which splits no batch: what leaves a mesh leaves it once.

    Example:
      >>> from distilljax.sharding import mesh_from_string
      >>> row_sharding(mesh_from_string("tensor=1", jax.devices()[:1])).spec
      P(('data', 'fsdp', 'tensor'),)
    """
    return NamedSharding(mesh, PartitionSpec((*batch_axes(mesh), "tensor")))


def move_rows(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays whose leading axis is the batch, with another sharding of that axis.

    Asynchronous. Every process sends what its own devices hold to its own devices.

    Args:
      tree: Arrays, split over their leading axis alone, or whole.
      sharding: Of the results: over the leading axis alone, or whole.

    Raises:
      ValueError: A device of this process needs rows that another process holds.

    Example:
      >>> from distilljax.sharding import mesh_from_string
      >>> mesh = mesh_from_string("data=1", jax.devices()[:1])
      >>> moved = move_rows({"tokens": jnp.arange(3)}, row_sharding(mesh))
      >>> moved["tokens"].sharding.spec
      P(('data', 'fsdp', 'tensor'),)
    """
    devices = sharding.device_set
    leaves = jax.tree.leaves(tree)
    if all(_is_placed(x) and x.sharding.device_set == devices for x in leaves):
        return _resharded(sharding)(tree)
    with jax.set_mesh(_NO_MESH):  # rows are cut and joined on single devices
        return jax.tree.map(
            lambda x: (_moved if _is_placed(x) else jax.device_put)(x, sharding), tree
        )


_NO_MESH = Mesh(np.empty((), object), ())


def _is_placed(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.committed


@functools.cache
def _resharded(sharding: NamedSharding) -> Any:
    # on the same devices it is a program, with the collectives that it takes
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def _rows(index: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    start, stop, _ = index[0].indices(shape[0])
    return start, stop


def _moved(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Shard by shard: rows are cut where they lie, and joined where they arrive."""
    held = {_rows(s.index, x.shape): s.data for s in x.addressable_shards}
    targets = sharding.addressable_devices_indices_map(x.shape)
    pieces, devices = [], []
    for device, index in targets.items():
        for piece in _cut(held, *_rows(index, x.shape)):
            pieces.append(piece)
            devices.append(device)
    arrived: dict[Any, list[jax.Array]] = {}
    for piece, device in zip(jax.device_put(pieces, devices), devices, strict=True):
        arrived.setdefault(device, []).append(piece)
    shards = [
        parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        for parts in arrived.values()
    ]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


def _cut(
    held: dict[tuple[int, int], jax.Array], start: int, stop: int
) -> Sequence[jax.Array]:
    """The pieces of which rows are made, in order."""
    if (start, stop) in held:
        return [held[start, stop]]
    found = []
    for (first, end), data in sorted(held.items(), key=lambda item: item[0]):
        if first <= start < end:
            last = min(end, stop)
            found.append(jax.lax.slice_in_dim(data, start - first, last - first))
            start = last
    if start < stop:
        _refuse_other_processes()
    return found


def check_rows(name: str, rows: int, here: NamedSharding, mesh: Mesh) -> None:
    """Raise if a batch cannot go to a teacher's devices, or its outputs come back.

    Args:
      name: Of the batch size, for messages.
      rows: How many.
      here: Where the student has them.
      mesh: The teacher's.
    """
    if rows % mesh.size:
        fail(
            "train",
            name,
            f"be a multiple of the teacher's devices, {mesh.size}",
            rows,
            "Change it, or the teacher's mesh: each of them sends rows of its own.",
        )
    if here.device_set == set(mesh.devices.flat):
        return  # a program, whose collectives reach everywhere
    one, other = (_rows_by_process(s, rows) for s in (here, row_sharding(mesh)))
    for process in one.keys() | other.keys():
        if one.get(process) != other.get(process):
            _refuse_other_processes()


def _rows_by_process(sharding: NamedSharding, rows: int) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for device, index in sharding.devices_indices_map((rows,)).items():
        own = found.setdefault(device.process_index, set())
        own.update(range(*_rows(index, (rows,))))
    return found


def _refuse_other_processes() -> None:
    fail(
        "StreamedTeacher",
        "each process",
        "have devices of both the teacher and the student, for the same rows",
        "rows that only another process holds, which the runtime does not send",
        REMEDY,
    )


__all__ = ["check_rows", "move_rows", "row_sharding"]
