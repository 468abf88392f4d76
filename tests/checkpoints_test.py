from __future__ import annotations

import gc
import math
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import make_distill_step, models, objectives
from distilljax.checkpoints import Checkpoints
from distilljax.sharding import (
    batch_axes,
    batch_sharding,
    mesh_from_string,
    tree_shardings,
)

# When it cannot restore an array, Orbax drops the reading of others.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def copied(tree):
    """The arrays on the host; of random keys, their data."""

    def copy(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.array(x, copy=True)

    return jax.tree.map(copy, tree)


def assert_same(state, host_copy):
    jax.tree.map(np.testing.assert_array_equal, copied(state), host_copy)


def steps_in(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def like(tree, shardings=None):
    shardings = shardings or jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def training(mesh: str):
    """A compiled step and the birth of its state, on a mesh."""
    devices = jax.devices()[:1] if mesh == "data=1" else None
    mesh = mesh_from_string(mesh, devices)
    spec = models.MLP(num_features=64, hidden=(128,), num_classes=10, dropout=0.5)
    student = nnx.eval_shape(lambda: spec(nnx.Rngs(0)))
    make: dict = {"student": student, "tx": optax.adamw(1e-3)}

    def init():
        step = make_distill_step(objectives.CrossEntropy(), **make)
        return step.init(spec(nnx.Rngs(0)))

    shardings = tree_shardings(jax.eval_shape(init), mesh)
    step = make_distill_step(
        objectives.CrossEntropy(),
        **make,
        state_shardings=shardings,
        batch_axes=batch_axes(mesh),
    )
    return mesh, step, jax.jit(init, out_shardings=shardings)


BATCH = {
    "inputs": np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32),
    "labels": np.arange(16, dtype=np.int32) % 10,
}


@pytest.mark.parametrize(("mesh", "after"), [("data=1", 300), ("data=4,fsdp=2", 30)])
def test_what_is_written_while_donated_steps_run_is_the_state_at_that_step(
    tmp_path, mesh, after
):
    """On CPU an array is borrowed for writing while the next steps reuse its memory."""
    mesh, step, init = training(mesh)
    batch = jax.device_put(BATCH, batch_sharding(mesh))

    def run(at_save):
        state = init()
        for _ in range(3):
            for _ in range(5):
                state, _ = step.pure(state, None, batch)
            at_save(state)
            for _ in range(after):
                state, metrics = step.pure(state, None, batch)
                if mesh.size > 1:  # collectives of simulated devices, one at a time
                    jax.block_until_ready(metrics)
        return state

    with jax.set_mesh(mesh):
        # Alone, because a copy on the host is kept by the array, and protects it.
        expected = []
        last = run(lambda state: expected.append(copied(state)))
        steps = [int(state.step) for state in expected]
        assert steps == [5, 10 + after, 15 + 2 * after]

        checkpoints = Checkpoints(tmp_path, keep_last=9)
        numbers = iter(steps)
        run(lambda state: checkpoints.save(next(numbers), state, {"a": 1}))
        for at, want in zip(steps, expected, strict=True):
            assert_same(checkpoints.restore(at, like(last))[0], want)
        checkpoints.close()


def test_a_state_is_restored_onto_other_meshes(tmp_path):
    state = {
        "kernel": jnp.arange(64.0 * 64).reshape(64, 64),
        "bias": jnp.arange(8.0),
        "rng": jax.random.key(3),
    }
    first = copied(state)
    seen = []
    for i, text in enumerate(["data=8", "data=4,fsdp=2", "data=1"]):
        devices = jax.devices()[:1] if text == "data=1" else None
        mesh = mesh_from_string(text, devices)
        checkpoints = Checkpoints(tmp_path, keep_last=9)
        if i:
            state, _ = checkpoints.restore(
                i - 1, like(state, tree_shardings(state, mesh))
            )
        else:
            state = jax.device_put(state, tree_shardings(state, mesh))
        seen.append(state["kernel"].sharding.spec)
        checkpoints.save(i, state, {"mesh": text})
        checkpoints.close()
    assert [str(spec) for spec in seen] == ["P()", "P('fsdp',)", "P()"]
    assert state["kernel"].devices() == {jax.devices()[0]}
    assert_same(state, first)


STATE = {"w": jnp.ones(4)}


def save_all(checkpoints: Checkpoints, values: dict[int, float | None]) -> None:
    for step, value in values.items():
        numbers = None if value is None else {"nll": value, "other": 1.0}
        checkpoints.save(step, STATE, {"step": step}, numbers)
        checkpoints.wait()


@pytest.mark.parametrize(
    ("mode", "values", "kept", "best"),
    [
        ("max", {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.2}, [2, 4], (2, 0.9)),
        ("min", {1: 0.3, 2: 0.1, 3: 0.5, 4: 0.2}, [2, 4], (2, 0.1)),
        # of equals the first, whatever comes later
        ("max", {1: 0.1, 2: 0.9, 3: 0.9, 4: 0.9}, [2, 4], (2, 0.9)),
        ("min", {1: 0.1, 2: 0.1, 3: 0.9, 4: 0.1}, [1, 4], (1, 0.1)),
        # the newest is the best: nothing else is needed
        ("max", {1: 0.1, 2: 0.2, 3: 0.3}, [3], (3, 0.3)),
        # those without a measure never push the best out
        ("max", {1: 0.1, 2: None, 3: None}, [1, 3], (1, 0.1)),
        # nan is not a measure
        ("max", {1: math.nan, 2: 0.1, 3: math.nan}, [2, 3], (2, 0.1)),
        ("min", {1: math.nan, 2: 0.1, 3: math.nan}, [2, 3], (2, 0.1)),
    ],
)
def test_the_best_and_the_newest_stay(tmp_path, mode, values, kept, best):
    checkpoints = Checkpoints(tmp_path, select="nll", mode=mode, keep_last=1)
    save_all(checkpoints, values)
    checkpoints.close()
    assert steps_in(tmp_path) == kept
    assert checkpoints.best() == pytest.approx(best)
    # and the same for a process that comes later
    again = Checkpoints(tmp_path, select="nll", mode=mode, keep_last=1)
    assert again.best() == pytest.approx(best)
    assert again.latest() == kept[-1]
    better = best[1] + (0.01 if mode == "max" else -0.01)
    assert again.improves(9, {"nll": better})
    assert not again.improves(9, {"nll": best[1]})
    assert not again.improves(9, {"nll": math.nan})
    assert not again.improves(9, None)


def test_without_a_measure_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, select=None, keep_last=2)
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    save_all(checkpoints, {1: 0.9, 2: 0.1, 3: 0.2})
    assert not checkpoints.improves(4, {"nll": 9.0})
    assert checkpoints.best() == (3, None)
    checkpoints.close()
    assert steps_in(tmp_path) == [2, 3]


