from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import os
import re
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distilljax import checkpoints as checkpoints_module
from distilljax import make_distill_step, models, objectives
from distilljax.checkpoints import Checkpoints
from distilljax.sharding import (
    batch_axes,
    batch_sharding,
    mesh_from_string,
    tree_shardings,
)
from tests import disks

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
    files = (p for p in root.rglob("*") if p.is_file() and p.name != "files.json")
    return max(files, key=os.path.getsize)


def cut_off(step: Path) -> None:
    os.truncate(largest(step), os.path.getsize(largest(step)) // 2)


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
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


# --- verified, and falling back -------------------------------------------------------


def saved_thrice(root: Path, **options) -> dict:
    """Checkpoints of steps 1 to 3, each of its own values."""
    checkpoints = Checkpoints(root, keep_last=9, **options)
    for step in (1, 2, 3):
        state = {"kernel": jnp.full((50, 50), float(step)), "bias": jnp.ones(3)}
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()
    return state


def flip_a_byte(step: Path) -> None:
    """The size stays, and so does whatever a reader may look at first."""
    path = largest(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "cut off": lambda step: os.truncate(
        largest(step), os.path.getsize(largest(step)) // 2
    ),
    "a changed byte": flip_a_byte,
    "a missing file": lambda step: largest(step).unlink(),
    "no metadata": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "no array": lambda step: shutil.rmtree(step / "state"),
}


@pytest.mark.parametrize("damaged", [(3,), (3, 2)], ids=["newest", "two newest"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    tmp_path, capfd, damage, damaged
):
    root = tmp_path / "checkpoints"
    state = saved_thrice(root)
    for step in damaged:
        DAMAGES[damage](root / str(step))
    checkpoints = Checkpoints(root, keep_last=9)
    step, found, meta = checkpoints.restore_newest(like(state))
    good = min(damaged) - 1
    assert (step, meta) == (good, {"step": good})
    assert (np.asarray(found["kernel"]) == good).all()
    err = capfd.readouterr().err
    for step in damaged:
        assert f"the checkpoint of step {step} must be complete, got " in err
        assert f"Going on from that of step {good}" in err
        assert (tmp_path / "checkpoints.damaged" / str(step)).is_dir()
    # and the run can write that step again
    assert steps_in(root) == list(range(1, good + 1))
    assert checkpoints.latest() == good
    checkpoints.save(3, state, {"step": 33})
    checkpoints.close()
    again = Checkpoints(root).restore_newest(like(state))
    assert again[0] == 3
    assert again[2] == {"step": 33}


@pytest.mark.parametrize("damage", ["cut off", "no metadata"])
def test_without_a_manifest_what_cannot_be_read_is_damaged_too(tmp_path, capfd, damage):
    """Killed between the end of a checkpoint and that of its verification."""
    root = tmp_path / "checkpoints"
    state = saved_thrice(root)
    (root / "3" / "files.json").unlink()
    assert Checkpoints(root).restore_newest(like(state))[0] == 3
    DAMAGES[damage](root / "3")
    assert Checkpoints(root).restore_newest(like(state))[0] == 2
    assert "step 3 must be complete" in capfd.readouterr().err
    gc.collect()


def test_if_all_are_damaged_it_is_an_error_and_nothing_is_touched(tmp_path):
    root = tmp_path / "checkpoints"
    state = saved_thrice(root)
    for step in (1, 2, 3):
        flip_a_byte(root / str(step))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"3 must be complete.* a changed file"):
        Checkpoints(root).restore_newest(like(state))
    assert snapshot(tmp_path) == before


def test_one_of_another_model_is_no_damage(tmp_path):
    """Else a wrong config would throw checkpoints away, one after the other."""
    root = tmp_path / "checkpoints"
    state = saved_thrice(root)
    other = {**state, "bias": jnp.ones(4)}
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"bias of shape \(3,\) instead of \(4,\)"):
        Checkpoints(root).restore_newest(like(other))
    assert snapshot(tmp_path) == before


def test_a_reader_falls_back_and_leaves_the_folder_alone(tmp_path):
    root = tmp_path / "checkpoints"
    state = saved_thrice(root)
    flip_a_byte(root / "3")
    before = snapshot(tmp_path)
    assert Checkpoints(root, read_only=True).restore_newest(like(state))[0] == 2
    assert snapshot(tmp_path) == before


