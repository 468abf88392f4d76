"""A teacher on four devices beside a student on four others, in a loop of one's own."""

from __future__ import annotations

import gc
import traceback
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import make_distill_step, models, objectives
from distilljax.losses import LinearHead
from distilljax.metrics import Window
from distilljax.sharding import batch_sharding, mesh_from_string
from distilljax.students import quantize_weights
from distilljax.teachers import StreamedTeacher, part
from distilljax.terms import Outputs
from distilljax.typing import Mean, Metrics
from tests.meshes import assert_close, pieces

DECODER = models.DecoderConfig(
    vocab_size=64,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    ffn_width=32,
)
SMALL = models.DecoderConfig(
    vocab_size=64,
    width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    ffn_width=16,
)


@pytest.fixture
def there():
    return mesh_from_string("data=2,tensor=2", jax.devices()[4:])


@pytest.fixture
def here():
    return mesh_from_string("data=2,fsdp=2", jax.devices()[:4])


def text_batches(count, rows=8, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens = rng.integers(0, 64, (rows, 6))
        yield {
            "tokens": tokens,
            "labels": np.roll(tokens, -1, axis=1),
            "loss_mask": rng.integers(0, 2, (rows, 6)).astype(bool),
        }


def train(make_step, batches, student, mesh):
    """Losses, and the student's parameters."""
    student = student(nnx.Rngs(1))
    optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)
    step = make_step()
    losses = []
    with jax.set_mesh(mesh):
        for module in (student, optimizer):
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            nnx.update(module, jax.device_put(nnx.state(module), whole))
        for batch in batches:
            metrics = step(student, optimizer, batch)
            jax.block_until_ready(metrics)
            losses.append(float(metrics["loss"].value))
    return losses, nnx.to_pure_dict(nnx.state(student, nnx.Param))


OBJECTIVES = {
    "logits": objectives.LogitKD(temperature=2.0),
    "sum": objectives.Sum(
        {
            "kd": objectives.LogitKD(temperature=2.0),
            "attention": objectives.FeatureKD(
                {"layers/0": "layers/1"}, projection=None
            ),
        }
    ),
}


def with_width(width):
    return models.DecoderConfig(**{**vars(SMALL), "width": width})


@pytest.mark.parametrize(
    ("name", "dtype", "accumulate", "quantised"),
    [
        ("logits", None, 1, False),
        ("sum", None, 2, False),
        ("logits", jnp.bfloat16, 1, False),
        ("logits", None, 1, True),
    ],
)
def test_losses_are_those_of_the_teacher_in_the_step(
    here, there, name, dtype, accumulate, quantised
):
    objective = OBJECTIVES[name]
    teacher = DECODER(nnx.Rngs(0))
    if quantised:
        teacher = quantize_weights(teacher, "int8")
    student = with_width(16)
    options = {"accumulate": accumulate, "compute_dtype": dtype}
    batches = list(text_batches(3))
    sent = [jax.device_put(batch, batch_sharding(here)) for batch in batches]
    features = ["layers/1"] if name == "sum" else []
    streamed = StreamedTeacher(
        teacher,
        mesh=there,
        sharding=batch_sharding(here),
        features=features,
        compute_dtype=dtype,
        example=batches[0],
    )

    def inline():
        whole = jax.sharding.NamedSharding(here, jax.sharding.PartitionSpec())
        nnx.update(teacher, jax.device_put(nnx.state(teacher), whole))
        return make_distill_step(objective, teacher, **options)

    def outside():
        return make_distill_step(objective, teacher_head=streamed.head, **options)

    expected, params = train(inline, sent, student, here)
    found, same = train(outside, streamed(sent), student, here)
    rtol = 1e-5 if dtype is None else 1e-3
    np.testing.assert_allclose(found, expected, rtol=rtol)
    if dtype is None:
        assert_close(same, params, rtol=1e-4, atol=1e-5)
    width = 2 if dtype is not None else 4
    per_token = 16 * width * (2 if name == "sum" else 1)
    assert streamed.bytes_per_token == per_token


class Batches:
    """Numbered batches, resumable, which note when they are read."""

    def __init__(self, count, mesh, noted=None):
        self.at, self.count = 0, count
        self.sharding, self.noted = batch_sharding(mesh), noted

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.count:
            raise StopIteration
        self.at += 1
        if self.noted is not None:
            self.noted.append(("teacher", self.at))
        rows = np.full((8, 4), self.at, np.float32)
        batch = {"inputs": rows, "labels": np.zeros(8, np.int32)}
        return jax.device_put(batch, self.sharding), np.arange(8)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def doubled(state, batch):
    return Outputs(logits=2 * batch["inputs"] * state)


def made(here, there, forward=doubled, **options):
    options = {"mesh": there, "sharding": batch_sharding(here)} | options
    return StreamedTeacher(jnp.ones(()), forward, **options)


def numbers(batch):
    return float(batch["inputs"][0, 0]), float(batch["teacher"].logits[0, 0])


