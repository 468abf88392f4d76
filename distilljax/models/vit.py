"""Vision transformers: ViT, and DeiT with its distillation token.

    x = [class token, distillation token, patches] + positions
    x = x + attention(norm(x));  x = x + mlp(norm(x))          for each layer
    logits = head(norm(x) of the class token)

Suffixes of names are axes: b batch, h height, w width of the image, c channels, t
tokens, d width, n heads, k size of a head.

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv
2010.11929, equations 1 to 4; Touvron et al., "Training data-efficient image
transformers & distillation through attention", ICML 2021, arXiv 2012.12877, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distilljax._checks import check_count, check_positive, fail
from distilljax.models._parts import as_batch
from distilljax.models.attention import dot_product_attention
from distilljax.sharding import Rule

# Columns, then rows, as for decoders: one sum over devices for each half of a layer.
VIT_RULES = (
    Rule(r"layers/\d+/.*(query|key|value|up)/kernel", ("fsdp", "tensor")),
    Rule(r"layers/\d+/.*(out|down)/kernel", ("tensor", "fsdp")),
)
"""Rules of `distilljax.sharding` for a `ViT` on a mesh of data, fsdp and tensor."""


@dataclass(frozen=True)
class ViTConfig:
    """How to build a `ViT`: call it with random streams.

    The defaults are ViT-B/16 for 224x224 and 1,000 classes. DeiT-Ti and DeiT-S have the
    width 192 and 384, and 3 and 6 heads of 64; `ffn_width` is four times the width.

    Example:
      >>> config = ViTConfig(num_classes=5, image_size=16, patch_size=4, width=24,
      ...                    num_layers=2, num_heads=4, ffn_width=48)
      >>> model = config(nnx.Rngs(0))
      >>> model(jnp.zeros((2, 16, 16, 3))).shape
      (2, 5)
    """

    num_classes: int = 1000
    """Width of the output."""
    image_size: int = 224
    """Height and width of the images."""
    patch_size: int = 16
    """Height and width of a patch; divides the image."""
    width: int = 768
    """Size of the residual stream."""
    num_layers: int = 12
    """Blocks of attention and feed-forward layer."""
    num_heads: int = 12
    """Heads of attention; they share the width."""
    ffn_width: int = 3072
    """Size of the feed-forward layer."""
    distilled: bool = False
    """Whether there is a distillation token with a head of its own (DeiT)."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    norm_eps: float = 1e-6
    """Added to the variance in norms."""
    in_channels: int = 3
    """Channels of the images."""

    def __post_init__(self):
        name = "ViTConfig"
        for field in (
            "num_classes", "image_size", "patch_size", "width", "num_layers",
            "num_heads", "ffn_width", "in_channels",
        ):  # fmt: skip
            check_count(name, field, getattr(self, field))
        check_positive(name, "norm_eps", self.norm_eps, "Use 1e-6.")
        if self.image_size % self.patch_size:
            rule = f"be a multiple of patch_size, {self.patch_size}"
            fail(name, "image_size", rule, self.image_size, "Patches are whole.")
        if self.width % self.num_heads:
            rule = f"be a multiple of num_heads, {self.num_heads}"
            fail(name, "width", rule, self.width, "Heads have equal parts of it.")

    def __call__(self, rngs: nnx.Rngs) -> ViT:
        """The module with fresh parameters."""
        return ViT(self, rngs)

    @property
    def num_tokens(self) -> int:
        """Patches, and the one or two tokens before them."""
        return (self.image_size // self.patch_size) ** 2 + 1 + self.distilled


class ViT(nnx.Module):
    """Patches, layers, norm and head; made by a `ViTConfig`.

    With a distillation token, the logits are in training those of the class head, and
    in inference the mean of both heads' (as the authors' code has it; the mean of two
    softmaxes in the paper). The second head's logits are a feature in both, under its
    path: `HardDistillation(distillation_logits="distillation_head")`.

    Features by path: `layers/0`, ... as [batch, tokens, width].

    Example:
      >>> config = ViTConfig(num_classes=5, image_size=16, patch_size=4, width=24,
      ...                    num_layers=2, num_heads=4, ffn_width=48, distilled=True)
      >>> model = ViT(config, nnx.Rngs(0))
      >>> model.positions.shape          # 16 patches and two tokens
      (1, 18, 24)
      >>> images = nnx.Rngs(1).normal((2, 16, 16, 3))
      >>> in_training = model(images)
      >>> model.eval()
      >>> bool(jnp.allclose(model(images), in_training))
      False
    """

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.width, (config.patch_size, config.patch_size)
        self.patch = nnx.Conv(
            config.in_channels, width, patch, strides=patch, padding="VALID", rngs=rngs
        )
        self.class_token = _table(1, width, rngs)
        self.distillation_token = _table(1, width, rngs) if config.distilled else None
        self.positions = _table(config.num_tokens, width, rngs)
        self.layers = nnx.List(Layer(config, rngs) for _ in range(config.num_layers))
        self.final_norm = _norm(config, rngs)
        self.head = _linear(width, config.num_classes, True, rngs)
        self.distillation_head = (
            _linear(width, config.num_classes, True, rngs) if config.distilled else None
        )
        # what nnx.Module.train and eval set
        self.deterministic = False

    def __call__(
        self, x_bhwc: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch of images."""
        self._check(x_bhwc.shape[1:])
        x_bhwd = self.patch(x_bhwc)
        batch, *_, width = x_bhwd.shape
        first = (self.class_token, self.distillation_token)
        tokens = [jnp.tile(t[...], (batch, 1, 1)) for t in first if t is not None]
        x_btd = jnp.concatenate([*tokens, x_bhwd.reshape(batch, -1, width)], axis=1)
        x_btd = as_batch(x_btd + self.positions[...])
        for layer in self.layers:
            x_btd = layer(x_btd)
        x_btd = self.final_norm(x_btd)
        logits_bc = self.head(as_batch(x_btd[:, 0]))
        if self.distillation_head is None:
            return logits_bc
        distilled_bc = self.distillation_head(as_batch(x_btd[:, 1]))
        return (logits_bc + distilled_bc) / 2 if self.deterministic else logits_bc

    def _check(self, shape: tuple[int, ...]) -> None:
        config = self.config
        wanted = (config.image_size, config.image_size, config.in_channels)
        if shape != wanted:
            fail(
                "ViT",
                "an example",
                f"have the shape {wanted}",
                shape,
                "Resize the images, or change image_size and in_channels: positions "
                "are learned for one size.",
            )


class Layer(nnx.Module):
    """Attention, then a feed-forward layer, each added to the residual stream."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x_btd: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens width"]:
        """All tokens of each image."""
        x_btd = x_btd + self.attention(self.attention_norm(x_btd))
        return x_btd + self.mlp(self.mlp_norm(x_btd))


class Attention(nnx.Module):
    """Of all tokens to all tokens."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.num_heads, width = config.num_heads, config.width
        self.query = _linear(width, width, config.qkv_bias, rngs)
        self.key = _linear(width, width, config.qkv_bias, rngs)
        self.value = _linear(width, width, config.qkv_bias, rngs)
        self.out = _linear(width, width, True, rngs)

    def __call__(
        self, x_btd: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens width"]:
        """Softmax in float32."""
        heads = (*x_btd.shape[:2], self.num_heads, -1)
        q_btnk, k_btnk, v_btnk = (
            linear(x_btd).reshape(heads)
            for linear in (self.query, self.key, self.value)
        )
        out_btnk = dot_product_attention(q_btnk, k_btnk, v_btnk, causal=False)
        return self.out(out_btnk.reshape(x_btd.shape))


class MLP(nnx.Module):
    """down(gelu(up(x))), with the exact GELU."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.up = _linear(config.width, config.ffn_width, True, rngs)
        self.down = _linear(config.ffn_width, config.width, True, rngs)

    def __call__(
        self, x_btd: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens width"]:
        """Each token by itself."""
        return self.down(nnx.gelu(self.up(x_btd), approximate=False))


def _norm(config: ViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.width, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs
    )


def _linear(inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.truncated_normal(0.02)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, rngs=rngs)


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Learned vectors that are alike for all images."""
    init = nnx.initializers.truncated_normal(0.02)
    return nnx.Param(init(rngs.params(), (1, rows, width)))
