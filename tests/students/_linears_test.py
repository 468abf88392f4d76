"""Linear maps by their paths: which are changed, and that nothing else is."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from distilljax.students._linears import IN_LAYERS, change_linears, linears
from tests.students.small import arrays_of, decoder, logits_of


def doubled(linear):
    graphdef, state = nnx.split(linear)
    return nnx.merge(graphdef, jax.tree.map(lambda x: 2 * x, state))


@pytest.mark.parametrize("scan", [False, True])
def test_the_maps_of_layers_are_changed_and_nothing_else(scan):
    model = decoder(num_layers=2, tied=False, qkv_bias=True, scan=scan)
    changed = change_linears("f", model, IN_LAYERS, doubled)
    before = arrays_of(model)
    for path, x in arrays_of(changed).items():
        linear = "layers" in path and "norm" not in path
        np.testing.assert_array_equal(x, before[path] * (2 if linear else 1))
        assert x is not before[path]
    assert nnx.graphdef(changed) == nnx.graphdef(model)
    logits_of(changed)


def test_a_pattern_names_whole_paths():
    model = decoder(num_layers=2)
    names = []

    def note(linear):
        names.append(linear.out_features)
        return linear

    change_linears("f", model, r"layers/1/mlp/(up|down)", note)
    assert sorted(names) == [16, 24]
    assert len(linears(model)) == 2 * 7


def test_maps_in_a_list_are_found():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )
    changed = change_linears("f", model, "layers/2", doubled)
    x = np.ones((1, 3), np.float32)
    np.testing.assert_allclose(changed(x), 2 * model(x), rtol=1e-5)


def test_a_pattern_that_finds_nothing_is_refused():
    message = "f: modules must match the path of an nnx.Linear, got 'up' among layers/0"
    with pytest.raises(ValueError, match=message):
        change_linears("f", decoder(num_layers=1), "up", doubled)
