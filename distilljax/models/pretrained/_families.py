"""Decoders in config.json: Llama, Mistral, Qwen and Gemma."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from flax import nnx

from distilljax._checks import fail
from distilljax.models.decoder import DECODER_RULES, Decoder, DecoderConfig
from distilljax.models.pretrained._kinds import Family, Json, Kind
from distilljax.models.pretrained._tables import decoder_table
from distilljax.models.rope import Rope

# How a model is run, and not what it is: files do not say it.
OPTIONS = ("scan", "remat", "attention", "compute_dtype")
ACTIVATIONS = {
    "silu": nnx.silu,
    "gelu_pytorch_tanh": nnx.gelu,
}
# What published files leave out, because transformers has it as its default.
GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
GEMMA3_DEFAULTS = {"vocab_size": 262_208, "max_position_embeddings": 131_072}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def _plain(config: DecoderConfig) -> DecoderConfig:
    """The same model, said in one way."""
    run = {*OPTIONS, "param_dtype"}
    config = replace(
        config, **{f.name: f.default for f in fields(config) if f.name in run}
    )
    scale = config.attention_scale or config.head_dim**-0.5
    if not any(config.locality):
        config = replace(config, window=None, local_rope=None)
    return replace(
        config, local_layers=_shortest(config.locality), attention_scale=scale
    )


def _sizes(json: Json, activation: str) -> dict[str, Any]:
    """What all families have."""
    name = json.get(activation, "silu")
    if name not in ACTIVATIONS:
        fail(
            "load_pretrained",
            activation,
            f"be one of {', '.join(ACTIVATIONS)}",
            repr(name),
            "Other gates are not built.",
        )
    heads = json["num_attention_heads"]
    return {
        "vocab_size": json["vocab_size"],
        "width": json["hidden_size"],
        "num_layers": json["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": json.get("num_key_value_heads") or heads,
        "head_dim": json.get("head_dim") or json["hidden_size"] // heads,
        "ffn_width": json["intermediate_size"],
        "max_length": json["max_position_embeddings"],
        "norm_eps": json["rms_norm_eps"],
        "activation": ACTIVATIONS[name],
        "tied": json.get("tie_word_embeddings", False),
    }


def _sizes_json(
    config: DecoderConfig, activation: str = "hidden_act"
) -> dict[str, Any]:
    names = {function: name for name, function in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        activation: names.get(config.activation, "silu"),
        "tie_word_embeddings": config.tied,
    }


def _rope(json: Json, layers: str = GLOBAL, base: float = 10_000.0) -> Rope:
    """Rotary embeddings, as old files say them and as new ones do."""
    found = json.get("rope_parameters") or json.get("rope_scaling") or {}
    found = found.get(layers, found)
    kind = found.get("rope_type", found.get("type", "default"))
    given = found.get("rope_theta", json.get("rope_theta"))
    rope = Rope(base=float(base if given is None else given))
    if kind == "default":
        return rope
    if kind == "linear":
        return replace(rope, factor=float(found["factor"]))
    if kind == "llama3":
        return replace(
            rope,
            factor=float(found["factor"]),
            original_length=found["original_max_position_embeddings"],
            low_freq_factor=float(found["low_freq_factor"]),
            high_freq_factor=float(found["high_freq_factor"]),
        )
    return fail(
        "load_pretrained",
        "rope_type",
        "be default, linear or llama3",
        repr(kind),
        "Other scalings of rotary embeddings are not built.",
    )


def _rope_json(rope: Rope) -> dict[str, Any]:
    """As files said it up to transformers 4, which version 5 still reads."""
    if rope.original_length is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    elif rope.factor != 1:
        scaling = {"rope_type": "linear", "factor": rope.factor}
    else:
        scaling = None
    return {"rope_theta": rope.base, "rope_scaling": scaling}


def _shortest(locality: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest pattern that says which layers are local, repeated."""
    for length in range(1, len(locality)):
        pattern = locality[:length]
        if all(x == pattern[i % length] for i, x in enumerate(locality)):
            return pattern
    return locality


def _windows(json: Json, default: tuple[bool, ...]) -> dict[str, Any]:
    """The window, and which layers have it."""
    window, kinds = json.get("sliding_window"), json.get("layer_types")
    if kinds is None:
        number = json["num_hidden_layers"]
        locality = tuple(default[i % len(default)] for i in range(number))
    else:
        locality = tuple(kind == LOCAL for kind in kinds)
    if window is None or not any(locality):
        return {"window": None, "local_layers": (False,)}
    return {"window": window, "local_layers": _shortest(locality)}


