"""Which tensor of a file is which parameter, and how it is turned.

A row is (pattern, path, transform): the name in the file and the path in the model,
with `{}` for the number of a layer, and how the one array becomes the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Index = tuple[slice, ...]
Shape = tuple[int, ...]


class Transform(NamedTuple):
    """How an array of a file becomes a parameter: piece by piece, and back."""

    shape: Callable[[Shape], Shape]
    """The shape in a file of a parameter of this shape."""
    piece: Callable[[Callable[[Index], np.ndarray], Index], np.ndarray]
    """A piece of the parameter, from a function that reads pieces of the file."""
    back: Callable[[np.ndarray], np.ndarray]
    """The array of the file, from the whole parameter."""


SAME = Transform(
    shape=lambda shape: shape,
    piece=lambda read, index: read(index),
    back=lambda x: x,
)
# torch.nn.Linear has [outputs, inputs]
TRANSPOSED = Transform(
    shape=lambda shape: shape[::-1],
    piece=lambda read, index: read(index[::-1]).T,
    back=lambda x: x.T,
)
# torch.nn.Conv2d has [outputs, inputs, height, width]
CONV = Transform(
    shape=lambda shape: (shape[3], shape[2], *shape[:2]),
    piece=lambda read, index: read(
        (index[3], index[2], *index[:2]),
    ).transpose(2, 3, 1, 0),
    back=lambda x: x.transpose(3, 2, 0, 1),
)


def unpermuted(num_heads: int) -> Transform:
    """As `TRANSPOSED`, with the rows of each head put back in order.

    llama.cpp turns the pairs (2 i, 2 i + 1), and stores the rows of queries and keys so
    that this equals turning (i, i + head_dim / 2).
    """

    def order(rows: int) -> np.ndarray:
        halves = np.arange(rows).reshape(num_heads, rows // num_heads // 2, 2)
        return halves.swapaxes(1, 2).reshape(-1)

    def piece(read: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
        columns, rows = index
        whole = read((slice(None), columns))
        return whole[order(len(whole))[rows]].T

    def back(x: np.ndarray) -> np.ndarray:
        return x.T[np.argsort(order(x.shape[1]))]

    return Transform(TRANSPOSED.shape, piece, back)


class Row(NamedTuple):
    """One line of a table."""

    pattern: str
    path: str
    transform: Transform = SAME

    def path_of(self, name: str) -> str | None:
        """The path of the tensor of this name; None if this is another row."""
        parts = map(re.escape, self.pattern.split("{}"))
        found = re.fullmatch(r"(\d+)".join(parts), name)
        return None if found is None else self.path.format(*found.groups())

    def name_of(self, path: str) -> str | None:
        """The name of the parameter of this path; None if this is another row."""
        parts = map(re.escape, self.path.split("{}"))
        found = re.fullmatch(r"(\d+)".join(parts), path)
        return None if found is None else self.pattern.format(*found.groups())


class Table(NamedTuple):
    """The rows of a format, and names that are passed over where they occur."""

    rows: tuple[Row, ...]
    ignored: str = r"(?!)"


def _linear(pattern: str, path: str, transform: Transform = TRANSPOSED) -> list[Row]:
    return [
        Row(f"{pattern}.weight", f"{path}/kernel", transform),
        Row(f"{pattern}.bias", f"{path}/bias"),
    ]


def _norm(pattern: str, path: str) -> Row:
    return Row(f"{pattern}.weight", f"{path}/scale")


def _scale_and_bias(pattern: str, path: str) -> list[Row]:
    return [_norm(pattern, path), Row(f"{pattern}.bias", f"{path}/bias")]


def decoder_table(config: Any) -> Table:
    """Names of transformers for decoders."""
    layer, ours = "model.layers.{}", "layers/{}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    if config.post_norm:
        after = [
            _norm(f"{layer}.post_attention_layernorm", f"{ours}/post_attention_norm"),
            _norm(f"{layer}.pre_feedforward_layernorm", f"{ours}/mlp_norm"),
            _norm(f"{layer}.post_feedforward_layernorm", f"{ours}/post_mlp_norm"),
        ]
    else:
        after = [_norm(f"{layer}.post_attention_layernorm", f"{ours}/mlp_norm")]
    rows = (
        Row("model.embed_tokens.weight", "embed/embedding"),
        _norm(f"{layer}.input_layernorm", f"{ours}/attention_norm"),
        *_linear(f"{attention}.q_proj", f"{ours}/attention/query"),
        *_linear(f"{attention}.k_proj", f"{ours}/attention/key"),
        *_linear(f"{attention}.v_proj", f"{ours}/attention/value"),
        *_linear(f"{attention}.o_proj", f"{ours}/attention/out"),
        _norm(f"{attention}.q_norm", f"{ours}/attention/query_norm"),
        _norm(f"{attention}.k_norm", f"{ours}/attention/key_norm"),
        *after,
        *_linear(f"{mlp}.gate_proj", f"{ours}/mlp/gate"),
        *_linear(f"{mlp}.up_proj", f"{ours}/mlp/up"),
        *_linear(f"{mlp}.down_proj", f"{ours}/mlp/down"),
        _norm("model.norm", "final_norm"),
        Row("lm_head.weight", "head/kernel", TRANSPOSED),
    )
    # a tied head is written by some as a copy of the embedding
    tied = r"|lm_head\.weight" if config.tied else ""
    return Table(rows, rf".*\.rotary_emb\.inv_freq{tied}")


def encoder_table(config: Any) -> Table:
    """Names of transformers for BERT, which has a prefix where a head is around it."""
    first = "bert." if config.num_classes else ""
    second = "" if first else "bert."
    rows = (*_bert_rows(first), *_bert_rows(second), *_linear("classifier", "head"))
    # a buffer of old files, and heads of pretraining
    ignored = [r"(bert\.)?embeddings\.position_ids", r"cls\..*"]
    if not config.pooler:
        ignored.append(r"(bert\.)?pooler\.dense\..*")
    return Table(rows, "|".join(ignored))


def _bert_rows(prefix: str) -> list[Row]:
    embeddings, layer = f"{prefix}embeddings", f"{prefix}encoder.layer.{{}}"
    ours, theirs = "layers/{}", f"{layer}.attention"
    return [
        Row(f"{embeddings}.word_embeddings.weight", "embed/embedding"),
        Row(f"{embeddings}.position_embeddings.weight", "position_embed/embedding"),
        Row(f"{embeddings}.token_type_embeddings.weight", "type_embed/embedding"),
        *_layer_norm(f"{embeddings}.LayerNorm", "embed_norm"),
        *_linear(f"{theirs}.self.query", f"{ours}/attention/query"),
        *_linear(f"{theirs}.self.key", f"{ours}/attention/key"),
        *_linear(f"{theirs}.self.value", f"{ours}/attention/value"),
        *_linear(f"{theirs}.output.dense", f"{ours}/attention/out"),
        *_layer_norm(f"{theirs}.output.LayerNorm", f"{ours}/attention_norm"),
        *_linear(f"{layer}.intermediate.dense", f"{ours}/mlp/up"),
        *_linear(f"{layer}.output.dense", f"{ours}/mlp/down"),
        *_layer_norm(f"{layer}.output.LayerNorm", f"{ours}/mlp_norm"),
        *_linear(f"{prefix}pooler.dense", "pooler"),
    ]


def _layer_norm(pattern: str, path: str) -> list[Row]:
    """With the names of the first files of BERT, which are still published."""
    older = [Row(f"{pattern}.gamma", f"{path}/scale")]
    older += [Row(f"{pattern}.beta", f"{path}/bias")]
    return [*_scale_and_bias(pattern, path), *older]


def gguf_table(config: Any, *, permuted: bool) -> Table:
    """Names of llama.cpp for decoders; `permuted` if queries and keys are."""
    layer, ours = "blk.{}", "layers/{}"
    query = unpermuted(config.num_heads) if permuted else TRANSPOSED
    key = unpermuted(config.num_kv_heads) if permuted else TRANSPOSED
    rows = (
        Row("token_embd.weight", "embed/embedding"),
        _norm(f"{layer}.attn_norm", f"{ours}/attention_norm"),
        *_linear(f"{layer}.attn_q", f"{ours}/attention/query", query),
        *_linear(f"{layer}.attn_k", f"{ours}/attention/key", key),
        *_linear(f"{layer}.attn_v", f"{ours}/attention/value"),
        *_linear(f"{layer}.attn_output", f"{ours}/attention/out"),
        _norm(f"{layer}.attn_q_norm", f"{ours}/attention/query_norm"),
        _norm(f"{layer}.attn_k_norm", f"{ours}/attention/key_norm"),
        _norm(f"{layer}.ffn_norm", f"{ours}/mlp_norm"),
        *_linear(f"{layer}.ffn_gate", f"{ours}/mlp/gate"),
        *_linear(f"{layer}.ffn_up", f"{ours}/mlp/up"),
        *_linear(f"{layer}.ffn_down", f"{ours}/mlp/down"),
        _norm("output_norm", "final_norm"),
        Row("output.weight", "head/kernel", TRANSPOSED),
    )
    return Table(rows, r"rope_freqs\.weight")


def resnet_table(config: Any) -> Table:
    """Names of transformers for ResNets."""
    del config  # what a config leaves out has no parameters
    block, ours = "resnet.encoder.stages.{}.layers.{}", "stages/{}/blocks/{}"
    rows = (
        *_conv_norm("resnet.embedder.embedder", "stem"),
        *_conv_norm(f"{block}.layer.{{}}", f"{ours}/convs/{{}}"),
        *_conv_norm(f"{block}.shortcut", f"{ours}/shortcut"),
        *_linear("classifier.1", "head"),
    )
    return Table(rows, r".*\.num_batches_tracked")


def _conv_norm(pattern: str, path: str) -> list[Row]:
    norm, ours = f"{pattern}.normalization", f"{path}/norm"
    return [
        Row(f"{pattern}.convolution.weight", f"{path}/conv/kernel", CONV),
        *_scale_and_bias(norm, ours),
        Row(f"{norm}.running_mean", f"{ours}/mean"),
        Row(f"{norm}.running_var", f"{ours}/var"),
    ]


def vit_table(config: Any) -> Table:
    """Names of transformers for ViT, and for DeiT with its distillation token."""
    model = "deit" if config.distilled else "vit"
    embeddings, layer, ours = (
        f"{model}.embeddings",
        f"{model}.encoder.layer.{{}}",
        "layers/{}",
    )
    attention = f"{layer}.attention"
    patch = f"{embeddings}.patch_embeddings.projection"
    rows = (
        Row(f"{embeddings}.cls_token", "class_token"),
        Row(f"{embeddings}.distillation_token", "distillation_token"),
        Row(f"{embeddings}.position_embeddings", "positions"),
        *_linear(patch, "patch", CONV),
        *_scale_and_bias(f"{layer}.layernorm_before", f"{ours}/attention_norm"),
        *_linear(f"{attention}.attention.query", f"{ours}/attention/query"),
        *_linear(f"{attention}.attention.key", f"{ours}/attention/key"),
        *_linear(f"{attention}.attention.value", f"{ours}/attention/value"),
        *_linear(f"{attention}.output.dense", f"{ours}/attention/out"),
        *_scale_and_bias(f"{layer}.layernorm_after", f"{ours}/mlp_norm"),
        *_linear(f"{layer}.intermediate.dense", f"{ours}/mlp/up"),
        *_linear(f"{layer}.output.dense", f"{ours}/mlp/down"),
        *_scale_and_bias(f"{model}.layernorm", "final_norm"),
        *_linear("cls_classifier" if config.distilled else "classifier", "head"),
        *_linear("distillation_classifier", "distillation_head"),
    )
    # of pretraining; a classifier has no use for them
    return Table(rows, rf"{model}\.pooler\..*|{model}\.embeddings\.mask_token")
