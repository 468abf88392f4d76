"""Random numbers that belong to an example, and not to a generator that moves on.

A shuffle or an augmentation drawn from a stateful generator depends on how many numbers
were drawn before: on the number of processes, of threads, and of restarts. Here every
number is a hash of (key, counter), so any process can compute any of them at any time.
The hash is splitmix64: a bijection of 64-bit integers in six operations, vectorised.
The numbers are defined by these lines alone, so that they outlive any version of NumPy.

Reference: Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014 (the finaliser is Stafford's variant 13).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int, Int64, UInt64

_GOLDEN = (
    0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: counters map to distinct states
)
_MASK = (1 << 64) - 1


def _finalize(
    bits: UInt64[np.ndarray, "*shape"],
) -> UInt64[np.ndarray, "*shape"]:
    """The output function of splitmix64; overwrites ``bits``."""
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def random_bits(
    key: int, counters: Int[np.ndarray, "*shape"]
) -> UInt64[np.ndarray, "*shape"]:
    """64 random bits for each counter: output number ``counter`` of splitmix64(key).

    Distinct counters give distinct bits (the map is a bijection), so sorting the bits
    is a permutation without ties.

    Args:
      key: The seed of the stream; used modulo 2^64.
      counters: Non-negative integers.

    Example:
      >>> [int(b) for b in random_bits(1234567, np.arange(2))]   # published test vector
      [6457827717110365317, 3203168211198807973]
    """
    states = np.asarray(counters, np.uint64) + np.uint64(1)
    states *= np.uint64(_GOLDEN)
    states += np.uint64(key & _MASK)
    return _finalize(states)


def derive_key(*parts: int | str) -> int:
    """A 64-bit key for a purpose: a hash of integers and names, in order.

    Seeds 0 and 1 are neighbours, their keys are not: a run never replays a piece of the
    stream of the run beside it.

    Example:
      >>> derive_key(0, "order", 1) == derive_key(0, "order", 1)
      True
      >>> len({derive_key(s, p) for s in range(3) for p in ("order", "augment")})
      6
    """
    key = 0
    for part in parts:
        number = (
            int.from_bytes(part.encode(), "little") if isinstance(part, str) else part
        )
        while True:  # long names are folded 64 bits at a time
            key = _first_output(key ^ (number & _MASK))
            number >>= 64
            if number in (0, -1):
                break
    return key


def _first_output(key: int) -> int:
    """``random_bits(key, 0)`` in Python's integers: one number needs no array."""
    bits = (key + _GOLDEN) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


def random_uniform(
    seeds: UInt64[np.ndarray, " batch"], draw: int = 0
) -> Float64[np.ndarray, " batch"]:
    """One uniform number in [0, 1) for each example.

    Args:
      seeds: One seed for each example, as an augmentation receives them.
      draw: Which number of the example; use 0, 1, 2, ... for independent numbers.

    Example:
      >>> u = random_uniform(random_bits(0, np.arange(10_000)))
      >>> bool(u.min() >= 0 and u.max() < 1), round(float(u.mean()), 2)
      (True, 0.5)
    """
    # The top 53 bits, the precision of a float64.
    return (_draw_bits(seeds, draw) >> np.uint64(11)) * 2.0**-53


def random_integers(
    seeds: UInt64[np.ndarray, " batch"], low: int, high: int, draw: int = 0
) -> Int64[np.ndarray, " batch"]:
    """One integer in [low, high) for each example.

    Numerics: by remainder; the bias is below (high - low) / 2^64.

    Args:
      seeds: One seed for each example, as an augmentation receives them.
      low: Smallest value.
      high: One more than the largest value.
      draw: Which number of the example; use 0, 1, 2, ... for independent numbers.

    Example:
      >>> d = random_integers(random_bits(0, np.arange(6_000)), -1, 2)
      >>> np.unique(d).tolist()
      [-1, 0, 1]
    """
    span = np.uint64(high - low)
    return (_draw_bits(seeds, draw) % span).astype(np.int64) + low


def _draw_bits(
    seeds: UInt64[np.ndarray, " batch"], draw: int
) -> UInt64[np.ndarray, " batch"]:
    return _finalize(seeds + np.uint64((_GOLDEN * (draw + 1)) & _MASK))
