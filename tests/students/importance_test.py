"""Importance: what is planted is found, and what does not count changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax.models.rope import Rope
from distilljax.students import measure_importance
from tests.students.small import BATCH, TOKENS, decoder


def scale_layer(teacher, layer, path, axis, index, factor):
    """Multiply a slice of a kernel of one layer."""
    module = teacher.layers if teacher.config.scan else teacher.layers[layer]
    for name in path.split("/"):
        module = getattr(module, name)
    kernel = np.array(module.kernel[...])
    one = kernel[layer] if teacher.config.scan else kernel
    one[(slice(None),) * axis + (index,)] *= factor
    module.kernel.set_value(jnp.array(kernel))


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_planted_is_found(scan):
    teacher = decoder(scan=scan, num_layers=2)
    scale_layer(teacher, 1, "mlp/up", 1, [7, 3], 20.0)
    # the second head of keys and values, so the heads 2 and 3
    scale_layer(teacher, 0, "attention/value", 1, slice(4, 8), 20.0)
    teacher.embed.embedding.set_value(teacher.embed.embedding[...].at[:, 5].mul(9.0))
    found = measure_importance(teacher, [BATCH])
    assert set(np.argsort(found.neurons[1])[-2:]) == {3, 7}
    assert set(np.argsort(found.neurons[0])[-2:]) != {3, 7}
    assert set(np.argsort(found.heads[0])[-2:]) == {2, 3}
    assert np.argmax(found.channels) == 5


def test_stacked_layers_have_the_same_scores():
    plain, stacked = decoder(), decoder(scan=True)
    state = nnx.to_pure_dict(nnx.state(plain))
    layers = [state["layers"][i] for i in range(4)]
    state["layers"] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    nnx.update(stacked, state)
    want, got = (measure_importance(m, [BATCH]) for m in (plain, stacked))
    for field in ("channels", "neurons", "heads"):
        x, y = getattr(got, field), getattr(want, field)
        np.testing.assert_allclose(x, y, rtol=1e-4)
    for name, energy in want.energy.items():
        np.testing.assert_allclose(got.energy[name], energy, rtol=1e-4)


def test_scores_are_those_of_the_paper():
    """Of one layer, from its own parts: mean over time, then L2 over examples."""
    teacher = decoder(num_layers=1)
    layer = teacher.layers[0]
    x = teacher.embed.embedding[...][TOKENS] * 50.0
    normed = layer.attention_norm(x)
    turns = (Rope().turns(4, jnp.arange(8)[None]),) * 2
    after = x + layer.attention(normed, False, turns, None)
    read = layer.mlp_norm(after)
    hidden = nnx.silu(layer.mlp.gate(read)) * layer.mlp.up(read)
    final = teacher.final_norm(after + layer.mlp.down(hidden))

    def score(*parts):
        means = [jnp.abs(part).mean(1) for part in parts]
        return jnp.sqrt(sum((m**2).sum(0) for m in means))

    found = measure_importance(teacher, [BATCH])
    np.testing.assert_allclose(found.neurons[0], score(hidden), rtol=1e-4)
    np.testing.assert_allclose(found.channels, score(normed, read, final), rtol=1e-4)
    energy = (x**2).sum((0, 1))
    np.testing.assert_allclose(found.energy["attention_norm"][0], energy, rtol=1e-4)


def test_batches_add_up():
    teacher = decoder(num_layers=1)
    whole = measure_importance(teacher, [BATCH])
    parts = [{"tokens": TOKENS[:2]}, {"tokens": TOKENS[2:]}]
    split = measure_importance(teacher, parts)
    np.testing.assert_allclose(split.heads, whole.heads, rtol=1e-5)
    np.testing.assert_allclose(split.channels, whole.channels, rtol=1e-5)


def test_masked_positions_do_not_count():
    teacher = decoder(num_layers=1)
    whole = measure_importance(teacher, [{"tokens": TOKENS[:, :5]}])
    mask = jnp.arange(8)[None].repeat(4, 0) < 5
    masked = measure_importance(teacher, [{**BATCH, "loss_mask": mask}])
    for field in ("channels", "neurons", "heads"):
        x, y = getattr(masked, field), getattr(whole, field)
        np.testing.assert_allclose(x, y, rtol=1e-4)
    none = measure_importance(teacher, [{**BATCH, "loss_mask": mask & False}])
    assert not none.channels.any()


def test_the_teacher_stays_as_it_is():
    teacher = decoder(num_layers=1)
    before = nnx.graphdef(teacher)
    measure_importance(teacher, [BATCH])
    assert nnx.graphdef(teacher) == before


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="batches must have at least one batch, got n"):
        measure_importance(decoder(), iter(()))
    with pytest.raises(TypeError, match="teacher must be a Decoder, got a Linear"):
        measure_importance(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [BATCH])
