"""GGUF files: blocks of small integers, and queries and keys in another order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax.models import DecoderConfig, load_pretrained
from distilljax.models.pretrained import _gguf
from distilljax.models.pretrained._gguf import GgufSource
from distilljax.sharding import mesh_from_string

CONFIG = DecoderConfig(
    vocab_size=64,
    width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_width=96,
    max_length=128,
    norm_eps=1e-5,
    tied=True,
    local_layers=(False,),
)
NAMES = {
    "attention_norm/scale": "attn_norm.weight",
    "attention/query/kernel": "attn_q.weight",
    "attention/key/kernel": "attn_k.weight",
    "attention/value/kernel": "attn_v.weight",
    "attention/query/bias": "attn_q.bias",
    "attention/key/bias": "attn_k.bias",
    "attention/value/bias": "attn_v.bias",
    "attention/out/kernel": "attn_output.weight",
    "attention/query_norm/scale": "attn_q_norm.weight",
    "attention/key_norm/scale": "attn_k_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "mlp/gate/kernel": "ffn_gate.weight",
    "mlp/up/kernel": "ffn_up.weight",
    "mlp/down/kernel": "ffn_down.weight",
}


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """As convert_hf_to_gguf.py of llama.cpp does it."""
    shape = (heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return x.reshape(shape).swapaxes(1, 2).reshape(x.shape)


def write(path: Path, model, kind: str, arch: str = "llama", **entries) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.base)
    for key, value in entries.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        else:
            writer.add_tensor(f"{key}.weight", value)
    quantised = gguf.GGMLQuantizationType[kind]

    def add(name: str, x: jax.Array) -> None:
        x = np.asarray(x, np.float32)
        x = np.ascontiguousarray(x.T)
        if arch == "llama" and name.endswith("attn_q.weight"):
            x = permuted(x, config.num_heads)
        if arch == "llama" and name.endswith("attn_k.weight"):
            x = permuted(x, config.num_kv_heads)
        if x.ndim == 1:
            writer.add_tensor(name, x)
        else:
            data = gguf.quantize(x, quantised)
            writer.add_tensor(name, data, raw_dtype=quantised)

    add("token_embd.weight", model.embed.embedding[...].T)
    add("output_norm.weight", model.final_norm.scale[...])
    for i, layer in enumerate(model.layers):
        state = {
            "/".join(path): x.get_value()
            for path, x in nnx.to_flat_state(nnx.state(layer))
        }
        for ours, theirs in NAMES.items():
            if ours in state:
                add(f"blk.{i}.{theirs}", state[ours])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# The largest error of a value, over the largest value: half a step of the grid of 127
# steps to each side (8 bits) or of 15 from least to most (Q4_1); a whole step of 1/8 at
# the end that Q4_0 has no number for; and the rounding of the scales to float16.
F16 = 2**-11
ERRORS = {
    "F32": 0.0,
    "F16": F16,
    "Q8_0": 0.5 / 127 + F16,
    "Q4_0": 1 / 8 + F16,
    "Q4_1": 1 / 15 + 2 * F16,
}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", ERRORS)
def test_the_weights_are_those_that_were_quantised(kind, scan, tmp_path):
    model = CONFIG(nnx.Rngs(0))
    write(tmp_path / "model.gguf", model, kind)
    loaded = load_pretrained(tmp_path / "model.gguf", scan=scan)
    assert loaded.config == replace(
        CONFIG,
        scan=scan,
        param_dtype=jnp.dtype("float32"),
        norm_eps=loaded.config.norm_eps,
    )
    assert loaded.config.norm_eps == pytest.approx(1e-5)
    for i, layer in enumerate(model.layers):
        state = nnx.to_pure_dict(nnx.state(layer))
        found = nnx.to_pure_dict(nnx.state(loaded.layers if scan else loaded.layers[i]))
        found = jax.tree.map(lambda x, i=i: x[i], found) if scan else found
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(
                y, x, rtol=0, atol=ERRORS[kind] * np.abs(x).max()
            ),
            state,
            found,
        )


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_architectures_say_the_same_as_before(arch, tmp_path):
    """Queries and keys of llama are permuted in the file, and those of qwen are not."""
    config = replace(CONFIG, qkv_bias=arch == "qwen2", qk_norm=arch == "qwen3")
    model = config(nnx.Rngs(0))
    write(tmp_path / "model.gguf", model, "F32", arch)
    loaded = load_pretrained(tmp_path)  # the only GGUF file of a directory
    tokens = jax.random.randint(jax.random.key(0), (2, 20), 0, 64)
    np.testing.assert_allclose(
        loaded(tokens).logits.logits(), model(tokens).logits.logits(), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_what_llama_cpp_mixes_in_is_read(kind, tmp_path):
    """As `gguf` decodes the whole tensor, whichever rows are asked for."""
    quantised = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[quantised]
    blocks = np.random.default_rng(0).integers(0, 256, (8, 2, size), np.uint8)
    # the scales of a block are float16: not inf, and not nan
    scales = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}
    first, last = scales.get(kind, (0, 4))
    blocks[..., first:last] = np.tile(
        np.float16([0.01]).view(np.uint8), (last - first) // 2
    )
    data = blocks.reshape(8, -1)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("token_embd.weight", data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "a.gguf")
    whole = gguf.dequantize(data, quantised)
    assert source.tensors()["token_embd.weight"][0] == whole.shape == (8, 512)
    assert np.isfinite(whole).all()
    piece = source.read("token_embd.weight", (slice(2, 5), slice(100, 300)))
    np.testing.assert_array_equal(piece, whole[2:5, 100:300])
    assert np.std(piece) > 0


def test_a_mesh_holds_the_pieces(tmp_path):
    model = CONFIG(nnx.Rngs(0))
    write(tmp_path / "model.gguf", model, "Q8_0")
    whole = load_pretrained(tmp_path, dtype=jnp.bfloat16, scan=True)
    mesh = mesh_from_string("fsdp=4,tensor=2")
    split = load_pretrained(tmp_path, dtype=jnp.bfloat16, scan=True, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(split), nnx.state(whole))
    kernel = split.layers.attention.query.kernel[...]
    assert tuple(kernel.sharding.spec) == (None, "fsdp", "tensor")


def test_scalings_of_rotary_embeddings(tmp_path):
    model = CONFIG(nnx.Rngs(0))
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    write(tmp_path / "llama3.gguf", model, "F32", rope_freqs=divisors)
    rope = load_pretrained(tmp_path / "llama3.gguf").config.rope
    np.testing.assert_allclose(rope.divisors, divisors)
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write(tmp_path / "linear.gguf", model, "F32", **linear)
    assert load_pretrained(tmp_path / "linear.gguf").config.rope.factor == 4.0
    write(tmp_path / "yarn.gguf", model, "F32", **{"rope.scaling.type": "yarn"})
    with pytest.raises(ValueError, match="type must be none or linear, got 'yarn'"):
        load_pretrained(tmp_path / "yarn.gguf")


def test_other_types_and_architectures_are_refused(tmp_path, monkeypatch):
    model = CONFIG(nnx.Rngs(0))
    write(tmp_path / "a.gguf", model, "Q5_0")
    load_pretrained(tmp_path / "a.gguf")
    told = r"among F32, F16, got 15 of others in .*a.gguf: token_embd.weight is Q5_0"
    monkeypatch.setattr(_gguf, "TYPES", ("F32", "F16"))
    with pytest.raises(ValueError, match=told):
        load_pretrained(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf", model, "F32", "mamba")
    with pytest.raises(ValueError, match=r"must be one of llama, .*, got 'mamba'"):
        load_pretrained(tmp_path / "b.gguf")


@pytest.mark.parametrize("size", [0, 10, 500, 30_000])
def test_a_file_that_was_cut_short_is_refused(tmp_path, size):
    path = tmp_path / "model.gguf"
    write(path, CONFIG(nnx.Rngs(0)), "Q8_0")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"must be a whole GGUF file.* cut short"):
        load_pretrained(path)
