"""Linear maps of a model by their paths, changed one by one through qwix.

qwix sees the operations of whichever module calls it. Given one linear map at a time it
sees one product of an input and a kernel, in every model, and stores what it makes of
the kernel in that module. (Given a whole model it also takes attention for products of
weights, and cannot store anything in layers that are copied or scanned in the call.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distilljax._checks import fail

# Those in numbered or stacked layers: an embedding and a head are not called.
IN_LAYERS = r"layers/.*"


def require_qwix(function: str) -> ModuleType:
    """The package, which is an extra."""
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            f"{function}: qwix must be installed, got {error}. "
            'pip install "distilljax[quant]".'
        ) from error
    return qwix


def change_linears(
    function: str,
    model: Any,
    modules: str,
    change: Callable[[nnx.Linear], Any],
    *,
    plain: bool = True,
) -> Any:
    """A copy of a model in which these linear maps are changed.

    Args:
      function: Whose arguments they are, for messages.
      model: The model; it stays as it is.
      modules: Regular expression that the whole path of a linear map matches.
      change: The new module of one map; of a stack, called for each of its layers.
      plain: Refuse maps that qwix has changed before: it would drop what it made.
    """
    # the arrays are copied: a student's are overwritten, and must not be the teacher's
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    every = linears(copy)
    found = {path: m for path, m in every.items() if re.fullmatch(modules, path)}
    if not found:
        known = ", ".join(list(every)[:8])
        rule = "match the path of an nnx.Linear"
        fail(function, "modules", rule, f"{modules!r} among {known}", "It is a regex.")
    if plain:
        check_plain(function, "model", found)
    for path, linear in found.items():
        parent, name = _parent(copy, path)
        new = change(linear) if not is_stacked(linear) else _each(linear, change)
        if isinstance(parent, nnx.List):
            parent[int(name)] = new
        else:
            setattr(parent, name, new)
    return copy


def through_qwix(linear: nnx.Linear, provider: Any, **options: Any) -> Any:
    """One map as a provider of qwix makes it; `rngs=` for what that adds."""
    qwix = require_qwix(type(provider).__name__)
    example = jnp.zeros((1, linear.in_features), linear.param_dtype)
    return qwix.quantize_model(linear, provider, example, **options)


def check_plain(function: str, argument: str, maps: Mapping[str, nnx.Linear]) -> None:
    """None of these linear maps, given by their paths, was made by qwix."""
    changed = [path for path, linear in maps.items() if hasattr(linear, "qwix_path")]
    if changed:
        lora = any(hasattr(maps[path], "kernel_lora_a") for path in changed)
        fail(
            function,
            argument,
            "have plain linear maps here",
            f"{'low-rank updates' if lora else 'quantised kernels'} in {changed[0]}"
            f"{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}",
            "Call merge_lora first."
            if lora
            else "Do this first, and quantise what comes out.",
        )


def linears(model: nnx.Module) -> dict[str, nnx.Linear]:
    """The linear maps of a model by their paths."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear)
    }


def is_stacked(linear: nnx.Linear) -> bool:
    """Whether a map is those of many layers, along the first axis of its arrays."""
    return jax.tree.leaves(nnx.state(linear))[0].ndim > 2 or linear.kernel.ndim > 2


def _each(linear: nnx.Linear, change: Callable[[nnx.Linear], Any]) -> Any:
    """A stack of maps, each changed by itself."""
    graphdef, state = nnx.split(linear)
    num_layers = jax.tree.leaves(state)[0].shape[0]
    changed = [
        change(nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)))
        for i in range(num_layers)
    ]
    parts = [nnx.split(layer) for layer in changed]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(state for _, state in parts))
    return nnx.merge(parts[0][0], stacked)


def _parent(model: Any, path: str) -> tuple[Any, str]:
    """The module that holds another, and under which name."""
    *outer, name = path.split("/")
    for part in outer:
        listed = isinstance(model, nnx.List)
        model = model[int(part)] if listed else getattr(model, part)
    return model, name


__all__ = [
    "IN_LAYERS",
    "change_linears",
    "check_plain",
    "is_stacked",
    "linears",
    "require_qwix",
    "through_qwix",
]
