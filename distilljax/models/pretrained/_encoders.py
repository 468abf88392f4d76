"""Encoders in config.json: BERT, and what is built on it.

Any of them is read as the encoder itself; of BertForSequenceClassification the head is
read too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flax import nnx

from distilljax._checks import fail
from distilljax.models.encoder import (
    ENCODER_RULES,
    Encoder,
    EncoderConfig,
    exact_gelu,
)
from distilljax.models.pooling import first_token
from distilljax.models.pretrained._kinds import Family, Json, Kind
from distilljax.models.pretrained._tables import encoder_table

CLASSIFIER = "BertForSequenceClassification"
OPTIONS = ("scan", "remat", "attention", "compute_dtype", "pooler")
ACTIVATIONS = {"gelu": exact_gelu, "gelu_new": nnx.gelu, "relu": nnx.relu}


def _read(json: Json) -> EncoderConfig:
    for key, known in (
        ("hidden_act", tuple(ACTIVATIONS)),
        ("position_embedding_type", ("absolute",)),
        ("is_decoder", (False,)),
    ):
        if (value := json.get(key, known[0])) not in known:
            fail(
                "load_pretrained",
                key,
                f"be one of {', '.join(map(str, known))}",
                repr(value),
                "Other variants of BERT are not built.",
            )
    classifies = CLASSIFIER in json.get("architectures", ())
    return EncoderConfig(
        vocab_size=json["vocab_size"],
        width=json["hidden_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=json["num_attention_heads"],
        ffn_width=json["intermediate_size"],
        max_length=json["max_position_embeddings"],
        num_types=json.get("type_vocab_size", 2),
        activation=ACTIVATIONS[json.get("hidden_act", "gelu")],
        norm_eps=json.get("layer_norm_eps", 1e-12),
        pool=first_token,
        pooler=classifies,
        num_classes=_num_classes(json) if classifies else None,
    )


def _num_classes(json: Json) -> int:
    # two labels are the default of transformers, and left out of files
    return len(json["id2label"]) if "id2label" in json else json.get("num_labels", 2)


def _write(config: EncoderConfig) -> dict[str, Any]:
    names = {function: name for name, function in ACTIVATIONS.items()}
    json = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.num_types,
        "hidden_act": names.get(config.activation, "gelu"),
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "absolute",
    }
    if config.num_classes:
        labels = [f"LABEL_{i}" for i in range(config.num_classes)]
        json["architectures"] = [CLASSIFIER]
        json["id2label"] = {str(i): name for i, name in enumerate(labels)}
        json["label2id"] = {name: i for i, name in enumerate(labels)}
    return json


def _plain(config: EncoderConfig) -> EncoderConfig:
    """The same model, said in one way; what is pooled matters to a head alone."""
    fresh = EncoderConfig(1, 1, 1, 1, 1)
    run = ("scan", "remat", "attention", "compute_dtype", "param_dtype")
    config = replace(config, **{name: getattr(fresh, name) for name in run})
    if config.num_classes is None:
        config = replace(config, pool=first_token, pooler=False)
    return config


ENCODERS = Kind(
    Encoder,
    {"bert": Family("BertModel", _read, _write)},
    encoder_table,
    ENCODER_RULES,
    OPTIONS,
    _plain,
)
