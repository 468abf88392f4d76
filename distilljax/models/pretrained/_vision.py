"""Models of images in config.json: ResNet, ViT and DeiT."""

from __future__ import annotations

from typing import Any

from distilljax._checks import fail
from distilljax.models.pretrained._kinds import Family, Json, Kind
from distilljax.models.pretrained._tables import resnet_table, vit_table
from distilljax.models.resnet import ResNet, ResNetConfig
from distilljax.models.vit import VIT_RULES, ViT, ViTConfig


def _require(json: Json, key: str, value: Any) -> None:
    """What has a field in transformers, and none here."""
    if json.get(key, value) != value:
        fail(
            "load_pretrained",
            key,
            f"be {value!r}",
            repr(json[key]),
            "Other variants are not built.",
        )


def _num_classes(json: Json) -> int:
    # two labels are the default of transformers, and left out of files
    return len(json["id2label"]) if "id2label" in json else json.get("num_labels", 2)


def _labels_json(num_classes: int) -> dict[str, Any]:
    names = [f"LABEL_{i}" for i in range(num_classes)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _read_resnet(json: Json) -> ResNetConfig:
    _require(json, "hidden_act", "relu")
    _require(json, "downsample_in_first_stage", False)
    return ResNetConfig(
        num_classes=_num_classes(json),
        depths=tuple(json["depths"]),
        widths=tuple(json["hidden_sizes"]),
        bottleneck=json["layer_type"] == "bottleneck",
        stem_width=json["embedding_size"],
        stride_first=json.get("downsample_in_bottleneck", False),
        in_channels=json["num_channels"],
    )


def _write_resnet(config: ResNetConfig) -> dict[str, Any]:
    return {
        "depths": list(config.depths),
        "hidden_sizes": list(config.widths),
        "layer_type": "bottleneck" if config.bottleneck else "basic",
        "embedding_size": config.stem_width,
        "downsample_in_bottleneck": config.stride_first,
        "downsample_in_first_stage": False,
        "num_channels": config.in_channels,
        "hidden_act": "relu",
        **_labels_json(config.num_classes),
    }


def _read_vit(json: Json) -> ViTConfig:
    _require(json, "hidden_act", "gelu")
    return ViTConfig(
        num_classes=_num_classes(json),
        image_size=_square(json, "image_size"),
        patch_size=_square(json, "patch_size"),
        width=json["hidden_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=json["num_attention_heads"],
        ffn_width=json["intermediate_size"],
        distilled=json["model_type"] == "deit",
        qkv_bias=json.get("qkv_bias", True),
        norm_eps=json["layer_norm_eps"],
        in_channels=json["num_channels"],
    )


def _square(json: Json, key: str) -> int:
    size = json[key]
    if isinstance(size, int):
        return size
    height, width = size
    if height != width:
        fail(
            "load_pretrained",
            key,
            "be as high as it is wide",
            size,
            "Other variants are not built.",
        )
    return height


def _write_vit(config: ViTConfig) -> dict[str, Any]:
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_width,
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "num_channels": config.in_channels,
        "hidden_act": "gelu",
        **_labels_json(config.num_classes),
    }


RESNETS = Kind(
    ResNet,
    {"resnet": Family("ResNetForImageClassification", _read_resnet, _write_resnet)},
    resnet_table,
)
VITS = Kind(
    ViT,
    {
        "vit": Family("ViTForImageClassification", _read_vit, _write_vit),
        "deit": Family("DeiTForImageClassificationWithTeacher", _read_vit, _write_vit),
    },
    vit_table,
    VIT_RULES,
)
