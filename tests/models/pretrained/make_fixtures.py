"""Writes the fixtures: tiny random checkpoints of `transformers`, and what it says.

    python tests/models/pretrained/make_fixtures.py

Needs torch and transformers, in an environment of their own; fixtures/versions.json
says of which versions the committed ones are. Each family has its directory with
config.json and model.safetensors, as transformers writes them, and expected.npz:

    tokens         [2, 24]
    logits         of each row, in full
    left_logits    of the batch whose row 1 has 9 tokens of padding on the left
    packed_logits  [24] of row 0 up to 10 and of row 1 up to 14, run one by one
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).resolve().parent / "fixtures"
LENGTH, PADDING, FIRST = 24, 9, 10

SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# What each family has beyond the sizes: all that the decoder has a field for.
FAMILIES = {
    "llama": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 100.0}),
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm": ("Llama", {"tie_word_embeddings": True, "rope_theta": 100_000.0}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "rope_theta": 1_000_000.0}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 7,
            "hidden_size": 16,
            "intermediate_size": 24,
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    ),
}


def main() -> None:
    import torch
    import transformers

    for name, (prefix, options) in FAMILIES.items():
        torch.manual_seed(0)
        kind = "Gemma3Text" if prefix == "Gemma3" else prefix
        config = getattr(transformers, f"{kind}Config")(
            **{**SIZES, **options}, attn_implementation="eager"
        )
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "norm" in path or path.endswith("bias"):  # else ones and zeros
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            expected = answers(model, torch)
        directory = FIXTURES / name
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(directory / "expected.npz", **expected)
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (FIXTURES / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def answers(model, torch) -> dict[str, np.ndarray]:
    tokens = torch.randint(0, SIZES["vocab_size"], (2, LENGTH))
    mask = torch.ones_like(tokens)
    mask[1, :PADDING] = 0
    positions = torch.clamp(torch.cumsum(mask, dim=1) - 1, min=0)
    left = model(tokens, attention_mask=mask, position_ids=positions).logits
    rest = LENGTH - FIRST
    packed = [
        model(tokens[i : i + 1, :end]).logits[0] for i, end in ((0, FIRST), (1, rest))
    ]
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": model(tokens).logits.numpy(),
        "left_logits": left.numpy(),
        "packed_logits": torch.cat(packed).numpy(),
    }


if __name__ == "__main__":
    main()
