"""Weights of few bits: how many, how far off, and trained as if."""

from __future__ import annotations

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import losses, make_distill_step, objectives
from distilljax.students import drift, fake_quantize, quantize_weights
from tests.students.small import BATCH, arrays_of, decoder, logits_of

pytest.importorskip("qwix")

UP = r"layers/.*mlp/up"
INPUTS = {"inputs": jax.random.normal(jax.random.key(3), (32, 16))}


def net(seed):
    rngs = nnx.Rngs(seed)
    maps = nnx.Linear(16, 24, rngs=rngs), nnx.relu, nnx.Linear(24, 6, rngs=rngs)
    return nnx.Sequential(*maps)


@pytest.mark.parametrize("scan", [False, True])
def test_kernels_are_kept_in_few_bits(scan):
    teacher = decoder(num_layers=2, scan=scan, tied=False)
    small = quantize_weights(teacher, "int4", tile_size=4, modules=UP)
    kinds = {x.dtype for path, x in arrays_of(small).items() if "qvalue" in path}
    assert kinds == {jnp.dtype(jnp.int4)}
    layer = small.layers if scan else small.layers[1]
    up = layer.mlp.up.kernel.array
    values = up.qvalue.astype(jnp.float32).reshape(-1, 4, 4, 24)[-1]
    scales = up.scale.reshape(-1, 4, 1, 24)[-1]
    theirs = (teacher.layers if scan else teacher.layers[1]).mlp.up.kernel[...]
    error = np.abs((values * scales).reshape(16, 24) - theirs.reshape(-1, 16, 24)[-1])
    assert 0 < error.max() <= 0.5001 * scales.max()
    np.testing.assert_array_equal(small.head.kernel, teacher.head.kernel)


def test_more_bits_drift_less():
    teacher = net(0)
    kl = {
        bits: drift(quantize_weights(teacher, bits), teacher, [INPUTS])["kl"].value
        for bits in ("int8", "int4")
    }
    assert 0 < kl["int8"] < 0.05 * kl["int4"]


def test_the_drift_is_the_kl_of_the_two():
    original, changed = net(0), net(1)
    x, counts = INPUTS["inputs"], jnp.arange(32) % 3 > 0
    parts = [{"inputs": x[i], "loss_mask": counts[i]} for i in (np.s_[:20], np.s_[20:])]
    found = drift(changed, original, parts)
    q, p = changed(x)[counts], original(x)[counts]
    want = losses.forward_kl(q, p).mean()
    np.testing.assert_allclose(found["kl"].value, want, rtol=1e-5)
    same = (q.argmax(-1) == p.argmax(-1)).mean()
    np.testing.assert_allclose(found["agreement"].value, same, rtol=1e-6)
    assert found["kl"].count == counts.sum()
    assert drift(original, original, [INPUTS])["kl"].value == 0


@pytest.mark.parametrize("scan", [False, True])
def test_a_quantised_teacher_teaches(scan):
    """Frozen, in both layers of the step, its features captured through the scan."""
    whole = decoder(num_layers=2, scan=scan)
    teacher = quantize_weights(whole, "int4", tile_size=8, modules=r"layers/.*mlp/.*")
    before = jax.tree.map(np.array, arrays_of(teacher))
    student = decoder(7, num_layers=2)
    objective = objectives.Sum(
        {
            "logits": objectives.LogitKD(ce_weight=0.0),
            "features": objectives.FeatureKD({"layers/1/mlp": "layers/1/mlp/down"}),
        }
    )
    step = make_distill_step(objective, teacher, student=student, tx=optax.adam(1e-3))
    state = step.init(student)
    _, metrics = step.pure(state, step.teacher_state, BATCH)
    optimizer = nnx.Optimizer(student, optax.adam(1e-3), wrt=nnx.Param)
    found = [float(step(student, optimizer, BATCH)["loss"].value) for _ in range(5)]
    np.testing.assert_allclose(metrics["loss"].value, found[0], rtol=1e-5)
    assert found[-1] < found[0]
    jax.tree.map(np.testing.assert_array_equal, arrays_of(teacher), before)


@pytest.mark.parametrize("scan", [False, True])
def test_a_student_trains_as_the_quantised_one_that_it_will_be(scan):
    plain = decoder(num_layers=2, scan=scan)
    options = {"tile_size": 8, "modules": r"layers/.*mlp/.*"}
    student = fake_quantize(plain, "int4", **options)
    assert arrays_of(student).keys() == arrays_of(plain).keys()
    teacher = decoder(3, num_layers=2)
    step = make_distill_step(objectives.LogitKD(ce_weight=0.0), teacher)
    optimizer = nnx.Optimizer(student, optax.adam(3e-3), wrt=nnx.Param)
    kls = [float(step(student, optimizer, BATCH)["kl"].value) for _ in range(6)]
    assert kls[-1] < kls[0]
    nnx.update(plain, nnx.state(student))
    final = quantize_weights(plain, "int4", **options)
    np.testing.assert_allclose(logits_of(student), logits_of(final), atol=1e-5)
    assert np.abs(logits_of(student) - logits_of(plain)).max() > 1e-3


def test_the_gradient_passes_the_rounding():
    """It is that of the product without it."""
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (5, 4))

    def gradient(model):
        graphdef, state = nnx.split(model)
        return jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s)(x)))(state)

    coarse = fake_quantize(model, "int4")
    assert np.abs(coarse(x) - model(x)).max() > 1e-3
    got, want = (nnx.to_pure_dict(gradient(m)) for m in (coarse, model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_inputs_may_be_rounded_too():
    model = nnx.Sequential(nnx.Linear(64, 3, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (5, 64))
    weights = fake_quantize(model, "int8")(x)
    both = fake_quantize(model, "int8", act_qtype="int4")(x)
    assert np.abs(both - model(x)).max() > 3 * np.abs(weights - model(x)).max()


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="tile_size must divide the inputs of every m"):
        quantize_weights(decoder(num_layers=1), "int4", tile_size=7)
    with pytest.raises(ValueError, match="drift: batches must have at least one batch"):
        drift(decoder(num_layers=1), decoder(num_layers=1), [])


def test_without_the_extra_it_is_named(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "qwix":
            raise ImportError("No module named 'qwix'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r"quantize_weights: qwix .*distilljax\[quant"
    ):
        quantize_weights(decoder(num_layers=1))
