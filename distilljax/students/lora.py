"""Students that are the teacher with low-rank updates, over exact or 4-bit weights."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from distilljax._checks import check_count, check_positive, fail
from distilljax.students._linears import (
    IN_LAYERS,
    change_linears,
    linears,
    require_qwix,
    through_qwix,
)

_A, _B = "kernel_lora_a", "kernel_lora_b"


def add_lora(
    model: Any,
    *,
    rank: int,
    rngs: nnx.Rngs,
    alpha: float | None = None,
    modules: str = IN_LAYERS,
    weight_qtype: Any = None,
    tile_size: int | None = None,
) -> Any:
    """A copy of a model with low-rank updates of its linear maps, to be trained alone.

    y = x (kernel + alpha / rank * a b) + bias

    It says what the model says, as b starts at 0. Train it with
    `make_distill_step(..., trainable=nnx.LoRAParam)` (and `wrt=step.wrt`): an
    `nnx.LoRAParam` is an `nnx.Param`, so the default would train the kernels too. Give
    it back its shape with `merge_lora`.

    Args:
      model: The model; it stays as it is, and no array is shared with it.
      rank: Columns of a, rows of b.
      rngs: Random streams, of which `params` initialises a.
      alpha: Scale of the update times the rank; None is the rank, for a scale of 1.
      modules: Regular expression of the whole paths of `nnx.Linear` modules.
      weight_qtype: Type in which the kernels are kept, such as "nf4" (QLoRA), "int4" or
        "int8"; None leaves them as they are.
      tile_size: How many values share a scale, along the input; None is all of them.

    Returns:
      The module; what has no update is called as before.

    Example:
      >>> from distilljax import models
      >>> model = models.DecoderConfig(
      ...     vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2,
      ...     head_dim=8, ffn_width=48)(nnx.Rngs(0))
      >>> student = add_lora(
      ...     model, rank=2, rngs=nnx.Rngs(1), modules=".*/(query|value)")
      >>> len(nnx.to_flat_state(nnx.state(student, nnx.LoRAParam)))   # a and b of four
      8

    Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR
    2022, arXiv 2106.09685; Dettmers et al., "QLoRA", NeurIPS 2023, arXiv 2305.14314.
    """
    qwix = require_qwix("add_lora")
    check_count("add_lora", "rank", rank)
    alpha = float(rank) if alpha is None else alpha
    check_positive("add_lora", "alpha", alpha, "None is the rank.")
    provider = qwix.LoraProvider(
        module_path=".*",
        rank=rank,
        alpha=alpha,
        weight_qtype=weight_qtype,
        tile_size=tile_size,
    )

    def adapted(linear: nnx.Linear) -> Any:
        new = through_qwix(linear, provider, rngs=rngs)
        new.lora_scale = alpha / rank  # for merging
        return new

    return change_linears("add_lora", model, modules, adapted)


def merge_lora(model: Any) -> Any:
    """A copy of a model of `add_lora` with the updates added to its kernels.

    It says the same, and is what it was made of: a plain module, to be saved. Kernels
    that were quantised come back in the type of the updates.

    Example:
      >>> from distilljax import models
      >>> model = models.DecoderConfig(
      ...     vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2,
      ...     head_dim=8, ffn_width=48)(nnx.Rngs(0))
      >>> merged = merge_lora(add_lora(model, rank=2, rngs=nnx.Rngs(1)))
      >>> nnx.graphdef(merged) == nnx.graphdef(model)
      True
    """
    qwix = require_qwix("merge_lora")

    def merged(linear: Any) -> Any:
        kernel, a, b = linear.kernel, getattr(linear, _A), getattr(linear, _B)
        if isinstance(kernel, nnx.Variable):
            whole = kernel[...]
        else:
            whole = qwix.dequantize(kernel.array)
        update = linear.lora_scale * jnp.matmul(a[...], b[...])
        return _plain(linear, (whole + update).astype(whole.dtype))

    paths = [p for p, linear in linears(model).items() if hasattr(linear, _A)]
    if not paths:
        rule = "have low-rank updates"
        fail("merge_lora", "model", rule, "none", "Make it with add_lora.")
    matched = "|".join(map(re.escape, paths))
    return change_linears("merge_lora", model, matched, merged, plain=False)


def _plain(linear: Any, kernel: Array) -> nnx.Linear:
    """The map without what qwix made of it, with this kernel."""
    new = nnx.eval_shape(
        lambda: nnx.Linear(
            linear.in_features,
            linear.out_features,
            use_bias=linear.use_bias,
            rngs=nnx.Rngs(0),
        )
    )
    for name in vars(new):
        if not name.startswith("_") and name != "kernel":
            setattr(new, name, getattr(linear, name))
    new.kernel = nnx.Param(kernel)
    return new


__all__ = ["add_lora", "merge_lora"]