def test_batches_keep_their_order_and_their_outputs(here, there):
    streamed = made(here, there, depth=3)
    found = [numbers(batch) for batch, _ in streamed(Batches(7, here))]
    assert found == [(n, 2.0 * n) for n in range(1, 8)]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_next_batches_are_with_the_teacher_before_the_student_is_waited_for(
    here, there, depth
):
    noted = []
    for number, _ in enumerate(made(here, there, depth=depth)(Batches(6, here, noted))):
        noted.append(("student", number + 1))
        if number == 3:
            break
    first = [("teacher", n + 1) for n in range(depth)]
    for n in range(1, 5):
        first += [("teacher", n + depth), ("student", n)]
    assert noted == first


def test_the_state_is_that_of_the_batch_last_yielded(here, there):
    batches = Batches(9, here)
    stream = made(here, there, depth=2)(batches)
    assert stream.get_state() == {"at": 0}
    for number in (1, 2, 3):
        next(stream)
        assert stream.get_state() == {"at": number}
    assert batches.at == 5
    stream.set_state({"at": 3})
    assert numbers(next(stream)[0]) == (4, 8)
    assert stream.get_state() == {"at": 4}
    plain = made(here, there)([{"inputs": jnp.ones((8, 4))}])
    with pytest.raises(TypeError, match="get_state: batches must have a get_state"):
        plain.get_state()


def broken(state, batch):
    raise RuntimeError("the teacher has no weights")


def test_an_error_of_the_teacher_is_raised_in_the_loop_with_its_own_traceback(
    here, there
):
    with pytest.raises(RuntimeError, match="no weights") as error:
        next(made(here, there, broken)(Batches(3, here)))
    frames = traceback.extract_tb(error.value.__traceback__)
    assert frames[-1].name == "broken"


def fails_at_three(state, batch):
    def check(x):
        if np.asarray(x)[0, 0] == 3:
            raise RuntimeError("the teacher fails at batch 3")
        return x

    shape = jax.ShapeDtypeStruct(batch["inputs"].shape, jnp.float32)
    return Outputs(jax.pure_callback(check, shape, batch["inputs"]) * state)


def test_an_error_while_the_teacher_runs_is_raised_at_its_batch(here):
    there = mesh_from_string("data=1", jax.devices()[7:])
    stream = made(here, there, fails_at_three)(Batches(4, here))
    # at once, where the program is waited for when it is sent; or when it is used
    errors = ValueError, jax.errors.JaxRuntimeError
    with pytest.raises(errors, match="fails at batch 3"):
        list(stream)
    assert stream.get_state()["at"] < 3


@pytest.mark.parametrize("text", ["data=4", "tensor=4", "data=2,tensor=2", "fsdp=4"])
def test_outputs_are_split_over_the_batch_on_both_sides(here, text, monkeypatch):
    """And none goes through the host, as device_put would send it."""
    there = mesh_from_string(text, jax.devices()[4:])
    fetched, seen = [], []
    value = type(jnp.ones(1))._value
    spy = property(lambda x: fetched.append(x.shape) or value.fget(x))
    monkeypatch.setattr(type(jnp.ones(1)), "_value", spy)
    streamed = made(here, there)
    batches = Batches(2, here)
    batch, _ = next(batches)
    put = jax.device_put
    monkeypatch.setattr(
        "distilljax.teachers.transfer.jax.device_put",
        lambda x, to: seen.append(([y.shape for y in x], to)) or put(x, to),
    )
    fetched.clear()
    with jax.transfer_guard("disallow"):
        sent = streamed.with_outputs(batch)
    assert not fetched
    assert pieces(sent["teacher"].logits) == {(2, 4)}
    assert sent["teacher"].logits.sharding == batch_sharding(here)
    (to_teacher, to_student) = seen
    assert to_teacher == ([(2, 4)] * 4, list(there.devices.flat))
    assert to_student[0] == [(2, 4)] * 4
    np.testing.assert_array_equal(sent["teacher"].logits, 2 * batch["inputs"])


