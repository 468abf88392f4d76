"""Writes the fixtures of encoders, as make_fixtures.py does those of decoders.

    python tests/models/pretrained/make_encoder_fixtures.py

Needs torch and transformers, in an environment of their own; encoders/versions.json
says of which versions the committed ones are. Three files of BERT, one without prefix
and with a pooler, two with the prefix, of which one has no pooler. expected.npz has

    tokens, types    [2, 24]
    last_hidden      of each row, in full
    pooled           the same, of the model with a pooler
    logits           the same, of the classifier
    padded_hidden    of the batch whose row 1 ends in 9 tokens of padding
    padded_logits    the same
    packed_hidden    [24] of row 0 up to 10 and of row 1 up to 14, run one by one
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).resolve().parent / "encoders"
LENGTH, PADDING, FIRST = 24, 9, 10
SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.25,
}
MODELS = {
    "bert": ("BertModel", {}),
    "bert_classifier": ("BertForSequenceClassification", {"num_labels": 5}),
    "bert_masked": ("BertForMaskedLM", {"hidden_act": "gelu_new"}),
}


def main() -> None:
    import torch
    import transformers

    for name, (kind, options) in MODELS.items():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            **SIZES, **options, attn_implementation="eager"
        )
        model = getattr(transformers, kind)(config).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "LayerNorm" in path or path.endswith("bias"):  # else ones and zeros
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            expected = answers(model, torch)
        model.save_pretrained(FIXTURES / name)
        (FIXTURES / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(FIXTURES / name / "expected.npz", **expected)
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (FIXTURES / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def answers(model, torch) -> dict[str, np.ndarray]:
    tokens = torch.randint(0, SIZES["vocab_size"], (2, LENGTH))
    types = torch.randint(0, 2, (2, LENGTH))
    mask = torch.ones_like(tokens)
    mask[1, -PADDING:] = 0
    bert = getattr(model, "bert", model)
    full = bert(tokens, token_type_ids=types)
    rest = LENGTH - FIRST
    packed = [
        bert(tokens[i : i + 1, :end]).last_hidden_state[0]
        for i, end in ((0, FIRST), (1, rest))
    ]
    found = {
        "tokens": tokens.int(),
        "types": types.int(),
        "last_hidden": full.last_hidden_state,
        "padded_hidden": bert(tokens, attention_mask=mask).last_hidden_state,
        "packed_hidden": torch.cat(packed),
    }
    if full.pooler_output is not None:
        found["pooled"] = full.pooler_output
    if hasattr(model, "classifier"):
        found["logits"] = model(tokens, token_type_ids=types).logits
        found["padded_logits"] = model(tokens, attention_mask=mask).logits
    return {name: x.numpy() for name, x in found.items()}


if __name__ == "__main__":
    main()
