"""Students and teachers of other libraries, through a forward function alone.

Flax Linen is in distill_test.py. Equinox comes with the tests; Tunix is heavy, and its
tests are run where it is installed, as docs/other_models.md says.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import make_distill_step
from distilljax.models import MLP, DecoderConfig, Rope, save_pretrained
from distilljax.objectives import LogitKD
from tests.meshes import assert_close

BOTH = LogitKD(ce_weight=0.5)
TEACHER = MLP(num_features=6, hidden=(12,), num_classes=4)(nnx.Rngs(0))
BATCH = {
    "inputs": jax.random.normal(jax.random.key(0), (8, 6)),
    "labels": jnp.arange(8) % 4,
    "loss_mask": jnp.arange(8) < 5,
}


def test_an_equinox_student_is_trained_as_the_same_one_in_nnx():
    ours = MLP(num_features=6, hidden=(5,), num_classes=4)(nnx.Rngs(1))
    model = eqx.nn.MLP(6, 4, width_size=5, depth=1, key=jax.random.key(0))
    arrays = [x for m in ours.layers for x in (m.kernel[...].T, m.bias[...])]
    model = eqx.tree_at(
        lambda m: [x for layer in m.layers for x in (layer.weight, layer.bias)],
        model,
        arrays,
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    options = {"accumulate": 2, "ema_decay": 0.9, "tx": optax.adam(0.1)}

    def forward(params, batch):
        return jax.vmap(eqx.combine(params, static))(batch["inputs"])

    step = make_distill_step(BOTH, TEACHER, student_forward=forward, **options)
    same = make_distill_step(BOTH, TEACHER, student=ours, **options)
    states = [step.init(params), same.init(ours)]
    for _ in range(3):
        states[0], found = step.pure(states[0], step.teacher_state, BATCH)
        states[1], wanted = same.pure(states[1], same.teacher_state, BATCH)
    assert_close(found, wanted)
    for name in ("params", "ema"):
        theirs, wanted = (getattr(state, name) for state in states)
        for i, layer in enumerate(theirs.layers):
            kernel, bias = (wanted["layers"][i][k] for k in ("kernel", "bias"))
            assert_close((layer.weight.T, layer.bias), (kernel, bias))


class Net(eqx.Module):
    """With batch statistics and dropout."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(6, 5, key=keys[0])
        self.norm = eqx.nn.BatchNorm(5, axis_name="batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)
        self.last = eqx.nn.Linear(5, 4, key=keys[1])

    def __call__(self, x, state, key):
        x, state = self.norm(self.first(x), state)
        return self.last(self.dropout(x, key=key)), state


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equinox_with_batch_statistics_and_dropout(accumulate):
    net, rest = eqx.nn.make_with_state(Net)(jax.random.key(1))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def forward(params, rest, batch, rng):
        model, x = eqx.combine(params, static), batch["inputs"]
        call = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
        return call(x, rest, jax.random.split(rng, len(x)))

    step = make_distill_step(
        BOTH,
        TEACHER,
        student_forward=forward,
        tx=optax.sgd(0.0),
        accumulate=accumulate,
    )

    def losses_of(seed):
        state = step.init(params, rest=rest, rng=jax.random.key(seed))
        found = []
        for _ in range(2):
            state, metrics = step.pure(state, step.teacher_state, BATCH)
            found.append(float(metrics["loss"].value))
        return found, state

    first, state = losses_of(0)
    assert first == losses_of(0)[0] != losses_of(1)[0]
    assert first[0] != first[1]  # another step, another dropout
    before, after = (jax.tree.leaves(x) for x in (rest, state.rest))
    assert any(not np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def tunix_forward(model, batch):
    """As in docs/other_models.md."""
    tokens, ids = batch["tokens"], batch["segment_ids"]
    time = tokens.shape[1]
    mask = jnp.tril(jnp.ones((1, time, time), bool))
    mask = mask & (ids[:, :, None] == ids[:, None, :])
    return model(tokens, batch["positions"], None, mask)[0]


# Tunix, and what it imports, call jax and flax by names that are on their way out
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_of_tunix_teaches_one_of_ours(tmp_path):
    pytest.importorskip("tunix", reason='needs pip install "distilljax[tunix]"')
    from tunix.models.qwen3 import model, params

    sizes = {"vocab_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    qwen = DecoderConfig(
        **sizes, width=32, num_layers=2, ffn_width=48, qk_norm=True, rope=Rope(1e6)
    )
    ours = qwen(nnx.Rngs(0))
    save_pretrained(ours, tmp_path / "qwen3")
    teacher = params.create_model_from_safe_tensors(
        str(tmp_path / "qwen3"),
        model.ModelConfig(
            **sizes,
            num_layers=2,
            embed_dim=32,
            hidden_dim=48,
            rope_theta=1_000_000,
            norm_eps=1e-6,
            use_tied_embedding=True,
        ),
    )
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 64)
    batch = {
        "tokens": tokens,
        "positions": jnp.tile(jnp.arange(6), 2)[None].repeat(4, 0),
        "segment_ids": jnp.repeat(jnp.array([[1, 2]]), 6, axis=1).repeat(4, 0),
        "labels": jnp.roll(tokens, -1, axis=1),
    }
    call = jax.jit(tunix_forward, static_argnums=0)
    want = nnx.jit(lambda m, *args: m(*args).logits.logits())(
        ours, tokens, batch["positions"], batch["segment_ids"]
    )
    np.testing.assert_allclose(call(teacher, batch), want, atol=1e-4)

    student = DecoderConfig(**sizes, width=16, num_layers=1, ffn_width=32)(nnx.Rngs(2))
    optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
    objective = LogitKD(ce_weight=0.0)
    step = make_distill_step(objective, teacher, teacher_forward=tunix_forward)
    kls = [float(step(student, optimizer, batch)["kl"].value) for _ in range(60)]
    assert kls[-1] < 0.3 * kls[0]
