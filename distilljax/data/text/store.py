"""Documents as tokens on disk: encoded once, measured once, read as memory.

A run needs the length of every document before its first batch, so all of them are
encoded first, and there is no reason to do that twice: the tokens are kept on disk,
under a digest of the documents, the tokenizer and the template. Whoever changes one of
them gets another store; whoever moves the files does not.

A store is a folder of plain arrays::

    tokens.bin     uint16, or uint32 for a vocabulary above 65,536
    learnt.bin     uint8, one for each token; conversations only
    offsets.npy    int64 [documents + 1]: where each document begins in them
    hashes.npy     uint64 [documents]: of the text, to split and to compare by
    num_bytes.npy  int64 [documents]: of the text in UTF-8, for bits per byte
    num_learnt.npy int64 [documents]: tokens that are learnt; never the first
    meta.json      what it was made from
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from distilljax._checks import fail
from distilljax.data.text.chat import Chat, ChatTemplate
from distilljax.data.text.documents import (
    Document,
    Documents,
    DocumentsConfig,
    digest,
)
from distilljax.data.text.encoder import Encoder
from distilljax.data.text.files import cache_directory
from distilljax.data.text.progress import Progress, show_progress
from distilljax.data.text.tokenizer import Tokenizer, TokenizerConfig

_FORMAT = 1
# Encoded together, in threads; a tokenizer takes 100 bytes and more for each token.
_DOCUMENTS_AT_ONCE = 1024
_CHARACTERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Tokenized:
    """Documents, how they become tokens, and where those are kept.

    Attributes:
      documents: The documents.
      tokenizer: The tokenizer.
      template: For conversations: the chat template. It writes all special tokens.
      add_eos: End each text as the tokenizer itself does, and with the end-of-sequence
        token if it has one (texts only).
      add_bos: Begin each text as the tokenizer itself does, with nothing or with a
        beginning-of-sequence token (texts only).
      cache_dir: Folder of the tokens; None: $DISTILLJAX_CACHE, or ``distilljax`` in the
        user's cache folder.

    Example:
      >>> from distilljax.data.text.documents import Texts
      >>> from distilljax.data.text.tokenizer import TokenizerJson
      >>> Tokenized(Texts(("Emma",)), TokenizerJson("student")).add_eos
      True
    """

    documents: DocumentsConfig
    tokenizer: TokenizerConfig
    template: ChatTemplate | None = None
    add_eos: bool = True
    add_bos: bool = True
    cache_dir: str | None = None

    def __call__(self, progress: Progress = show_progress) -> TokenStore:
        """Open the tokens; encode the documents first where nobody has yet.

        Of many processes on one machine one encodes, and the others wait.
        """
        documents, tokenizer = self.documents(), self.tokenizer()
        before = tokenizer.prefix if self.add_bos else ()
        after = self.ending(tokenizer)
        if self.template is None and self.add_eos and not after:
            fail(
                "Tokenized",
                "the tokenizer",
                "have an end-of-sequence token where add_eos is True",
                "none",
                'Name it, TokenizerJson(path, eos="</s>"), or pass add_eos=False.',
            )
        encoder = Encoder(tokenizer, self._chat(tokenizer), before, after)
        made_from = {
            "format": _FORMAT,
            "documents": documents.fingerprint,
            "encoder": encoder.fingerprint,
        }
        folder = cache_directory(self.cache_dir) / f"tokens-{digest(made_from)}"
        if not (folder / "meta.json").exists():
            with _lock(folder):
                if not (folder / "meta.json").exists():
                    _build(folder, documents, encoder, made_from, progress)
        return TokenStore(folder, tokenizer)

    def ending(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """What stands behind each text: the tokenizer's own suffix, and its eos."""
        if self.template is not None or not self.add_eos:
            return ()
        suffix, eos = tokenizer.suffix, tokenizer.eos_id
        return suffix if eos is None or eos in suffix else (*suffix, eos)

    def _chat(self, tokenizer: Tokenizer) -> Chat | None:
        if self.template is None:
            return None
        bos, eos = (
            None if token_id is None else tokenizer.token(token_id)
            for token_id in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return self.template(bos=bos, eos=eos)


class TokenStore:
    """Documents as tokens, in a folder that `Tokenized` wrote.

    Attributes:
      folder: Where it lies.
      tokenizer: What wrote it, to read its tokens.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())

    @property
    def fingerprint(self) -> str:
        """Of the documents, the tokenizer and the template."""
        return self.folder.name

    @property
    def is_chat(self) -> bool:
        """True if the documents are conversations."""
        return self.meta["is_chat"]

    @cached_property
    def offsets(self) -> Int64[np.ndarray, " more"]:
        """Where each document begins in all tokens, and where the last one ends."""
        return np.load(self.folder / "offsets.npy")

    @cached_property
    def hashes(self) -> UInt64[np.ndarray, " documents"]:
        """64 bits of the digest of each text."""
        return np.load(self.folder / "hashes.npy")

    @cached_property
    def num_bytes(self) -> Int64[np.ndarray, " documents"]:
        """The length of each text in UTF-8."""
        return np.load(self.folder / "num_bytes.npy")

    @cached_property
    def num_learnt(self) -> Int64[np.ndarray, " documents"]:
        """How many tokens of each document are learnt; its first one never is."""
        return np.load(self.folder / "num_learnt.npy")

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """The number of tokens of each document."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    def tokens(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> Int32[np.ndarray, " tokens"]:
        """Tokens ``start`` to ``stop`` of a document."""
        return self.all_tokens[self._slice(document, start, stop)].astype(np.int32)

    def learnt(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> Bool[np.ndarray, " tokens"]:
        """Which of these tokens are learnt: all of a text."""
        where = self._slice(document, start, stop)
        if self.all_learnt is None:
            return np.ones(where.stop - where.start, bool)
        return self.all_learnt[where].astype(bool)

    def _slice(self, document: int, start: int, stop: int | None) -> slice:
        first, last = self.offsets[document : document + 2].tolist()
        return slice(first + start, last if stop is None else min(first + stop, last))

    @cached_property
    def all_tokens(self) -> np.ndarray:
        """The tokens of all documents in a row, as they are stored."""
        return self._mapped("tokens.bin", self.meta["dtype"])

    @cached_property
    def all_learnt(self) -> np.ndarray | None:
        """Which of them are learnt, as stored; None: all of them, as of texts."""
        return self._mapped("learnt.bin", "uint8") if self.is_chat else None

    def _mapped(self, name: str, dtype: str) -> np.ndarray:
        count = int(self.offsets[-1])
        stored = (self.folder / name).stat().st_size
        if stored != count * np.dtype(dtype).itemsize:
            fail(
                "Tokenized",
                str(self.folder / name),
                f"have {count * np.dtype(dtype).itemsize} bytes",
                stored,
                "It is damaged: remove the folder, and it is made again.",
            )
        if count == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        # a view: indexing what numpy calls a memmap takes several times as long
        mapped = np.memmap(self.folder / name, dtype, mode="r", shape=(count,))
        return mapped.view(np.ndarray)

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes map the files themselves."""
        return {k: self.__dict__[k] for k in ("folder", "tokenizer", "meta")}


def _build(
    folder: Path,
    documents: Documents,
    encoder: Encoder,
    made_from: dict[str, Any],
    progress: Progress,
) -> None:
    """Encode all documents; the folder appears when it is complete."""
    if len(documents) == 0:
        fail(
            "Tokenized",
            "documents",
            "have at least one document",
            0,
            "Check the paths, and that the files are not empty.",
        )
    partial = folder.with_name(f".{folder.name}.incomplete-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = "uint16" if encoder.tokenizer.vocab_size <= 2**16 else "uint32"
    try:
        columns = _write_tokens(partial, documents, encoder, dtype, progress)
        lengths = columns.pop("lengths")
        columns["offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        for name, column in columns.items():
            np.save(partial / f"{name}.npy", column)
        meta = {"dtype": dtype, "is_chat": encoder.chat is not None, **made_from}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tokens(
    folder: Path,
    documents: Documents,
    encoder: Encoder,
    dtype: str,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """The tokens to their files; what is known of each document as columns."""
    lengths, hashes, num_bytes, num_learnt = (array(kind) for kind in "qQqq")
    with contextlib.ExitStack() as stack:
        tokens = stack.enter_context((folder / "tokens.bin").open("wb"))
        mask = None
        if encoder.chat is not None:
            mask = stack.enter_context((folder / "learnt.bin").open("wb"))
        advance = stack.enter_context(progress("tokenizing", len(documents)))
        for first, some in _read(documents):
            for text, ids, is_learnt in encoder(some, first, documents.where):
                data = text.encode()
                num_bytes.append(len(data))
                small = hashlib.blake2b(data, digest_size=8).digest()
                hashes.append(int.from_bytes(small, "little"))
                lengths.append(len(ids))
                tokens.write(ids.astype(dtype).tobytes())
                if mask is None:
                    num_learnt.append(max(len(ids) - 1, 0))
                else:
                    num_learnt.append(int(is_learnt[1:].sum()))
                    mask.write(is_learnt.astype(np.uint8).tobytes())
            advance(first + len(some))
    return {
        "lengths": np.array(lengths, np.int64),
        "hashes": np.array(hashes, np.uint64),
        "num_bytes": np.array(num_bytes, np.int64),
        "num_learnt": np.array(num_learnt, np.int64),
    }


def _read(documents: Documents) -> Iterator[tuple[int, list[Document]]]:
    """Some documents at a time, and the number of the first of them."""
    some: list[Document] = []
    first, size = 0, 0
    for index in range(len(documents)):
        document = documents[index]
        some.append(document)
        size += len(document) if isinstance(document, str) else len(str(document))
        last = index + 1 == len(documents)
        if last or len(some) == _DOCUMENTS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield first, some
            first, some, size = index + 1, [], 0


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time encodes; the system frees the lock of one that dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        fail(
            "Tokenized",
            "cache_dir",
            "be a folder that can be written",
            f"{folder.parent} ({error.strerror})",
            "Choose another one, or set DISTILLJAX_CACHE.",
        )
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
