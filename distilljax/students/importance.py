"""Which heads, neurons and channels of a decoder matter, measured on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distilljax._checks import check_type, fail
from distilljax._functional import Batch, Forward, default_forward
from distilljax.models.decoder import Decoder

# What reads the residual stream, or what is added to it: normalised over channels.
NORMS = ("attention_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm")


@dataclass(frozen=True)
class Importance:
    """How much of a decoder's activations are where; larger is more.

    Scores of layers are comparable within a layer only.
    """

    channels: Float[Array, " width"]
    """Of the residual stream: sum over the norms of their outputs' sizes."""
    neurons: Float[Array, "layers ffn_width"]
    """Of the feed-forward layers: what goes into `down`."""
    heads: Float[Array, "layers num_heads"]
    """Of attention: the norm of what each head hands to `out`."""
    energy: Mapping[str, Float[Array, "layers width"]]
    """Sum of squares of what goes into each norm, by its name, one row for each layer
    (`final_norm` has one). It says how to scale what is left without a channel."""


class _Watched(nnx.Module):
    """A module whose calls leave a note of what goes in and out."""

    def __init__(self, module: nnx.Module, note: Callable[[Array, Array], Any]):
        self.module, self.note = module, note

    def __call__(self, x: Array) -> Array:
        out = self.module(x)  # pyright: ignore[reportCallIssue]
        for name, value in self.note(x, out).items():
            self.sow(nnx.Intermediate, name, value)
        return out


def measure_importance(
    teacher: Any, batches: Iterable[Batch], *, forward: Forward = default_forward
) -> Importance:
    """Scores of heads, neurons and channels from activations alone.

    score = square root of the sum over examples of (mean over time of |activation|)²

    One forward pass, no gradients and no labels; Minitron uses 1024 examples. Positions
    where `batch["loss_mask"]` is 0 do not count.

    Args:
      teacher: A `models.Decoder`, its layers stacked or not.
      batches: Batches of the data that the student is for, all of one shape or few.
      forward: `(model, batch) -> outputs`.

    Returns:
      The scores, float32.

    Example:
      >>> from distilljax import models
      >>> teacher = models.DecoderConfig(
      ...     vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2,
      ...     head_dim=8, ffn_width=48)(nnx.Rngs(0))
      >>> batch = {"tokens": jnp.arange(24).reshape(2, 12)}
      >>> found = measure_importance(teacher, [batch])
      >>> found.channels.shape, found.neurons.shape, found.heads.shape
      ((32,), (2, 48), (2, 4))

    Reference: Muralidharan et al., "Compact Language Models via Pruning and Knowledge
    Distillation" (Minitron), NeurIPS 2024, arXiv 2407.14679, section 2.2.
    """
    remedy = "Scores of other models are yours to measure."
    check_type("measure_importance", "teacher", teacher, Decoder, remedy)
    graphdef, state = nnx.split(teacher)

    @jax.jit
    def sums_of(state: Any, batch: Batch) -> Any:
        model = nnx.merge(graphdef, state, copy=True)
        model.eval()
        _watch(model, batch)
        _, notes = nnx.capture(forward, nnx.Intermediate)(model, batch)
        return _by_kind(notes)

    total = None
    for batch in batches:
        sums = sums_of(state, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        rule, remedy = "have at least one batch", "An iterator can be used up."
        fail("measure_importance", "batches", rule, "none", remedy)
    channels = [x.sum(0) for x in total["channels"].values()]
    return Importance(
        channels=jnp.sqrt(sum(channels[1:], channels[0])),
        neurons=jnp.sqrt(total["neurons"]["down"]),
        heads=jnp.sqrt(total["heads"]["out"]),
        energy=total["energy"],
    )


def _watch(model: Any, batch: Batch) -> None:
    """Let the modules of a copy of a decoder note their activations."""
    mask = batch.get("loss_mask")

    def counted(x_bt: Array) -> Array:
        """Where a position counts, with trailing axes of 1 as x needs them."""
        if mask is None:
            return jnp.ones((*x_bt.shape[:2], 1), bool)
        return (jnp.asarray(mask) != 0)[..., None]

    def score(x_btn: Array) -> Array:
        """Over positions the mean size, over examples the sum of squares."""
        where = counted(x_btn)
        sizes = jnp.where(where, jnp.abs(x_btn.astype(jnp.float32)), 0)
        means_bn = sizes.sum(1) / jnp.maximum(where.sum(1), 1)
        return jnp.sum(means_bn**2, axis=0)

    def energy(x_btd: Array) -> Array:
        kept = jnp.where(counted(x_btd), x_btd.astype(jnp.float32), 0)
        return jnp.sum(kept**2, axis=(0, 1))

    def of_heads(x: Array, out: Array) -> dict[str, Array]:
        x_btnh = x.reshape(*x.shape[:2], -1, model.config.head_dim)
        return {"heads": score(jnp.linalg.norm(x_btnh.astype(jnp.float32), axis=-1))}

    def of_neurons(x: Array, out: Array) -> dict[str, Array]:
        return {"neurons": score(x)}

    def reads(x: Array, out: Array) -> dict[str, Array]:
        return {"channels": score(out), "energy": energy(x)}

    def adds(x: Array, out: Array) -> dict[str, Array]:
        return {"energy": energy(x)}

    for layer in [model.layers] if model.config.scan else model.layers:
        layer.attention.out = _Watched(layer.attention.out, of_heads)
        layer.mlp.down = _Watched(layer.mlp.down, of_neurons)
        for name in NORMS:
            if getattr(layer, name) is not None:
                note = adds if name.startswith("post") else reads
                setattr(layer, name, _Watched(getattr(layer, name), note))
    model.final_norm = _Watched(model.final_norm, reads)


def _by_kind(notes: Any) -> dict[str, dict[str, Array]]:
    """Notes by what they are of and the module's name, layers along the first axis."""
    found: dict[str, dict[str, list[Array]]] = {}
    for path, value in sorted(nnx.to_flat_state(notes), key=lambda item: item[0]):
        *_, name, kind = path
        (array,) = value.get_value()
        rows = array if "layers" in path and array.ndim == 2 else array[None]
        found.setdefault(str(kind), {}).setdefault(str(name), []).append(rows)
    return {
        kind: {name: jnp.concatenate(arrays) for name, arrays in named.items()}
        for kind, named in found.items()
    }


__all__ = ["Importance", "measure_importance"]
