"""Decoders: Llama, SmolLM, Mistral, Qwen2, Qwen3, Gemma-2 and Gemma-3 by configuration.

    x = embed(tokens)
    x = x + attention(norm(x));  x = x + mlp(norm(x))          for each layer
    logits = LinearHead(norm(x), kernel)                       never whole by itself

Suffixes of names are axes: b batch, t time, d width, n heads, k kv_heads, h head_dim,
f width of the feed-forward layer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from distilljax._checks import check_count, check_positive, check_type, fail
from distilljax.losses import LinearHead
from distilljax.models._parts import (
    as_batch,
    check_functions,
    here,
    looked_up,
    make_linear,
)
from distilljax.models.attention import dot_product_attention
from distilljax.models.rope import Rope, rotate
from distilljax.sharding import Rule
from distilljax.terms import Outputs

# Large kernels over `tensor` as Megatron-LM splits them (columns, then rows: one sum
# over devices for each block), and over `fsdp` along the other axis. What is small is
# left to the sizes.
_COLUMNS = r"(query|key|value|gate|up)/kernel"
_ROWS = r"(out|down)/kernel"
DECODER_RULES = (
    Rule(r"layers/\d+/.*" + _COLUMNS, ("fsdp", "tensor")),
    Rule(r"layers/\d+/.*" + _ROWS, ("tensor", "fsdp")),
    Rule(r"layers/\D.*" + _COLUMNS, (None, "fsdp", "tensor")),
    Rule(r"layers/\D.*" + _ROWS, (None, "tensor", "fsdp")),
    Rule(r"embed/embedding", ("tensor", "fsdp")),
    Rule(r"head/kernel", ("fsdp", "tensor")),
)
"""Rules of `distilljax.sharding` for decoders on a mesh of data, fsdp and tensor."""


@dataclass(frozen=True)
class DecoderConfig:
    """How to build a `Decoder`: call it with random streams.

    Example:
      >>> config = DecoderConfig(vocab_size=64, width=32, num_layers=2, num_heads=4,
      ...                        num_kv_heads=2, head_dim=8, ffn_width=48)
      >>> model = config(nnx.Rngs(0))
      >>> model(jnp.array([[1, 2, 3]])).logits.shape
      (1, 3, 64)
    """

    vocab_size: int
    """Tokens, padded ones included."""
    width: int
    """Size of the residual stream."""
    num_layers: int
    """Blocks of attention and feed-forward layer."""
    num_heads: int
    """Heads of the queries."""
    num_kv_heads: int
    """Heads of keys and values; each is shared by num_heads / num_kv_heads."""
    head_dim: int
    """Size of a head; even."""
    ffn_width: int
    """Size of the gated feed-forward layer."""
    max_length: int = 2048
    """Longest sequence it is made for: written to files, not enforced."""
    activation: Callable[[Array], Array] = nnx.silu
    """Of the gate: `nnx.silu` (SwiGLU), or `nnx.gelu` (GeGLU with tanh, Gemma)."""
    rope: Rope = Rope()  # noqa: RUF009  frozen
    """Rotary embeddings."""
    local_rope: Rope | None = None
    """Those of layers with a window, if they differ (Gemma-3)."""
    window: int | None = None
    """Positions that a local layer sees, itself included; None: no layer is local."""
    local_layers: tuple[bool, ...] = (True,)
    """Which layers are local, repeated as often as there are layers."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias (Qwen2)."""
    out_bias: bool = False
    """Whether the output of attention has one."""
    mlp_bias: bool = False
    """Whether the feed-forward layer has them."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, each head by itself (Qwen3, Gemma-3)."""
    post_norm: bool = False
    """Whether what a block adds is normalised too (Gemma)."""
    unit_offset: bool = False
    """Whether norms multiply by 1 + scale (Gemma) instead of scale."""
    norm_eps: float = 1e-6
    """Added to the mean square in norms."""
    embed_scale: float = 1.0
    """Factor of the embeddings (Gemma: sqrt(width))."""
    attention_scale: float | None = None
    """Factor of the scores; None is 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Bound of the scores (Gemma-2)."""
    logit_softcap: float | None = None
    """Bound of the logits (Gemma-2)."""
    tied: bool = True
    """Whether the embedding is the kernel of the logits too."""
    scan: bool = False
    """Whether layers are stacked and scanned: one is compiled for all."""
    remat: Callable[..., Any] | None = None
    """What of a layer is kept for the gradient, a policy of `jax.checkpoint_policies`;
    the rest is computed again. None keeps everything."""
    attention: Callable[..., Any] = dot_product_attention
    """Attention, as one of `models.attention`."""
    compute_dtype: Any = None
    """Type that is computed in; None is that of the parameters."""
    param_dtype: Any = jnp.float32
    """Type of the parameters."""

    def __post_init__(self):
        name = "DecoderConfig"
        for field in (
            "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "ffn_width", "max_length",
        ):  # fmt: skip
            check_count(name, field, getattr(self, field))
        if self.window is not None:
            check_count(name, "window", self.window)
        for field in ("attention_softcap", "logit_softcap", "attention_scale"):
            if getattr(self, field) is not None:
                check_positive(name, field, getattr(self, field), "Or use None.")
        if self.num_heads % self.num_kv_heads:
            rule = f"be a multiple of num_kv_heads, {self.num_kv_heads}"
            why = "Equally many heads share each head of keys and values."
            fail(name, "num_heads", rule, self.num_heads, why)
        if self.head_dim % 2:
            rule = "be even"
            fail(name, "head_dim", rule, self.head_dim, "Its halves turn as pairs.")
        check_positive(name, "norm_eps", self.norm_eps, "Llama has 1e-5.")
        check_positive(name, "embed_scale", self.embed_scale, "1.0 is none.")
        check_type(name, "rope", self.rope, Rope, "Rope() is the default.")
        check_functions(name, self)
        if not self.local_layers:
            rule = "have at least one entry"
            fail(name, "local_layers", rule, "()", "Use window=None for none.")

    def __call__(self, rngs: nnx.Rngs) -> Decoder:
        """The module with fresh parameters."""
        return Decoder(self, rngs)

    @property
    def locality(self) -> tuple[bool, ...]:
        """For each layer, whether it is local."""
        repeated = itertools.islice(itertools.cycle(self.local_layers), self.num_layers)
        return tuple(self.window is not None and local for local in repeated)


