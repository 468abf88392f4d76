"""How many operations a program takes, counted from what it is traced to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
from jax.interpreters import partial_eval


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Multiplications and additions of all matrix products and convolutions.

    A compiler's own count sees the body of a loop once, and so a stack of scanned
    layers as one. Here a loop counts as often as it runs, where that is known before;
    of the branches of a condition the dearest counts, and of those by kind of device
    the one for any. Element-wise operations, a few per cent of a network, are
    not counted.

    A loop in a compiled function with a name such as `trips_10_of_4` has ten trips in
    four runs: of blocked attention, whose rows see more and more blocks.

    What `jax.shard_map` does on each device counts for all of them; what is traced and
    not read counts nothing.

    Args:
      function: What is traced; nothing is computed.
      *args: Its arguments, arrays or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> def layers(x, kernels):
      ...     return jax.lax.scan(lambda x, k: (x @ k, None), x, kernels)[0]
      >>> count_flops(layers, jnp.ones((2, 8)), jnp.ones((5, 8, 8)))   # 5 * 2 * 2 * 64
      1280
    """
    traced: Any = jax.make_jaxpr(function)(*args)
    read, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return round(_count(read))


def _count(jaxpr: Any) -> Any:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> Any:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        terms = math.prod(shape[axis] for axis in contracted)
        return 2 * terms * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        terms = math.prod(kernel) // max(outputs, 1)
        return 2 * terms * math.prod(equation.outvars[0].aval.shape)
    if name == "cond":
        found = list(map(_count, params["branches"]))
        # `jax.lax.platform_dependent` has its default last
        return found[-1] if params.get("branches_platforms") else max(found)
    inner = sum(map(_count, filter(_is_jaxpr, _values(params))))
    if trips := re.fullmatch(r"trips_(\d+)_of_(\d+)", str(params.get("name", ""))):
        return inner * Fraction(int(trips[1]), int(trips[2]))
    if name == "shard_map":
        # its shapes are those of one device along the axes that it has by hand
        shape = params["mesh"].shape
        by_hand = params.get("newly_manual_axes", params.get("manual_axes", ()))
        return inner * math.prod(shape[axis] for axis in by_hand)
    return inner * params["length"] if name == "scan" else inner


def _values(params: dict[str, Any]) -> list[Any]:
    """The parameters, and those in tuples of them."""
    found = []
    for value in params.values():
        found += value if isinstance(value, tuple | list) else [value]
    return found


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")
