"""Meshes from text and shardings from rules; what cannot be is said at once."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from distilljax import make_distill_step, objectives
from distilljax.models import MLP
from distilljax.sharding import (
    Rule,
    batch_sharding,
    mesh_from_string,
    replicated,
    tree_shardings,
)

KERNEL = jax.ShapeDtypeStruct((64, 32), jnp.float32)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=8", (8, 1, 1)),
        ("data=-1", (8, 1, 1)),
        ("data=2,fsdp=4", (2, 4, 1)),
        ("tensor=2, fsdp=-1", (1, 4, 2)),
        ("fsdp=2,tensor=2,data=2", (2, 2, 2)),
    ],
)
def test_a_mesh_from_text(text, sizes):
    mesh = mesh_from_string(text)
    assert tuple(mesh.shape.values()) == sizes
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", r"multiply to the number of devices, 8, got 'data=3'"),
        ("data=16", r"multiply to the number of devices"),
        ("data=3,fsdp=-1", r"multiply to the number of devices"),
        ("data=-1,fsdp=-1", r"multiply to the number of devices"),
        ("batch=8", r"be sizes of the axes data, fsdp, tensor"),
        ("data=2,data=4", r"each at most once"),
        ("data:8", r"be sizes of the axes"),
        ("data=0", r"be sizes of the axes"),
        ("", r"be sizes of the axes"),
    ],
)
def test_a_wrong_mesh_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        mesh_from_string(text)


def test_the_batch_lies_over_data_and_fsdp():
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    x = jax.device_put(jnp.zeros((8, 3)), batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
    whole = jax.device_put(jnp.zeros((8, 3)), replicated(mesh))
    assert {shard.data.shape for shard in whole.addressable_shards} == {(8, 3)}


def test_rules_by_path_then_size():
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    tree = {"a": {"kernel": KERNEL, "bias": jax.ShapeDtypeStruct((32,), jnp.float32)}}
    rules = [Rule("a/kernel", (None, "tensor")), Rule("kernel", ("fsdp", None))]
    found = tree_shardings({**tree, "b": tree["a"], "n": jnp.zeros(())}, mesh, rules)
    assert found["a"]["kernel"].spec == PartitionSpec(None, "tensor")  # first match
    assert found["b"]["kernel"].spec == PartitionSpec("fsdp", None)
    assert found["a"]["bias"].spec == PartitionSpec()  # small
    assert found["n"].spec == PartitionSpec()
    by_size = tree_shardings(tree, mesh)["a"]["kernel"]
    assert by_size.spec == PartitionSpec("fsdp")
    wide = tree_shardings({"k": jax.ShapeDtypeStruct((33, 64), jnp.float32)}, mesh)
    assert wide["k"].spec == PartitionSpec(None, "fsdp")
    odd = tree_shardings({"k": jax.ShapeDtypeStruct((33, 65), jnp.float32)}, mesh)
    assert odd["k"].spec == PartitionSpec()


def test_moments_and_averages_lie_where_their_parameters_do():
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    student = MLP(num_features=64, hidden=(32,), num_classes=10)(nnx.Rngs(0))
    step = make_distill_step(
        objectives.CrossEntropy(), student=student, tx=optax.adam(0.1), ema_decay=0.9
    )
    state = jax.eval_shape(step.init, student)
    rules = [Rule("layers/0/kernel", ("fsdp", "tensor"))]
    found = tree_shardings(state, mesh, rules)
    adam = found.opt_state[0]
    for tree in (found.params, found.ema, adam.mu, adam.nu):
        assert tree["layers"][0]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert adam.count.spec == PartitionSpec()


def test_a_rule_must_fit_the_array():
    mesh = mesh_from_string("data=2,fsdp=2,tensor=2")
    with pytest.raises(
        ValueError, match=r"an entry for each axis of k, shape \(64, 32\)"
    ):
        tree_shardings({"k": KERNEL}, mesh, [Rule("k", ("fsdp",))])
    odd = jax.ShapeDtypeStruct((63, 32), jnp.float32)
    with pytest.raises(ValueError, match=r"divide each axis of k, shape \(63, 32\)"):
        tree_shardings({"k": odd}, mesh, [Rule("k", ("fsdp", None))])
    with pytest.raises(ValueError, match="divide each axis"):
        tree_shardings({"k": KERNEL}, mesh, [Rule("k", ("model", None))])
    scales = jax.ShapeDtypeStruct((1, 32), jnp.float32)
    found = tree_shardings({"k": scales}, mesh, [Rule("k", ("fsdp", "tensor"))])
    assert found["k"].spec == PartitionSpec(None, "tensor")


def test_slices_lie_one_after_the_other_along_data():
    """Whatever order their devices come in: only `data` may be sent between slices."""

    @dataclass(frozen=True)
    class Chip:
        id: int
        slice_index: int
        platform: str = "tpu"
        process_index: int = 0

    devices = [Chip(4, 1), Chip(0, 0), Chip(5, 1), Chip(1, 0)]
    mesh = mesh_from_string("data=2,tensor=2", devices)
    assert [[d.id for d in row] for row in mesh.devices[:, 0]] == [[0, 1], [4, 5]]
