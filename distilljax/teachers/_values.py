"""Log-probabilities in few bytes: how the numbers of a top-k signal are written.

`log8` takes one byte for each, and one for each position: how far down its smallest
finite one lies, rounded up, by 1/16 at most. That range is a number of 8 bits of its
own, 4 of exponent and 4 of mantissa: 1/4 nat to 15,872, the same on every machine.
Within a range of 8 nats the codes lie evenly. An error of e nats in a class of
probability p costs about e^2 p / 2 nats of KL, so 1/64 nat at most costs nothing. In a
longer range the first codes keep that distance, and it grows in proportion to the code
behind them: what lies far down is rare, also at the temperatures of a grid.

All of them keep -inf exactly, and never write -inf for a finite number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

_RANGES = np.ldexp(16.0 + np.arange(256) % 16, np.arange(256) // 16 - 6)
_EVEN = np.minimum(_RANGES, 8)
_SLOPES, _BENDS = _EVEN / 254, (_RANGES - _EVEN) / 254**2
_ZERO = 255  # the code of -inf; finite ones are 0 to 254


def to_log8(
    log_probs: Float32[np.ndarray, "positions k"],
) -> UInt8[np.ndarray, "positions bytes"]:
    """A byte for the range of each position, and one for each log-probability.

    Byte b is the range r = (16 + b mod 16) 2^(b div 16 - 6). With e = min(r, 8), code c
    from 0 to 254 is the log-probability -(e u + (r - e) u^2), u = c / 254, and 255 is
    -inf. Numbers above 0 are written as 0, those below -15,872 as -15,872.

    Example:
      >>> log_probs = np.array([[0.0, -0.5, -1.0, -np.inf]], np.float32)
      >>> to_log8(log_probs).tolist()    # 32 = 2 * 16: r = 16 * 2^-4
      [[32, 0, 127, 254, 255]]
    """
    zero = np.isneginf(log_probs)
    depths = np.where(zero, 0, np.maximum(-log_probs, 0))
    deepest = depths.max(axis=1, keepdims=True)
    scales = np.minimum(np.searchsorted(_RANGES, deepest), 255)
    # c (slope + bend c) = depth, solved for c so that the bend may be 0
    slopes, bends = _SLOPES[scales], _BENDS[scales]
    codes = 2 * depths / (slopes + np.sqrt(slopes**2 + 4 * bends * depths))
    codes = np.minimum(np.rint(codes), 254)
    return np.hstack([scales, np.where(zero, _ZERO, codes)]).astype(np.uint8)


def from_log8(
    octets: UInt8[np.ndarray, "positions bytes"],
) -> Float32[np.ndarray, "positions k"]:
    """What `to_log8` wrote.

    Example:
      >>> from_log8(np.array([[32, 0, 127, 254, 255]], np.uint8)).tolist()
      [[0.0, -0.5, -1.0, -inf]]
    """
    scales, codes = octets[:, :1], octets[:, 1:]
    log_probs = codes * _BENDS.astype(np.float32)[scales]
    log_probs += _SLOPES.astype(np.float32)[scales]
    log_probs *= codes
    np.subtract(0, log_probs, out=log_probs)
    log_probs[codes == _ZERO] = -np.inf
    return log_probs


def to_bfloat16(x: Float32[np.ndarray, "rows n"]) -> UInt8[np.ndarray, "rows bytes"]:
    """The upper halves of float32 numbers, rounded to the nearest, ties to even.

    Example:
      >>> to_bfloat16(np.array([[1.0, -np.inf]], np.float32)).tobytes().hex(" ", 2)
      '803f 80ff'
    """
    whole = np.ascontiguousarray(x, "<f4").view("<u4")
    rounded = (whole + (0x7FFF + (whole >> 16 & 1))) >> 16
    largest = whole >> 16  # of finite numbers: not rounded to an infinite one
    halves = np.where(np.isfinite(x) & (rounded & 0x7FFF == 0x7F80), largest, rounded)
    return _octets(halves.astype("<u2"))


def from_bfloat16(
    octets: UInt8[np.ndarray, "rows bytes"],
) -> Float32[np.ndarray, "rows n"]:
    """What `to_bfloat16` wrote.

    Example:
      >>> from_bfloat16(to_bfloat16(np.array([[1 / 3]], np.float32))).tolist()
      [[0.333984375]]
    """
    halves = _numbers(octets, "<u2").astype(np.uint32)
    return (halves << 16).view(np.float32)


def to_float16(x: Float32[np.ndarray, "rows n"]) -> UInt8[np.ndarray, "rows bytes"]:
    """Halves of IEEE 754; finite numbers beyond 65,504 are written as 65,504.

    Example:
      >>> numbers = np.array([[-1e6, -np.inf]], np.float32)
      >>> from_float16(to_float16(numbers)).tolist()
      [[-65504.0, -inf]]
    """
    return _octets(np.where(np.isfinite(x), np.clip(x, -65504, 65504), x).astype("<f2"))


def from_float16(
    octets: UInt8[np.ndarray, "rows bytes"],
) -> Float32[np.ndarray, "rows n"]:
    """What `to_float16` wrote."""
    return _numbers(octets, "<f2").astype(np.float32)


def to_float32(x: Float32[np.ndarray, "rows n"]) -> UInt8[np.ndarray, "rows bytes"]:
    """As they are."""
    return _octets(x.astype("<f4"))


def from_float32(
    octets: UInt8[np.ndarray, "rows bytes"],
) -> Float32[np.ndarray, "rows n"]:
    """What `to_float32` wrote."""
    return _numbers(octets, "<f4").astype(np.float32)


def _octets(x: Any) -> Any:
    return np.ascontiguousarray(x).view(np.uint8)


def _numbers(octets: Any, dtype: str) -> Any:
    return np.ascontiguousarray(octets).view(dtype)
