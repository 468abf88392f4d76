"""Models, or their tokenizers alone, by their name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from distilljax._checks import fail

# Of a repository that may hold the weights in several formats.
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "*.jinja")
MODEL = ("*.json", "*.safetensors", *TOKENIZER)


def fetch(function: str, name: str, patterns: Sequence[str] = MODEL) -> Path:
    """The directory into which a model of the hub was fetched, or was before.

    Args:
      function: Who asks, for messages.
      name: "owner/name".
      patterns: Which of its files.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        fail(
            function,
            "the path",
            "exist, or be owner/name on the hub",
            repr(name),
            "Check the path.",
        )
    try:
        import huggingface_hub
    except ImportError:
        fail(
            function,
            "the path",
            "exist where huggingface_hub is not installed",
            repr(name),
            "pip install huggingface_hub, or fetch the directory otherwise.",
        )
    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=list(patterns))
    except (OSError, ValueError) as error:  # of the network, of a name, of a licence
        first = str(error).strip().partition("\n")[0]
        fail(
            function,
            "the path",
            "exist, or be a model that can be fetched from the hub",
            f"{name!r} ({type(error).__name__}: {first})",
            "Check the name, the network, and whether its licence was accepted (hf "
            "auth login), or fetch the directory otherwise.",
        )
    return Path(found)
