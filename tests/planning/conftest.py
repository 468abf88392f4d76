"""A plan that several tests look at: it is compiled once."""

from __future__ import annotations

import pytest

from distilljax.planning import plan
from tests.planning.small import language_model


@pytest.fixture(scope="session")
def here():
    """The plan for the eight simulated devices of the tests."""
    return plan(language_model())
