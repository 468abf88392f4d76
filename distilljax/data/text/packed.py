"""Packed rows as a source: what a Loader reads, and a language model is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
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
from distilljax.data.text.packing import Pieces, Plan, cut, positions, shift
from distilljax.data.text.progress import Progress, show_progress
from distilljax.data.text.store import Tokenized, TokenStore
from distilljax.data.text.tokenizer import Tokenizer

Long = Literal["split", "drop", "error"]


class Span(NamedTuple):
    """Where a segment of a row is from: tokens ``start`` to ``start + places``."""

    document: int
    start: int
    places: int


@dataclass(frozen=True)
class Packed:
    """Rows of ``context`` tokens, each filled with several documents.

    An example has five arrays of [context]: ``tokens``; ``labels``, the token that
    follows each; ``loss_mask``, whether that label is learnt; ``segment_ids``, from 1
    on, and 0 for padding; ``positions``, from 0 in each segment.

    Attributes:
      text: The documents and their tokenizer.
      context: Tokens in a row.
      split: "train" and "validation" divide the documents by a hash of their text, so
        that copies of one document are on one side; "all" takes every one.
      validation_fraction: The share of the documents that is for validation.
      long: What becomes of a document that is longer than a row: "split" into pieces,
        "drop", or "error". None: texts are split, conversations dropped, for the rest
        of a conversation means little without its beginning.
      min_tokens: Shorter documents are dropped; at least 2, for one predicts nothing.
      max_tokens: Longer documents are dropped; None: none for that reason.
      repack: Give each document new neighbours in each epoch. False keeps the rows, so
        that what was computed for a row (a teacher's logits) holds in every epoch.
      seed: Of the packing.

    Example:
      >>> from distilljax.data.text import Texts, Tokenized, TokenizerJson
      >>> text = Tokenized(Texts(("Emma",)), TokenizerJson("student"))
      >>> train = Packed(text, 1024, split="train", validation_fraction=0.01)
      >>> train.context    # a config opens nothing
      1024
    """

    text: Tokenized
    context: int
    split: Split = "all"
    validation_fraction: float = 0.0
    long: Long | None = None
    min_tokens: int = 2
    max_tokens: int | None = None
    repack: bool = True
    seed: int = 0

    def __post_init__(self):
        check_count("Packed", "context", self.context)
        check_count("Packed", "min_tokens", self.min_tokens, low=2)
        check_choice("Packed", "long", self.long, (None, "split", "drop", "error"))
        check_split("Packed", self.split, self.validation_fraction)

    def __call__(self, progress: Progress = show_progress) -> PackedRows:
        """Encode the documents, or find their tokens on disk, and plan the rows."""
        store = self.text(progress)
        kept, drops = self._filtered(store)
        return PackedRows(self, store, kept, drops)

    def shapes(self) -> dict[str, Any]:
        """The shapes of an example, known before anything is opened."""
        names = ("tokens", "labels", "segment_ids", "positions")
        kinds = {**dict.fromkeys(names, np.int32), "loss_mask": np.bool_}
        return {
            name: jax.ShapeDtypeStruct((self.context,), kind)
            for name, kind in kinds.items()
        }

    def _filtered(
        self, store: TokenStore
    ) -> tuple[Int64[np.ndarray, " kept"], dict[str, int]]:
        """Which documents are packed, and how many are not, by the reason."""
        lengths = store.lengths
        part = in_split(store.hashes, self.split, self.validation_fraction)
        too_long = np.zeros(len(store), bool)
        if self.max_tokens is not None:
            too_long = lengths > self.max_tokens
        long = self.long or ("drop" if store.is_chat else "split")
        if long != "split":
            over = part & ~too_long & (lengths - 1 > self.context)
            if long == "error" and over.any():
                self._refuse(int(np.argmax(over)), lengths, int(over.sum()))
            too_long |= over
        return sift(
            "Packed",
            part,
            (
                ("empty", lengths < 2),
                (f"under {self.min_tokens} tokens", lengths < self.min_tokens),
                ("too long", too_long),
                ("nothing to learn", store.num_learnt == 0),
            ),
        )

    def _refuse(
        self, first: int, lengths: Int64[np.ndarray, " documents"], count: int
    ) -> None:
        fail(
            "Packed",
            f"the document at {self.text.documents().where(first)}",
            f"have at most {self.context + 1} tokens, what a row of {self.context} "
            "predicts",
            f"{lengths[first]} ({count} such documents)",
            'Pass long="split" or long="drop", or a longer context.',
        )


class PackedRows:
    """The rows of a `Packed`: a source, read from the tokens on disk.

    ``len(rows)`` is that of one epoch, and row i of epoch e is ``rows[e len(rows) +
    i]``: an index names a row and what is in it, in whatever epoch.

    Attributes:
      config: What it was made with.
      store: The tokens of all documents.
      kept: Which documents are in the rows.
      drops: How many of the split are not, by the reason.
      plan: Which pieces lie in which row.
      endless: True if an index beyond the length is a row of a later epoch.
    """

    def __init__(
        self,
        config: Packed,
        store: TokenStore,
        kept: Int64[np.ndarray, " kept"],
        drops: dict[str, int],
    ):
        self.config, self.store, self.kept, self.drops = config, store, kept, drops
        pieces: Pieces = cut(kept, store.lengths[kept], config.context)
        self.plan = Plan(pieces, context=config.context, seed=config.seed)
        self.endless = config.repack

    @property
    def tokenizer(self) -> Tokenizer:
        """Whose tokens these are: a run checks that the student knows all of them."""
        return self.store.tokenizer

    @property
    def num_classes(self) -> int:
        """How many tokens the tokenizer has: labels are checked to be among them."""
        return self.tokenizer.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens and of the packing."""
        c = self.config
        how = (c.context, c.split, c.validation_fraction, c.long, c.min_tokens)
        more = (c.max_tokens, c.repack, c.seed)
        return digest(self.store.fingerprint, how, more)

    @property
    def num_units(self) -> int:
        """How many pieces there are: an epoch has each of them once."""
        return len(self.plan.pieces)

    @cached_property
    def units_fingerprint(self) -> str:
        """Of the pieces, whatever rows they are put into."""
        c = self.config
        how = (c.context, c.split, c.validation_fraction, c.long, c.min_tokens)
        return digest("pieces", self.store.fingerprint, how, c.max_tokens)

    def units(
        self, index: int
    ) -> tuple[Int64[np.ndarray, " some"], Int64[np.ndarray, " some"]]:
        """Which pieces lie in row ``index``, in order, and how long each of them is."""
        which = self._pieces(index)
        return which, self.plan.pieces.places[which]

    def __len__(self) -> int:
        """How many rows an epoch has."""
        return self.plan.num_rows

    def __iter__(self) -> Iterator[Example]:
        """The rows of one epoch, in order."""
        return (self[i] for i in range(len(self)))

    def spans(self, index: int) -> list[Span]:
        """Which pieces of which documents lie in row ``index``, in order."""
        pieces, which = self.plan.pieces, self._pieces(index)
        columns = (pieces.document, pieces.start, pieces.places)
        return [
            Span(*one)
            for one in zip(*(column[which].tolist() for column in columns), strict=True)
        ]

    def __getitem__(self, index: int) -> Example:
        """Row ``index``."""
        pieces, which = self.plan.pieces, self._pieces(index)
        places = pieces.places[which]
        starts = self.store.offsets[pieces.document[which]] + pieces.start[which]
        tokens, labels, mask = shift(
            self.store.all_tokens, self.store.all_learnt, starts, places
        )
        used = len(tokens)
        row: dict[str, Any] = {
            name: np.zeros(x.shape, x.dtype) for name, x in self.config.shapes().items()
        }
        row["tokens"][:used], row["labels"][:used] = tokens, labels
        row["loss_mask"][:used] = mask
        row["segment_ids"][:used] = np.repeat(np.arange(1, len(which) + 1), places)
        row["positions"][:used] = positions(places)
        return row

    def _pieces(self, index: int) -> Int64[np.ndarray, " some"]:
        epoch, row = divmod(index, len(self))
        if index < 0 or (epoch and not self.endless):
            raise IndexError(f"row {index} of {len(self)}")
        return self.plan.row(epoch, row)
