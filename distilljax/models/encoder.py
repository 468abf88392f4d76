"""Encoders: BERT and MiniLM.

    x = norm(embed(tokens) + embed(positions) + embed(types))
    x = norm(x + attention(x));  x = norm(x + mlp(x))          for each layer
    last_hidden = x;  logits = head(pool(last_hidden))         if there are classes

No dropout: nothing here is random. Suffixes of names are axes: b batch, t time,
d width, n heads, h head_dim, c classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from distilljax._checks import check_count, check_positive, fail
from distilljax.models._parts import (
    as_batch,
    check_functions,
    here,
    looked_up,
    make_linear,
)
from distilljax.models.attention import dot_product_attention
from distilljax.models.pooling import mean_pool
from distilljax.sharding import Rule
from distilljax.terms import Outputs

# As for decoders; positions, types, pooler and head are small, and left to the sizes.
_COLUMNS = r"(query|key|value|up)/kernel"
_ROWS = r"(out|down)/kernel"
ENCODER_RULES = (
    Rule(r"layers/\d+/.*" + _COLUMNS, ("fsdp", "tensor")),
    Rule(r"layers/\d+/.*" + _ROWS, ("tensor", "fsdp")),
    Rule(r"layers/\D.*" + _COLUMNS, (None, "fsdp", "tensor")),
    Rule(r"layers/\D.*" + _ROWS, (None, "tensor", "fsdp")),
    Rule(r"(^|/)embed/embedding", (None, "fsdp")),
)
"""Rules of `distilljax.sharding` for encoders on a mesh of data, fsdp and tensor. The
vocabulary stays whole: that of BERT, 30,522, is divided by 2 and by nothing larger."""


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x times the normal distribution function of x, without the tanh in its place.

    Args:
      x: Any shape.

    Example:
      >>> round(float(exact_gelu(jnp.array(1.0))), 4)    # with tanh .8412
      0.8413

    Reference: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, arXiv
    1606.08415.
    """
    return jax.nn.gelu(x, approximate=False)


@dataclass(frozen=True)
class EncoderConfig:
    """How to build an `Encoder`: call it with random streams.

    Example:
      >>> config = EncoderConfig(vocab_size=64, width=32, num_layers=2, num_heads=4,
      ...                        ffn_width=48, num_classes=5)
      >>> model = config(nnx.Rngs(0))
      >>> model(jnp.array([[1, 2, 3]])).logits.shape
      (1, 5)
    """

    vocab_size: int
    """Tokens, padded ones included."""
    width: int
    """Size of the residual stream."""
    num_layers: int
    """Blocks of attention and feed-forward layer."""
    num_heads: int
    """Heads of attention; they divide the width."""
    ffn_width: int
    """Size of the feed-forward layer."""
    max_length: int = 512
    """Positions that are learned: no text is longer."""
    num_types: int = 2
    """Kinds of tokens, such as first and second text."""
    activation: Callable[[Array], Array] = exact_gelu
    """Of the feed-forward layer."""
    norm_eps: float = 1e-12
    """Added to the variance in norms."""
    num_classes: int | None = None
    """Classes of a text; None: no logits."""
    pool: Callable[..., Array] = mean_pool
    """How a row becomes the one vector that the head sees: `mean_pool`, `first_token`,
    or `(hidden, segment_ids) -> [batch, width]`."""
    pooler: bool = False
    """Whether that vector goes through a linear map and tanh before it (BERT)."""
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
        name = "EncoderConfig"
        for field in (
            "vocab_size", "width", "num_layers", "num_heads", "ffn_width", "max_length",
            "num_types",
        ):  # fmt: skip
            check_count(name, field, getattr(self, field))
        if self.num_classes is not None:
            check_count(name, "num_classes", self.num_classes)
        check_positive(name, "norm_eps", self.norm_eps, "BERT has 1e-12.")
        check_functions(name, self)
        if self.width % self.num_heads:
            rule = f"be a multiple of num_heads, {self.num_heads}"
            fail(name, "width", rule, self.width, "Each head is as wide as the others.")

    def __call__(self, rngs: nnx.Rngs) -> Encoder:
        """The module with fresh parameters."""
        return Encoder(self, rngs)


