"""Losses must also work for those who forbid implicit promotion of dtypes and ranks."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
