"""Students that are not the teacher's weights, and embeddings that are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import make_distill_step
from distilljax.models import save_pretrained
from distilljax.objectives import LogitKD
from distilljax.students import (
    from_checkpoint,
    from_scratch,
    projected_embedding,
    sliced_embedding,
)
from tests.students.small import BATCH, CONFIG, arrays_of, decoder, logits_of


def small(**changes):
    fields = {"width": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    return lambda rngs: decoder(9, **{**fields, **changes})


def test_a_student_from_scratch_is_what_its_config_makes():
    teacher = decoder()
    made = from_scratch(small(), teacher, nnx.Rngs(9))
    want = arrays_of(small()(nnx.Rngs(9)))
    got = arrays_of(made.student)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert made.layers == {"layers/0": "layers/0", "layers/1": "layers/3"}
    assert made.parameters.student["embedding"] == 32 * 8


@pytest.mark.parametrize("narrow", [sliced_embedding, projected_embedding])
def test_its_embedding_may_be_the_teachers(narrow):
    teacher = decoder()
    made = from_scratch(small(), teacher, nnx.Rngs(9), embedding=narrow)
    got = made.student.embed.embedding[...]
    np.testing.assert_array_equal(got, narrow(teacher.embed.embedding[...], 8))


def test_a_slice_has_the_largest_channels_in_order():
    x = jax.random.normal(jax.random.key(0), (20, 6)) * jnp.array([1, 9, 1, 1, 5, 7.0])
    np.testing.assert_array_equal(sliced_embedding(x, 3), x[:, [1, 4, 5]])
    np.testing.assert_array_equal(sliced_embedding(x, 6), x)


def test_a_projection_keeps_the_products_of_tokens():
    """Exactly, if the embedding has no more directions; else as well as can be."""
    x = np.random.default_rng(0).normal(size=(20, 3)) @ np.eye(3, 6)
    turned = x @ np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    narrow = np.array(projected_embedding(jnp.float32(turned), 3))
    np.testing.assert_allclose(narrow @ narrow.T, x @ x.T, atol=1e-4)
    s = np.linalg.svd(x, compute_uv=False)
    two = np.array(projected_embedding(jnp.float32(turned), 2))
    error = np.linalg.norm(two @ two.T - x @ x.T, 2)
    np.testing.assert_allclose(error, s[2] ** 2, rtol=1e-4)
    assert projected_embedding(jnp.bfloat16(turned), 2).dtype == jnp.bfloat16


def test_a_checkpoint_is_loaded_as_it_is(tmp_path):
    model = small()(nnx.Rngs(9))
    model.config = CONFIG.__class__(
        **{**vars(model.config), "embed_scale": 1.0, "head_dim": 4}
    )
    save_pretrained(model, tmp_path / "student")
    made = from_checkpoint(tmp_path / "student", decoder())
    np.testing.assert_allclose(logits_of(made.student), logits_of(model), atol=1e-6)
    assert made.layers == {"layers/0": "layers/0", "layers/1": "layers/3"}


def test_a_checkpoint_may_be_padded_otherwise(tmp_path):
    """Then the loss is told how many tokens there are."""
    padded = {"vocab_size": 40, "embed_scale": 1.0, "head_dim": 4}
    save_pretrained(small(**padded)(nnx.Rngs(9)), tmp_path / "student")
    teacher = decoder()
    student = from_checkpoint(tmp_path / "student", teacher).student
    optimizer = nnx.Optimizer(student, optax.sgd(1e-2), wrt=nnx.Param)
    kd = {"temperature": 1.0, "ce_weight": 0.0}
    with pytest.raises(ValueError, match="pass num_classes"):
        make_distill_step(LogitKD(**kd), teacher)(student, optimizer, BATCH)
    step = make_distill_step(LogitKD(num_classes=32, **kd), teacher)
    assert np.isfinite(step(student, optimizer, BATCH)["kd"].value)


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="teacher's vocabulary, of 32 tokens, got 40"):
        from_scratch(small(vocab_size=40), decoder(), nnx.Rngs(0))


@pytest.mark.parametrize("narrow", [sliced_embedding, projected_embedding])
def test_an_embedding_is_not_made_wider(narrow):
    with pytest.raises(ValueError, match="width must be at most that of the embedding"):
        from_scratch(small(width=24), decoder(), nnx.Rngs(0), embedding=narrow)


def test_a_narrowing_returns_the_width_that_it_is_asked_for():
    with pytest.raises(ValueError, match=r"embedding must return the shape \(32, 8\)"):
        from_scratch(
            small(), decoder(), nnx.Rngs(0), embedding=lambda x, width: x[:, :3]
        )
