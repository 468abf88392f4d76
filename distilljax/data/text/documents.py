"""Documents: random access to texts and conversations, wherever they are stored.

As with examples, two things carry the word. The *config*, such as ``Jsonl(...)``, is a
frozen dataclass that opens nothing; calling it gives the *documents*. A document is a
text, or a conversation: a list of messages, each a dict of ``role``, ``content`` and
whatever else a chat template reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from distilljax._checks import fail

Messages = Sequence[Mapping[str, Any]]
Document = str | Messages
# What becomes of bytes that are not UTF-8, and of half surrogate pairs in JSON.
Errors = Literal["strict", "replace"]


@runtime_checkable
class Documents(Protocol):
    """Random access to documents that can say where each of them is from."""

    @property
    def fingerprint(self) -> str:
        """A digest of what is in them; the same wherever the files lie."""
        ...

    def __len__(self) -> int:
        """How many documents there are."""
        ...

    def __getitem__(self, index: int, /) -> Document:
        """Document ``index``: a text, or a list of messages."""
        ...

    def where(self, index: int) -> str:
        """Where document ``index`` is from, for messages: a file and a line, say."""
        ...


@runtime_checkable
class DocumentsConfig(Protocol):
    """A frozen dataclass that says where documents are, and opens them when called."""

    def __call__(self) -> Documents:
        """Open the documents."""
        ...


@dataclass(frozen=True)
class Texts:
    """Documents that are already in memory: documents, and their own config.

    Attributes:
      texts: Texts, or conversations.

    Example:
      >>> few = Texts(("Emma Woodhouse,", [{"role": "user", "content": "Hello"}]))
      >>> len(few), few[0], few[1][0]["content"], few.where(1)
      (2, 'Emma Woodhouse,', 'Hello', 'document 1')
    """

    texts: Sequence[Any]

    def __post_init__(self):
        if isinstance(self.texts, str):
            fail(
                "Texts",
                "texts",
                "be a sequence of documents",
                "a single text",
                'For one document, write ("It is a truth",).',
                TypeError,
            )

    @property
    def fingerprint(self) -> str:
        """A digest of all of them."""
        return digest("Texts", list(self.texts))

    def __call__(self) -> Documents:
        """Itself: there is nothing to open."""
        return self

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.texts)

    def __getitem__(self, index: int) -> Document:
        """Document ``index``."""
        return checked_document("Texts", self.texts[index], index, self.where)

    def where(self, index: int) -> str:
        """Its number."""
        return f"document {index}"


def digest(*parts: Any) -> str:
    """A digest of what JSON can say; other objects count as they are printed.

    Example:
      >>> digest("a", 1) == digest("a", 1), digest("a", 1) == digest("a", 2)
      (True, False)
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def checked_document(
    function: str,
    value: Any,
    index: int,
    where: Callable[[int], str],
    errors: str = "strict",
) -> Document:
    """A text or a conversation that a tokenizer can read.

    Args:
      function: Who asks, for the message.
      value: What was found as the document.
      index: Which document it is.
      where: Tells where a document is from; asked if something is wrong.
      errors: "replace" turns half surrogate pairs, which JSON can write and UTF-8
        cannot, into question marks.

    Example:
      >>> checked_document("Jsonl", "half: \\ud83d", 0, str, errors="replace")
      'half: ?'
    """
    value = _unicode(function, value, index, where, errors)
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(
        isinstance(message, Mapping) for message in value
    ):
        fail(
            function,
            f"the document at {where(index)}",
            "be a text or a list of messages",
            f"{type(value).__name__} {str(value)[:40]!r}",
            "Name the field of the text, or leave this document out.",
            TypeError,
        )
    for number, message in enumerate(value):
        if "role" not in message:
            fail(
                function,
                f"message {number} at {where(index)}",
                "have a role",
                f"the keys {sorted(message)}",
                'A message is {"role": "user", "content": "..."}.',
            )
        if message.get("content", "") is None and not message.get("tool_calls"):
            fail(
                function,
                f"message {number} at {where(index)}",
                "have a content, or tool_calls",
                "neither",
                "A template would write the word None: leave this message out.",
            )
    return value


def _unicode(
    function: str, value: Any, index: int, where: Callable[[int], str], errors: str
) -> Any:
    """The same, all of whose texts UTF-8 can write: those inside of messages, too."""

    def of(inner: Any) -> Any:
        return _unicode(function, inner, index, where, errors)

    if isinstance(value, Mapping):
        return {key: of(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [of(inner) for inner in value]
    if not isinstance(value, str):
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if errors == "replace":
            return value.encode(errors="replace").decode()
        fail(
            function,
            f"the text at {where(index)}",
            "be Unicode",
            f"half a surrogate pair at character {error.start}",
            'Repair the file, or pass errors="replace".',
        )
    return value


def check_errors(function: str, errors: str) -> None:
    """``errors`` is one of the two ways.

    Example:
      >>> check_errors("Jsonl", "strict")
    """
    if errors not in ("strict", "replace"):
        fail(
            function,
            "errors",
            'be "strict" or "replace"',
            repr(errors),
            "Strict stops at bytes that are no UTF-8; replace puts U+FFFD there.",
        )
