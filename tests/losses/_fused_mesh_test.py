"""The fused pass on eight devices: the numbers of one, and what is never sent around.

What is protected: the compiled program reduces over `tensor` one number for each
position (and the gradient of the hidden states, which every split unembedding sums
there), gathers neither logits nor kernels along `tensor`, and along `fsdp` each kernel
once, however many chunks of positions there are.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distilljax import losses
from distilljax.losses import LinearHead, fused_divergence
from distilljax.planning.collectives import collectives as collectives_of
from distilljax.planning.hlo import Program
from distilljax.sharding import batch_sharding, mesh_from_string
from tests.losses.contract import UNOPTIMIZED

BATCH, TIME, WIDTH, TEACHER_WIDTH, CLASSES, CHUNK = 8, 6, 8, 12, 128, 3


def arguments(classes=CLASSES, teacher_classes=CLASSES, batch=BATCH):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    student = LinearHead(
        normal(batch, TIME, WIDTH), normal(WIDTH, classes), normal(classes), 3.0
    )
    teacher = LinearHead(
        normal(batch, TIME, TEACHER_WIDTH), normal(TEACHER_WIDTH, teacher_classes)
    )
    labels = jnp.asarray(rng.integers(0, 100, (batch, TIME)))
    where = jnp.asarray(rng.random((batch, TIME)) > 0.4)
    return student, teacher, labels, where


def loss(student, teacher, labels, where, **options):
    total, parts = fused_divergence(
        student,
        teacher,
        labels=labels,
        where=where,
        ce_weight=0.5,
        chunk_tokens=CHUNK,
        **options,
    )
    return total.sum / total.count, parts


def gradient(options):
    return jax.value_and_grad(functools.partial(loss, **options), has_aux=True)


@functools.cache
def on_one_device(divergence):
    options = {"divergence": divergence, "temperature": 1.5}
    compiled = jax.jit(gradient(options), compiler_options=UNOPTIMIZED)
    return compiled(*arguments())


def on_mesh(mesh, args, options):
    """The compiled program, and its arguments as a large run would hold them."""
    rows = batch_sharding(mesh)
    kernel = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

    def place(head):
        return LinearHead(
            jax.device_put(head.hidden, rows),
            jax.device_put(head.kernel, kernel),
            head.bias,
            head.softcap,
        )

    student, teacher, *rest = args
    args = (place(student), place(teacher), *jax.device_put(rest, rows))
    program = jax.jit(gradient(options), compiler_options=UNOPTIMIZED)
    return program.lower(*args).compile(), args


SHARD = TEACHER_WIDTH * CLASSES // 2  # of a kernel, where tensor=2
HIDDEN = CHUNK * WIDTH  # the gradient of the hidden states of a chunk


@pytest.mark.parametrize(
    ("axes", "divergence", "largest"),
    [
        # All devices along one axis: whatever is sent is sent along it.
        ("tensor=8", losses.jensen_shannon, {"all-reduce": HIDDEN}),
        (
            "data=2,fsdp=2,tensor=2",
            losses.forward_kl,
            {"all-gather": SHARD, "reduce-scatter": SHARD, "all-reduce": None},
        ),
        ("data=4,fsdp=2", losses.forward_kl, {"all-gather": None, "all-reduce": None}),
    ],
)
def test_eight_devices_give_the_numbers_of_one(axes, divergence, largest):
    """And send no more than they must: logits of a chunk are 384, a kernel 1,024."""
    mesh = mesh_from_string(axes)
    with jax.set_mesh(mesh):
        options = {"divergence": divergence, "temperature": 1.5}
        compiled, args = on_mesh(mesh, arguments(), options)
        found = compiled(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found,
        on_one_device(divergence),
    )
    sent = collectives(compiled.as_text())
    assert sent, "no collective was found: the pattern does not fit the program"
    for kind, size in sent:
        assert kind in largest, f"{kind} of {size} numbers"
        assert largest[kind] is None or size <= largest[kind], f"{kind} of {size}"


def test_a_kernel_is_sent_once_whatever_the_number_of_chunks():
    """In the loop it would be sent for each chunk: more than all else together."""
    mesh = mesh_from_string("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        compiled, _ = on_mesh(mesh, arguments(), {})
    sent = collectives_of(Program(compiled.as_text()), mesh)
    along = [c for c in sent if c.axes == ("fsdp",) and c.kind != "all-reduce"]
    assert [c.times for c in along] == [1] * 3
    sizes = sorted(c.shapes[0].size for c in along)
    # the student's gradient, split again by rows, its kernel and the teacher's
    assert sizes == [WIDTH * CLASSES // 8, WIDTH * CLASSES // 2, SHARD]
    loops = [c for c in sent if c.times == BATCH * TIME // 4 // CHUNK]
    assert loops, "the loop over chunks reduces over the classes, and was not found"
    assert max(c.shapes[0].size for c in loops) <= HIDDEN


def test_classes_that_do_not_divide_are_padded_on_a_mesh():
    """134 classes on two shards are 67, which is prime; on four they are padded."""
    args = arguments(classes=134, teacher_classes=134)
    expected = jax.jit(gradient({}), compiler_options=UNOPTIMIZED)(*args)
    for axes in ("fsdp=4,tensor=2", "fsdp=2,tensor=4"):
        with jax.set_mesh(mesh_from_string(axes)):
            student, teacher, *rest = args
            # a numpy teacher of dense logits is padded as one of jax is
            dense = np.asarray(teacher.logits())
            found = jax.jit(gradient({}), compiler_options=UNOPTIMIZED)(*args)
            loss(student, dense, *rest)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            found,
            expected,
        )


def test_nothing_needs_to_divide():
    """42 positions over 4 devices, and vocabularies that are padded differently."""
    args = arguments(classes=126, teacher_classes=122, batch=7)
    options = {"num_classes": 101}
    expected = jax.jit(gradient(options), compiler_options=UNOPTIMIZED)(*args)
    with jax.set_mesh(mesh_from_string("data=2,fsdp=2,tensor=2")):
        found = jax.jit(gradient(options), compiler_options=UNOPTIMIZED)(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found,
        expected,
    )


def by_position(student, teacher, where):
    """Values at each position, and the gradient of a weighted sum of them."""

    def total(student):
        values = losses.jensen_shannon(student, teacher, where=where)
        return jnp.sum(
            values * jnp.arange(float(values.size)).reshape(values.shape)
        ), values

    return jax.value_and_grad(total, has_aux=True)(student)


@pytest.mark.parametrize("axes", ["data=4,fsdp=2", "data=2,fsdp=2,tensor=2"])
def test_position_by_position_every_device_has_its_own(axes, monkeypatch):
    """Also where the positions, 42, do not divide; logits of all would be 5,376."""
    monkeypatch.setattr("distilljax.losses._heads.default_chunk", lambda *_: CHUNK)
    student, teacher, _, where = arguments(batch=7)
    expected = jax.jit(by_position, compiler_options=UNOPTIMIZED)(
        student, teacher, where
    )
    with jax.set_mesh(mesh_from_string(axes)):
        program = jax.jit(by_position, compiler_options=UNOPTIMIZED)
        compiled = program.lower(student, teacher, where).compile()
        found = compiled(student, teacher, where)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )
    # the kernel's gradient is the largest of what is summed over the devices
    sent = collectives(compiled.as_text())
    assert sent
    assert max(size for _, size in sent) <= WIDTH * CLASSES


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(text):
    """Kind and size of the largest result of everything that devices send."""
    found = []
    for match in COLLECTIVE.finditer(text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
        sizes = [np.prod([int(n) for n in s.split(",") if n]) for s in shapes]
        found.append((match[2], max(sizes)))
    return found
