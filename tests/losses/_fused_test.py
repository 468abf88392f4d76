"""The fused pass is the plain loss: values, all gradients, and what it keeps in memory.

What is protected: a pass over chunks that leaves out, counts twice or mixes positions;
a soft-cap, scale, bias or padding that a fused loss forgets; masked positions that leak
into the kernel's gradient; memory that grows with the number of positions.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from distilljax.losses import LinearHead, fused_divergence
from tests.losses.contract import UNOPTIMIZED

LEAD, WIDTH, TEACHER_WIDTH, CLASSES = (3, 7), 5, 6, 37


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def make_heads(dtype=jnp.float32, classes=CLASSES, teacher_classes=CLASSES, **student):
    rng = np.random.default_rng(0)
    options = {
        "bias": normal(rng, classes, dtype=dtype),
        "softcap": jnp.asarray(3.0, dtype),
        "scale": jnp.asarray(0.7, dtype),
    } | student
    return (
        LinearHead(
            normal(rng, *LEAD, WIDTH, dtype=dtype),
            normal(rng, WIDTH, classes, dtype=dtype),
            **options,
        ),
        LinearHead(
            normal(rng, *LEAD, TEACHER_WIDTH, dtype=dtype),
            normal(rng, TEACHER_WIDTH, teacher_classes, dtype=dtype),
            scale=0.5,
        ),
    )


def make_batch(classes=CLASSES):
    rng = np.random.default_rng(1)
    return {
        "labels": jnp.asarray(rng.integers(0, classes, LEAD)),
        "where": jnp.asarray(rng.random(LEAD) > 0.4),
    }


def plain(student, teacher, batch, weights, divergence, temperature, num_classes=None):
    """The same from whole logits: what the pass must equal."""
    z = student.logits()[..., :num_classes]
    v = teacher.logits()[..., :num_classes]
    where, kd_weight, ce_weight = batch["where"], *weights
    kd = divergence(z, v, temperature=temperature, where=where)
    ce = losses.cross_entropy(z, batch["labels"], where=where)
    return kd_weight * losses.masked_sum(kd) + ce_weight * losses.masked_sum(ce)


def fused(student, teacher, batch, weights, divergence, temperature, **options):
    total, parts = fused_divergence(
        student,
        teacher,
        divergence=divergence,
        labels=batch["labels"],
        where=batch["where"],
        temperature=temperature,
        kd_weight=weights[0],
        ce_weight=weights[1],
        **({"chunk_tokens": 4} | options),
    )
    return total.sum, (total, parts)


def both(
    divergence, temperature, dtype=jnp.float32, num_classes=None, chunk=4, **heads
):
    """Value and gradients (heads, weights) of the fused loss and of the plain one."""
    student, teacher = make_heads(dtype, **heads)
    batch = make_batch(num_classes or CLASSES)
    weights = (jnp.asarray(0.8, dtype), jnp.asarray(0.3, dtype))

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def run(student, weights):
        def ours(student, weights):
            return fused(
                student, teacher, batch, weights, divergence, temperature,
                num_classes=num_classes, chunk_tokens=chunk,
            )  # fmt: skip

        def theirs(student, weights):
            return plain(
                student, teacher, batch, weights, divergence, temperature, num_classes
            )

        grad = functools.partial(jax.value_and_grad, argnums=(0, 1))
        (value, (total, parts)), grads = grad(ours, has_aux=True)(student, weights)
        return (value, grads), grad(theirs)(student, weights), (total, parts)

    return run(student, weights)


DIVERGENCES = [
    (losses.forward_kl, 1.0),
    (losses.forward_kl, 2.5),
    (losses.reverse_kl, 1.0),
    (functools.partial(losses.jensen_shannon, beta=0.3, normalized=True), 2.0),
    (losses.total_variation, 1.0),
]


# In chunks of 4 of the 21 positions; and all at once, as so few are by default.
CHUNKS = pytest.mark.parametrize("chunk", [4, None])


@CHUNKS
@pytest.mark.parametrize(("divergence", "temperature"), DIVERGENCES)
def test_equals_the_plain_loss_with_all_gradients(divergence, temperature, chunk):
    """Soft-cap, scale, bias, mask, labels, weights."""
    ours, theirs, _ = both(divergence, temperature, chunk=chunk)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        ours,
        theirs,
    )


@CHUNKS
def test_is_exact_in_float64(chunk):
    """Nothing is rounded to float32 on the way, in the value or in any gradient."""
    with jax.enable_x64(True):
        ours, theirs, _ = both(losses.forward_kl, 1.7, jnp.float64, chunk=chunk)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
        ours,
        theirs,
    )
    assert {x.dtype for x in jax.tree.leaves(ours)} == {np.dtype(np.float64)}


@CHUNKS
def test_different_paddings_of_the_vocabulary(chunk):
    """41 and 37 columns for 35 real classes: the rest takes no part, on either side."""
    options = {"classes": 41, "teacher_classes": 37, "num_classes": 35, "chunk": chunk}
    (value, grads), theirs, _ = both(losses.forward_kl, 1.0, **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (value, grads),
        theirs,
    )
    np.testing.assert_array_equal(grads[0].kernel[:, 35:], 0)
    student, teacher = make_heads(classes=41, teacher_classes=37)
    with pytest.raises(ValueError, match=r"teacher must have the shape.*num_classes"):
        fused_divergence(student, teacher)


def test_parts_are_what_is_logged_of_dense_logits():
    _, _, (total, parts) = both(losses.reverse_kl, 2.0)
    student, teacher = make_heads()
    batch = make_batch()
    z, v, where = student.logits(), teacher.logits(), batch["where"]
    top = jnp.argmax(z, axis=-1)
    expected = {
        "kd": losses.reverse_kl(z, v, temperature=2.0),
        "ce": losses.cross_entropy(z, batch["labels"]),
        "kl": losses.forward_kl(z, v),
        "student_entropy": losses.soft_cross_entropy(z, z),
        "teacher_entropy": losses.soft_cross_entropy(v, v),
        "agreement": (top == jnp.argmax(v, axis=-1)).astype(jnp.float32),
        "accuracy": (top == batch["labels"]).astype(jnp.float32),
    }
    assert parts.keys() == expected.keys()
    for name, values in expected.items():
        mean = losses.masked_mean(values, where)
        np.testing.assert_allclose(parts[name].value, mean, rtol=1e-5, atol=1e-6)
        assert float(parts[name].count) == float(total.count) == float(where.sum())


def test_equal_logits_are_no_agreement_by_accident():
    """The first of equals is the likeliest, as `argmax` says, not all of them."""
    zeros = LinearHead(jnp.zeros((2, 3)), jnp.zeros((3, 4)))
    teacher = jnp.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    _, parts = fused_divergence(zeros, teacher, labels=jnp.array([1, 0]))
    assert float(parts["accuracy"].value) == float(parts["agreement"].value) == 0.5


@functools.cache
def masked_gradient(chunk=4):
    def loss(student, teacher, labels, where):
        total, parts = fused_divergence(
            student,
            teacher,
            labels=labels,
            where=where,
            ce_weight=1.0,
            chunk_tokens=chunk,
        )
        return total.sum, parts

    gradient = jax.value_and_grad(loss, has_aux=True)
    return jax.jit(gradient, compiler_options=UNOPTIMIZED)


@CHUNKS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masked_positions_are_inert(bad, chunk):
    """To the bit, in the kernel's gradient too, where 0 * nan would be nan."""
    student, teacher = make_heads()
    batch = make_batch()
    labels, where = batch["labels"], batch["where"]

    def spoil(head):
        hidden = jnp.where(where[..., None], head.hidden, bad)
        return LinearHead(hidden, head.kernel, head.bias, head.softcap, head.scale)

    clean = masked_gradient(chunk)(student, teacher, labels, where)
    labels = jnp.where(where, labels, -100)
    dirty = masked_gradient(chunk)(spoil(student), spoil(teacher), labels, where)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    np.testing.assert_array_equal(dirty[1].hidden[~where], 0)