@pytest.mark.parametrize("counts", [(1, 7), (3, 5), (6, 2), (7, 1)])
def test_any_numbers_of_devices_go_together(counts):
    teacher, student = counts
    there = mesh_from_string("tensor=-1", jax.devices()[8 - teacher :])
    here = mesh_from_string("data=-1", jax.devices()[:student])
    rows = teacher * student
    inputs = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    batch = jax.device_put({"inputs": inputs}, batch_sharding(here))
    streamed = made(here, there)
    with jax.transfer_guard("disallow"):
        sent = streamed.with_outputs(batch)["teacher"].logits
    assert pieces(sent) == {(rows // student, 4)}
    np.testing.assert_array_equal(sent, 2 * inputs)


def test_what_the_teacher_does_not_read_is_not_sent(here, there, monkeypatch):
    """Labels and masks; but that they are there, it may ask."""
    sent = []
    move = part.move_rows
    monkeypatch.setattr(
        part, "move_rows", lambda tree, to: sent.append(tree) or move(tree, to)
    )

    def asks(state, batch):
        return Outputs(batch["inputs"] * (2 if "labels" in batch else 1) * state)

    batch, _ = next(Batches(1, here))
    found = made(here, there, asks).with_outputs(batch)
    assert set(sent[0]) == {"inputs"}
    assert numbers(found) == (1, 2)
    assert found["labels"] is batch["labels"]


def with_head(state, batch):
    hidden = (batch["tokens"][..., None] * jnp.ones(32)).astype(jnp.bfloat16)
    return Outputs(LinearHead(hidden, state), {"unused": hidden})


def test_bytes_per_token_are_those_of_the_hidden_states(here, there):
    kernel = jnp.ones((32, 1000), jnp.bfloat16)
    example = {"tokens": np.zeros((8, 5), np.int32)}
    options = {"mesh": there, "sharding": batch_sharding(here), "example": example}
    streamed = StreamedTeacher(kernel, with_head, features=(), **options)
    batch = streamed.with_outputs(jax.device_put(example, batch_sharding(here)))
    sent = batch["teacher"]
    assert sent.logits.kernel is None
    assert not sent.features
    assert sent.logits.hidden.dtype == jnp.bfloat16
    assert sent.logits.hidden.nbytes == 8 * 5 * 32 * 2
    assert streamed.bytes_per_token == 32 * 2
    assert streamed.head.kernel.sharding.device_set == set(here.devices.flat)
    assert "64 bytes per token cross" in streamed.described()
    both = StreamedTeacher(kernel, with_head, **options)
    assert both.shapes(example)["teacher"].features["unused"].shape == (8, 5, 32)
    assert both.bytes_per_token == 2 * 32 * 2


def test_a_head_needs_an_example(here, there):
    with pytest.raises(ValueError, match="example must be given to know the teacher's"):
        _ = made(here, there).head
    with pytest.raises(ValueError, match="depth must be at least 1"):
        made(here, there, depth=0)


def worked(x):
    """The same, after so many products that a device is slower than the host."""
    start = jnp.full((256, 256), x[0, 0] * 0.0)
    busy = jax.lax.fori_loop(0, 5, lambda _, c: jnp.sin(c @ c), start)
    return x + busy[0, 0]


def slow(state, batch):
    return Outputs(worked(2 * batch["inputs"] * state))


@pytest.mark.parametrize("depth", [1, 3])
def test_a_host_that_is_ahead_waits_for_the_teacher(here, there, monkeypatch, depth):
    """Each batch that is given out is one whose outputs were waited for, and no more
    than `depth` others have been asked for by then."""
    waited_for, real = [], jax.block_until_ready

    def wait(x):
        waited_for.append([id(leaf) for leaf in jax.tree.leaves(x)])
        return real(x)

    monkeypatch.setattr(jax, "block_until_ready", wait)
    source = Batches(10, here)
    stream = made(here, there, depth=depth)(source)
    for number, (batch, _) in enumerate(stream, start=1):
        assert waited_for[-1] == [id(x) for x in jax.tree.leaves(batch["teacher"])]
        assert source.at == min(number + depth, 10)


def run_slowly(slower, count, here):
    """How many steps and answers were on their way at each step, and bytes alive."""
    there = mesh_from_string("data=1", jax.devices()[7:])

    @jax.jit
    def step(total, teacher):
        logits = teacher.logits
        seen = worked(logits) if slower == "student" else logits
        total = total + seen.sum()
        return total, Metrics.of({"loss": Mean(total, 1.0)})

    stream = made(here, there, slow if slower == "teacher" else doubled, depth=2)
    batches = stream(Batches(count, here))
    window, recent, in_flight, sizes = Window(lead=2), deque(maxlen=99), [], []
    total = jax.device_put(0.0, batch_sharding(here).mesh.devices.item())
    for number, (batch, index) in enumerate(batches, start=1):
        total, metrics = step(total, batch["teacher"])
        window.add(number, metrics, index)
        recent.append(total)
        asked = [item[0][0]["teacher"].logits for item in batches._queue]
        in_flight.append(sum(not x.is_ready() for x in (*recent, *asked)))
        if number % 100 == 50:
            window._pending.clear()
            recent.clear()
            gc.collect()
            sizes.append(sum(x.nbytes for x in jax.live_arrays()))
    assert float(total) == sum(2 * 32 * n for n in range(1, count + 1))
    return in_flight, sizes


@pytest.mark.parametrize("slower", ["teacher", "student"])
def test_memory_does_not_grow_over_1000_steps(slower, monkeypatch):
    """No batch is kept that was given out, and few are on their way, whoever is slow:
    two answers ahead, and two steps behind the last.

    The second could only fail on an accelerator: on a CPU, what is sent from one device
    to another waits until that has nothing else to do.
    """
    monkeypatch.setattr("distilljax.metrics.max_lead", lambda: 8)  # as on accelerators
    here = mesh_from_string("data=1", jax.devices()[:1])
    in_flight, sizes = run_slowly(slower, 1000, here)
    assert len(sizes) == 10
    assert max(sizes[1:]) <= sizes[1] + 8 * 4 * 4
    assert 1 <= max(in_flight) <= 5
