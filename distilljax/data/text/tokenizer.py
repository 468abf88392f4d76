"""Tokenizers: from texts to integers and back, behind one small protocol."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from distilljax._checks import check_type, fail
from distilljax._hub import TOKENIZER, fetch


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text as tokens.

    Attributes:
      ids: The tokens.
      starts: At which character of the text each begins; None if nobody asked.
    """

    ids: Int32[np.ndarray, " tokens"]
    starts: Int32[np.ndarray, " tokens"] | None = None


@runtime_checkable
class Tokenizer(Protocol):
    """What reads and writes the tokens of a model.

    ``prefix`` and ``suffix`` are what the tokenizer itself puts around a text:
    (bos_id,) and () for Llama, [CLS] and [SEP] for BERT. ``encode`` adds nothing.
    """

    vocab_size: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    fingerprint: str

    def encode(
        self, texts: Sequence[str], *, with_starts: bool = False
    ) -> list[Encoded]:
        """The tokens of several texts, with nothing added to them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones included."""
        ...

    def token(self, token_id: int) -> str:
        """How a token is written: "</s>", say."""
        ...

    def num_bytes(self) -> Int32[np.ndarray, " vocab"]:
        """How many bytes of text each token stands for; special ones stand for none."""
        ...


@runtime_checkable
class TokenizerConfig(Protocol):
    """A frozen dataclass that says where a tokenizer is, and loads it when called."""

    def __call__(self) -> Tokenizer:
        """Load the tokenizer."""
        ...