@CHUNKS
def test_an_empty_mask_gives_zero(chunk):
    student, teacher = make_heads()
    nothing = jnp.zeros(LEAD, bool)
    bad = jnp.full_like(student.hidden, jnp.nan)
    student = LinearHead(bad, student.kernel, student.bias, 3.0)
    (value, parts), grads = masked_gradient(chunk)(
        student, teacher, jnp.full(LEAD, -1), nothing
    )
    assert float(value) == 0
    assert not any(float(part.sum) for part in parts.values())
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), grads)


@CHUNKS
def test_a_label_out_of_range_is_nan_in_the_gradient_too(chunk):
    student, teacher = make_heads()
    labels = jnp.zeros(LEAD, int).at[0, 0].set(CLASSES)
    where = jnp.ones(LEAD, bool)
    (value, _), grads = masked_gradient(chunk)(student, teacher, labels, where)
    assert np.isnan(value)
    assert np.isnan(grads.kernel).any()


def test_labels_alone_and_smoothing():
    """Without a teacher it is the cross-entropy, for `objectives.CrossEntropy`."""
    student, _ = make_heads()
    labels = make_batch()["labels"]

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def run(student):
        def ours(student):
            total, _ = fused_divergence(
                student, labels=labels, ce_weight=1.0, label_smoothing=0.2
            )
            return total.sum

        def theirs(student):
            values = losses.cross_entropy(student.logits(), labels, label_smoothing=0.2)
            return jnp.sum(values)

        return [jax.value_and_grad(f)(student) for f in (ours, theirs)]

    ours, theirs = run(student)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        ours,
        theirs,
    )


