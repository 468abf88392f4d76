"""Features of a model that nobody edited. What these tests protect:

a layer has the same name and the same feature whether it is a module of a list, under
remat or stacked under a scan, in both modes of NNX; what cannot be seen is said, with
the fix; a class and a model are afterwards what they were before, whatever other
threads trace meanwhile.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import Outputs, losses, make_distill_step
from distilljax._capture import with_features
from distilljax.objectives import FeatureKD

WIDTH, DEPTH = 4, 3


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.linear(x))


class Inherited(Block):
    """A class without a call of its own."""


class Plain(nnx.Module):
    kind = Inherited

    def __init__(self, rngs):
        self.blocks = nnx.List(self.kind(rngs) for _ in range(DEPTH))
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def run(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x):
        x = self.run(x)
        self.sow(nnx.Intermediate, "pooled", jnp.mean(x, axis=0))
        return self.head(x)


class Remat(Plain):
    def run(self, x):
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x)
        return x


class Scanned(Plain):
    """The layers of `Plain` in one module, their arrays stacked."""

    def __init__(self, rngs):
        plain = Plain(rngs)
        graphdef, *_ = nnx.split(plain.blocks[0])
        states = [nnx.state(block) for block in plain.blocks]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *states)
        self.blocks = nnx.merge(graphdef, stacked)
        self.head = plain.head

    def run(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def scan(x, block):
            return block(x)

        return scan(x, self.blocks)


class OverArrays(Scanned):
    """A scan by hand, which NNX cannot see into."""

    def run(self, x):
        graphdef, arrays = nnx.split(self.blocks)

        def body(x, layer):
            return nnx.merge(graphdef, layer)(x), None

        return jax.lax.scan(body, x, arrays)[0]


class Checkpointed(Plain):
    """Remat by hand."""

    def run(self, x):
        for block in self.blocks:
            x = jax.checkpoint(lambda x, block=block: block(x))(x)
        return x


NAMES = ("blocks/1", "blocks/2/linear", "pooled")


def captured(model, names=NAMES):
    """Features and gradients of all parameters, as a step traces them."""
    graphdef, params = nnx.split(model)
    forward = with_features(lambda model, batch: model(batch["inputs"]), names)
    x = jax.random.normal(jax.random.key(1), (5, WIDTH))

    @jax.jit
    def run(params):
        def loss(params):
            found = nnx.merge(graphdef, params, copy=True)
            outputs = forward(found, {"inputs": x})
            assert nnx.graphdef(found) == graphdef  # nothing is left on the model
            return sum(jnp.sum(f**2) for f in outputs.features.values()), outputs

        return jax.grad(loss, has_aux=True)(params)

    grads, outputs = run(params)
    return outputs, nnx.to_pure_dict(grads)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_layers_have_the_same_features_however_they_are_run(graph):
    call = Block.__call__
    with nnx.set_graph_mode(graph):
        expected, expected_grads = captured(Plain(nnx.Rngs(0)))
        remat, remat_grads = captured(Remat(nnx.Rngs(0)))
        scanned, scanned_grads = captured(Scanned(nnx.Rngs(0)))
    assert {n: f.shape for n, f in expected.features.items()} == {
        "blocks/1": (5, WIDTH),
        "blocks/2/linear": (5, WIDTH),
        "pooled": (WIDTH,),
    }
    for other in (remat, scanned):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), other, expected
        )
    layers = expected_grads["blocks"]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *[layers[i] for i in range(DEPTH)])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        (remat_grads, scanned_grads["blocks"]),
        (expected_grads, stacked),
    )
    assert Block.__call__ is call


def test_the_features_are_what_the_modules_return():
    model = Plain(nnx.Rngs(0))
    outputs, _ = captured(model)
    x = jax.random.normal(jax.random.key(1), (5, WIDTH))
    first = model.blocks[0](x)
    np.testing.assert_allclose(outputs.features["blocks/1"], model.blocks[1](first))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (Plain, "blocks/3", r"none of blocks, blocks/0, .*head, pooled\..*blocks/3"),
        (Scanned, "blocks/3", "one of the 3 layers stacked in 'blocks', got 3"),
        (OverArrays, "blocks/1", r"got none\. .*jax\.lax\.scan .* use nnx\.scan"),
        (Checkpointed, "blocks/1", r"outside jax\.checkpoint.*Use nnx\.remat"),
    ],
)
def test_what_cannot_be_captured_is_said_with_the_fix(kind, name, message):
    call = Block.__call__
    with pytest.raises(ValueError, match=message):
        captured(kind(nnx.Rngs(0)), (name,))
    assert Block.__call__ is call


def test_a_module_that_is_called_twice_or_returns_no_array_is_refused():
    class Twice(Plain):
        def run(self, x):
            return self.blocks[0](self.blocks[0](x))

    class Pair(Block):
        def __call__(self, x):
            return super().__call__(x), None

    class Pairs(Plain):
        kind = Pair

        def run(self, x):
            return self.blocks[0](x)[0]

    with pytest.raises(ValueError, match="made once in a forward pass, got 2 calls"):
        captured(Twice(nnx.Rngs(0)), ("blocks/0",))
    with pytest.raises(TypeError, match="be an array, got tuple"):
        captured(Pairs(nnx.Rngs(0)), ("blocks/0",))


def test_two_threads_may_trace_at_once():
    """The second comes while the first is at it, and is still at it when that leaves.

    They take turns: so the first waits in vain for the second, for a moment, and the
    second does not wait at all.
    """
    call = Block.__call__
    arrived, came_in, left = (threading.Event() for _ in range(3))

    def first(model, batch):
        arrived.set()
        came_in.wait(timeout=0.5)
        return model(batch["inputs"])

    def second(model, batch):
        came_in.set()
        left.wait(timeout=10)
        return model(batch["inputs"])

    def traced(forward):
        forward = with_features(forward, NAMES)
        return forward(Plain(nnx.Rngs(0)), {"inputs": jnp.ones((5, WIDTH))}).features

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(traced, first)
        one.add_done_callback(lambda _: left.set())
        assert arrived.wait(timeout=60)
        other = pool.submit(traced, second)
        jax.tree.map(np.testing.assert_array_equal, one.result(), other.result())
    assert Block.__call__ is call


def test_a_forward_with_features_may_hold_another():
    inner = with_features(lambda model, batch: model(batch["inputs"]), ("blocks/0",))

    def outer(model, batch):
        noted = inner(Plain(nnx.Rngs(1)), batch).features["blocks/0"]
        return Outputs(model(batch["inputs"]), {"noted": noted})

    batch = {"inputs": jnp.ones((5, WIDTH))}
    model = Plain(nnx.Rngs(0))
    features = with_features(outer, ("blocks/0",))(model, batch).features
    np.testing.assert_allclose(
        features["blocks/0"], model.blocks[0](batch["inputs"]), rtol=1e-6
    )
    assert (features["noted"] != features["blocks/0"]).any()


def test_what_the_forward_gives_is_not_captured():
    def forward(model, batch):
        return Outputs(model(batch["inputs"]), {"blocks/0": jnp.zeros(3)})

    found = with_features(forward, ("blocks/0", "head"))(
        Plain(nnx.Rngs(0)), {"inputs": jnp.ones((2, WIDTH))}
    )
    assert found.features["blocks/0"].shape == (3,)
    np.testing.assert_allclose(found.features["head"], found.logits)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_a_scanned_student_learns_the_layers_of_a_plain_teacher(graph):
    """The teacher is captured too; the other way round is the same code."""
    objective = FeatureKD({"blocks/0": "blocks/0", "blocks/2": "blocks/2"})
    batch = {"inputs": jax.random.normal(jax.random.key(2), (16, WIDTH))}
    with nnx.set_graph_mode(graph):
        student = Scanned(nnx.Rngs(0))
        optimizer = nnx.Optimizer(student, optax.adam(3e-2), wrt=nnx.Param)
        step = make_distill_step(objective, Plain(nnx.Rngs(1)), accumulate=2)
        first = step(student, optimizer, batch)["loss"].value
        for _ in range(100):
            last = step(student, optimizer, batch)["loss"].value
    assert last < 0.1 * first
    assert step._in_place.compiled._cache_size() == 1


def test_features_of_a_plain_function_are_its_own_business():
    def apply(params, batch):
        hidden = batch["inputs"] @ params["in"]
        return Outputs(hidden @ params["out"], {"hidden": hidden})

    params = {"in": jnp.ones((WIDTH, 3)), "out": jnp.ones((3, 2))}
    batch = {"inputs": jnp.ones((2, WIDTH))}
    kwargs = {"student_forward": apply, "teacher_forward": apply, "tx": optax.sgd(0.1)}
    for name, wrong in (("hidden", False), ("layers/0", True)):
        objective = FeatureKD({name: name}, loss=losses.hidden_cosine)
        step = make_distill_step(objective, params, **kwargs)
        state = step.init(params)
        if wrong:
            with pytest.raises(ValueError, match=r"got \['hidden'\]. Only NNX modules"):
                step.pure(state, step.teacher_state, batch)
        else:
            _, metrics = step.pure(state, step.teacher_state, batch)
            np.testing.assert_allclose(metrics["hidden"].value, 0, atol=1e-6)
