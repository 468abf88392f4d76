"""The small models: shapes, training against inference, and what they carry."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax.models import MLP, ConvNet


@pytest.mark.parametrize("shape", [(3, 64), (3, 8, 8, 1)])
def test_mlp_flattens(shape):
    model = MLP(num_features=64, hidden=(16, 8), num_classes=10)(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), shape)
    logits = model(x)
    assert logits.shape == (3, 10)
    np.testing.assert_allclose(logits, model(x.reshape(3, 64)), rtol=1e-6)
    sizes = [layer.kernel.shape for layer in model.layers]
    assert sizes == [(64, 16), (16, 8), (8, 10)]


def test_mlp_is_what_it_says():
    model = MLP(num_features=4, hidden=(5,), num_classes=3)(nnx.Rngs(0))
    x = jnp.arange(8.0).reshape(2, 4) - 3
    first, last = model.layers
    hidden = jnp.maximum(x @ first.kernel[...] + first.bias[...], 0)
    expected = hidden @ last.kernel[...] + last.bias[...]
    np.testing.assert_allclose(model(x), expected, rtol=1e-6)


def test_dropout_is_on_in_training_alone():
    spec = MLP(
        num_features=8, hidden=(64,), num_classes=4, input_dropout=0.2, dropout=0.5
    )
    model, x = spec(nnx.Rngs(0)), jnp.ones((2, 8))
    model.train()
    assert not jnp.array_equal(model(x), model(x))
    model.eval()
    assert jnp.array_equal(model(x), model(x))


def test_no_random_stream_without_dropout():
    """A stream would be state: to save, to shard and to carry in every step."""
    for spec in (MLP(8, (4,), 2), ConvNet(num_classes=2)):
        state = nnx.state(spec(nnx.Rngs(0)), nnx.RngState)
        assert not jax.tree.leaves(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(0, (4,), 2), "num_features must be at least 1, got 0"),
        (lambda: MLP(8, (4, -1), 2), "hidden must be at least 1, got -1"),
        (lambda: ConvNet(2, (8, 0)), "channels must be at least 1, got 0"),
        (
            lambda: MLP(8, (4,), 2, dropout=1.0),
            r"dropout must lie in \[0, 1\), got 1.0",
        ),
        (lambda: MLP(8, (4,), 2, float("nan")), "input_dropout must lie in"),
        (lambda: ConvNet(2, dropout=-0.5), "dropout must lie in"),
        (lambda: ConvNet(2, in_channels=0), "in_channels must be at least"),
    ],
)
def test_sizes_are_counts_and_dropouts_are_probabilities(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (
            MLP(63, (4,), 2),
            (8, 8, 1),
            r"num_features must be 64, .*\(8, 8, 1\), got 63",
        ),
        (ConvNet(2), (8, 8, 3), r"in_channels must be 3, .*\(8, 8, 3\), got 1"),
        (ConvNet(2), (3, 8, 1), r"at least 4 high and wide, got the shape \(3, 8, 1\)"),
    ],
)
def test_examples_of_another_shape_are_refused(spec, shape, message):
    model = nnx.eval_shape(lambda: spec(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: model(x), jnp.zeros((2, *shape)))


def test_convnet_normalises_with_the_batch_then_with_its_averages():
    model = ConvNet(num_classes=3, channels=(4, 8), in_channels=2, dropout=0.5)(
        nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (4, 12, 12, 2))
    model.train()
    before = model.norms[0].mean[...]
    assert model(x).shape == (4, 3)
    assert not jnp.array_equal(before, model.norms[0].mean[...])
    model.eval()
    frozen = model.norms[0].mean[...]
    one, both = model(x[:1]), model(x)
    np.testing.assert_allclose(one, both[:1], rtol=1e-5, atol=1e-6)  # no batch effects
    assert jnp.array_equal(frozen, model.norms[0].mean[...])