def test_a_part_of_a_state_is_restored(tmp_path):
    state = {"params": jnp.arange(3.0), "rest": {}, "opt_state": jnp.ones(5)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state, {"a": 1})
    checkpoints.close()
    found = checkpoints.restore_student(7, like({"params": state["params"]}))
    assert found["params"].tolist() == [0.0, 1.0, 2.0]
    assert found.keys() == {"params"}


@pytest.fixture
def saved(tmp_path):
    """A folder with one checkpoint, and what is in it."""
    state = {"kernel": jnp.arange(40_000.0).reshape(200, 200), "bias": jnp.ones(200)}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state, {"a": 1})
    checkpoints.close()
    yield tmp_path / "checkpoints", state
    gc.collect()  # what Orbax leaves behind when it fails, is complained about here


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def largest(root: Path) -> Path:
    return max((p for p in root.rglob("*") if p.is_file()), key=os.path.getsize)


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: os.truncate(largest(step), os.path.getsize(largest(step)) // 2),
        lambda step: largest(step).unlink(),
        lambda step: (step / "state" / "manifest.ocdbt").unlink(),
        lambda step: (step / "state" / "_METADATA").unlink(),
        lambda step: (step / "state" / "_METADATA").write_text("{"),
        lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
        lambda step: (step / "_CHECKPOINT_METADATA").write_text("{"),
        lambda step: shutil.rmtree(step / "state"),
    ],
    ids=[
        "truncated array",
        "missing array",
        "missing manifest",
        "missing tree",
        "broken tree",
        "missing metadata",
        "broken metadata",
        "missing state",
    ],
)
def test_a_damaged_checkpoint_is_a_clear_error_and_is_left_alone(saved, damage):
    root, state = saved
    damage(root / "3")
    before = snapshot(root)
    with pytest.raises(ValueError, match=r"checkpoint .*3 must be complete") as error:
        Checkpoints(root).restore(3, like(state))
    assert "delete that folder" in str(error.value)
    assert not re.search(r"(?i)orbax|handler|Error|entry", str(error.value))
    assert snapshot(root) == before


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda step: largest(step).unlink(), "arrays that are missing, damaged"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=["missing array", "missing folder"],
)
def test_a_damaged_teacher_is_nothing_to_delete(saved, damage, what):
    root, state = saved
    damage(root / "3")
    with pytest.raises(ValueError, match=f"{what}.* from a copy") as error:
        Checkpoints(root, read_only=True).restore_student(3, like(state))
    assert "delete" not in str(error.value)
    assert not re.search(r"(?i)orbax|handler|Error|entry", str(error.value))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (
            {"kernel": jnp.zeros((200, 100)), "bias": jnp.ones(200)},
            r"kernel of shape \(200, 200\) instead of \(200, 100\)",
        ),
        ({"kernel": jnp.zeros((200, 200))}, "bias, which is not expected"),
        (
            {
                "kernel": jnp.ones((200, 200)),
                "bias": jnp.ones(200),
                "more": jnp.ones(1),
            },
            "no more",
        ),
        ({"layer": {"kernel": jnp.ones((200, 200))}}, "no layer/kernel"),
    ],
    ids=["other width", "fewer arrays", "more arrays", "other names"],
)
def test_a_checkpoint_of_another_model_is_a_clear_error(saved, other, what):
    root, _ = saved
    before = snapshot(root)
    checkpoints = Checkpoints(root)
    with pytest.raises(ValueError, match=f"of this student and optimizer.*{what}"):
        checkpoints.restore(3, like(other))
    assert snapshot(root) == before


def test_only_a_writer_removes_what_a_killed_run_left(saved):
    root, _ = saved
    half_written = root / "2.orbax-checkpoint-tmp"
    half_written.mkdir()
    (half_written / "data").write_text("...")
    assert Checkpoints(root, read_only=True).latest() == 3
    assert half_written.exists()  # a run may be writing it at this moment
    save_all(Checkpoints(root), {4: None})
    assert not half_written.exists()
    assert steps_in(root) == [4]
