from __future__ import annotations

import jax
import pytest

from distilljax.sharding import mesh_from_string


@pytest.fixture
def one_device(monkeypatch):
    """On one of the simulated devices: compiling for all of them takes long."""
    only = jax.devices()[:1]
    monkeypatch.setattr(
        "distilljax.train.mesh_from_string", lambda text: mesh_from_string(text, only)
    )
