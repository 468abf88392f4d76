"""What a fused pass refuses, and what it leaves out of its sum."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from distilljax import losses
from distilljax.losses import LinearHead, fused_divergence
from tests.losses.contract import UNOPTIMIZED

ROWS, CLASSES = 12, 7


def heads(rows=ROWS):
    rng = np.random.default_rng(0)
    h, k, g, c = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((rows, 4), (4, CLASSES), (rows, 5), (5, CLASSES))
    )
    return LinearHead(h, k), LinearHead(g, c)


@pytest.mark.parametrize("chunk", [None, 5])
def test_labels_of_weight_zero_cannot_spoil_the_sum(chunk):
    """-100 for "no label" is logged as nan, and teaches nothing."""
    student, teacher = heads()
    labels = jnp.zeros(ROWS, int).at[3].set(-100)

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def run(student):
        def of(student, **options):
            total, parts = fused_divergence(
                student, teacher, chunk_tokens=chunk, **options
            )
            return total.sum, parts

        gradient = functools.partial(jax.value_and_grad, has_aux=True)
        with_labels = functools.partial(of, labels=labels, ce_weight=0.0)
        return gradient(with_labels)(student), gradient(of)(student)

    ((value, parts), grads), ((expected, _), slopes) = run(student)
    assert float(value) == float(expected)
    jax.tree.map(np.testing.assert_array_equal, grads, slopes)
    assert np.isnan(parts["ce"].value)
    assert np.isfinite(parts["kd"].value)


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_divergence_may_ask_for_labels(chunk):
    student, teacher = heads()
    labels = jnp.arange(ROWS) % CLASSES
    loss = functools.partial(losses.decoupled_kd, target_weight=2.0)
    total, _ = fused_divergence(
        student, teacher, divergence=loss, labels=labels, temperature=3.0,
        chunk_tokens=chunk,
    )  # fmt: skip
    z, v = student.logits(), teacher.logits()
    expected = jnp.sum(loss(z, v, labels=labels, temperature=3.0))
    np.testing.assert_allclose(total.sum, expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.logit_mse, losses.hinge_ranking])
def test_a_divergence_may_have_no_temperature(loss):
    student, teacher = heads()
    total, _ = fused_divergence(student, teacher, divergence=loss, chunk_tokens=5)
    expected = jnp.sum(loss(student.logits(), teacher.logits()))
    np.testing.assert_allclose(total.sum, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"temperature must be 1 .* got 2\.0"):
        fused_divergence(student, teacher, divergence=loss, temperature=2.0)


def a_mean(z, v):
    return jnp.mean((z - v) ** 2)


@pytest.mark.parametrize("loss", [losses.dist, a_mean])
def test_a_loss_over_the_batch_is_refused(loss):
    """Its value would depend on the size of a chunk."""
    student, teacher = heads()
    message = r"divergence must give one value for each position, got \(\) for three"
    with pytest.raises(ValueError, match=message):
        fused_divergence(student, teacher, divergence=loss)


def test_what_belongs_to_positions_cannot_be_bound():
    """With few positions it would pass, and fail when there are many."""
    labels = jnp.zeros(ROWS, int)
    bound = functools.partial(losses.decoupled_kd, labels=labels)
    with pytest.raises(ValueError, match="labels must have the shape") as caught:
        fused_divergence(*heads(), divergence=bound)
    assert "cannot be bound" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ce_weight": 1.0}, "labels must be given where ce_weight is not 0"),
        ({"ce_weight": -1.0}, "ce_weight must lie in"),
        ({"kd_weight": np.nan}, "kd_weight must lie in"),
        ({"kd_weight": np.inf}, "kd_weight must be finite"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fused_divergence(*heads(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_tokens": 2.5}, "chunk_tokens must be an integer"),
        ({"num_classes": 2.5}, "num_classes must be an integer"),
        ({"matmul_dtype": jnp.int8}, "matmul_dtype must be a floating-point type"),
        ({"teacher": jnp.zeros((ROWS, CLASSES), int)}, "teacher must be a floating"),
    ],
)
def test_bad_kinds_are_named(options, message):
    student, teacher = heads()
    plain = inspect.unwrap(fused_divergence)  # no type checker
    with pytest.raises(TypeError, match=message):
        plain(student, **({"teacher": teacher} | options))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("softcap", 0.0, "softcap must be positive"),
        ("softcap", -3.0, "softcap must be positive"),
        ("softcap", np.inf, "softcap must be finite"),
        ("scale", np.nan, "scale must be finite"),
    ],
)
def test_a_head_without_logits_is_refused(field, value, message):
    """A bound of 0 makes all logits 0: a finite loss from which nothing is learnt."""
    student, teacher = heads()
    head = LinearHead(student.hidden, student.kernel, **{field: value})
    with pytest.raises(ValueError, match=message):
        fused_divergence(head, teacher)


@pytest.mark.parametrize("chunk", [None, 4])
def test_no_positions_are_no_loss(chunk):
    student, teacher = heads(0)
    total, _ = fused_divergence(student, teacher, chunk_tokens=chunk)
    assert float(total.sum) == float(total.count) == 0


def test_a_mesh_of_explicit_axes_is_named():
    """The default of jax.make_mesh: the compiler would raise something obscure."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="'data' as an Auto axis"):
        fused_divergence(*heads())


def test_a_traced_temperature_out_of_its_domain_is_nan():
    student, teacher = heads()

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def run(temperature):
        return fused_divergence(student, teacher, temperature=temperature)[0].sum

    assert np.isnan(run(-1.0))
    assert np.isfinite(run(2.0))