def test_tied_embeddings_get_both_gradients():
    """The kernel is a view of the embedding, which is used below it as well."""
    rng = np.random.default_rng(0)
    embedding, teacher = normal(rng, CLASSES, WIDTH), normal(rng, 5, CLASSES)
    tokens = jnp.asarray(rng.integers(0, CLASSES, 5))

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def run(embedding):
        def ours(embedding):
            head = LinearHead(jnp.tanh(embedding[tokens]), embedding.T)
            return fused_divergence(head, teacher, chunk_tokens=2)[0].sum

        def theirs(embedding):
            z = jnp.tanh(embedding[tokens]) @ embedding.T
            return jnp.sum(losses.forward_kl(z, teacher))

        return jax.grad(ours)(embedding), jax.grad(theirs)(embedding)

    np.testing.assert_allclose(*run(embedding), rtol=1e-4, atol=1e-5)


def test_what_is_frozen_costs_no_gradient():
    """A frozen unembedding is as large as its gradient would be."""
    student, teacher = make_heads()

    def loss(hidden, kernel):
        head = LinearHead(hidden, kernel)
        return fused_divergence(head, teacher, chunk_tokens=4)[0].sum

    args = (student.hidden, student.kernel)
    frozen = str(jax.make_jaxpr(jax.grad(loss))(*args))
    value = str(jax.make_jaxpr(loss)(*args))
    trained = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*args))
    products = [text.count("dot_general") for text in (value, frozen, trained)]
    assert products == [2, 3, 4]  # evaluation: the logits; then one for each gradient


