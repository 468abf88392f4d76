"""The pass on a mesh: positions over `data` and `fsdp`, classes over `tensor`.

Each device runs the pass over its own positions. What happens along the axes of the
positions is written by hand, with `jax.shard_map`, because there the compiler would be
free to gather a kernel whole. Along `tensor` it is left to the compiler, which is held
to blocks of logits that stay split: every divergence is elementwise but for reductions
over classes, and those become reductions of one number for each position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from distilljax._checks import fail
from distilljax.losses._products import Products

WIDTH = "fsdp"
CLASSES = "tensor"


def automatic_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh that is set, as far as the compiler has them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = [axis for axis, kind in kinds.items() if kind == AxisType.Auto]
    for axis in ("data", WIDTH, CLASSES):
        if kinds.get(axis) == AxisType.Explicit and mesh.shape[axis] > 1:
            fail(
                "LinearHead",
                "the mesh",
                f"have {axis!r} as an Auto axis",
                "an Explicit one, the default of jax.make_mesh",
                "Make it with distilljax.sharding.mesh_from_string, or with "
                "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * n).",
            )
    return {axis: mesh.shape[axis] for axis in free if mesh.shape[axis] > 1}


def position_axes() -> tuple[str, ...]:
    """The axes of the mesh that is set over which positions are split."""
    axes = automatic_axes()
    # the outer one first, as `sharding.batch_axes` splits a batch: no row has to move
    order = (WIDTH, "data") if CLASSES in axes else ("data", WIDTH)
    return tuple(axis for axis in order if axis in axes)


def has_split_classes() -> bool:
    """Whether the mesh that is set splits the classes."""
    return CLASSES in automatic_axes()


def products_for(dtype: Any, widths: list[int]) -> Products:
    """How kernels of these widths lie on the mesh that is set."""
    axes = automatic_axes()
    if not has_split_classes():
        return Products(dtype)
    if WIDTH not in axes or any(width % axes[WIDTH] for width in widths):
        return Products(dtype, CLASSES)
    return Products(dtype, CLASSES, WIDTH)


def padded_classes(classes: int) -> int:
    """So many classes that every device along `tensor` has equally many.

    What the devices divide already stays as it is: padding a kernel is a copy of it.
    """
    shards = automatic_axes().get(CLASSES, 1)
    return -(-classes // shards) * shards


def pad_axis(x: Array, size: int, axis: int) -> Array:
    """Zeros behind the values of an axis, up to a size."""
    short = size - x.shape[axis]
    if short <= 0:
        return x
    widths = [(0, short if i == axis % x.ndim else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def num_position_shards() -> int:
    """How many parts the positions are split into."""
    axes = automatic_axes()
    return math.prod(axes[axis] for axis in position_axes())


def padded_rows(num_rows: int) -> int:
    """So many positions that every device has equally many."""
    shards = num_position_shards()
    return -(-num_rows // shards) * shards


def hold_classes(logits: Array) -> Array:
    """Keep the classes split over `tensor`, if they divide; rows are a device's own."""
    shards = automatic_axes().get(CLASSES, 1)
    if shards == 1 or logits.shape[1] % shards:
        return logits
    return jax.lax.with_sharding_constraint(logits, PartitionSpec(None, CLASSES))


def over_positions(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(by_row, whole)` on each device, for its own part of ``by_row``.

    What it returns is put together along the first axis. The gradient of ``whole`` is
    summed over the devices.
    """
    axes = position_axes()
    if not axes:
        return function
    by_row, whole = PartitionSpec(axes), PartitionSpec()
    # Compiled, because outside of a program a part of the axes cannot be by hand.
    return jax.jit(
        jax.shard_map(
            function,
            in_specs=(by_row, whole),
            out_specs=by_row,
            axis_names=set(axes),
            check_vma=False,
        )
    )


def each_for_its_positions(
    run: Callable[..., Any], products: Products, wanted: frozenset[str]
) -> Callable[..., Any]:
    """`run(params, scalars, fixed)` with positions over the axes of the mesh."""
    axes = position_axes()
    if not axes:
        return run
    by_row, whole = PartitionSpec(axes), PartitionSpec()
    special = {"hidden": by_row, "kernel": PartitionSpec(products.width_axis)}

    def local(params: Any, scalars: Any, fixed: Any) -> Any:
        teacher, *others = fixed
        params = {**params, "kernel": products.gather(params["kernel"])}
        if teacher is not None:
            teacher = replace(teacher, kernel=products.gather(teacher.kernel))
        values, grads = run(params, scalars, (teacher, *others))
        for key in grads.keys() - {"hidden"}:
            scattered = key == "kernel" and products.width_axis is not None
            if scattered:
                grads[key] = products.scatter(grads[key])
            rest = tuple(axis for axis in axes if not (scattered and axis == WIDTH))
            grads[key] = jax.lax.psum(grads[key], rest) if rest else grads[key]
        return values, grads

    def on_mesh(params: Any, scalars: Any, fixed: Any) -> Any:
        teacher, rows, others = fixed
        specs = {key: special.get(key, whole) for key in (*params, *wanted)}
        head = None
        if teacher is not None:
            head = jax.tree.map(lambda _: whole, teacher)
            head = replace(head, kernel=special["kernel"])
        mapped = jax.shard_map(
            local,
            in_specs=(
                {key: specs[key] for key in params},
                whole,
                (head, by_row, whole),
            ),
            out_specs=(by_row, {key: specs[key] for key in wanted}),
            axis_names=set(axes),
            check_vma=False,
        )
        # Compiled, because outside of a program a part of the axes cannot be by hand.
        return jax.jit(mapped)(params, scalars, (teacher, rows, others))

    return on_mesh
