"""The decoder: stacked or not, on a mesh or not, it is one function."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import make_distill_step, objectives
from distilljax._capture import with_features
from distilljax._functional import default_forward
from distilljax.losses import LinearHead
from distilljax.models import DECODER_RULES, DecoderConfig, Rope, blocked_attention
from distilljax.models._parts import check_functions
from distilljax.sharding import mesh_from_string, tree_shardings

CONFIG = DecoderConfig(
    vocab_size=64,
    width=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_width=24,
    window=5,
    local_layers=(True, False),
    local_rope=Rope(100.0),
    qk_norm=True,
    post_norm=True,
    tied=False,
    attention=blocked_attention,
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 12), 0, 64)


def stacked(model):
    """The same decoder, with its layers in one stack."""
    other = replace(model.config, scan=True)(nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model))
    layers = [state["layers"][i] for i in range(model.config.num_layers)]
    state["layers"] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    nnx.update(other, state)
    return other


def logits_of(model, tokens=TOKENS, *rest):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda s: nnx.merge(graphdef, s)(tokens, *rest).logits.logits())(
        state
    )


def gradient_of(model):
    graphdef, state = nnx.split(model)

    def loss(state):
        logits = nnx.merge(graphdef, state)(TOKENS).logits.logits()
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)

    return nnx.to_pure_dict(jax.jit(jax.grad(loss))(state))


@pytest.mark.parametrize("local_layers", [(True, False), (True,), (False,)])
def test_stacked_layers_are_the_same_function(local_layers):
    model = replace(CONFIG, local_layers=local_layers)(nnx.Rngs(0))
    other = stacked(model)
    np.testing.assert_allclose(logits_of(other), logits_of(model), atol=1e-6)
    want, got = gradient_of(model), gradient_of(other)
    for i in range(4):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=1e-6),
            got["layers"],
            want["layers"][i],
        )


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "policy", ["nothing_saveable", "dots_with_no_batch_dims_saveable"]
)
def test_remat_changes_no_gradient(scan, policy):
    plain = CONFIG(nnx.Rngs(0))
    config = replace(CONFIG, scan=scan, remat=getattr(jax.checkpoint_policies, policy))
    model = config(nnx.Rngs(0))
    source = stacked(plain) if scan else plain
    nnx.update(model, nnx.state(source))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        gradient_of(model),
        gradient_of(source),
    )


def test_remat_keeps_less():
    """Of each further layer, only what goes into it."""
    tokens = jnp.zeros((8, 256), jnp.int32)

    def temp_bytes(remat, num_layers):
        config = replace(CONFIG, scan=True, remat=remat, num_layers=num_layers)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: config(nnx.Rngs(0))))

        def loss(state):
            return jnp.sum(nnx.merge(graphdef, state)(tokens).logits.hidden)

        compiled = jax.jit(jax.grad(loss)).lower(state).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def of_a_layer(remat):
        return (temp_bytes(remat, 8) - temp_bytes(remat, 4)) / 4

    policy = jax.checkpoint_policies.nothing_saveable
    residual = 8 * 256 * CONFIG.width * 4
    assert of_a_layer(policy) < 1.5 * residual
    assert of_a_layer(None) > 6 * residual


@pytest.mark.parametrize("scan", [False, True])
def test_what_comes_later_changes_nothing(scan):
    model = replace(CONFIG, scan=scan)(nnx.Rngs(0))
    changed = TOKENS.at[:, 8:].set((TOKENS[:, 8:] + 1) % 64)
    want, got = logits_of(model), logits_of(model, changed)
    np.testing.assert_allclose(got[:, :8], want[:, :8], atol=1e-6)
    assert np.abs(got[:, 8:] - want[:, 8:]).max() > 1e-3


def test_the_logits_are_a_head():
    for tied in (True, False):
        model = replace(CONFIG, tied=tied, logit_softcap=0.5)(nnx.Rngs(0))
        head = model(TOKENS).logits
        assert isinstance(head, LinearHead)
        assert head.shape == (4, 12, 64)
        assert head.softcap == 0.5
        kernel = model.embed.embedding[...].T if tied else model.head.kernel[...]
        np.testing.assert_array_equal(head.kernel, kernel)
        assert (model.head is None) == tied


def test_the_type_of_computing_is_not_that_of_the_parameters():
    model = replace(CONFIG, compute_dtype=jnp.bfloat16)(nnx.Rngs(0))
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {x.dtype for x in params} == {jnp.dtype("float32")}
    head = model(TOKENS).logits
    assert head.hidden.dtype == head.kernel.dtype == jnp.bfloat16
    exact = logits_of(CONFIG(nnx.Rngs(0)))
    np.testing.assert_allclose(head.logits(), exact, atol=0.02)
    half = replace(CONFIG, param_dtype=jnp.bfloat16)(nnx.Rngs(0))
    assert half(TOKENS).logits.hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize("scan", [False, True])
def test_features_have_the_number_of_their_layer(scan):
    model = CONFIG(nnx.Rngs(0))
    model = stacked(model) if scan else model
    names = ["layers/0", "layers/3/attention", "embed"][:2]
    outputs = with_features(default_forward, names)(model, {"tokens": TOKENS})
    x = model.embed.embedding[...][TOKENS]
    plain = CONFIG(nnx.Rngs(0))
    angles = jnp.arange(12)[None]
    turns = tuple(r.turns(8, angles) for r in (CONFIG.rope, CONFIG.local_rope))
    for i, layer in enumerate(plain.layers):
        if i == 3:
            normed = layer.attention_norm(x)
            want = layer.attention(normed, False, turns, None)
            np.testing.assert_allclose(
                outputs.features["layers/3/attention"], want, atol=1e-5
            )
        x = layer(x, i % 2 == 0, turns, None)
        if i == 0:
            np.testing.assert_allclose(outputs.features["layers/0"], x, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2"])
def test_a_mesh_changes_nothing(mesh, scan):
    model = replace(CONFIG, scan=scan)(nnx.Rngs(0))
    want, grads = logits_of(model), gradient_of(model)
    mesh = mesh_from_string(mesh)
    state = nnx.state(model)
    shardings = tree_shardings(state, mesh, DECODER_RULES, min_size=2**30)
    nnx.update(model, jax.device_put(state, shardings))
    layer = model.layers if scan else model.layers[0]
    stack = (None,) if scan else ()
    spec = layer.attention.query.kernel[...].sharding.spec
    assert tuple(spec) == (*stack, "fsdp", "tensor")
    assert tuple(layer.mlp.down.kernel[...].sharding.spec) == (*stack, "tensor", "fsdp")
    assert tuple(model.embed.embedding[...].sharding.spec) == ("tensor", "fsdp")
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits_of(model), want, atol=2e-6)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6),
            gradient_of(model),
            grads,
        )


def test_activations_stay_split_by_examples():
    """An embedding that is split along its width must not split the examples less."""
    mesh = mesh_from_string("fsdp=8")
    model = replace(CONFIG, scan=True)(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    shardings = tree_shardings(state, mesh, DECODER_RULES, min_size=0)
    batch = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    tokens = jax.ShapeDtypeStruct((64, 128), jnp.int32, sharding=batch)

    def hidden(state, tokens):
        return nnx.merge(graphdef, state)(tokens).logits.hidden

    with jax.set_mesh(mesh):
        fn = jax.jit(hidden, in_shardings=(shardings, batch), out_shardings=batch)
        text = fn.lower(state, tokens).compile().as_text()
    # no device has the residual stream of more examples than its own 8
    assert not re.search(r"f32\[(16|32|64),128,(16|2)\]", text)


@pytest.mark.parametrize("scan", [False, True])
def test_no_array_of_time_by_time(scan):
    time = 1024
    config = replace(
        CONFIG,
        num_heads=2,
        num_kv_heads=1,
        scan=scan,
        attention=lambda *args, **kw: blocked_attention(*args, **kw, block=128),
    )
    model = config(nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    def loss(state):
        tokens = jnp.zeros((1, time), jnp.int32)
        return jnp.sum(nnx.merge(graphdef, state)(tokens).logits.hidden ** 2)

    text = jax.jit(jax.grad(loss)).lower(state).compile().as_text()
    assert not re.search(rf"\b{time},{time}\b", text)


def test_a_small_decoder_learns_from_a_large_one():
    """The step as it is used: heads on both sides, packed rows, features by path."""
    teacher = replace(CONFIG, scan=True)(nnx.Rngs(0))
    student = replace(CONFIG, num_layers=2, width=8)(nnx.Rngs(1))
    optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
    step = make_distill_step(objectives.LogitKD(ce_weight=0.0), teacher)
    ids = jnp.repeat(jnp.array([[1, 2]]), 6, axis=1).repeat(4, 0)
    batch = {
        "tokens": TOKENS,
        "positions": jnp.tile(jnp.arange(6), 2)[None].repeat(4, 0),
        "segment_ids": ids,
        "labels": jnp.roll(TOKENS, -1, axis=1),
        "loss_mask": ids == 1,
    }
    kls = [float(step(student, optimizer, batch)["kl"].value) for _ in range(60)]
    assert kls[-1] < 0.3 * kls[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads must be a multiple of num_kv_heads, 2, got 3"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"local_layers": ()}, "local_layers must have at least one entry"),
        ({"logit_softcap": 0.0}, "logit_softcap must be positive and finite, got 0.0"),
        ({"norm_eps": -1.0}, "norm_eps must be positive and finite, got -1.0"),
        ({"embed_scale": 0.0}, "embed_scale must be positive and finite, got 0.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_functions_are_no_names():
    """They come from config files, where nothing else checks their types."""
    given = {"activation": abs, "attention": abs, "remat": None}
    check_functions("DecoderConfig", SimpleNamespace(**given))
    for field, value in (("activation", "silu"), ("attention", None), ("remat", True)):
        match = f"DecoderConfig: {field} must be a function, got {value!r}"
        with pytest.raises(TypeError, match=match):
            check_functions("DecoderConfig", SimpleNamespace(**{**given, field: value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": -1.0}, "base must be positive and finite, got -1.0"),
        ({"factor": 0.0}, "factor must be positive and finite, got 0.0"),
        ({"original_length": 0}, "original_length must be at least 1, got 0"),
        (
            {"original_length": 8, "high_freq_factor": 1.0},
            "high_freq_factor must be above low_freq_factor, 1.0, got 1.0",
        ),
        ({"divisors": (1.0,)}, "divisors must be one for each pair of a head, 4"),
    ],
)
def test_frequencies_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Rope(**fields).frequencies(8)


def test_a_token_that_is_none_is_taken_for_no_other():
    """Nor is -1 the last one, as an index of numpy would be."""
    model = CONFIG(nnx.Rngs(0))
    for token in (-1, CONFIG.vocab_size):
        hidden = model(TOKENS.at[0, 3].set(token)).logits.hidden
        assert jnp.isnan(hidden[0, 3]).all()
        assert jnp.isfinite(hidden[1:]).all()


def test_frequencies_of_llama_3():
    """Short waves stay, long ones are stretched, and between there is a ramp."""
    plain, rope = Rope(10_000.0), Rope(10_000.0, 8.0, 64, 1.0, 4.0)
    waves = 2 * np.pi / plain.frequencies(8)  # 6.3, 63, 630, 6300
    ratio = plain.frequencies(8) / rope.frequencies(8)
    assert ratio[0] == 1
    np.testing.assert_allclose(ratio[2:], 8, rtol=1e-6)
    kept = (64 / waves[1] - 1) / 3
    np.testing.assert_allclose(1 / ratio[1], kept + (1 - kept) / 8, rtol=1e-5)
    halved = Rope(10_000.0, divisors=(1.0, 2.0, 4.0, 8.0)).frequencies(8)
    np.testing.assert_allclose(halved * [1, 2, 4, 8], plain.frequencies(8), rtol=1e-6)


def test_only_relative_positions_matter():
    model = CONFIG(nnx.Rngs(0))
    shifted = jnp.arange(12)[None].repeat(4, 0) + 100
    np.testing.assert_allclose(
        logits_of(model, TOKENS, shifted), logits_of(model), atol=1e-5
    )
