"""Encoders with a fresh head: from a pretrained one to one that knows classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distilljax._checks import check_count, check_type
from distilljax.models.encoder import Encoder
from distilljax.models.pooling import mean_pool
from distilljax.students.made import filled, structure_of


def add_head(
    encoder: Any,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    pool: Callable[..., Any] = mean_pool,
) -> Encoder:
    """An encoder with a fresh linear head over classes; all else is copied.

    Args:
      encoder: A `models.Encoder`; a head or a pooler of its own is left out.
      num_classes: Classes of a text.
      rngs: Random streams of the head's kernel; its bias is 0.
      pool: What the head sees of a row, as `EncoderConfig.pool`.

    Returns:
      The encoder, whose outputs have logits [batch, num_classes].

    Example:
      >>> from distilljax import models
      >>> encoder = models.EncoderConfig(vocab_size=64, width=32, num_layers=1,
      ...                                num_heads=4, ffn_width=48)(nnx.Rngs(0))
      >>> model = add_head(encoder, 26, rngs=nnx.Rngs(1))
      >>> model(jnp.array([[1, 2, 3]])).logits.shape
      (1, 26)
    """
    check_type("add_head", "encoder", encoder, Encoder, "Decoders have a head.")
    check_count("add_head", "num_classes", num_classes)
    config = dataclasses.replace(
        encoder.config, num_classes=num_classes, pool=pool, pooler=False
    )
    dtype = config.param_dtype
    kernel = nnx.initializers.normal(0.02)(
        rngs.params(), (config.width, num_classes), dtype
    )
    arrays = dict(nnx.to_pure_dict(nnx.state(encoder, nnx.Param)))
    arrays.pop("pooler", None)
    arrays["head"] = {"kernel": kernel, "bias": jnp.zeros(num_classes, dtype)}
    return filled(structure_of(config), jax.tree.map(jnp.copy, arrays))


__all__ = ["add_head"]