def _windows_json(config: DecoderConfig) -> dict[str, Any]:
    kinds = [LOCAL if local else GLOBAL for local in config.locality]
    return {"sliding_window": config.window, "layer_types": kinds}


def _read_llama(json: Json) -> DecoderConfig:
    bias = json.get("attention_bias", False)
    return DecoderConfig(
        **_sizes(json, "hidden_act"),
        rope=_rope(json),
        local_layers=(False,),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=json.get("mlp_bias", False),
    )


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_sizes_json(config),
        **_rope_json(config.rope),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _read_mistral(json: Json) -> DecoderConfig:
    json = {"sliding_window": 4096, **json}
    windows = _windows(json, (True,))
    return DecoderConfig(**_sizes(json, "hidden_act"), rope=_rope(json), **windows)


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_sizes_json(config),
        **_rope_json(config.rope),
        "sliding_window": config.window,
    }


def _qwen_windows(json: Json) -> dict[str, Any]:
    if not json.get("use_sliding_window", False):
        return {"window": None, "local_layers": (False,)}
    first = json.get("max_window_layers", 0)
    number = json["num_hidden_layers"]
    return _windows(json, tuple(i >= first for i in range(number)))


def _qwen_windows_json(config: DecoderConfig) -> dict[str, Any]:
    if config.window is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "max_window_layers": config.locality.index(True),
        **_windows_json(config),
    }


def _read_qwen2(json: Json) -> DecoderConfig:
    return DecoderConfig(
        **_sizes(json, "hidden_act"),
        rope=_rope(json),
        **_qwen_windows(json),
        qkv_bias=True,
    )


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_sizes_json(config),
        **_rope_json(config.rope),
        **_qwen_windows_json(config),
    }


def _read_qwen3(json: Json) -> DecoderConfig:
    bias = json.get("attention_bias", False)
    return DecoderConfig(
        **_sizes(json, "hidden_act"),
        rope=_rope(json),
        **_qwen_windows(json),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
    )


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_qwen2(config), "attention_bias": config.qkv_bias}


def _gemma(json: Json) -> dict[str, Any]:
    """What Gemma-2 and Gemma-3 share."""
    return dict(
        **_sizes(json, "hidden_activation"),
        rope=_rope(json),
        post_norm=True,
        unit_offset=True,
        embed_scale=math.sqrt(json["hidden_size"]),
        attention_scale=json["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=json.get("attn_logit_softcapping"),
        logit_softcap=json.get("final_logit_softcapping"),
    )


def _gemma_json(config: DecoderConfig) -> dict[str, Any]:
    scale = config.attention_scale or config.head_dim**-0.5
    whole = round(scale**-2)
    return {
        **_sizes_json(config, "hidden_activation"),
        **_rope_json(config.rope),
        # whole in every published file, and rounded off a little by the powers
        "query_pre_attn_scalar": whole if whole**-0.5 == scale else scale**-2,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        **_windows_json(config),
    }


def _read_gemma2(json: Json) -> DecoderConfig:
    softcaps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    json = {**GEMMA_DEFAULTS, **softcaps, **json}
    return DecoderConfig(**_gemma(json), **_windows(json, (True, False)))


def _read_gemma3(json: Json) -> DecoderConfig:
    json = {**GEMMA_DEFAULTS, **GEMMA3_DEFAULTS, **json}
    every = json.get("sliding_window_pattern", 6)
    base = json.get("rope_local_base_freq", 10_000.0)
    # a scaling in the old form is that of the global layers
    local = {k: v for k, v in json.items() if k not in ("rope_theta", "rope_scaling")}
    bias = json.get("attention_bias", False)
    return DecoderConfig(
        **{**_gemma(json), "rope": _rope(json, base=1_000_000.0)},
        **_windows(json, (True,) * (every - 1) + (False,)),
        local_rope=_rope(local, LOCAL, base),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
    )


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_gemma_json(config),
        "rope_local_base_freq": (config.local_rope or config.rope).base,
        "attention_bias": config.qkv_bias,
    }


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _gemma_json),
    "gemma3_text": Family("Gemma3ForCausalLM", _read_gemma3, _write_gemma3),
}
DECODERS = Kind(Decoder, FAMILIES, decoder_table, DECODER_RULES, OPTIONS, _plain)
