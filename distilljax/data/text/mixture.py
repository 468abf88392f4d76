"""Several sources of rows as one, each with its share, in an order without chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64

from distilljax._checks import fail
from distilljax.data.rows import Example
from distilljax.data.text.documents import digest
from distilljax.data.text.packed import Packed, PackedRows
from distilljax.data.text.tokenizer import Tokenizer

# Shares are multiples of one in this many rows.
PERIOD = 10_000


@dataclass(frozen=True)
class Mixture:
    """Rows of several `Packed`, with weights: 3 and 1 are three rows to one.

    Rows of a part are evenly spread, and a part that ends begins again, packed anew. An
    epoch is over when each part has been seen at least once. All rows have one context,
    so weights of rows are weights of tokens (and of padding, where rows are not full).

    Attributes:
      parts: The parts, by name.
      weights: The weight of each part, by the same names; any positive numbers, held
        to one row in 10,000.

    Example:
      >>> from distilljax.data.text import Texts, Tokenized, TokenizerJson
      >>> text = Tokenized(Texts(("Emma",)), TokenizerJson("student"))
      >>> parts = {"novels": Packed(text, 1024), "glosses": Packed(text, 1024)}
      >>> Mixture(parts, {"novels": 3, "glosses": 1}).weights["novels"]
      3
    """

    parts: Mapping[str, Packed]
    weights: Mapping[str, float]

    def __post_init__(self):
        if not self.parts or set(self.parts) != set(self.weights):
            fail(
                "Mixture",
                "weights",
                f"have the names of the parts, {sorted(self.parts)}",
                sorted(self.weights),
                "Give each part its weight.",
            )
        if not all(0 < weight < float("inf") for weight in self.weights.values()):
            fail(
                "Mixture",
                "weights",
                "be positive numbers",
                dict(self.weights),
                "Leave out a part that has no share.",
            )
        contexts = {name: part.context for name, part in self.parts.items()}
        if len(set(contexts.values())) > 1:
            fail(
                "Mixture",
                "parts",
                "have rows of one context",
                contexts,
                "Rows of a batch have one shape.",
            )

    def __call__(self) -> MixedRows:
        """Open all parts."""
        shares = quotas([self.weights[name] for name in self.parts], PERIOD)
        rows = {name: part() for name, part in self.parts.items()}
        tokenizers = {name: part.tokenizer.fingerprint for name, part in rows.items()}
        if len(set(tokenizers.values())) > 1:
            fail(
                "Mixture",
                "parts",
                "have one tokenizer",
                tokenizers,
                "A token would mean something else in each part.",
            )
        return MixedRows(rows, shares)


def quotas(weights: Sequence[float], total: int) -> Int64[np.ndarray, " parts"]:
    """``total`` in proportion to the weights: rounded down, and then the largest rest.

    Args:
      weights: Positive numbers.
      total: What is divided.

    Example:
      >>> quotas([1, 1, 1], 10).tolist()
      [4, 3, 3]
    """
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    found = np.floor(exact).astype(np.int64)
    more = np.argsort(found - exact, kind="stable")[: total - found.sum()]
    found[more] += 1
    if np.any(found == 0):
        fail(
            "Mixture",
            "weights",
            f"be at least 1 / {total} of their sum",
            list(weights),
            "Leave out a part that is hardly ever seen.",
        )
    return found


class MixedRows:
    """The rows of a `Mixture`; row i is found without the rows before it.

    Attributes:
      parts: The rows of each part, by name.
      shares: How many rows of each part are in a period.
    """

    endless = True

    def __init__(
        self, parts: Mapping[str, PackedRows], shares: Int64[np.ndarray, " parts"]
    ):
        self.parts, self.shares = dict(parts), shares
        # Row r of the q rows of a part lies at (r + 1/2) / q of the period.
        at = np.concatenate([(np.arange(q) + 0.5) / q for q in shares])
        part = np.repeat(np.arange(len(shares)), shares)
        rank = np.concatenate([np.arange(q) for q in shares])
        order = np.argsort(at, kind="stable")
        self._part, self._rank = part[order], rank[order]
        self._rows = list(self.parts.values())

    @property
    def tokenizer(self) -> Tokenizer:
        """Whose tokens these are: all parts have the same."""
        return self._rows[0].tokenizer

    @property
    def num_classes(self) -> int:
        """How many tokens the tokenizer has."""
        return self.tokenizer.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """Of all parts and their shares."""
        parts = [rows.fingerprint for rows in self._rows]
        return digest("Mixture", parts, self.shares.tolist())

    @cached_property
    def unit_parts(self) -> list[tuple[PackedRows, int]]:
        """The rows of each part, and the number of the first of its pieces."""
        counts = [rows.num_units for rows in self._rows]
        firsts = np.concatenate([[0], np.cumsum(counts)[:-1]]).tolist()
        return list(zip(self._rows, firsts, strict=True))

    @property
    def num_units(self) -> int:
        """How many pieces all parts have."""
        return sum(rows.num_units for rows in self._rows)

    @property
    def units_fingerprint(self) -> str:
        """Of the pieces of all parts, whatever their shares."""
        parts = {name: rows.units_fingerprint for name, rows in self.parts.items()}
        return digest("Mixture", parts)

    def units(
        self, index: int
    ) -> tuple[Int64[np.ndarray, " some"], Int64[np.ndarray, " some"]]:
        """Which pieces lie in row ``index``, and how long each of them is."""
        name, row = self.place(index)
        rows, first = self.unit_parts[list(self.parts).index(name)]
        which, places = rows.units(row)
        return which + first, places

    def __len__(self) -> int:
        """How many rows an epoch has: until each part has been seen at least once."""
        return self._num_rows

    @cached_property
    def _num_rows(self) -> int:
        ends = []
        for number, rows in enumerate(self._rows):
            period, rank = divmod(len(rows) - 1, int(self.shares[number]))
            last = np.flatnonzero(self._part == number)[rank]
            ends.append(period * len(self._part) + int(last) + 1)
        return max(ends)

    def __iter__(self) -> Iterator[Example]:
        """The rows of one epoch, in order."""
        return (self[i] for i in range(len(self)))

    def place(self, index: int) -> tuple[str, int]:
        """The part that row ``index`` is from, and its index there."""
        if index < 0:
            raise IndexError(f"row {index} of {len(self)}")
        period, within = divmod(index, len(self._part))
        part = int(self._part[within])
        row = period * int(self.shares[part]) + int(self._rank[within])
        rows = self._rows[part]
        return list(self.parts)[part], row if rows.endless else row % len(rows)

    def rows_of(
        self, part: str, chosen: Int64[np.ndarray, " chosen"]
    ) -> Int64[np.ndarray, " some"]:
        """Which rows of a part are among the chosen rows of the mixture."""
        places = [self.place(int(i)) for i in chosen]
        return np.array([row for name, row in places if name == part], np.int64)

    def __getitem__(self, index: int) -> Example:
        """Row ``index``."""
        name, row = self.place(index)
        return self.parts[name][row]

    def spans(self, index: int) -> Any:
        """The part that row ``index`` is from, and its spans there."""
        name, row = self.place(index)
        return name, self.parts[name].spans(row)
