"""GGUF files of llama.cpp: their description, and their tensors dequantised."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from distilljax._checks import fail
from distilljax.models.decoder import DecoderConfig
from distilljax.models.pretrained._tables import Index, Shape, Table, gguf_table
from distilljax.models.rope import Rope

# What is known of the architectures beyond their files.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
# Those whose queries and keys llama.cpp permutes.
PERMUTED = {"llama"}
# Also those that llama.cpp mixes in: a file of Q4_0 may have a head in Q6_K.
TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip


class GgufSource:
    """The tensors of one GGUF file, in float32."""

    def __init__(self, path: Path):
        import gguf

        self.where = str(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            fail(
                "load_pretrained",
                str(path),
                "be a whole GGUF file",
                f"one that cannot be read ({error})",
                "It may have been cut short: fetch it again.",
            )
        self._by_name = {tensor.name: tensor for tensor in self._reader.tensors}
        kinds = {name: t.tensor_type.name for name, t in self._by_name.items()}
        others = {name: kind for name, kind in kinds.items() if kind not in TYPES}
        if others:
            first = next(iter(others))
            fail(
                "load_pretrained",
                "all tensors",
                f"be of types among {', '.join(TYPES)}",
                f"{len(others)} of others in {path}: {first} is {others[first]}",
                "Quantise the model to one of these, or load its safetensors.",
            )

    def tensors(self) -> Mapping[str, tuple[Shape, Any]]:
        """Shape and dtype of each tensor, by name."""
        kind = jnp.dtype("float32")
        # the file counts axes from the fastest one
        shapes = {n: t.shape[::-1].tolist() for n, t in self._by_name.items()}
        return {name: (tuple(shape), kind) for name, shape in shapes.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """A piece of a tensor: of the rows that it needs, all blocks are decoded."""
        from gguf import dequantize

        tensor = self._by_name[name]
        rows = dequantize(tensor.data[index[0]], tensor.tensor_type)
        return rows[(slice(None), *index[1:])]

    def config(self) -> DecoderConfig:
        """The decoder that the file describes."""
        kind, heads = self.architecture, self._value("attention.head_count")
        width = self._value("embedding_length")
        names = self._by_name
        return DecoderConfig(
            vocab_size=self.tensors()["token_embd.weight"][0][0],
            width=width,
            num_layers=self._value("block_count"),
            num_heads=heads,
            num_kv_heads=self._value("attention.head_count_kv", heads),
            head_dim=self._value("attention.key_length", width // heads),
            ffn_width=self._value("feed_forward_length"),
            max_length=self._value("context_length"),
            norm_eps=self._value("attention.layer_norm_rms_epsilon"),
            rope=self._rope(),
            local_layers=(False,),
            tied="output.weight" not in names,
            **ARCHITECTURES[kind],
        )

    def table(self) -> Table:
        """The names of the tensors."""
        permuted = self.architecture in PERMUTED
        return gguf_table(self.config(), permuted=permuted)

    @functools.cached_property
    def architecture(self) -> str:
        """The kind of model, in the words of llama.cpp."""
        kind = self._field("general.architecture", "nothing")
        if kind not in ARCHITECTURES:
            fail(
                "load_pretrained",
                "general.architecture",
                f"be one of {', '.join(ARCHITECTURES)}",
                f"{kind!r} in {self.where}",
                "Load the safetensors of the model instead.",
            )
        return kind

    def _rope(self) -> Rope:
        rope = Rope(base=float(self._value("rope.freq_base", 10_000.0)))
        scaling = self._value("rope.scaling.type", "none")
        if scaling == "linear":
            factor = float(self._value("rope.scaling.factor"))
            return Rope(base=rope.base, factor=factor)
        if scaling != "none":
            fail(
                "load_pretrained",
                "rope.scaling.type",
                "be none or linear",
                repr(scaling),
                "Load the safetensors of the model instead.",
            )
        if "rope_freqs.weight" in self._by_name:
            divisors = self.read("rope_freqs.weight", (slice(None),))
            return Rope(base=rope.base, divisors=tuple(divisors.tolist()))
        return rope

    def _value(self, key: str, default: Any = None) -> Any:
        return self._field(f"{self.architecture}.{key}", default)

    def _field(self, key: str, default: Any = None) -> Any:
        """An entry of the description; without a default it must be there."""
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is None:
            fail(
                "load_pretrained",
                self.where,
                f"have the entry {key}",
                "none",
                "Convert the model again with a newer llama.cpp.",
            )
        return default
