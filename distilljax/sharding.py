"""Meshes, rules and shardings: what lies where on the devices.

    mesh = mesh_from_string("data=4,fsdp=2")
    shardings = tree_shardings(jax.eval_shape(init), mesh, rules)
    state = jax.jit(init, out_shardings=shardings)()       # born sharded

Axes: `data` splits the batch; `fsdp` splits the batch and every large parameter;
`tensor` splits what a model's rules say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distilljax._checks import fail
from distilljax.typing import path_of

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Rule:
    """Where the axes of the parameters lie whose path matches.

    Example:
      >>> rule = Rule(r"layers/0/kernel", (None, "tensor"))    # split its columns
      >>> rule.matches("layers/0/kernel"), rule.matches("layers/1/kernel")
      (True, False)
    """

    pattern: str
    """Regular expression, searched in the path, such as ``layers/0/kernel``."""
    axes: tuple[str | None, ...]
    """A mesh axis or None for each axis of the array."""

    def matches(self, path: str) -> bool:
        """True if the pattern is found in the path."""
        return re.search(self.pattern, path) is not None


def mesh_from_string(
    mesh: str = "data=-1", devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh from text such as ``"data=4,fsdp=2,tensor=1"``.

    Args:
      mesh: Sizes by axis, of `data`, `fsdp` and `tensor`; one may be -1: all devices
        that the others leave. An axis that is left out has size 1.
      devices: The devices; all if None.

    Returns:
      A mesh of three axes, in automatic mode (the compiler places the collectives).

    Example:
      >>> dict(mesh_from_string("data=-1", jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    # of several slices one after the other: `data`, the outer axis, is what spans them
    devices = sorted(devices, key=lambda d: getattr(d, "slice_index", None) or 0)
    sizes = {}
    for part in mesh.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", part)
        if match is None or match[1] not in AXES or match[1] in sizes:
            fail(
                "mesh_from_string",
                "mesh",
                f"be sizes of the axes {', '.join(AXES)}, each at most once",
                repr(mesh),
                'Write for example "data=4,fsdp=2"; -1 takes the remaining devices.',
            )
        sizes[match[1]] = int(match[2])
    known = prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) == 1 and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if len(free) > 1 or prod(sizes.values()) != len(devices):
        fail(
            "mesh_from_string",
            "mesh",
            f"multiply to the number of devices, {len(devices)}",
            f"{mesh!r}",
            "Change a size, or use -1 for one axis to take the remaining devices.",
        )
    shape = [sizes.get(axis, 1) for axis in AXES]
    return Mesh(
        np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3
    )


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which a batch is split: `data` and `fsdp`, the outer one first.

    The outer one is `data`, in the order of the devices; but `fsdp` where `tensor`
    splits too. With `data` outside, XLA's partitioner (of jaxlib 0.10 and 0.12) loses
    the order of the rows in some products with kernels that are split over `fsdp`, and
    gradients are silently wrong: 11 of 60 random placements of a network of four
    layers on 2 x 2 x 2 devices, and with `fsdp` outside none of 250.

    Example:
      >>> batch_axes(mesh_from_string("data=1", jax.devices()[:1]))
      ('data', 'fsdp')
    """
    return ("fsdp", "data") if mesh.shape["tensor"] > 1 else ("data", "fsdp")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over `data` and `fsdp`, all else whole; see `batch_axes`.

    Example:
      >>> batch_sharding(mesh_from_string("data=1", jax.devices()[:1])).spec
      P(('data', 'fsdp'),)
    """
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device.

    Example:
      >>> replicated(mesh_from_string("data=1", jax.devices()[:1])).spec
      P()
    """
    return NamedSharding(mesh, PartitionSpec())


def _by_rule(rule: Rule, path: str, x: Any, mesh: Mesh) -> PartitionSpec:
    if len(rule.axes) != len(x.shape):
        fail(
            "tree_shardings",
            f"the rule {rule.pattern!r}",
            f"have an entry for each axis of {path}, shape {x.shape}",
            rule.axes,
            "Use None for an axis that stays whole.",
        )
    # an axis of one stays whole: of a quantised kernel, the scales for a whole row
    pairs = zip(x.shape, rule.axes, strict=True)
    axes = [axis if size != 1 else None for size, axis in pairs]
    for size, axis in zip(x.shape, axes, strict=True):
        if axis is not None and (axis not in mesh.shape or size % mesh.shape[axis]):
            fail(
                "tree_shardings",
                f"the rule {rule.pattern!r}",
                f"divide each axis of {path}, shape {x.shape}, over the mesh "
                f"{dict(mesh.shape)}",
                rule.axes,
                "Change the rule, the mesh or the width of the model.",
            )
    return PartitionSpec(*axes)


def _by_size(x: Any, mesh: Mesh, min_size: int) -> PartitionSpec:
    """The largest axis that `fsdp` divides; arrays of few values stay whole."""
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1 or prod(x.shape) < min_size:
        return PartitionSpec()
    axes = [i for i, size in enumerate(x.shape) if size % fsdp == 0]
    if not axes:
        return PartitionSpec()
    best = max(axes, key=lambda i: x.shape[i])
    return PartitionSpec(*(["fsdp" if i == best else None for i in range(best + 1)]))


def tree_shardings(
    tree: Any, mesh: Mesh, rules: Sequence[Rule] = (), *, min_size: int = 1024
) -> Any:
    """A sharding for every array of a tree: by the first rule that matches its path.

    An optimizer's moments and a moving average end in the paths of their parameters, so
    the same rules place them. What no rule matches is split over `fsdp` along its
    largest divisible axis, unless it has fewer than `min_size` values.

    Args:
      tree: Arrays, or their shapes from `jax.eval_shape`.
      mesh: The mesh.
      rules: Rules, first match counts; they apply to arrays with at least one axis.
      min_size: Arrays with fewer values stay whole.

    Returns:
      A tree of `NamedSharding`.

    Example:
      >>> mesh = mesh_from_string("data=1,fsdp=1", jax.devices()[:1])
      >>> tree = {"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}
      >>> tree_shardings(tree, mesh, [Rule("kernel", ("fsdp", None))])["kernel"].spec
      P('fsdp', None)
    """

    def sharding(key_path: Any, x: Any) -> NamedSharding:
        path = path_of(key_path)
        shape = getattr(x, "shape", ())
        rule = next((r for r in rules if shape and r.matches(path)), None)
        if rule is not None:
            return NamedSharding(mesh, _by_rule(rule, path, x, mesh))
        return NamedSharding(mesh, _by_size(x, mesh, min_size))

    return jax.tree_util.tree_map_with_path(sharding, tree)


__all__ = [
    "AXES",
    "Rule",
    "batch_axes",
    "batch_sharding",
    "mesh_from_string",
    "replicated",
    "tree_shardings",
]
