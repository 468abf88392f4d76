"""Whose bytes lie in the memory of a device, and how many there are at the peak."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from distilljax.planning.abstract import AbstractRun
from distilljax.planning.hlo import Program
from distilljax.planning.liveness import Live, peak_of

# In the order in which a bar stacks them.
OWNERS: tuple[str, ...] = (
    "teacher parameters",
    "student parameters",
    "optimizer state",
    "other state",
    "batch",
    "gradients",
    "activations and temporaries",
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device in one program."""

    owners: dict[str, int]
    """At the peak, by owner, in the order of `OWNERS`."""
    largest: tuple[Live, ...]
    """Of gradients, activations and temporaries at the peak, the largest arrays."""
    peak: int
    """What the compiler says is in use at most; 0 where it does not say: that of the
    CPU leaves temporaries out."""
    allocated: int
    """What it sets aside: arguments, results, temporaries with the gaps between them,
    and the program. That much has to be free."""

    @property
    def predicted_peak(self) -> int:
        """The sum over the owners: the peak of a walk through the program."""
        return sum(self.owners.values())

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "owners": self.owners,
            "predicted_peak": self.predicted_peak,
            "peak": self.peak,
            "allocated": self.allocated,
            "largest": [
                {"array": str(x.shape), "bytes": x.nbytes, "from": x.op_name}
                for x in self.largest
            ],
        }


def device_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device, by their shardings.

    Example:
      >>> device_bytes({"kernel": jax.ShapeDtypeStruct((4, 8), "bfloat16")})
      64
    """
    return sum(map(_leaf_bytes, jax.tree.leaves(tree)))


def _leaf_bytes(x: Any) -> int:
    shape = _shard_shape(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 16
    return prod(shape) * x.dtype.itemsize


def known_owners(run: AbstractRun) -> dict[str, int]:
    """What is known before anything is compiled: state, teacher, batch."""
    state = run.training.like
    owners = {
        "student parameters": device_bytes((state.params, state.rest)),
        "optimizer state": device_bytes(state.opt_state),
        "other state": device_bytes(
            (state.step, state.rng, state.ema, state.objective_state)
        ),
        # of a streamed teacher, its head, which is with the student
        "teacher parameters": device_bytes(run.training.step.teacher_state),
        "batch": device_bytes(run.step_batch),
    }
    return {name: owners[name] for name in OWNERS if name in owners}


def memory_of(
    compiled: Any,
    program: Program,
    owners: dict[str, int],
    params: Any,
    *,
    has_peak: bool = True,
) -> Memory:
    """The memory of a compiled program, by owner.

    Of what is not an argument, what `is_gradient` takes for one are gradients; all else
    are activations and temporaries, also what is gathered of parameters, their copies
    in another type, and the sum of a gradient before it is split over devices.

    Args:
      compiled: The compiled step.
      program: The same, parsed.
      owners: Of `known_owners`.
      params: What is trained, with its shardings; None if nothing is.
      has_peak: Whether the compiler states a peak that can be relied on.
    """
    found, walk = compiled.memory_analysis(), peak_of(program)
    shares = {_without_ones(_shard_shape(x)) for x in jax.tree.leaves(params)}
    size = sum(x.nbytes for x in walk.live if is_gradient(x, shares))
    rest = walk.nbytes - walk.arguments - size
    known = sum(owners.get(name, 0) for name in OWNERS[:5])
    # layouts pad, and what a program never reads is not passed to it
    padding = walk.arguments - known
    return Memory(
        {name: owners.get(name, 0) for name in OWNERS[:5]}
        | {
            "gradients": size,
            "activations and temporaries": rest + padding,
        },
        walk.live[:8],
        int(getattr(found, "peak_memory_in_bytes", 0)) if has_peak else 0,
        sum(
            int(getattr(found, f"{part}_size_in_bytes"))
            for part in ("argument", "temp", "output", "generated_code")
        )
        - int(found.alias_size_in_bytes),
    )


def is_gradient(x: Live, shares: Collection[tuple[int, ...]]) -> bool:
    """Whether an array of a step is a gradient, or what the optimizer makes of one.

    It has the shape of a device's share of a trained parameter, and is in float32; or
    in a shorter type (`compute_dtype`), and from the backward pass. There a loop's sums
    begin as zeros, which XLA may make for several and then gives no name of the step.
    A copy of a parameter in that type is none, nor what is computed again.

    Args:
      x: An array that is no argument.
      shares: Shapes, without axes of size 1.

    Example:
      >>> from distilljax.planning.hlo import Shape
      >>> sums = "jit(_update)/transpose(jvp(student))/broadcast_in_dim"
      >>> is_gradient(Live(Shape("bf16", (1, 4, 8)), sums, "broadcast"), {(4, 8)})
      True
      >>> copy = "jit(_update)/jvp()/convert_element_type"
      >>> is_gradient(Live(Shape("bf16", (4, 8)), copy, "convert"), {(4, 8)})
      False
    """
    if _without_ones(x.shape.dims) not in shares:
        return False
    if x.shape.dtype not in ("bf16", "f16"):
        return x.shape.dtype == "f32"
    if "/" not in x.op_name:
        return x.opcode == "broadcast"
    again = x.op_name.endswith("convert_element_type") or "/rematted" in x.op_name
    return "transpose(" in x.op_name and not again


def _shard_shape(x: Any) -> tuple[int, ...]:
    sharding = getattr(x, "sharding", None)
    return x.shape if sharding is None else sharding.shard_shape(x.shape)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