def test_bfloat16_heads_keep_their_accuracy():
    """At a KL of 0.01 against float64 of the same numbers; sums are in float32."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(64, 32)), rng.normal(size=(32, 500)) / 3
    near = hidden + 0.07 * rng.normal(size=hidden.shape)
    heads = [jnp.asarray(x, jnp.bfloat16) for x in (near, kernel, hidden)]

    def loss(near, kernel, hidden):
        teacher = jax.lax.stop_gradient(LinearHead(hidden, kernel))
        total, _ = fused_divergence(LinearHead(near, kernel), teacher, chunk_tokens=16)
        return total.sum / hidden.shape[0]

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, grads = gradient(*heads)
    with jax.enable_x64(True):
        exact, slopes = gradient(*(x.astype(jnp.float64) for x in heads))
    assert 0.005 < float(exact) < 0.02
    assert abs(float(value) - float(exact)) <= 1e-3 * float(exact)
    for found, true in zip(grads, slopes, strict=True):
        assert found.dtype == jnp.bfloat16
        error = np.abs(np.asarray(found.astype(jnp.float32)) - np.asarray(true)).max()
        assert error <= 1e-2 * np.abs(np.asarray(true)).max()


def test_products_in_bfloat16_on_request():
    student, teacher = make_heads()
    wide, _ = fused_divergence(student, teacher)
    narrow, _ = fused_divergence(student, teacher, matmul_dtype=jnp.bfloat16)
    assert narrow.sum.dtype == jnp.float32
    assert 0 < abs(narrow.sum - wide.sum) < 1e-2 * wide.sum


# --- Position by position ------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [losses.forward_kl, losses.logit_mse, losses.jensen_shannon]
)
def test_every_divergence_takes_heads(loss, monkeypatch):
    """[*batch] of two heads, or of a head and logits, with the gradients of logits."""
    monkeypatch.setattr("distilljax.losses._heads.default_chunk", lambda *_: 4)
    student, teacher = make_heads()
    where = make_batch()["where"]
    weights = jnp.arange(21.0).reshape(LEAD)
    bad = jnp.where(where[..., None], student.hidden, jnp.nan)
    spoilt = LinearHead(bad, student.kernel, student.bias, 3.0, 0.7)

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def run(spoilt, student):
        def of(head, *signals):
            return jnp.sum(weights * loss(*signals, where=where))

        v = teacher.logits()
        ours = jax.value_and_grad(lambda head: of(head, head, teacher))(spoilt)
        mixed = jax.value_and_grad(lambda head: of(head, head, v))(spoilt)
        theirs = jax.value_and_grad(lambda head: of(head, head.logits(), v))(student)
        return ours, mixed, theirs

    ours, mixed, theirs = run(spoilt, student)
    for found in (ours, mixed):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            found,
            theirs,
        )


def test_cross_entropy_takes_a_head():
    student, _ = make_heads()
    labels = make_batch()["labels"]
    values = losses.cross_entropy(student, labels, label_smoothing=0.1)
    expected = losses.cross_entropy(student.logits(), labels, label_smoothing=0.1)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


# --- Memory --------------------------------------------------------------------------


def temp_bytes(tokens, classes=128256, width=512, teacher_width=1024, sparse=None):
    """Of value and gradient, compiled for abstract arrays: nothing is executed."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    student = LinearHead(shape((tokens, width)), shape((width, classes)))
    teacher = sparse or LinearHead(
        shape((tokens, teacher_width)), shape((teacher_width, classes))
    )

    def loss(student, teacher):
        total, _ = fused_divergence(student, teacher)
        return total.value

    compiled = jax.jit(jax.value_and_grad(loss)).lower(student, teacher).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def sparse_teacher(kind, tokens, k):
    ids = jax.ShapeDtypeStruct((tokens, k), jnp.int32)
    values = jax.ShapeDtypeStruct((tokens, k), jnp.float32)
    if kind == "sampled":
        return losses.SampledLogits(ids, values)
    tail = jax.ShapeDtypeStruct((tokens, 1), jnp.float32)
    return losses.SparseLogits(ids, values, tail, temperatures=(1.0,))


@pytest.mark.parametrize(("kind", "k"), [("sampled", 50), ("top_k", 128)])
def test_sparse_targets_never_make_a_dense_teacher(kind, k):
    """Of a whole step's positions, as with a head: no [tokens, classes], and flat."""
    small, large = (
        temp_bytes(tokens, sparse=sparse_teacher(kind, tokens, k))
        for tokens in (8192, 16384)
    )
    assert small <= 0.15 * 4 * 8192 * 128256
    assert large <= 1.05 * small


