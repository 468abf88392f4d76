"""Writes vision/: tiny random checkpoints of `transformers`, and what it says.

    python tests/models/pretrained/make_vision_fixtures.py

Needs torch and transformers, as make_fixtures.py. Each model has its directory with
config.json and model.safetensors, as transformers writes them, and expected.npz:

    images           [3, height, width, 3]
    logits           in inference mode
    training_logits  in training mode: BatchNorm by the batch, the class head of DeiT
    distillation_logits  of DeiT's other head
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).resolve().parent / "vision"

RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 20,
    "patch_size": 4,
    "initializer_range": 0.25,
}
FIVE = {"num_labels": 5}
# Two labels are what transformers does not write; an eps of 1e-2 is seen in the logits.
MODELS = {
    "resnet_basic": ("ResNet", "", {**RESNET, "layer_type": "basic", **FIVE}),
    "resnet_v15": ("ResNet", "", {**RESNET, "layer_type": "bottleneck", **FIVE}),
    "resnet_v1": ("ResNet", "", {**RESNET, "downsample_in_bottleneck": True}),
    "vit": ("ViT", "", {**VIT, "qkv_bias": False, "layer_norm_eps": 1e-2, **FIVE}),
    "deit": ("DeiT", "WithTeacher", VIT),
}


def main() -> None:
    import torch
    import transformers

    for name, (prefix, suffix, options) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix}Config")(**options)
        kind = getattr(transformers, f"{prefix}ForImageClassification{suffix}")
        model = kind(config).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                # else zeros and ones
                if "norm" in path or path.endswith(("bias", "token", "embeddings")):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            for path, buffer in model.named_buffers():
                if path.endswith("running_mean"):
                    buffer.normal_(std=0.3)
                elif path.endswith("running_var"):
                    buffer.uniform_(0.3, 2.0)
            model.save_pretrained(FIXTURES / name)
            expected = answers(model, options.get("image_size", 33), torch)
        np.savez_compressed(FIXTURES / name / "expected.npz", **expected)
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (FIXTURES / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def answers(model, size: int, torch) -> dict[str, np.ndarray]:
    images = torch.randn(3, 3, size, size)
    found = model(images)
    expected = {"images": images.permute(0, 2, 3, 1), "logits": found.logits}
    if model.config.model_type == "deit":
        expected["training_logits"] = found.cls_logits
        expected["distillation_logits"] = found.distillation_logits
    else:  # after it, the running averages are others
        expected["training_logits"] = model.train()(images).logits
    return {name: x.contiguous().numpy() for name, x in expected.items()}


if __name__ == "__main__":
    main()
