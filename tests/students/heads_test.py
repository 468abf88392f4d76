"""A fresh head on an encoder: all else is as it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilljax import students
from distilljax.config import from_json, to_json
from distilljax.models import EncoderConfig, first_token, mean_pool, save_pretrained
from tests.students.small import arrays_of, decoder

CONFIG = EncoderConfig(
    vocab_size=32, width=16, num_layers=3, num_heads=4, ffn_width=24, max_length=8
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 8), 0, 32)


@nnx.jit
def call(model):
    return model(TOKENS)


def hidden_of(model):
    return call(model).features["last_hidden"]


@pytest.mark.parametrize("pool", [mean_pool, first_token])
def test_the_head_is_fresh_and_the_rest_is_copied(pool):
    encoder = CONFIG(nnx.Rngs(0))
    model = students.add_head(encoder, 5, rngs=nnx.Rngs(1), pool=pool)
    ours, theirs = arrays_of(model), arrays_of(encoder)
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x)
    assert len(ours) == len(theirs) + 2
    hidden = hidden_of(encoder)
    outputs = call(model)
    np.testing.assert_array_equal(outputs.features["last_hidden"], hidden)
    logits = pool(hidden) @ model.head.kernel[...]
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-6)
    other = students.add_head(encoder, 5, rngs=nnx.Rngs(2))
    assert not np.array_equal(other.head.kernel[...], model.head.kernel[...])
    # and it is the student's own: training it leaves the encoder alone
    model.embed.embedding.set_value(0 * model.embed.embedding[...])
    np.testing.assert_array_equal(hidden_of(encoder), hidden)


def test_a_head_replaces_another():
    encoder = students.add_head(CONFIG(nnx.Rngs(0)), 5, rngs=nnx.Rngs(1))
    model = students.add_head(encoder, 7, rngs=nnx.Rngs(1))
    assert call(model).logits.shape == (4, 7)


def test_a_spec_does_the_same_and_is_saved(tmp_path):
    save_pretrained(CONFIG(nnx.Rngs(0)), tmp_path / "encoder")
    kept = students.KeptLayers(students.Pretrained(str(tmp_path / "encoder")), (0, 2))
    spec = students.WithHead(kept, num_classes=5)
    assert from_json(to_json(spec)) == spec
    model = spec(nnx.Rngs(3))
    assert model.config.num_layers == 2
    want = students.add_head(kept(nnx.Rngs(0)), 5, rngs=nnx.Rngs(3))
    jax.tree.map(np.testing.assert_array_equal, arrays_of(model), arrays_of(want))
    # a run asks for shapes first, then for arrays in a compiled program
    abstract = nnx.eval_shape(lambda: spec(nnx.Rngs(0)))
    shapes = {path: x.shape for path, x in arrays_of(abstract).items()}
    assert shapes == {path: x.shape for path, x in arrays_of(model).items()}
    made = jax.jit(lambda key: nnx.state(spec(nnx.Rngs(key))))(jax.random.key(0))
    head = nnx.to_pure_dict(made)["head"]["kernel"]
    assert head.shape == (16, 5)
    assert jnp.std(head) > 0.01


def test_layers_of_an_encoder_are_kept():
    encoder = CONFIG(nnx.Rngs(0))
    made = students.keep_layers(encoder, 2)
    assert made.layers == {"layers/0": "layers/0", "layers/1": "layers/2"}
    student = made.student
    assert student.config.num_layers == 2
    np.testing.assert_array_equal(
        student.layers[1].mlp.up.kernel[...], encoder.layers[2].mlp.up.kernel[...]
    )
    embedded = encoder.embed(TOKENS) + encoder.position_embed.embedding[...]
    x = encoder.embed_norm(embedded + encoder.type_embed.embedding[...][0])
    want = encoder.layers[2](encoder.layers[0](x, None), None)
    np.testing.assert_allclose(hidden_of(student), want, atol=1e-6)
    assert set(made.parameters.student) == {"embedding", "attention", "mlp", "norms"}


def test_what_is_no_encoder_is_refused():
    with pytest.raises(TypeError, match="encoder must be a Encoder, got a Decoder"):
        students.add_head(decoder(), 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        students.WithHead(students.Copied(students.Pretrained("none")), 0)
