"""What other tests cannot reach: under test, annotations refuse other kinds first."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import distilljax.config
import distilljax.data  # noqa: F401  what is suggested must be loaded
from distilljax._checks import (
    check_count,
    check_temperature,
    check_widths,
    suggest_field,
)


@pytest.mark.parametrize("value", ["2", None, True, [1.0, "2"]])
def test_a_temperature_is_a_number(value):
    with pytest.raises(TypeError, match="temperature must be a number, got"):
        check_temperature("LogitKD", value)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), jnp.bfloat16(2)])
def test_a_number_may_be_of_any_type(value):
    check_temperature("LogitKD", value)


@pytest.mark.parametrize("value", ["3", 3.0, None, True])
def test_a_count_is_an_integer(value):
    with pytest.raises(TypeError, match="steps must be an integer, got"):
        check_count("Config", "steps", value)
    with pytest.raises(TypeError, match="hidden must be an integer, got"):
        check_widths("MLP", "hidden", (3, value))


def test_a_single_width_is_written_as_a_tuple():
    with pytest.raises(TypeError, match=r"tuple of integers, got 64. .*\(64,\)"):
        check_widths("MLP", "hidden", 64)
    check_widths("MLP", "hidden", (np.int64(64), 32))


@pytest.mark.parametrize(
    ("part", "field", "remedy"),
    [
        ("Config", "stepz", "Did you mean steps"),
        ("Loader", "batchsize", "Did you mean batch_size"),
        ("AdamW", "lr", "It has learning_rate, b1"),
    ],
)
def test_an_unknown_field_gets_a_suggestion(part, field, remedy):
    said = f"{part}.__init__() got an unexpected keyword argument '{field}'"
    with pytest.raises(TypeError, match=f"{field} must be a field of {part}.*{remedy}"):
        suggest_field(TypeError(said), "mine.py")


@pytest.mark.parametrize(
    "said",
    [
        "f() missing 1 required positional argument: 'x'",
        "Mine.__init__() got an unexpected keyword argument 'x'",
    ],
)
def test_other_errors_are_left_as_they_are(said):
    suggest_field(TypeError(said), "mine.py")
