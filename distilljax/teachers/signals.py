"""What is kept of a teacher's logits, and what a loss gets of it.

`TopK`       the likeliest classes and the tail's mass, at each temperature of a grid
`Sampled`    draws from the teacher: an unbiased target, in the fewest bytes
`Hidden`     the last hidden states: exact, or in 8 bits; the head's kernel is kept once
`Dense`      all logits: small vocabularies, and images

Each makes its arrays of a batch on the devices (`of`), codes those of some positions as
bytes (`coding`), and makes of decoded arrays what a divergence takes (`logits`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from distilljax._checks import check_count, fail
from distilljax.losses import LinearHead, SampledLogits, SparseLogits
from distilljax.losses._heads import map_positions
from distilljax.teachers._coding import SampledCoding, TopKCoding

Arrays = dict[str, np.ndarray]
# Of each array, its dtype and its shape at one position.
Layout = Mapping[str, tuple[str, tuple[int, ...]]]


@runtime_checkable
class Coding(Protocol):
    """Arrays of positions as bytes, and back."""

    def encode(self, arrays: Arrays) -> bytes:
        """The bytes of one unit's positions; arrays are [positions, ...]."""
        ...

    def decode(self, records: Sequence[bytes], positions: np.ndarray) -> Arrays:
        """The arrays of all units' positions, one unit after the other."""
        ...


@dataclass(frozen=True)
class Raw:
    """Arrays as they are: little-endian, in C order, one after the other."""

    layout: Layout

    def encode(self, arrays: Arrays) -> bytes:
        """The bytes of each array, in the order of the layout."""
        return b"".join(
            np.ascontiguousarray(arrays[name], np.dtype(dtype)).tobytes()
            for name, (dtype, _) in self.layout.items()
        )

    def size(self, positions: int) -> int:
        """How many bytes so many positions take."""
        return positions * sum(
            np.dtype(dtype).itemsize * math.prod(shape)
            for dtype, shape in self.layout.values()
        )

    def decode(self, records: Sequence[bytes], positions: np.ndarray) -> Arrays:
        """The arrays again, exactly."""
        for record, count in zip(records, positions.tolist(), strict=True):
            if len(record) != self.size(count):
                fail(
                    "Raw",
                    "a record",
                    f"have {self.size(count)} bytes for {count} positions",
                    len(record),
                    "The store is damaged: write it again.",
                )
        found, starts = {}, np.zeros(len(records), np.int64)
        for name, (dtype, shape) in self.layout.items():
            each = np.dtype(dtype).itemsize * math.prod(shape)
            ends = starts + positions * each
            pieces = zip(records, starts.tolist(), ends.tolist(), strict=True)
            joined = b"".join(record[i:j] for record, i, j in pieces)
            found[name] = np.frombuffer(joined, dtype).reshape(-1, *shape)
            starts = ends
        return found


@dataclass(frozen=True)
class TopK:
    """The k likeliest classes at each position, and the mass of the others.

    Example:
      >>> kind = TopK(2, temperatures=(1.0, 2.0))
      >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
      >>> found = kind.of(logits, jnp.zeros(1, jnp.int32))
      >>> found["ids"].tolist()
      [[0, 1]]
    """

    name: ClassVar[str] = "top_k"
    k: int = 128
    """How many classes are kept."""
    temperatures: tuple[float, ...] = (1.0,)
    """The grid: a loss takes these temperatures and no others."""
    values: Literal["log8", "bfloat16", "float32"] = "log8"
    """How log-probabilities are stored: in 8 bits, or in more."""

    def __post_init__(self):
        check_count("TopK", "k", self.k)

    def of(self, logits: Any, rows: Int[Array, " batch"]) -> dict[str, Array]:
        """Ids, log-probabilities and tails of a batch.

        Args:
          logits: Dense, or a head, [batch, ..., classes].
          rows: Of no use here.
        """
        del rows

        def top(z: Array) -> dict[str, Array]:
            found = SparseLogits.top_k(z, self.k, self.temperatures)
            return {name: getattr(found, name) for name in _TOP_K}

        if isinstance(logits, LinearHead):
            return map_positions(top, logits)
        return top(logits)

    def coding(self, num_classes: int, layout: Layout, width: int) -> Coding:
        """Elias-Fano ids, and coded values; see docs/store_format.md."""
        del layout, width
        return _TopK(TopKCoding(num_classes, self.k, self.temperatures, self.values))

    def logits(self, arrays: Mapping[str, Any]) -> SparseLogits:
        """What a divergence takes."""
        return SparseLogits(**arrays, temperatures=self.temperatures)


_TOP_K = ("ids", "log_probs", "log_tail")


@dataclass(frozen=True)
class _TopK:
    inner: TopKCoding

    def encode(self, arrays: Arrays) -> bytes:
        return self.inner.encode(*(arrays[name] for name in _TOP_K))

    def decode(self, records: Sequence[bytes], positions: np.ndarray) -> Arrays:
        found = self.inner.decode(records, positions)
        return dict(zip(_TOP_K, found, strict=True))