def test_memory_is_flat_as_positions_grow():
    """One float32 array of the logits would be 4.2 GB; peers hold 1.27 to 10 of it."""
    small, large = temp_bytes(8192), temp_bytes(16384)
    assert small <= 0.15 * 4 * 8192 * 128256
    assert large <= 1.05 * small


def test_few_positions_hold_no_gradient_of_the_kernel():
    """64 of width 2,048: less than plain JAX takes, and a fifth of one [W, V] array."""
    kernel = 4 * 2048 * 32000
    assert temp_bytes(64, 32000, 2048, 4096) < 0.25 * kernel
    assert temp_bytes(1024, 32000, 2048, 4096) > kernel  # in chunks there is one


# --- Bad input -----------------------------------------------------------------------


def test_what_does_not_fit_is_said():
    student, teacher = make_heads()
    hidden, kernel = student.hidden, student.kernel
    cases = [
        ({"student": LinearHead(hidden, kernel.T)}, r"kernel=embedding\.T"),
        ({"student": LinearHead(hidden, kernel, jnp.zeros(3))}, "one bias"),
        ({"student": LinearHead(hidden, kernel, scale=jnp.ones(3))}, "scalar scale"),
        ({"teacher": teacher.logits()[:2]}, "leading axes differ"),
        ({"teacher": None}, "or labels, got neither"),
        ({"where": jnp.ones(3, bool)}, "where must have the shape"),
        ({"num_classes": 99}, r"num_classes must lie in \[1, 37\]"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"labels": jnp.zeros(3, int)}, "labels must have the shape"),
    ]
    for options, message in cases:
        arguments = {"student": student, "teacher": teacher} | options
        with pytest.raises(ValueError, match=message) as caught:
            fused_divergence(arguments.pop("student"), **arguments)
        assert str(caught.value).startswith("fused_divergence: ")
    with pytest.raises(TypeError, match="student must be a LinearHead, got"):
        inspect.unwrap(fused_divergence)(student.logits(), teacher)  # no type checker
    with pytest.raises(TypeError, match="floating-point hidden"):
        fused_divergence(LinearHead(jnp.zeros((2, 5), int), kernel), teacher)
    with pytest.raises(ValueError, match=r"forward_kl: .*kernel with as many rows"):
        losses.forward_kl(LinearHead(hidden, kernel.T), teacher)
    with pytest.raises(ValueError, match=r"forward_kl: .*\(3, 7, 37\).*\(2, 7, 37\)"):
        losses.forward_kl(student, teacher.logits()[:2])


def test_a_sparse_teacher_in_the_same_pass():
    """Its rows are cut as those of a head are; no dense teacher is made."""
    student, teacher = make_heads()
    sparse = losses.SparseLogits.top_k(teacher.logits(), 5, temperatures=(1.0, 2.0))
    where = make_batch()["where"]

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def run(student):
        def ours(student):
            total, parts = fused_divergence(
                student, sparse, temperature=2.0, where=where, chunk_tokens=4
            )
            return total.sum, parts

        def theirs(student):
            z = student.logits()
            values = losses.forward_kl(z, sparse, temperature=2.0, where=where)
            return jnp.sum(values), losses.forward_kl(z, sparse, where=where)

        gradient = functools.partial(jax.value_and_grad, has_aux=True)
        return gradient(ours)(student), gradient(theirs)(student)

    ((value, parts), grads), ((expected, kl), slopes) = run(student)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(parts["kl"].sum, kl.sum(), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grads,
        slopes,
    )


def test_labels_are_cut_with_the_positions():
    """Also where they come by keyword."""
    student, teacher = make_heads()
    labels = make_batch()["labels"]
    values = losses.decoupled_kd(student, teacher, labels=labels)
    z, v = student.logits(), teacher.logits()
    expected = losses.decoupled_kd(z, v, labels=labels)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