class Decoder(nnx.Module):
    """Embedding, layers, norm and head; made by a `DecoderConfig`.

    Layers are `layers/0`, `layers/1`, ...; with `scan` their arrays are stacked in
    `layers`, and features of them are still asked for by number.

    Example:
      >>> config = DecoderConfig(vocab_size=64, width=32, num_layers=3, num_heads=4,
      ...                        num_kv_heads=2, head_dim=8, ffn_width=48, scan=True)
      >>> model = Decoder(config, nnx.Rngs(0))
      >>> model.layers.mlp.up.kernel.shape
      (3, 32, 48)
      >>> model(jnp.zeros((1, 5), int)).logits.hidden.shape
      (1, 5, 32)
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(
            config.vocab_size,
            config.width,
            param_dtype=config.param_dtype,
            embedding_init=init,
            rngs=rngs,
        )
        if config.scan:
            make = nnx.vmap(lambda rngs: Layer(config, rngs), in_axes=0, out_axes=0)
            self.layers = make(rngs.split(config.num_layers))
        else:
            layers = (Layer(config, rngs) for _ in range(config.num_layers))
            self.layers = nnx.List(layers)
        self.final_norm = RMSNorm(config.width, config, rngs)
        shape = (config.width, config.vocab_size)
        self.head = None if config.tied else make_linear(config, *shape, False, rngs)

    def __call__(
        self,
        tokens_bt: Int[Array, "batch time"],
        positions_bt: Int[Array, "batch time"] | None = None,
        segment_ids_bt: Int[Array, "batch time"] | None = None,
    ) -> Outputs:
        """The head whose logits predict the next token of each position.

        Args:
          tokens_bt: Token ids, [batch, time].
          positions_bt: Of each token in its document; None counts from 0 in each row.
          segment_ids_bt: Number of its document; a token sees those of its own number
            alone. Padding is a document too, of a number of its own. None: one a row.
        """
        config = self.config
        embedding_vd = self.embed.embedding[...]
        dtype = config.compute_dtype or embedding_vd.dtype
        x_btd = looked_up(embedding_vd, tokens_bt).astype(dtype)
        x_btd = as_batch(x_btd * jnp.asarray(config.embed_scale, dtype))
        if positions_bt is None:
            positions_bt = jnp.arange(tokens_bt.shape[1])[None]
        ropes = (config.rope, config.local_rope or config.rope)
        turns = tuple(rope.turns(config.head_dim, positions_bt) for rope in ropes)
        x_btd = self._run(x_btd, turns, segment_ids_bt)
        kernel_dv = embedding_vd.T if self.head is None else self.head.kernel[...]
        head = LinearHead(
            self.final_norm(x_btd),
            kernel_dv.astype(dtype),
            softcap=config.logit_softcap,
            tied=self.head is None,
        )
        return Outputs(logits=head)

    def _run(self, x_btd: Array, turns: Any, ids_bt: Any) -> Array:
        """Through all layers."""
        config, locality = self.config, self.config.locality

        def kept(run: Callable[..., Array]) -> Callable[..., Array]:
            if config.remat is None:
                return run
            return nnx.remat(run, policy=config.remat, prevent_cse=not config.scan)

        def at(place: bool | None) -> Callable[..., Array]:
            """A layer, local or not; None: as its argument says."""

            def run(x: Array, layer: Layer, local: Any, *rest: Any) -> Array:
                return layer(x, local if place is None else place, *rest)

            return kept(run)

        if not config.scan:
            for layer, local in zip(cast(Any, self.layers), locality, strict=True):
                x_btd = at(local)(x_btd, here(layer), None, turns, ids_bt)
            return x_btd
        # layers that are all alike need no branches
        run = at(locality[0] if len(set(locality)) == 1 else None)
        axes = (nnx.Carry, 0, 0, None, None)
        scan = nnx.scan(run, in_axes=axes, out_axes=nnx.Carry)
        return scan(x_btd, here(self.layers), jnp.array(locality), turns, ids_bt)


class Layer(nnx.Module):
    """Attention, then a feed-forward layer, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.width, config, rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.post_attention_norm = norm() if config.post_norm else None
        self.post_mlp_norm = norm() if config.post_norm else None
        self.attention = Attention(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x_btd: Float[Array, "batch time width"], local: Any, turns: Any, ids: Any
    ) -> Float[Array, "batch time width"]:
        """`local`: whether there is a window, a bool that may be traced."""
        y_btd = self.attention(self.attention_norm(x_btd), local, turns, ids)
        if self.post_attention_norm is not None:
            y_btd = self.post_attention_norm(y_btd)
        x_btd = x_btd + y_btd
        y_btd = self.mlp(self.mlp_norm(x_btd))
        if self.post_mlp_norm is not None:
            y_btd = self.post_mlp_norm(y_btd)
        return x_btd + y_btd


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        linear = functools.partial(make_linear, config)
        inner, kv_inner = (
            heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)
        )
        self.query = linear(config.width, inner, config.qkv_bias, rngs)
        self.key = linear(config.width, kv_inner, config.qkv_bias, rngs)
        self.value = linear(config.width, kv_inner, config.qkv_bias, rngs)
        self.out = linear(inner, config.width, config.out_bias, rngs)
        norm = functools.partial(RMSNorm, config.head_dim, config, rngs)
        self.query_norm = norm() if config.qk_norm else None
        self.key_norm = norm() if config.qk_norm else None

    def __call__(
        self, x_btd: Float[Array, "batch time width"], local: Any, turns: Any, ids: Any
    ) -> Float[Array, "batch time width"]:
        """`local` as in `Layer`; `turns` of global and of local layers."""
        config = self.config
        heads = (*x_btd.shape[:2], -1, config.head_dim)
        q_btnh = self.query(x_btd).reshape(heads)
        k_btkh = self.key(x_btd).reshape(heads)
        v_btkh = self.value(x_btd).reshape(heads)
        if self.query_norm is not None and self.key_norm is not None:
            q_btnh, k_btkh = self.query_norm(q_btnh), self.key_norm(k_btkh)

        def attend(window: int | None, turn: Any, q_btnh: Array, k_btkh: Array, *rest):
            v_btkh, ids_bt = rest
            return config.attention(
                rotate(q_btnh, turn),
                rotate(k_btkh, turn),
                v_btkh,
                segment_ids=ids_bt,
                window=window,
                softcap=config.attention_softcap,
                scale=config.attention_scale,
            )

        everywhere = functools.partial(attend, None, turns[0])
        nearby = functools.partial(attend, config.window, turns[1])
        operands = (q_btnh, k_btkh, v_btkh, ids)
        if isinstance(local, bool):
            out_btnh = (nearby if local else everywhere)(*operands)
        else:
            out_btnh = jax.lax.cond(local, nearby, everywhere, *operands)
        return self.out(out_btnh.reshape(*x_btd.shape[:2], -1))


class MLP(nnx.Module):
    """down(activation(gate(x)) up(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        linear = functools.partial(make_linear, config)
        self.gate = linear(config.width, config.ffn_width, config.mlp_bias, rngs)
        self.up = linear(config.width, config.ffn_width, config.mlp_bias, rngs)
        self.down = linear(config.ffn_width, config.width, config.mlp_bias, rngs)

    def __call__(
        self, x_btd: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time width"]:
        """Each position by itself."""
        return self.down(self.activation(self.gate(x_btd)) * self.up(x_btd))


class RMSNorm(nnx.Module):
    """x / root mean square of x, times a learned scale; in float32."""

    def __init__(self, size: int, config: DecoderConfig, rngs: nnx.Rngs):
        del rngs  # starts as the identity
        self.offset, self.eps = float(config.unit_offset), config.norm_eps
        start = jnp.zeros if config.unit_offset else jnp.ones
        self.scale = nnx.Param(start(size, config.param_dtype))

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """Over the last axis."""
        x_32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x_32 * x_32, axis=-1, keepdims=True)
        scale = self.offset + self.scale[...].astype(jnp.float32)
        return (x_32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)
