"""The bytes of a text as its tokens: a tokenizer that needs no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from distilljax.data.text.tokenizer import Encoded, Tokenizer

_END = 256


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes, 0 to 255, and 256 for the end of a text.

    For tests, for small models, and for texts in whatever script.

    Example:
      >>> tokenizer = ByteTokenizer()()
      >>> tokenizer.encode(["né"])[0].ids.tolist(), tokenizer.decode([110, 195, 169])
      ([110, 195, 169], 'né')

    Reference: Xue et al., "ByT5: Towards a token-free future with pre-trained
    byte-to-byte models", TACL 2022, arXiv 2105.13626.
    """

    def __call__(self) -> Tokenizer:
        """The tokenizer."""
        return _Bytes()


class _Bytes:
    vocab_size = 257
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = _END
    fingerprint = "bytes"

    def encode(
        self, texts: Sequence[str], *, with_starts: bool = False
    ) -> list[Encoded]:
        found = []
        for text in texts:
            ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
            starts = None
            if with_starts:
                # a byte that continues a character begins where that one does
                starts = np.cumsum((ids & 0xC0) != 0x80, dtype=np.int32) - 1
            found.append(Encoded(ids, starts))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """What is no UTF-8 becomes U+FFFD; the end of a text is not written."""
        return bytes(i for i in ids if i < _END).decode(errors="replace")

    def token(self, token_id: int) -> str:
        return "</s>" if token_id == _END else f"<0x{token_id:02X}>"

    def num_bytes(self) -> Int32[np.ndarray, " vocab"]:
        return (np.arange(self.vocab_size) < _END).astype(np.int32)
