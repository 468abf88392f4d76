"""Students that are slices of the teacher: some heads, neurons and channels of it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from distilljax._checks import check_count, check_type, fail
from distilljax.models.decoder import Decoder
from distilljax.students._linears import check_plain, linears
from distilljax.students.importance import NORMS, Importance
from distilljax.students.made import Made, filled, layer_pairs, made, structure_of

# What the axes of a parameter count: d channels, f neurons, n the heads of queries, k
# those of keys and values, each head head_dim long; "-" is left whole.
_AXES = (
    (r"embed/embedding", "-d"),
    (r"head/kernel", "d-"),
    (r"attention/query/kernel", "dn"),
    (r"attention/(key|value)/kernel", "dk"),
    (r"attention/out/kernel", "nd"),
    (r"attention/query/bias", "n"),
    (r"attention/(key|value)/bias", "k"),
    (r"mlp/(gate|up)/kernel", "df"),
    (r"mlp/down/kernel", "fd"),
    (r"mlp/(gate|up)/bias", "f"),
    (r"(query|key)_norm/scale", "-"),
    (r"(out|down)/bias|norm/scale", "d"),
)

# What is kept, for each layer or for all, by the letter of its axis.
Kept = dict[str, Array]


def slice_width(
    teacher: Any,
    importance: Importance,
    *,
    width: int | None = None,
    num_kv_heads: int | None = None,
    ffn_width: int | None = None,
) -> Made:
    """A student that is the teacher without its least important parts.

    What is kept stays in its order. Channels are the same in all layers, and so are
    sliced from the embedding and the head too; the vocabulary stays whole. Heads go in
    groups, those of the queries with the head of keys and values that they share.

    A norm over fewer channels would scale them otherwise: its scale is multiplied by
    the root of (mean square of the channels that stay / of all channels), as measured.
    So a decoder whose other channels are 0 says the same without them. An embedding
    that is scaled by the root of its width, as Gemma's is, is so in the student too.

    Args:
      teacher: A `models.Decoder`, its layers stacked or not; the student's are as its.
      importance: From `measure_importance` on this teacher.
      width: Channels to keep; None is all.
      num_kv_heads: Groups of heads to keep in each layer; None is all.
      ffn_width: Neurons to keep in each layer; None is all.

    Returns:
      The student, as deep as the teacher: give it to `keep_layers` for fewer layers.

    Example:
      >>> from distilljax import models
      >>> from distilljax.students import measure_importance
      >>> teacher = models.DecoderConfig(
      ...     vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2,
      ...     head_dim=8, ffn_width=48)(nnx.Rngs(0))
      >>> batch = {"tokens": jnp.arange(24).reshape(2, 12)}
      >>> found = measure_importance(teacher, [batch])
      >>> made = slice_width(teacher, found, width=16, num_kv_heads=1, ffn_width=20)
      >>> made.student.config.num_heads, made.student.embed.embedding.shape
      (2, (64, 16))

    Reference: Muralidharan et al., "Compact Language Models via Pruning and Knowledge
    Distillation" (Minitron), NeurIPS 2024, arXiv 2407.14679, section 2.3; the scale:
    Samragh et al., "Weight subcloning", 2023, arXiv 2312.09299.
    """
    check_type("slice_width", "teacher", teacher, Decoder, "It knows its axes.")
    check_plain("slice_width", "teacher", linears(teacher))
    config = teacher.config
    sizes = {"width": width, "num_kv_heads": num_kv_heads, "ffn_width": ffn_width}
    given = {name: size for name, size in sizes.items() if size is not None}
    for name, size in given.items():
        check_count("slice_width", name, size)
        if size > getattr(config, name):
            rule = f"be at most the teacher's, {getattr(config, name)}"
            fail("slice_width", name, rule, size, "A slice is no larger.")
    _check_shapes(config, importance)
    kept, everywhere = _kept(config, importance, given)
    scales = _scales(importance, everywhere["d"])
    group = config.num_heads // config.num_kv_heads
    if num_kv_heads is not None:
        given["num_heads"] = group * num_kv_heads
    arrays = nnx.to_pure_dict(nnx.state(teacher, nnx.Param))
    changes: dict[str, Any] = dict(given)
    if width is not None and math.isclose(config.embed_scale, math.sqrt(config.width)):
        # Gemma's files have no other scale than the root of their own width
        changes["embed_scale"] = math.sqrt(width)
        ratio = config.embed_scale / changes["embed_scale"]
        arrays["embed"] = {"embedding": arrays["embed"]["embedding"] * ratio}
        if config.tied:  # the head is the embedding, and reads what this norm gives
            scales["final_norm"] = scales["final_norm"] / ratio
    student = structure_of(dataclasses.replace(config, **changes))
    layers = arrays.pop("layers")
    offset = float(config.unit_offset)
    one = functools.partial(_slice, offset=offset)
    if config.scan:
        own = jax.vmap(lambda *each: one(each[0], {**each[1], **everywhere}, each[2]))(
            layers, kept, {name: x for name, x in scales.items() if name in NORMS}
        )
    else:
        own = {
            i: one(
                layers[i],
                {**{axis: x[i] for axis, x in kept.items()}, **everywhere},
                {name: x[i] for name, x in scales.items() if name in NORMS},
            )
            for i in range(config.num_layers)
        }
    rest = one(arrays, everywhere, {"final_norm": scales["final_norm"][0]})
    filled(student, {**rest, "layers": own})
    pairs = layer_pairs(config.num_layers, config.num_layers)
    return made(student, teacher, pairs)


def _check_shapes(config: Any, importance: Importance) -> None:
    want = (
        (config.width,),
        (config.num_layers, config.ffn_width),
        (config.num_layers, config.num_heads),
    )
    scores = (importance.channels, importance.neurons, importance.heads)
    got = tuple(x.shape for x in scores)
    if got != want:
        rule = f"be that of the teacher, with scores of shapes {want}"
        fail("slice_width", "importance", rule, got, "Measure it on this teacher.")


def _best(scores: Array, count: int) -> Array:
    """The places of the largest scores along the last axis, in order of place."""
    best = jnp.argsort(scores, axis=-1, descending=True, stable=True)[..., :count]
    return jnp.sort(best, axis=-1)


def _kept(
    config: Any, importance: Importance, given: Mapping[str, int]
) -> tuple[Kept, Kept]:
    """What each layer keeps, [layers, kept], and what all keep."""
    heads, dim = config.num_heads // config.num_kv_heads, config.head_dim
    by_group = importance.heads.reshape(config.num_layers, config.num_kv_heads, heads)
    groups = _best(
        jnp.linalg.norm(by_group, axis=-1),
        given.get("num_kv_heads", config.num_kv_heads),
    )

    def columns(first: Array, count: int) -> Array:
        """`count` columns from each of these on."""
        every = first[..., None] * count + jnp.arange(count)
        return every.reshape(*first.shape[:-1], -1)

    neurons = _best(importance.neurons, given.get("ffn_width", config.ffn_width))
    layers = {"n": columns(groups, heads * dim), "k": columns(groups, dim)}
    channels = _best(importance.channels, given.get("width", config.width))
    return {**layers, "f": neurons}, {"d": channels}


def _scales(importance: Importance, channels: Array) -> dict[str, Array]:
    """For each norm, by what its scale is multiplied: [layers]."""

    def scale(energy: Array) -> Array:
        left, all_of_it = energy[:, channels].mean(-1), energy.mean(-1)
        return jnp.sqrt(jnp.where(all_of_it > 0, left / all_of_it, 1.0))

    return {name: scale(energy) for name, energy in importance.energy.items()}


def _slice(
    arrays: Mapping[str, Any],
    kept: Kept,
    scales: Mapping[str, Array],
    *,
    offset: float,
    path: str = "",
) -> dict[str, Any]:
    """Nested arrays, each sliced along its axes."""
    out = {}
    for name, x in arrays.items():
        where = f"{path}/{name}"
        if isinstance(x, Mapping):
            options = {"offset": offset, "path": where}
            out[name] = _slice(x, kept, scales, **options)
            continue
        axes = next(a for pattern, a in _AXES if re.search(pattern, where))
        for axis, letter in enumerate(axes):
            if letter in kept:
                x = jnp.take(x, kept[letter], axis=axis)
        norm = where.split("/")[-2]
        if norm in scales:
            scale = (offset + x.astype(jnp.float32)) * scales[norm]
            x = (scale - offset).astype(x.dtype)
        out[name] = jnp.copy(x)
    return out


__all__ = ["slice_width"]