@dataclass(frozen=True)
class TokenizerJson:
    """The ``tokenizer.json`` of a model, as Hugging Face's `tokenizers` reads it.

    Attributes:
      path: The file, or a folder that has it, or the name of a model on the Hugging
        Face hub, "owner/name". Names of special tokens are read from the
        ``tokenizer_config.json`` beside it, if there is one.
      bos: Token before a text; None: as the files say.
      eos: Token after a text; None: as the files say.

    Example:
      >>> TokenizerJson("checkpoints/student").path    # a config opens nothing
      'checkpoints/student'
    """

    path: str
    bos: str | None = None
    eos: str | None = None

    def __call__(self) -> Tokenizer:
        """Load the tokenizer; it neither cuts nor pads."""
        import tokenizers  # heavy

        path = Path(self.path)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.path) and not path.exists():
            path = fetch("TokenizerJson", self.path, TOKENIZER)
        if path.is_dir():
            path = path / "tokenizer.json"
        data = _read("TokenizerJson", path)
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except ValueError as error:
            fail(
                "TokenizerJson",
                "path",
                "be a whole tokenizer.json",
                f"{path} ({error})",
                "Copy it again from the model; .model files are read by SentencePiece.",
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        special = _special_tokens(path.with_name("tokenizer_config.json"))
        names = {"bos": special.get("bos_token"), "eos": special.get("eos_token")}
        chosen = {"bos": self.bos, "eos": self.eos}
        names |= {name: token for name, token in chosen.items() if token is not None}
        digest = hashlib.sha256(data).hexdigest()
        return FastTokenizer(
            tokenizer, names, digest, path, begins=self.bos is not None
        )


class FastTokenizer:
    """A `Tokenizer` of the package `tokenizers`.

    Args:
      tokenizer: A `tokenizers.Tokenizer`.
      special: How the tokens that begin ("bos") and end ("eos") are written; None for
        none.
      digest: Of the file that it was read from.
      path: The file, for messages.
      begins: Put bos before a text even if the file does not say so.
    """

    def __init__(
        self,
        tokenizer: Any,
        special: Mapping[str, str | None],
        digest: str,
        path: Path,
        *,
        begins: bool = False,
    ):
        self._tokenizer = tokenizer
        ids: dict[str, int | None] = {"bos": None, "eos": None}
        for name, token in special.items():
            ids[name] = None if token is None else tokenizer.token_to_id(token)
            if token is not None and ids[name] is None:
                fail(
                    "TokenizerJson" if path.suffix == ".json" else "GgufTokenizer",
                    name,
                    f"be a token of {path}",
                    repr(token),
                    "Special tokens are listed in the file.",
                )
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        self.fingerprint = f"{digest}:{self.bos_id}:{self.eos_id}"
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        bare = tokenizer.encode("a", add_special_tokens=False).ids
        whole = tokenizer.encode("a", add_special_tokens=True).ids
        before = 0
        while whole[before : before + len(bare)] != bare:
            before += 1
        self.prefix = tuple(whole[:before])
        if begins and self.bos_id is not None and self.bos_id not in self.prefix:
            self.prefix = (self.bos_id, *self.prefix)
        self.suffix = tuple(whole[before + len(bare) :])

    def encode(
        self, texts: Sequence[str], *, with_starts: bool = False
    ) -> list[Encoded]:
        """The tokens of several texts, with nothing added to them."""
        encode = self._tokenizer.encode_batch
        if not with_starts:
            encode = self._tokenizer.encode_batch_fast  # computes no offsets
        found = []
        for one in encode(list(texts), add_special_tokens=False):
            starts = None
            if with_starts:
                starts = np.array([a for a, _ in one.offsets], np.int32)
            found.append(Encoded(np.array(one.ids, np.int32), starts))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """How a token is written."""
        return self._tokenizer.id_to_token(token_id)

    def num_bytes(self) -> Int32[np.ndarray, " vocab"]:
        """How many bytes of text each token stands for; special ones stand for none."""
        added = self._tokenizer.get_added_tokens_decoder()
        decoder = json.loads(self._tokenizer.to_str())["decoder"]
        # each of its letters stands for one byte
        of_bytes = '"ByteLevel"' in json.dumps(decoder)
        found = np.zeros(self.vocab_size, np.int32)
        for token, i in self._tokenizer.get_vocab().items():
            if i in added:  # written as it is, like a run of spaces, or no text at all
                found[i] = 0 if added[i].special else len(added[i].content.encode())
            else:
                found[i] = len(token) if of_bytes else _num_bytes(token)
        return found


@dataclass(frozen=True)
class SentencePiece:
    """A ``.model`` file of SentencePiece, as Llama 2, Gemma and T5 have it.

    Control symbols in a text, such as ``<s>``, are letters to it: only symbols that the
    model calls user-defined become one token, which is how Gemma's turns are made. The
    beginning and the end of a sequence that a chat template writes are tokens all the
    same, and what lies between them is encoded by itself, as Llama 2 does it.

    Attributes:
      path: The file.

    Example:
      >>> SentencePiece("gemma/tokenizer.model").path    # a config opens nothing
      'gemma/tokenizer.model'

    Reference: Kudo, Richardson, "SentencePiece: A simple and language independent
    subword tokenizer and detokenizer for neural text processing", EMNLP 2018.
    """

    path: str

    def __call__(self) -> Tokenizer:
        """Load the model."""
        import sentencepiece  # heavy

        data = _read("SentencePiece", Path(self.path))
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
        except RuntimeError as error:
            fail(
                "SentencePiece",
                "path",
                "be a whole SentencePiece model",
                f"{self.path} ({error})",
                "Copy it again from the model; tokenizer.json is read by "
                "TokenizerJson.",
            )
        return _SentencePieceModel(processor, hashlib.sha256(data).hexdigest())


class _SentencePieceModel:
    def __init__(self, processor: Any, digest: str):
        self._processor = processor
        self.fingerprint = digest
        self.vocab_size = processor.get_piece_size()
        self.bos_id, self.eos_id = (
            None if found < 0 else found
            for found in (processor.bos_id(), processor.eos_id())
        )
        self.prefix = () if self.bos_id is None else (self.bos_id,)
        self.suffix = ()

    def encode(
        self, texts: Sequence[str], *, with_starts: bool = False
    ) -> list[Encoded]:
        if not with_starts:
            found = self._processor.encode(list(texts), return_type=int)
            return [Encoded(np.array(ids, np.int32)) for ids in found]
        found = self._processor.encode(list(texts), return_type="offset_mapping")
        return [
            Encoded(
                np.array(one["ids"], np.int32),
                np.array([start for start, _ in one["offsets"]], np.int32),
            )
            for one in found
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(map(int, ids)))

    def token(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def num_bytes(self) -> Int32[np.ndarray, " vocab"]:
        processor = self._processor
        return np.array(
            [
                0 if processor.is_control(i) else _num_bytes(processor.id_to_piece(i))
                for i in range(self.vocab_size)
            ],
            np.int32,
        )


def _num_bytes(token: str) -> int:
    """Bytes of the text that a token of SentencePiece or WordPiece stands for."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode())


def check_vocabulary(tokenizer: Any, num_classes: int) -> int:
    """Every token of a tokenizer is a class of the model; returns how many are left.

    A model may have more classes than its tokenizer has tokens: vocabularies are padded
    to a multiple that suits the hardware. The other way round some text has no class.

    Args:
      tokenizer: The tokenizer, or whatever has a ``vocab_size``.
      num_classes: The vocabulary of the model: the width of its logits.

    Example:
      >>> from types import SimpleNamespace
      >>> check_vocabulary(SimpleNamespace(vocab_size=151_665), 151_936)
      271
    """
    if tokenizer.vocab_size > num_classes:
        fail(
            "check_vocabulary",
            "the tokenizer",
            f"have at most as many tokens as the model has classes, {num_classes}",
            tokenizer.vocab_size,
            "Use the tokenizer that belongs to the model, or a wider model.",
        )
    return num_classes - tokenizer.vocab_size


def _read(function: str, path: Path) -> bytes:
    if not path.is_file():
        fail(
            function,
            "path",
            "be a file that exists",
            str(path),
            "It lies in the folder of the model.",
        )
    return path.read_bytes()


def _special_tokens(path: Path) -> dict[str, str]:
    """The names of special tokens in a ``tokenizer_config.json``, if there is one."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        fail("TokenizerJson", str(path), "be JSON", error, "Copy it again.")
    check_type("TokenizerJson", str(path), found, dict, "Copy it again.")
    tokens = {}
    for name in ("bos_token", "eos_token"):
        token = found.get(name)
        # an added token with its flags, or its text alone
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            tokens[name] = token
    return tokens