def test_a_checkpoint_is_read_back_when_it_is_written(tmp_path, monkeypatch):
    """What is told of it, is told after that; what is not as written, is an error."""
    told = []
    checkpoints = Checkpoints(tmp_path / "good")
    checkpoints.save(
        1, STATE, {"a": 1}, then=lambda: told.append(steps_in(tmp_path / "good"))
    )
    checkpoints.wait()
    assert told == [[1]]
    assert (tmp_path / "good" / "1" / "files.json").exists()

    # of what was to be written, and what was
    shapes = itertools.chain([{"w": (4,)}], itertools.repeat({"w": (5,)}))
    monkeypatch.setattr("distilljax.checkpoints.shapes_of", lambda _: next(shapes))
    monkeypatch.setattr("time.sleep", lambda _: None)
    checkpoints = Checkpoints(tmp_path / "bad")
    checkpoints.save(1, STATE, {"a": 1}, then=lambda: told.append("bad"))
    with pytest.raises(ValueError, match=r"bad/1 must be written.*other arrays"):
        checkpoints.wait()
    assert told == [[1]]


def test_an_error_of_writing_is_raised_at_the_next_checkpoint(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr("distilljax.checkpoints.write_manifest", full)
    checkpoints.save(1, STATE, {"a": 1})
    with pytest.raises(ValueError, match=r"1 must be written.*No space left"):
        checkpoints.save(2, STATE, {"a": 1})
    checkpoints.save(3, STATE, {"a": 1})
    with pytest.raises(ValueError, match="No space left"):
        checkpoints.close()
    # what ended a run is not hidden by it
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, STATE, {"a": 1})
    with pytest.raises(ZeroDivisionError), contextlib.closing(checkpoints):
        raise ZeroDivisionError


@pytest.fixture
def answers(monkeypatch):
    """Whether the next checkpoints can be written; without more of them, all can."""
    found: list[bool] = []
    orbax = checkpoints_module.ocp.training.Checkpointer
    real = orbax.save_checkpointables_async

    class Broken:
        def result(self):
            raise OSError(5, "Input/output error")

    def save(self, step, *args, **kwargs):
        if found and not found.pop(0):
            return Broken()
        return real(self, step, *args, **kwargs)

    monkeypatch.setattr(orbax, "save_checkpointables_async", save)
    monkeypatch.setattr(checkpoints_module, "RETRY_SECS", 0.0)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return found


def test_of_a_disk_that_does_not_answer_the_third_failure_in_a_row_is_an_error(
    tmp_path, answers, capfd
):
    """Each checkpoint stands for the one before it."""
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    answers += [False, False, True, False, False, False]
    for step in (1, 2, 3, 4, 5, 6):
        checkpoints.save(step, STATE, {"a": step})
    told = capfd.readouterr().err
    for step in (1, 2, 4, 5):
        assert f"the checkpoint of step {step} was not written and read back" in told
    with pytest.raises(ValueError, match=r"6 must be written.*Input/output error"):
        checkpoints.save(7, STATE, {"a": 7})
    assert steps_in(tmp_path) == [3]


def test_the_last_checkpoint_of_a_run_is_tried_three_times(tmp_path, answers):
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    answers += [False, False, False, False, True]
    for step in (1, 2):
        checkpoints.save(step, STATE, {"a": step})
    checkpoints.save(3, STATE, {"a": 3}, wait=True)  # a count of its own
    assert (tmp_path / "3" / "files.json").exists()
    answers += [False, False, False]
    with pytest.raises(ValueError, match=r"4 must be written"):
        checkpoints.save(4, STATE, {"a": 4}, wait=True)
    checkpoints.save(5, STATE, {"a": 5})
    checkpoints.wait()
    answers += [False]
    checkpoints.save(6, STATE, {"a": 6})
    with pytest.raises(ValueError, match=r"6 must be written"):
        checkpoints.wait()
    checkpoints.close()
    assert steps_in(tmp_path) == [3, 5]


def test_a_best_one_that_was_not_written_is_not_the_best(tmp_path, answers):
    checkpoints = Checkpoints(tmp_path, select="accuracy")
    checkpoints.save(1, STATE, {"a": 1}, {"accuracy": 0.5})
    checkpoints.wait()
    answers += [False]
    checkpoints.save(2, STATE, {"a": 2}, {"accuracy": 0.9})
    checkpoints._verifying.join()
    assert checkpoints.improves(3, {"accuracy": 0.8})
    assert checkpoints.best() == (1, 0.5)
    checkpoints.close()


