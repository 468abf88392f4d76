"""The encoder: stacked or not, packed or padded, on a mesh or not, one function."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.stats import norm

from distilljax import losses, make_distill_step, objectives
from distilljax._capture import with_features
from distilljax.models import (
    ENCODER_RULES,
    EncoderConfig,
    blocked_attention,
    cudnn_attention,
    exact_gelu,
    first_token,
    mean_pool,
    sentence_embedding,
    splash_attention,
)
from distilljax.sharding import mesh_from_string, tree_shardings


def dense_attention(query, key, value, *, segment_ids, causal):
    """All scores at once: short to compile, and what the others are compared with."""
    assert not causal
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key) / query.shape[-1] ** 0.5
    if segment_ids is not None:
        seen = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), value)


CONFIG = EncoderConfig(
    vocab_size=64,
    width=16,
    num_layers=2,
    num_heads=4,
    ffn_width=24,
    max_length=12,
    num_classes=8,
    attention=dense_attention,
)
TOKENS = jax.random.randint(jax.random.key(1), (8, 12), 0, 64)


def stacked(model):
    """The same encoder, with its layers in one stack."""
    other = replace(model.config, scan=True)(nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model))
    layers = [state["layers"][i] for i in range(model.config.num_layers)]
    state["layers"] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    nnx.update(other, state)
    return other


def outputs_of(model, tokens=TOKENS, *rest):
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, tokens, *rest):
        outputs = nnx.merge(graphdef, state)(tokens, *rest)
        return outputs.features["last_hidden"], outputs.logits

    return run(state, tokens, *rest)


def gradient_of(model):
    graphdef, state = nnx.split(model)

    def loss(state):
        logits = nnx.merge(graphdef, state)(TOKENS).logits
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss))(state)
    return {"loss": value, **nnx.to_pure_dict(grads)}


def close(got, want, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), got, want)


def test_stacked_layers_are_the_same_function():
    model = CONFIG(nnx.Rngs(0))
    other = stacked(model)
    want, got = gradient_of(model), gradient_of(other)
    close(got["loss"], want["loss"])
    close(got["embed"], want["embed"])
    for i in range(2):
        of_layer = jax.tree.map(lambda x, i=i: x[i], got["layers"])
        close(of_layer, want["layers"][i], 1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_computed_again_is_the_same(scan):
    plain = replace(CONFIG, scan=scan, num_layers=1)
    again = replace(plain, remat=jax.checkpoint_policies.nothing_saveable)
    close(gradient_of(again(nnx.Rngs(0))), gradient_of(plain(nnx.Rngs(0))))


def test_what_is_computed_again_is_not_kept():
    def temp_bytes(remat):
        config = replace(CONFIG, scan=True, num_layers=6, remat=remat)
        graphdef, state = nnx.split(config(nnx.Rngs(0)))

        def loss(state):
            tokens = jnp.zeros((64, 12), jnp.int32)
            return jnp.sum(nnx.merge(graphdef, state)(tokens).logits ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(state).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    policy = jax.checkpoint_policies.nothing_saveable
    assert temp_bytes(policy) < 0.5 * temp_bytes(None)


def test_every_token_sees_every_other_of_its_text_and_no_other():
    model = CONFIG(nnx.Rngs(0))
    changed = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 64)
    ids = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 0]), 4), (8, 12))
    for segments, moved in ((None, slice(0, 12)), (ids, slice(4, 8))):
        rest = (None, segments)
        want, got = (outputs_of(model, t, *rest)[0] for t in (TOKENS, changed))
        moves = np.abs(got - want).max(axis=(0, 2)) > 1e-4
        assert moves[moved].all()
        assert moves.sum() == len(moves[moved])


def test_a_packed_row_is_its_texts():
    model = CONFIG(nnx.Rngs(0))
    packed = jnp.concatenate([TOKENS[:, :5], TOKENS[:, :7]], axis=1)
    ids = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2]), jnp.array([5, 7])), (8, 12))
    positions = jnp.broadcast_to(
        jnp.concatenate([jnp.arange(5), jnp.arange(7)]), (8, 12)
    )
    hidden, _ = outputs_of(model, packed, positions, ids)
    alone = [outputs_of(model, TOKENS[:, :n])[0] for n in (5, 7)]
    close(hidden, jnp.concatenate(alone, axis=1))
    means = mean_pool(hidden, ids, num_segments=3)
    close(means[:, :2], jnp.stack([x.mean(axis=1) for x in alone], axis=1))
    assert not means[:, 2].any()


def test_padding_is_not_pooled():
    model = CONFIG(nnx.Rngs(0))
    ids = jnp.broadcast_to(jnp.arange(12) < 5, (8, 12)).astype(jnp.int32)
    _, logits = outputs_of(model, TOKENS, None, ids)
    close(logits, outputs_of(model, TOKENS[:, :5])[1])
    _, others = outputs_of(model, TOKENS.at[:, 5:].set(0), None, ids)
    close(others, logits)


def test_a_text_without_tokens_is_zero_with_a_finite_gradient():
    model = CONFIG(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    ids = jnp.zeros((8, 12), jnp.int32)

    def loss(state):
        batch = {"tokens": TOKENS, "segment_ids": ids}
        x = sentence_embedding(nnx.merge(graphdef, state), batch)
        return jnp.sum(x.features["embedding"])

    value, grads = jax.jit(jax.value_and_grad(loss))(state)
    assert value == 0
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_heads_see_what_is_pooled():
    model = replace(CONFIG, pool=first_token, pooler=True)(nnx.Rngs(0))
    outputs = nnx.jit(lambda m: m(TOKENS))(model)
    hidden = outputs.features["last_hidden"][:, 0]
    pooled = jnp.tanh(hidden @ model.pooler.kernel[...] + model.pooler.bias[...])
    close(outputs.features["pooled"], pooled, 1e-6)
    close(outputs.logits, pooled @ model.head.kernel[...] + model.head.bias[...], 1e-6)
    bare = replace(CONFIG, num_classes=None)(nnx.Rngs(0))(TOKENS)
    assert bare.logits is None
    assert bare.features.keys() == {"last_hidden"}


def test_types_of_tokens_are_added():
    model = CONFIG(nnx.Rngs(0))
    types = jnp.ones_like(TOKENS)
    want = outputs_of(model, TOKENS, None, None, types)
    table = model.type_embed.embedding[...]
    model.type_embed.embedding.set_value(table[::-1])
    close(outputs_of(model), want, 0)


def test_gelu_is_exact():
    x = jnp.linspace(-4, 4, 33)
    np.testing.assert_allclose(exact_gelu(x), x * norm.cdf(x), atol=1e-6)
    assert np.abs(nnx.gelu(x) - exact_gelu(x)).max() > 1e-4


@pytest.mark.parametrize("scan", [False, True])
def test_features_and_attention_relations_by_path(scan):
    model = CONFIG(nnx.Rngs(0))
    model = stacked(model) if scan else model
    names = [f"layers/1/attention/{x}" for x in ("query", "key", "value")]
    names += ["layers/0"]
    batch = {"tokens": TOKENS}
    found = with_features(lambda m, b: m(b["tokens"]), names)(model, batch).features
    plain = CONFIG(nnx.Rngs(0))
    close(found["layers/0"], _after(plain, 1))
    x = _after(plain, 1)
    for name in names[:3]:
        project = getattr(plain.layers[1].attention, name.rpartition("/")[2])
        close(found[name], project(x))


def _after(model, count):
    x = model.embed(TOKENS) + model.position_embed.embedding[...][:12]
    x = model.embed_norm(x + model.type_embed.embedding[...][0])
    for layer in list(model.layers)[:count]:
        x = layer(x, None)
    return x


@pytest.mark.parametrize(
    ("mesh", "scan"), [("data=2,fsdp=2,tensor=2", True), ("fsdp=4,tensor=2", False)]
)
def test_a_mesh_changes_nothing(mesh, scan):
    model = replace(CONFIG, scan=scan, num_layers=2 if scan else 1)(nnx.Rngs(0))
    want = gradient_of(model)
    mesh = mesh_from_string(mesh)
    state = nnx.state(model)
    shardings = tree_shardings(state, mesh, ENCODER_RULES, min_size=2**30)
    nnx.update(model, jax.device_put(state, shardings))
    layer = model.layers if scan else model.layers[0]
    stack = (None,) if scan else ()
    spec = layer.attention.query.kernel[...].sharding.spec
    assert tuple(spec) == (*stack, "fsdp", "tensor")
    assert tuple(layer.mlp.down.kernel[...].sharding.spec) == (*stack, "tensor", "fsdp")
    assert tuple(model.embed.embedding[...].sharding.spec) == (None, "fsdp")
    assert tuple(model.position_embed.embedding[...].sharding.spec) == ()
    with jax.set_mesh(mesh):
        close(gradient_of(model), want)


def blocked(*args, **options):
    return blocked_attention(*args, **options, block=8)


def splash(*args, **options):
    return splash_attention(*args, **options, interpret=True)


def cudnn(*args, **options):
    return cudnn_attention(*args, **options, implementation="xla")


@pytest.mark.parametrize("attention", [blocked, splash, cudnn])
def test_all_attentions_look_both_ways(attention):
    """Those of a TPU and of a GPU too, run slowly here."""
    config = replace(CONFIG, width=256, num_heads=2, num_layers=1)
    other = replace(config, attention=attention)
    ids = jnp.broadcast_to(jnp.arange(12) < 9, (2, 12)).astype(jnp.int32)
    for segments in (None, ids):
        rest = (TOKENS[:2], None, segments)
        if attention is cudnn and segments is not None:
            continue  # it has no segments, and says so
        want = outputs_of(config(nnx.Rngs(0)), *rest)
        close(outputs_of(other(nnx.Rngs(0)), *rest), want, 1e-5)


def test_the_type_of_computing_is_not_that_of_the_parameters():
    model = replace(CONFIG, compute_dtype=jnp.bfloat16)(nnx.Rngs(0))
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {x.dtype for x in params} == {jnp.dtype("float32")}
    hidden, logits = outputs_of(model)
    assert hidden.dtype == logits.dtype == jnp.bfloat16
    close(hidden.astype("float32"), outputs_of(CONFIG(nnx.Rngs(0)))[0], 0.05)


def test_a_small_encoder_learns_from_a_large_one():
    """Embeddings and attention relations at once, of padded texts, by the step."""
    teacher = replace(CONFIG, scan=True, num_classes=None)(nnx.Rngs(0))
    student = replace(CONFIG, num_layers=1, num_classes=None)(nnx.Rngs(1))
    ids = (jnp.arange(12) < jnp.arange(5, 13)[:, None]).astype(jnp.int32)
    batch = {"tokens": TOKENS, "segment_ids": ids, "loss_mask": ids == 1}
    pairs = {
        f"layers/0/attention/{x}": f"layers/1/attention/{x}" for x in ("query", "key")
    }
    objective = objectives.Sum(
        {
            "cosine": objectives.FeatureKD(
                {"embedding": "embedding"}, loss=losses.hidden_cosine
            ),
            "relations": objectives.AttentionKD(pairs, num_relation_heads=4),
        }
    )
    step = make_distill_step(
        objective,
        teacher,
        student_forward=sentence_embedding,
        teacher_forward=sentence_embedding,
    )
    optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
    found = [step(student, optimizer, batch) for _ in range(40)]
    for name, value in found[0].items():
        if "cosine" in name or "relations" in name:
            assert found[-1][name].value < 0.5 * value.value, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "width must be a multiple of num_heads, 3, got 16"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive and finite, got 0.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_what_is_in_no_table_is_taken_for_nothing_else():
    model, tokens = CONFIG(nnx.Rngs(0)), jnp.zeros((1, 3), jnp.int32)
    positions = jnp.array([[0, 1, -1]])
    for hidden in (
        outputs_of(model, tokens.at[0, 2].set(-1))[0],
        outputs_of(model, tokens, positions)[0],
    ):
        assert jnp.isnan(hidden[0, 2]).all()


def test_a_row_longer_than_the_positions_is_refused():
    tokens = jnp.zeros((1, 13), jnp.int32)
    with pytest.raises(ValueError, match=r"at most max_length=12 of them .* got 13"):
        CONFIG(nnx.Rngs(0))(tokens)
    # with positions of its own it may be longer: several texts, each short enough
    ids = jnp.repeat(jnp.array([1, 2]), jnp.array([6, 7]))[None]
    positions = jnp.concatenate([jnp.arange(6), jnp.arange(7)])[None]
    hidden, _ = outputs_of(CONFIG(nnx.Rngs(0)), tokens, positions, ids)
    assert jnp.isfinite(hidden).all()
    assert jnp.isnan(outputs_of(CONFIG(nnx.Rngs(0)), tokens, positions + 6)[0]).any()
