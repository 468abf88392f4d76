"""Models by their name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from distilljax._checks import fail

# Of a repository that may hold the weights in several formats.
PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def fetch(name: str) -> Path:
    """The directory into which a model of the hub was fetched, or was before."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        fail(
            "load_pretrained",
            "path_or_id",
            "be a path that exists, or owner/name on the hub",
            repr(name),
            "Check the path.",
        )
    try:
        import huggingface_hub
    except ImportError:
        fail(
            "load_pretrained",
            "path_or_id",
            "be a path that exists where huggingface_hub is not installed",
            repr(name),
            "pip install huggingface_hub, or fetch the directory otherwise.",
        )
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS))