class Encoder(nnx.Module):
    """Embeddings, layers, and a head if there are classes; made by an `EncoderConfig`.

    Layers are `layers/0`, `layers/1`, ..., and what they project `layers/0/attention/
    query`, `key` and `value`; with `scan` their arrays are stacked in `layers`, and
    features of them are still asked for by number.

    Example:
      >>> config = EncoderConfig(vocab_size=64, width=32, num_layers=3, num_heads=4,
      ...                        ffn_width=48, scan=True)
      >>> model = Encoder(config, nnx.Rngs(0))
      >>> model.layers.mlp.up.kernel.shape
      (3, 32, 48)
      >>> model(jnp.zeros((1, 5), int)).features["last_hidden"].shape
      (1, 5, 32)
    """

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = _embedding(config, config.vocab_size, rngs)
        self.position_embed = _embedding(config, config.max_length, rngs)
        self.type_embed = _embedding(config, config.num_types, rngs)
        self.embed_norm = _norm(config, rngs)
        if config.scan:
            make = nnx.vmap(lambda rngs: Layer(config, rngs), in_axes=0, out_axes=0)
            self.layers = make(rngs.split(config.num_layers))
        else:
            layers = (Layer(config, rngs) for _ in range(config.num_layers))
            self.layers = nnx.List(layers)
        width, classes = config.width, config.num_classes
        self.pooler = (
            make_linear(config, width, width, True, rngs) if config.pooler else None
        )
        self.head = make_linear(config, width, classes, True, rngs) if classes else None

    def __call__(
        self,
        tokens_bt: Int[Array, "batch time"],
        positions_bt: Int[Array, "batch time"] | None = None,
        segment_ids_bt: Int[Array, "batch time"] | None = None,
        token_types_bt: Int[Array, "batch time"] | None = None,
    ) -> Outputs:
        """The feature `last_hidden`, [batch, time, width]; logits if there are classes.

        Args:
          tokens_bt: Token ids, [batch, time].
          positions_bt: Of each token in its text, below `max_length`; None counts from
            0 in each row.
          segment_ids_bt: Number of its text; a token sees those of its own number
            alone. Padding is 0. None: one text a row, without padding.
          token_types_bt: Kind of each token; None is 0.
        """
        config = self.config
        if positions_bt is None:
            _check_length(config, tokens_bt.shape[1])
            positions_bt = jnp.arange(tokens_bt.shape[1])[None]
        if token_types_bt is None:
            token_types_bt = jnp.zeros((1, 1), jnp.int32)
        dtype = config.compute_dtype or self.embed.embedding[...].dtype
        # nan for what is in no table, so that it is not taken for something else
        x_btd = sum(
            looked_up(table.embedding[...], ids_bt).astype(dtype)
            for table, ids_bt in (
                (self.embed, tokens_bt),
                (self.position_embed, positions_bt),
                (self.type_embed, token_types_bt),
            )
        )
        x_btd = self.embed_norm(as_batch(cast(Array, x_btd)))
        x_btd = self._run(x_btd, segment_ids_bt)
        features = {"last_hidden": x_btd}
        if self.pooler is None and self.head is None:
            return Outputs(features=features)
        pooled_bd = config.pool(x_btd, segment_ids_bt)
        if self.pooler is not None:
            pooled_bd = features["pooled"] = jnp.tanh(self.pooler(pooled_bd))
        logits_bc = None if self.head is None else self.head(pooled_bd)
        return Outputs(logits=logits_bc, features=features)

    def _run(self, x_btd: Array, ids_bt: Any) -> Array:
        """Through all layers."""
        config = self.config

        def run(x: Array, layer: Layer, ids: Any) -> Array:
            return layer(x, ids)

        if config.remat is not None:
            run = nnx.remat(run, policy=config.remat, prevent_cse=not config.scan)
        if config.scan:
            axes = (nnx.Carry, 0, None)
            scan = nnx.scan(run, in_axes=axes, out_axes=nnx.Carry)
            return scan(x_btd, here(self.layers), ids_bt)
        for layer in cast(Any, self.layers):
            x_btd = run(x_btd, here(layer), ids_bt)
        return x_btd


class Layer(nnx.Module):
    """Attention, then a feed-forward layer; a norm after each sum."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.attention_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(
        self, x_btd: Float[Array, "batch time width"], ids_bt: Any
    ) -> Float[Array, "batch time width"]:
        """`ids_bt` as the segments of `Encoder`."""
        x_btd = self.attention_norm(x_btd + self.attention(x_btd, ids_bt))
        return self.mlp_norm(x_btd + self.mlp(x_btd))


class Attention(nnx.Module):
    """Each token looks at all of its text."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.query = make_linear(config, width, width, True, rngs)
        self.key = make_linear(config, width, width, True, rngs)
        self.value = make_linear(config, width, width, True, rngs)
        self.out = make_linear(config, width, width, True, rngs)

    def __call__(
        self, x_btd: Float[Array, "batch time width"], ids_bt: Any
    ) -> Float[Array, "batch time width"]:
        """`ids_bt` as the segments of `Encoder`."""
        heads = (*x_btd.shape[:2], self.config.num_heads, -1)
        q_btnh, k_btnh, v_btnh = (
            project(x_btd).reshape(heads)
            for project in (self.query, self.key, self.value)
        )
        out_btnh = self.config.attention(
            q_btnh, k_btnh, v_btnh, segment_ids=ids_bt, causal=False
        )
        return self.out(out_btnh.reshape(x_btd.shape))


class MLP(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up = make_linear(config, config.width, config.ffn_width, True, rngs)
        self.down = make_linear(config, config.ffn_width, config.width, True, rngs)

    def __call__(
        self, x_btd: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time width"]:
        """Each position by itself."""
        return self.down(self.activation(self.up(x_btd)))


def _embedding(config: EncoderConfig, number: int, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        number,
        config.width,
        param_dtype=config.param_dtype,
        embedding_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def _norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """The variance around the mean: as E[x²] - E[x]² it is less exact than eps."""
    return nnx.LayerNorm(
        config.width,
        epsilon=config.norm_eps,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def _check_length(config: EncoderConfig, length: int) -> None:
    if length > config.max_length:
        fail(
            "Encoder",
            "tokens",
            f"have at most max_length={config.max_length} of them in a row",
            length,
            "Cut the texts; rows packed with several need their positions.",
        )
