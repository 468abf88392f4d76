"""From documents to tokens, and to which of them are learnt."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from distilljax._checks import fail
from distilljax.data.text.chat import Chat
from distilljax.data.text.documents import Document, digest
from distilljax.data.text.tokenizer import Encoded, Tokenizer


@dataclass(frozen=True)
class Encoder:
    """From documents to tokens, and to what is learnt of them."""

    tokenizer: Tokenizer
    chat: Chat | None
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer, the template and the rest."""
        chat = None if self.chat is None else self.chat.fingerprint
        apart = [self._apart] if self._apart else []
        return digest(self.tokenizer.fingerprint, chat, self.before, self.after, *apart)

    @cached_property
    def _apart(self) -> dict[str, int]:
        """What a template writes for bos and eos, and the tokenizer reads as letters.

        A ``tokenizer.json`` finds its special tokens in a text by itself.
        """
        ids = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        if self.chat is None:
            return {}
        written = {self.tokenizer.token(i): i for i in ids if i is not None}
        found = self.tokenizer.encode(list(written))
        return {
            token: i
            for (token, i), encoded in zip(written.items(), found, strict=True)
            if encoded.ids.tolist() != [i]
        }

    def __call__(
        self, some: list[Document], first: int, where: Callable[[int], str]
    ) -> Iterator[tuple[str, Int32[np.ndarray, " tokens"], Any]]:
        """Of each document its text, its tokens, and which of them are learnt."""
        numbered = list(enumerate(some, first))
        if self.chat is None:
            texts = [self._text(document, i, where) for i, document in numbered]
            for text, encoded in zip(texts, self.tokenizer.encode(texts), strict=True):
                # what has no text has no tokens, special ones included
                ids = encoded.ids[:0]
                if text.strip():
                    ids = np.concatenate([self.before, encoded.ids, self.after])
                yield text, ids.astype(np.int32), None
            return
        chat = self.chat
        rendered = [
            self._rendered(chat, document, i, where) for i, document in numbered
        ]
        found = self._with_starts([one.text for one in rendered])
        for one, encoded in zip(rendered, found, strict=True):
            yield one.text, encoded.ids, learnt(encoded.starts, one.spans)

    def _with_starts(self, texts: list[str]) -> list[Encoded]:
        """The tokens of rendered conversations, special ones among them."""
        if not self._apart:
            return self.tokenizer.encode(texts, with_starts=True)
        written = re.compile(f"({'|'.join(map(re.escape, self._apart))})")
        cut = [written.split(text) for text in texts]
        others = [part for parts in cut for part in parts if part not in self._apart]
        encoded = iter(self.tokenizer.encode(others, with_starts=True))
        found = []
        for parts in cut:
            begins = itertools.accumulate(map(len, parts), initial=0)
            ids, starts = [], []
            for part, begin in zip(parts, begins, strict=False):
                if part in self._apart:
                    ids.append(np.array([self._apart[part]], np.int32))
                    starts.append(np.array([begin], np.int32))
                else:
                    one: Any = next(encoded)
                    ids.append(one.ids)
                    starts.append(one.starts + np.int32(begin))
            found.append(Encoded(np.concatenate(ids), np.concatenate(starts)))
        return found

    def _text(self, document: Document, index: int, where: Callable[[int], str]) -> str:
        if not isinstance(document, str):
            fail(
                "Tokenized",
                f"the document at {where(index)}",
                "be a text where there is no template",
                "a conversation",
                'Pass template=ChatTemplate("folder of the model").',
            )
        return document

    def _rendered(
        self,
        chat: Chat,
        document: Document,
        index: int,
        where: Callable[[int], str],
    ) -> Any:
        if isinstance(document, str):
            fail(
                "Tokenized",
                f"the document at {where(index)}",
                "be a conversation where there is a template",
                f"the text {document[:40]!r}",
                'Name the field of the messages, such as field="messages".',
            )
        return chat(document, lambda: where(index))


def learnt(
    starts: Any, spans: tuple[tuple[int, int], ...]
) -> Bool[np.ndarray, " tokens"]:
    """Which tokens begin inside of a span of characters.

    A token that begins before the assistant does is part of the prompt.

    Args:
      starts: At which character each token begins, int [tokens].
      spans: First and last character (exclusive) of each span, in order.

    Example:
      >>> learnt(np.int32([0, 3, 5, 9]), ((3, 6),)).tolist()
      [False, True, True, False]
    """
    found = np.zeros(len(starts), bool)
    for start, stop in spans:
        found |= (starts >= start) & (starts < stop)
    return found