@dataclass(frozen=True)
class Sampled:
    """Independent draws from the teacher at each position.

    A draw belongs to its row: whatever batch the row is in, and whoever reads it, the
    classes are the same.

    Example:
      >>> found = Sampled(4).of(jnp.array([[0.0, -jnp.inf]]), jnp.zeros(1, jnp.int32))
      >>> found["ids"].tolist()
      [[0, 0, 0, 0]]

    Reference: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge
    Distillation in LLMs", ACL 2025, arXiv 2503.16870.
    """

    name: ClassVar[str] = "sampled"
    num_samples: int = 50
    """Draws at each position; a language model has some 12 different classes in 50."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self):
        check_count("Sampled", "num_samples", self.num_samples)

    def of(self, logits: Any, rows: Int[Array, " batch"]) -> dict[str, Array]:
        """The drawn classes of a batch, [batch, ..., num_samples], with copies.

        Args:
          logits: Dense, or a head, [batch, ..., classes].
          rows: The number of each row, which decides its draws.
        """
        shape = (*logits.shape[1:-1], self.num_samples)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(self.seed), row))
        points = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys(rows))

        def draw(z: Array, points: Array) -> Array:
            return SampledLogits.at(points, z).ids

        if isinstance(logits, LinearHead):
            return {"ids": map_positions(draw, logits, points)}
        return {"ids": draw(logits, points)}

    def coding(self, num_classes: int, layout: Layout, width: int) -> Coding:
        """Distinct ids by Elias-Fano, counts in unary; see docs/store_format.md."""
        del layout
        return _Sampled(SampledCoding(num_classes, self.num_samples), width)

    def logits(self, arrays: Mapping[str, Any]) -> SampledLogits:
        """What a divergence takes."""
        return SampledLogits(**arrays)


@dataclass(frozen=True)
class _Sampled:
    inner: SampledCoding
    width: int

    def encode(self, arrays: Arrays) -> bytes:
        return self.inner.encode(arrays["ids"])

    def decode(self, records: Sequence[bytes], positions: np.ndarray) -> Arrays:
        ids, counts = self.inner.decode(records, positions, self.width)
        n = self.inner.num_samples
        weights = np.log(np.arange(1, n + 1) / n)
        table = np.concatenate([[-np.inf], weights]).astype(np.float32)
        return {"ids": ids, "log_weights": table[counts]}


@dataclass(frozen=True)
class Hidden:
    """The last hidden states; the kernel of the head is in the store once.

    Example:
      >>> head = LinearHead(jnp.ones((1, 3)), jnp.ones((3, 5)))
      >>> Hidden().of(head, jnp.zeros(1, jnp.int32))["hidden"].shape
      (1, 3)
    """

    name: ClassVar[str] = "hidden"
    dtype: Literal["same", "int8"] = "same"
    """"same": as the teacher computes them, and exact. "int8": one scale per position,
    and a loss of accuracy that is measured and written into the manifest."""

    def __post_init__(self):
        if self.dtype not in ("same", "int8"):
            remedy = '"same" is exact.'
            fail("Hidden", "dtype", 'be "same" or "int8"', repr(self.dtype), remedy)

    def of(self, logits: Any, rows: Int[Array, " batch"]) -> dict[str, Array]:
        """The hidden states of a batch, [batch, ..., width].

        Args:
          logits: A `LinearHead`.
          rows: Of no use here.
        """
        del rows
        if not isinstance(logits, LinearHead):
            fail(
                "Hidden",
                "the teacher",
                "have a LinearHead, hidden states and a kernel",
                f"logits of {type(logits).__name__}",
                "Keep --kind dense, top_k or sampled of it.",
                TypeError,
            )
        if self.dtype == "same":
            return {"hidden": logits.hidden}
        hidden = logits.hidden.astype(jnp.float32)
        scale = jnp.max(jnp.abs(hidden), axis=-1) / 127
        rounded = jnp.round(hidden / jnp.where(scale > 0, scale, 1)[..., None])
        return {"hidden": rounded.astype(jnp.int8), "scale": scale}

    def coding(self, num_classes: int, layout: Layout, width: int) -> Coding:
        """As they are."""
        del num_classes, width
        return Raw(layout) if self.dtype == "same" else _Int8(Raw(layout))

    def logits(self, arrays: Mapping[str, Any]) -> LinearHead:
        """A head without its kernel, which the step has."""
        return LinearHead(arrays["hidden"], None, scale=None)


@dataclass(frozen=True)
class _Int8:
    inner: Raw

    def encode(self, arrays: Arrays) -> bytes:
        return self.inner.encode(arrays)

    def decode(self, records: Sequence[bytes], positions: np.ndarray) -> Arrays:
        found = self.inner.decode(records, positions)
        hidden = found["hidden"].astype(np.float32)
        return {"hidden": hidden * found["scale"][:, None]}


@dataclass(frozen=True)
class Dense:
    """All logits.

    Example:
      >>> Dense().of(jnp.ones((2, 10)), jnp.arange(2))["logits"].shape
      (2, 10)
    """

    name: ClassVar[str] = "dense"

    def of(self, logits: Any, rows: Int[Array, " batch"]) -> dict[str, Array]:
        """The logits of a batch in the dtype that the teacher has; a head's in float32.

        Args:
          logits: Dense, or a head.
          rows: Of no use here.
        """
        del rows
        return {"logits": logits.logits() if hasattr(logits, "logits") else logits}

    def coding(self, num_classes: int, layout: Layout, width: int) -> Coding:
        """As they are."""
        del num_classes, width
        return Raw(layout)

    def logits(self, arrays: Mapping[str, Any]) -> Any:
        """The logits again."""
        return arrays["logits"]


Kind = TopK | Sampled | Hidden | Dense
KINDS: dict[str, type[Kind]] = {k.name: k for k in (TopK, Sampled, Hidden, Dense)}


__all__ = ["KINDS", "Coding", "Dense", "Hidden", "Kind", "Raw", "Sampled", "TopK"]
