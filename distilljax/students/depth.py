"""Students that are some of the teacher's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distilljax._checks import check_count, fail
from distilljax.students._linears import check_plain, linears
from distilljax.students.layers import evenly_spaced
from distilljax.students.made import Made, check_layered, filled, made, structure_of


def keep_layers(
    teacher: Any, layers: int | Sequence[int], *, keep_first: bool = True
) -> Made:
    """A student that is the teacher with some of its layers.

    All else is the teacher's too: embedding, head, norms. The number of layers alone
    spaces them evenly, the first and the last among them, as distil-whisper does.

    Args:
      teacher: A `models.Decoder`, its layers stacked or not; the student's are as its.
      layers: How many, or which: numbers from 0, in order.
      keep_first: Of a number of layers, whether the first is kept; without it each is
        the end of its share of the teacher, as in `objectives.evenly_spaced`.

    Returns:
      The student; its layers belong to those that they were.

    Example:
      >>> from distilljax import models
      >>> teacher = models.DecoderConfig(
      ...     vocab_size=64, width=32, num_layers=6, num_heads=4, num_kv_heads=2,
      ...     head_dim=8, ffn_width=48)(nnx.Rngs(0))
      >>> keep_layers(teacher, 3).layers
      {'layers/0': 'layers/0', 'layers/1': 'layers/2', 'layers/2': 'layers/5'}
      >>> keep_layers(teacher, [1, 3]).layers
      {'layers/0': 'layers/1', 'layers/1': 'layers/3'}

    Reference: Sanh et al., "DistilBERT", 2019, arXiv 1910.01108; Gandhi et al.,
    "Distil-Whisper", 2023, arXiv 2311.00430, section 3.
    """
    check_layered("keep_layers", "teacher", teacher)
    check_plain("keep_layers", "teacher", linears(teacher))
    config = teacher.config
    kept = _numbers(layers, config.num_layers, keep_first)
    changes: dict[str, Any] = {"num_layers": len(kept)}
    if getattr(config, "window", None) is not None:
        # which are local is said layer by layer: a pattern has other places now
        changes["local_layers"] = tuple(config.locality[i] for i in kept)
    student = structure_of(dataclasses.replace(config, **changes))
    arrays = nnx.to_pure_dict(nnx.state(teacher, nnx.Param))
    own = arrays.pop("layers")
    if getattr(config, "scan", False):
        own = jax.tree.map(lambda x: x[jnp.array(kept)], own)
    else:
        own = jax.tree.map(jnp.copy, {i: own[j] for i, j in enumerate(kept)})
    filled(student, {**jax.tree.map(jnp.copy, arrays), "layers": own})
    pairs = {f"layers/{i}": f"layers/{j}" for i, j in enumerate(kept)}
    return made(student, teacher, pairs)


def _numbers(
    layers: int | Sequence[int], num_layers: int, keep_first: bool
) -> tuple[int, ...]:
    """Which layers are kept."""
    if not isinstance(layers, Sequence):
        check_count("keep_layers", "layers", layers)
        return evenly_spaced(layers, num_layers, keep_first=keep_first)
    for number in layers:
        check_count("keep_layers", "layers", number, 0)
    kept = tuple(int(i) for i in layers)
    if not kept or kept[-1] >= num_layers or list(kept) != sorted(set(kept)):
        fail(
            "keep_layers",
            "layers",
            f"be increasing numbers in [0, {num_layers}), at least one",
            kept,
            "They are layers of the teacher, and keep their order.",
        )
    return kept


__all__ = ["keep_layers"]
