"""One document in each row: for encoders, embeddings and classes of texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from distilljax._checks import check_count, fail
from distilljax.data.rows import Example
from distilljax.data.text.documents import digest
from distilljax.data.text.filters import (
    Split,
    check_choice,
    check_split,
    in_split,
    sift,
)
from distilljax.data.text.progress import Progress, show_progress
from distilljax.data.text.store import Tokenized, TokenStore


@dataclass(frozen=True)
class Padded:
    """A document in each row of ``context`` tokens, and padding behind it.

    An example has three arrays of [context]: ``tokens``; ``segment_ids``, 1 for the
    document and 0 for padding; ``positions``. Where the documents have ``labels`` (a
    class for each, as `WordNetGlosses` of nouns has), it has ``labels``, one integer.

    Attributes:
      text: The documents and their tokenizer.
      context: Tokens in a row.
      split: "train" and "validation" divide the documents by a hash of their text, so
        that copies of one document are on one side; "all" takes every one.
      validation_fraction: The share of the documents that is for validation.
      long: What becomes of a document that is longer than a row: "cut" keeps its
        beginning, and what the tokenizer puts at the end; "drop", or "error".
      min_tokens: Shorter documents are dropped.
      token_mask: Whether an example also has ``loss_mask``, bool [context], False in
        padding: for objectives that look at single tokens. A class belongs to a whole
        document, and needs none.

    Example:
      >>> from distilljax.data.text import Texts, Tokenized, TokenizerJson
      >>> text = Tokenized(Texts(("Emma",)), TokenizerJson("encoder"))
      >>> Padded(text, 64).long    # a config opens nothing
      'cut'
    """

    text: Tokenized
    context: int
    split: Split = "all"
    validation_fraction: float = 0.0
    long: Literal["cut", "drop", "error"] = "cut"
    min_tokens: int = 1
    token_mask: bool = False

    def __post_init__(self):
        check_count("Padded", "context", self.context)
        check_count("Padded", "min_tokens", self.min_tokens)
        check_choice("Padded", "long", self.long, ("cut", "drop", "error"))
        check_split("Padded", self.split, self.validation_fraction)

    def __call__(self, progress: Progress = show_progress) -> PaddedRows:
        """Encode the documents, or find their tokens on disk."""
        store = self.text(progress)
        documents: Any = self.text.documents()
        part = in_split(store.hashes, self.split, self.validation_fraction)
        over = store.lengths > self.context
        if self.long == "error" and (part & over).any():
            first = int(np.argmax(part & over))
            fail(
                "Padded",
                f"the document at {documents.where(first)}",
                f"have at most {self.context} tokens",
                f"{store.lengths[first]} ({(part & over).sum()} such documents)",
                'Pass long="cut" or long="drop", or a longer context.',
            )
        kept, drops = sift(
            "Padded",
            part,
            (
                ("empty", store.lengths == 0),
                (f"under {self.min_tokens} tokens", store.lengths < self.min_tokens),
                ("too long", over & (self.long == "drop")),
            ),
        )
        labels = getattr(documents, "labels", None)
        names = tuple(getattr(documents, "class_names", ()))
        return PaddedRows(
            self, store, kept, drops, None if labels is None else labels[kept], names
        )


class PaddedRows:
    """The rows of a `Padded`: a source, read from the tokens on disk.

    Attributes:
      config: What it was made with.
      store: The tokens of all documents.
      kept: Which document is in each row.
      drops: How many of the split are in none, by the reason.
      labels: The class of each row; None: there are none.
      class_names: One name for each class, where known.
    """

    def __init__(
        self,
        config: Padded,
        store: TokenStore,
        kept: Int64[np.ndarray, " rows"],
        drops: dict[str, int],
        labels: Any,
        class_names: tuple[str, ...],
    ):
        self.config, self.store, self.kept, self.drops = config, store, kept, drops
        self.labels, self.class_names = labels, class_names
        self._end = np.array(config.text.ending(store.tokenizer), np.int32)

    @property
    def num_classes(self) -> int | None:
        """How many classes there are, where known."""
        return len(self.class_names) or None

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens, of what is kept of them, and of the labels."""
        c = self.config
        how = (c.context, c.split, c.validation_fraction, c.long, c.min_tokens)
        how += (c.token_mask,) if c.token_mask else ()
        labels = None if self.labels is None else self.labels.tolist()
        return digest(self.store.fingerprint, how, labels)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.kept)

    def __iter__(self) -> Iterator[Example]:
        """All rows, in order."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Row ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        context = self.config.context
        document = int(self.kept[index])
        tokens = self.store.tokens(document, 0, context)
        if self.store.lengths[document] > context and len(self._end) < context:
            tokens[context - len(self._end) :] = self._end
        row: dict[str, Any] = {
            name: np.zeros(context, np.int32)
            for name in ("tokens", "segment_ids", "positions")
        }
        row["tokens"][: len(tokens)] = tokens
        row["segment_ids"][: len(tokens)] = 1
        row["positions"][: len(tokens)] = np.arange(len(tokens))
        if self.config.token_mask:
            row["loss_mask"] = row["segment_ids"] == 1
        if self.labels is not None:
            row["labels"] = np.int32(self.labels[index])
        return row
