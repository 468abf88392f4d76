"""What each way of writing numbers loses, and what it never loses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distilljax.teachers import _values as values

WAYS = {
    "log8": (values.to_log8, values.from_log8),
    "bfloat16": (values.to_bfloat16, values.from_bfloat16),
    "float16": (values.to_float16, values.from_float16),
    "float32": (values.to_float32, values.from_float32),
}
finite = st.floats(-(2.0**127), 0, width=32)
shapes = st.tuples(st.integers(0, 3), st.integers(1, 6))
logs = arrays(np.float32, shapes, elements=st.one_of(finite, st.just(-np.inf)))


@pytest.mark.parametrize("way", WAYS)
@given(x=logs)
def test_minus_infinity_and_nothing_else_is_minus_infinity(way, x):
    write, read = WAYS[way]
    found = read(write(x))
    assert found.dtype == np.float32
    assert found.shape == x.shape
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(x))
    assert (found <= 0).all()


@pytest.mark.parametrize("way", ["bfloat16", "float16", "float32"])
@given(x=logs)
def test_what_was_read_is_read_again(way, x):
    write, read = WAYS[way]
    once = read(write(x))
    np.testing.assert_array_equal(read(write(once)), once)
    if way == "float32":
        np.testing.assert_array_equal(once, x)


@given(arrays(np.float32, shapes, elements=st.floats(-15000, 0, width=32)))
def test_log8_is_off_by_half_a_step_at_most(x):
    found = values.from_log8(values.to_log8(x))
    deepest = -x.min(axis=1, keepdims=True, initial=-0.25)
    reach = deepest * 17 / 16  # rounded up
    even = np.minimum(reach, 8)
    step = np.sqrt(even**2 + 4 * (reach - even) * -x) / 254
    curvature = (reach - even) / 254**2
    assert (np.abs(found - x) <= (step / 2 + curvature) * 1.001 + 1e-5).all()


def test_every_range_is_a_small_integer_times_a_power_of_two():
    """Byte 255 reaches 31 * 2^9, and byte 0 reaches 16 / 64."""
    codes = np.array([[scale, 254] for scale in range(256)], np.uint8)
    reach = -values.from_log8(codes)[:, 0]
    expected = [(16 + b % 16) * 2.0 ** (b // 16 - 6) for b in range(256)]
    np.testing.assert_allclose(reach, expected, rtol=1e-6)


def test_bfloat16_rounds_to_nearest_even_as_jax_does():
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    x = -np.exp(rng.normal(size=(50, 40)) * 5).astype(np.float32)
    x[0, :3] = [-1.00390625, -1.01171875, -0.0]  # two ties
    found = values.from_bfloat16(values.to_bfloat16(x))
    expected = jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(found, expected)


def test_what_is_too_large_for_a_half_is_the_largest_half():
    x = np.array([[-65504, -65519, -65520, -1e9, 1e9]], np.float32)
    found = values.from_float16(values.to_float16(x))
    assert found.tolist() == [[-65504, -65504, -65504, -65504, 65504]]
    x = np.array([[np.finfo(np.float32).min]])
    found = values.from_bfloat16(values.to_bfloat16(x))
    assert found.tolist() == [[-(2.0**127) * (2 - 2**-7)]]


def test_the_format_is_this():
    """Stores are read by later versions: these bytes must never change."""
    x = np.array([[-0.001, -0.7, -9.25, -40.0, -np.inf]], np.float32)
    golden = {
        "log8": "74 00 11 6c fe ff",
        "bfloat16": "83 ba 33 bf 14 c1 20 c2 80 ff",
        "float16": "19 94 9a b9 a0 c8 00 d1 00 fc",
        "float32": "6f 12 83 ba 33 33 33 bf 00 00 14 c1 00 00 20 c2 00 00 80 ff",
    }
    for way, (write, _) in WAYS.items():
        assert write(x).tobytes().hex(" ") == golden[way], way
    # Range (16 + 4) 2^(7 - 6) = 40, and code c is 8 u + 32 u^2 down, u = c / 254.
    steps = np.array([0, 0x11, 0x6C, 0xFE]) / 254
    found = values.from_log8(values.to_log8(x))[0, :-1]
    np.testing.assert_allclose(found, -(8 * steps + 32 * steps**2), rtol=1e-6)
