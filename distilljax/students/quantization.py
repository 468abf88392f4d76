"""Teachers with weights of few bits, and students that train as if theirs were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distilljax._checks import fail
from distilljax._functional import Batch, Forward, default_forward
from distilljax.students._linears import (
    IN_LAYERS,
    change_linears,
    require_qwix,
    through_qwix,
)
from distilljax.terms import as_outputs, diagnostics
from distilljax.typing import Mean


def quantize_weights(
    teacher: Any,
    weight_qtype: Any = "int8",
    *,
    tile_size: int | None = None,
    modules: str = IN_LAYERS,
) -> Any:
    """A copy of a model that keeps the kernels of its linear maps in few bits.

    For a frozen teacher: kernels are rounded once, to the nearest of symmetric levels
    (of "nf4": to the quantiles of a normal distribution), and multiplied out where they
    are used. Measure what that changes with `drift`.

    Args:
      teacher: The model; it stays as it is, and no array is shared with it.
      weight_qtype: "int8", "int4", "nf4", or a type such as `jnp.float8_e4m3fn`.
      tile_size: How many values share a scale, along the input, which it must divide;
        None is all of them. 4 bits want 32 or 64.
      modules: Regular expression of the whole paths of `nnx.Linear` modules; embeddings
        and heads stay as they are.

    Returns:
      The module, called as before.

    Example:
      >>> from distilljax import models
      >>> teacher = models.DecoderConfig(
      ...     vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2,
      ...     head_dim=8, ffn_width=48)(nnx.Rngs(0))
      >>> small = quantize_weights(teacher, "int8")
      >>> drift(small, teacher, [{"tokens": jnp.arange(12)[None]}])["kl"].value < 1e-4
      Array(True, dtype=bool)
    """
    qwix = require_qwix("quantize_weights")
    rule = qwix.QuantizationRule(
        module_path=".*", weight_qtype=weight_qtype, tile_size=tile_size
    )
    return _through(
        "quantize_weights", teacher, modules, qwix.PtqProvider([rule]), tile_size
    )


def fake_quantize(
    student: Any,
    weight_qtype: Any = "int8",
    *,
    act_qtype: Any = None,
    tile_size: int | None = None,
    modules: str = IN_LAYERS,
) -> Any:
    """A copy of a student that computes as if it were quantised, and trains as it is.

    Quantisation-aware distillation: kernels (and inputs, with `act_qtype`) are rounded
    in the forward pass, and the gradient passes the rounding as if it were none. Its
    parameters are those of the student, in full precision, by the same paths; after
    training, `quantize_weights` of a student with them computes what was trained.

    Args:
      student: The model; it stays as it is, and no array is shared with it.
      weight_qtype: Type of the kernels.
      act_qtype: Type of what goes into a map, rounded for each call; None leaves it.
      tile_size: How many values of a kernel share a scale, along the input.
      modules: Regular expression of the whole paths of `nnx.Linear` modules.

    Returns:
      The module.

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018, arXiv 1712.05877, section 3.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> coarse = fake_quantize(model, "int4", modules="layers/0")
      >>> x = jnp.eye(4)
      >>> bool(jnp.any(coarse(x) != model(x)))
      True
    """
    qwix = require_qwix("fake_quantize")
    rule = qwix.QuantizationRule(
        module_path=".*",
        weight_qtype=weight_qtype,
        act_qtype=act_qtype,
        tile_size=tile_size,
    )
    return _through(
        "fake_quantize", student, modules, qwix.QtProvider([rule]), tile_size
    )


def drift(
    changed: Any,
    original: Any,
    batches: Iterable[Batch],
    *,
    forward: Forward = default_forward,
) -> dict[str, Mean]:
    """How far a changed model is from what it was: of a quantised teacher, say.

    Args:
      changed: The model as it is now.
      original: The model as it was.
      batches: Batches on which both are compared; positions where `loss_mask` is 0 do
        not count.
      forward: `(model, batch) -> outputs`.

    Returns:
      `kl`: KL(original || changed) in nats per position, at temperature 1; `agreement`:
      share of the positions with the same best class.

    Example:
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> found = drift(model, model, [{"inputs": jnp.eye(4)}])
      >>> float(found["kl"].value), float(found["agreement"].value)
      (0.0, 1.0)
    """
    graphdefs, states = zip(*map(nnx.split, (changed, original)), strict=True)

    @jax.jit
    def measure(states: Any, batch: Batch) -> dict[str, Mean]:
        outputs = []
        for graphdef, state in zip(graphdefs, states, strict=True):
            model = nnx.merge(graphdef, state, copy=True)
            model.eval()
            outputs.append(as_outputs(forward(model, batch)))
        found = diagnostics(outputs[0], outputs[1], batch)
        return {name: found[name] for name in ("kl", "agreement")}

    total = None
    for batch in batches:
        found = measure(states, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        rule, remedy = "have at least one batch", "An iterator can be used up."
        fail("drift", "batches", rule, "none", remedy)
    return total


def _through(
    function: str, model: Any, modules: str, provider: Any, tile_size: int | None
) -> Any:
    """Each map as this provider of qwix makes it."""

    def changed(linear: nnx.Linear) -> Any:
        if tile_size is not None and linear.in_features % tile_size:
            rule = f"divide the inputs of every map, {linear.in_features} of one"
            fail(function, "tile_size", rule, tile_size, "Or leave that one out.")
        return through_qwix(linear, provider)

    return change_linears(function, model, modules, changed)


__all__ = ["drift", "fake_quantize", "quantize_weights"]
