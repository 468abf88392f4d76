"""Rotary position embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from distilljax._checks import check_count, check_positive, fail


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings: the frequencies by which queries and keys turn.

    frequency i = base^(-2 i / head_dim), then scaled for contexts longer than those of
    the first training: all by `factor` (linear), or, with `original_length`, only the
    slow ones (Llama 3).

    Example:
      >>> Rope(base=256.0, factor=2.0).frequencies(4).tolist()
      [0.5, 0.03125]

    Reference: Su et al., "RoFormer", 2021, arXiv 2104.09864; Chen et al., "Extending
    Context Window of Large Language Models via Positional Interpolation", 2023, arXiv
    2306.15595; Llama Team, "The Llama 3 Herd of Models", 2024, arXiv 2407.21783.
    """

    base: float = 10_000.0
    """Wavelengths go from 2 pi to 2 pi base."""
    factor: float = 1.0
    """Divides frequencies: by how much the context was stretched."""
    original_length: int | None = None
    """Context before that (Llama 3); None divides all frequencies (linear)."""
    low_freq_factor: float = 1.0
    """Llama 3: waves longer than original_length / this are stretched in full."""
    high_freq_factor: float = 4.0
    """Llama 3: waves shorter than original_length / this are left alone."""
    divisors: tuple[float, ...] | None = None
    """Further divisors of the frequencies, one for each (GGUF files have them)."""

    def __post_init__(self):
        for field in ("base", "factor", "low_freq_factor", "high_freq_factor"):
            check_positive("Rope", field, getattr(self, field), "Files have it.")
        if self.original_length is not None:
            check_count("Rope", "original_length", self.original_length)
            if self.high_freq_factor <= self.low_freq_factor:
                fail(
                    "Rope",
                    "high_freq_factor",
                    f"be above low_freq_factor, {self.low_freq_factor}",
                    self.high_freq_factor,
                    "Llama 3 has 1.0 and 4.0.",
                )

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, one for each pair of dimensions, float32."""
        freqs = self.base ** -(np.arange(0, head_dim, 2) / head_dim)
        if self.original_length is None:
            freqs = freqs / self.factor
        else:
            turns = self.original_length * freqs / (2 * np.pi)
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0, 1)
            freqs = kept * freqs + (1 - kept) * freqs / self.factor
        if self.divisors is not None:
            if len(self.divisors) != len(freqs):
                rule = f"be one for each pair of a head, {len(freqs)}"
                why = "It is as head_dim / 2."
                fail("Rope", "divisors", rule, len(self.divisors), why)
            freqs = freqs / np.asarray(self.divisors)
        return freqs.astype(np.float32)

    def turns(
        self, head_dim: int, positions: Int[Array, "batch time"]
    ) -> tuple[Float[Array, "batch time 1 pairs"], Float[Array, "batch time 1 pairs"]]:
        """Cosine and sine of the angle of each position and pair, with a heads axis."""
        angles = positions[:, :, None, None].astype(jnp.float32)
        angles *= self.frequencies(head_dim)
        return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch time heads head_dim"], turns: tuple[Array, Array]
) -> Float[Array, "batch time heads head_dim"]:
    """Turn the pairs (i, i + head_dim / 2) of every head."""
    cos, sin = turns
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
