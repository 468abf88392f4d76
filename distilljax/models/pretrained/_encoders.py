"""Which encoder a config.json of BERT describes, and the one that describes an encoder.

The family is `bert`: BertModel and what is built on it. A file of any of them is read
as the encoder itself; of BertForSequenceClassification its head is read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from distilljax._checks import fail
from distilljax.models.encoder import EncoderConfig, exact_gelu
from distilljax.models.pooling import first_token

BERT = "bert"
CLASSIFIER = "BertForSequenceClassification"
ACTIVATIONS = {
    "gelu": exact_gelu,
    "gelu_new": nnx.gelu,
    "relu": nnx.relu,
}


def encoder_config(json: Mapping[str, Any], where: str) -> EncoderConfig:
    """The encoder that a config.json describes."""
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
                f"{value!r} in {where}",
                "Other variants of BERT are not built.",
            )
    try:
        config = EncoderConfig(
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
            pooler=CLASSIFIER in json.get("architectures", ()),
            num_classes=_num_classes(json),
        )
    except KeyError as error:
        fail(
            "load_pretrained",
            where,
            f"have the key {error}",
            sorted(json),
            "A BERT cannot be built without it.",
        )
    return config


def _num_classes(json: Mapping[str, Any]) -> int | None:
    if CLASSIFIER not in json.get("architectures", ()):
        return None
    return len(json["id2label"]) if "id2label" in json else json.get("num_labels", 2)


def encoder_json(config: EncoderConfig) -> dict[str, Any]:
    """The config.json that describes an encoder."""
    names = {function: name for name, function in ACTIVATIONS.items()}
    classes = config.num_classes
    cannot = None
    if config.activation not in names:
        cannot = "the activation"
    elif classes and not (config.pooler and config.pool is first_token):
        cannot = "a head without first_token and the pooler before it"
    if cannot:
        fail(
            "save_pretrained",
            "the encoder",
            "be what a BERT of transformers can be",
            cannot,
            "Save it with distilljax.checkpoints, or save the encoder without head.",
        )
    json = {
        "architectures": [CLASSIFIER if classes else "BertModel"],
        "model_type": BERT,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.num_types,
        "hidden_act": names[config.activation],
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "absolute",
    }
    if classes:
        labels = {str(i): f"LABEL_{i}" for i in range(classes)}
        json["id2label"] = labels
        json["label2id"] = {name: int(i) for i, name in labels.items()}
    return json