@pytest.mark.parametrize(("wait", "failures"), [(False, 1), (True, 1), (True, 3)])
def test_a_complete_checkpoint_is_read_back_though_something_failed_after_it(
    tmp_path, monkeypatch, capfd, wait, failures
):
    """It has its list of files then, and counts for what it is. One that is waited for
    is not written a second time, which could not be."""
    left: list[OSError] = []
    real = checkpoints_module.write_manifest

    def write(folder):
        if left:
            raise left.pop()
        real(folder)

    monkeypatch.setattr(checkpoints_module, "write_manifest", write)
    monkeypatch.setattr("time.sleep", lambda _: None)
    checkpoints, told = Checkpoints(tmp_path), []
    for step in (1, 2, 3):  # three that were whole in the end are no failures in a row
        left += [OSError(5, "Input/output error")] * failures
        then = functools.partial(told.append, step)
        checkpoints.save(step, STATE, {"a": 1}, then=then, wait=wait)
        checkpoints.wait()
    checkpoints.close()
    assert told == [1, 2, 3]
    assert (tmp_path / "3" / "files.json").exists()
    assert ("was not written" in capfd.readouterr().err) == (failures > 2)


def test_what_is_not_there_for_a_moment_is_no_damage(tmp_path, monkeypatch):
    """Neither a file's size, nor whether it is there, nor what Orbax says of it."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE, {"a": 1}, wait=True)
    monkeypatch.setattr("time.sleep", lambda _: None)
    left = []

    def faulty(real, answer=None):
        def call(*args, **kwargs):
            if left and not left.pop():
                if answer is None:
                    raise OSError(116, "Stale file handle")
                return answer
            return real(*args, **kwargs)

        return call

    ocp = checkpoints_module.ocp
    nothing = types.SimpleNamespace(custom_metadata={}, metadata={"state": None})
    with monkeypatch.context() as patch:
        for name in ("stat", "exists", "is_file"):
            patch.setattr(Path, name, faulty(getattr(Path, name)))
        for skipped in range(4):
            left[:] = [False] + [True] * skipped
            assert checkpoints_module.damage(tmp_path / "1") is None
            assert not left
    for owner in (checkpoints._checkpointer, ocp):
        name = "checkpointables_metadata"
        monkeypatch.setattr(owner, name, faulty(getattr(owner, name), nothing))
    left[:] = [False]
    assert checkpoints.restore_newest(STATE)[0] == 1
    assert not left
    left[:] = [False]
    found = checkpoints.restore_student(1, {"w": STATE["w"]})
    np.testing.assert_array_equal(found["w"], STATE["w"])
    assert not left
    checkpoints.close()


def test_another_model_is_said_at_once(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE, {"a": 1}, wait=True)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it will not pass"))
    with pytest.raises(ValueError, match="that has no other"):
        checkpoints.restore_newest({**STATE, "other": STATE["w"]})
    checkpoints.close()


def test_what_cannot_be_noted_of_a_checkpoint_leaves_it_whole(tmp_path, capfd):
    def then():
        raise OSError(5, "Input/output error")

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE, {"a": 1}, then=then, wait=True)
    checkpoints.close()
    assert "step 1 is saved, and could not be noted" in capfd.readouterr().err


def test_of_several_processes_a_fault_ends_the_run_at_once(tmp_path, monkeypatch):
    """The others wait where a checkpoint begins: a step without them would hang."""
    checkpoints = Checkpoints(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(
        checkpoints_module.ocp.training.Checkpointer, "save_checkpointables_async", fail
    )
    with monkeypatch.context() as several:
        several.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(ValueError, match=r"1 must be written"):
            checkpoints.save(1, STATE, {"a": 1})
    checkpoints.close()


@pytest.fixture
def small_disk(tmp_path):
    with disks.small_disk(tmp_path / "small", "1m") as found:
        yield found


def test_a_full_disk_ends_with_what_to_do_and_with_a_good_checkpoint(small_disk):
    mount, remount = small_disk
    state = {"kernel": jax.random.normal(jax.random.key(0), (400, 300))}
    checkpoints = Checkpoints(mount / "checkpoints", keep_last=9)

    def fill() -> None:
        for step in range(1, 9):
            checkpoints.save(step, state, {"step": step})

    with pytest.raises(ValueError, match=r"must be written.* Make room") as error:
        fill()
    assert re.search(r"(?i)space", str(error.value))
    with contextlib.suppress(ValueError):
        checkpoints.close()
    remount("size=16m")
    checkpoints = Checkpoints(mount / "checkpoints", keep_last=9)
    step, found, _ = checkpoints.restore_newest(like(state))
    assert step >= 1
    np.testing.assert_array_equal(found["kernel"], state["kernel"])
    checkpoints.save(step + 1, state, {"step": step + 1})
    checkpoints.close()
    assert checkpoints.latest() == step + 1


def test_a_folder_that_cannot_be_written_is_said_before_anything(small_disk):
    mount, remount = small_disk
    saved_thrice(mount / "checkpoints")
    remount("ro")
    with pytest.raises(ValueError, match=r"folder of the checkpoints must .*Read-only"):
        Checkpoints(mount / "checkpoints")
    assert Checkpoints(mount / "checkpoints", read_only=True).latest() == 3
