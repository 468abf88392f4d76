"""The tokenizer inside a GGUF file: of byte pairs, as GPT-2's, Llama 3's and Qwen's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilljax._checks import fail
from distilljax.data.text.tokenizer import FastTokenizer, Tokenizer

# How a text is cut before pairs are merged, by the name that llama.cpp gives it; the
# patterns are those of the models' own tokenizer.json.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2(parts: Any) -> Any:
    return parts.ByteLevel(add_prefix_space=False)


def _smollm(parts: Any) -> Any:
    return parts.Sequence([parts.Digits(individual_digits=True), _gpt2(parts)])


def _by_pattern(pattern: str) -> Callable[[Any], Any]:
    def make(parts: Any) -> Any:
        from tokenizers import Regex  # heavy

        cut = parts.Split(Regex(pattern), behavior="isolated", invert=False)
        bare = parts.ByteLevel(add_prefix_space=False, use_regex=False)
        return parts.Sequence([cut, bare])

    return make


_PRE_TOKENIZERS: dict[str, Callable[[Any], Any]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _by_pattern(_LLAMA_3),
    "qwen2": _by_pattern(_QWEN_2),
}
# Types of tokens in GGUF.
_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer of a GGUF file, as the model that lies beside it in the file needs.

    Attributes:
      path: The file.
      bos: Token before a text; None: as the file says (`tokenizer.ggml.add_bos_token`),
        and where it says nothing, as llama.cpp does: with Llama 3's alone.
      eos: Token after a text; None: the end-of-sequence token of the file.

    Raises:
      ValueError: The file is none, or its tokenizer is not of byte pairs, or cuts
        texts in a way that is not known here.

    Example:
      >>> GgufTokenizer("SmolLM2-135M-Instruct.Q4_1.gguf").bos    # opens nothing
    """

    path: str
    bos: str | None = None
    eos: str | None = None

    def __call__(self) -> Tokenizer:
        """Load the tokenizer."""
        import gguf  # heavy
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        path = Path(self.path)
        if not path.is_file():
            remedy = "Name a GGUF file with a tokenizer."
            fail("GgufTokenizer", "path", "be a file that exists", str(path), remedy)
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            remedy = "Copy it again."
            fail("GgufTokenizer", "path", "be a whole GGUF file", error, remedy)

        def read(name: str) -> Any:
            field = reader.get_field(f"tokenizer.{name}")
            return None if field is None else field.contents()

        kind, cut = read("ggml.model"), read("ggml.pre")
        if kind != "gpt2" or cut not in _PRE_TOKENIZERS:
            fail(
                "GgufTokenizer",
                str(path),
                f"have a tokenizer of byte pairs cut as {', '.join(_PRE_TOKENIZERS)}",
                f"{kind!r} cut as {cut!r}",
                "Read the tokenizer.json or .model file of the original model instead.",
            )
        tokens, merges = read("ggml.tokens"), read("ggml.merges")
        types = read("ggml.token_type") or []
        vocab = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ")) for merge in merges]
        # as llama.cpp reads files that do not say it: a word of Llama 3's vocabulary is
        # one token whatever its merges are, and a text has a beginning
        is_llama_3 = cut == "llama-bpe"
        bpe = models.BPE(vocab, pairs, ignore_merges=is_llama_3)
        made = tokenizers.Tokenizer(bpe)
        made.pre_tokenizer = _PRE_TOKENIZERS[cut](pre_tokenizers)
        made.decoder = decoders.ByteLevel()
        named = list(zip(tokens, types, strict=False))
        made.add_special_tokens([t for t, kind in named if kind == _CONTROL])
        made.add_tokens([t for t, kind in named if kind == _USER_DEFINED])

        def token(name: str) -> str | None:
            found = read(f"ggml.{name}_token_id")
            return None if found is None else tokens[found]

        begins = read("ggml.add_bos_token")
        begins = is_llama_3 if begins is None else begins
        before = token("bos") if begins else None
        special = {"bos": self.bos or before, "eos": self.eos or token("eos")}
        parts = [tokens, merges, types, cut, *(["whole words"] if is_llama_3 else [])]
        digest = hashlib.sha256(json.dumps(parts).encode())
        return FastTokenizer(made, special, digest.hexdigest(), path, begins=True)
