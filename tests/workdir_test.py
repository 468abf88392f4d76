from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax.config import load_experiment, to_json
from distilljax.programs import Programs
from distilljax.sharding import mesh_from_string, tree_shardings
from distilljax.train import train
from distilljax.workdir import TrainedRun, claim, fingerprint, read_json

TINY = Path(__file__).parent / "cli" / "tiny.py"
SAVED = {"steps": 10, "loader": {"scale": 1.0, "num_threads": 2}, "student": "a"}


def test_a_folder_is_used_by_one_at_a_time(tmp_path):
    with (
        claim(tmp_path / "run", SAVED),
        pytest.raises(ValueError, match="one process at a time"),
        claim(tmp_path / "run", SAVED),
    ):
        pass
    with claim(tmp_path / "run", SAVED):  # and is free afterwards
        pass


def test_claiming_writes_nothing_but_a_lock(tmp_path):
    with claim(tmp_path, SAVED):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 20}, None),
        ({"loader": {"scale": 1.0, "num_threads": 8}}, None),
        ({"loader": {"scale": 2.0, "num_threads": 2}}, "loader.scale: 1.0 -> 2.0"),
        ({"student": "b"}, "student: 'a' -> 'b'"),
        ({"new_field": 1}, "new_field: None -> 1"),
    ],
)
def test_a_run_is_taken_up_with_its_own_config_only(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(SAVED))
    if message is None:
        with claim(tmp_path, SAVED | change):
            pass
    else:
        with pytest.raises(ValueError, match=message), claim(tmp_path, SAVED | change):
            pass
    assert json.loads((tmp_path / "config.json").read_text()) == SAVED


def test_a_config_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"steps":')
    with pytest.raises(ValueError, match=r"config.json must be a JSON file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config.json"), claim(tmp_path, SAVED):
        pass


def test_a_refused_run_leaves_the_folders_as_they_were(tmp_path):
    def refuse(workdir, write=False):
        with claim(workdir, SAVED):
            assert (workdir / ".lock").exists()
            if write:
                (workdir / "config.json").write_text(json.dumps(SAVED))
            raise ZeroDivisionError

    (tmp_path / "there").mkdir()
    for name in ("new/run", "there/run", "there"):
        with pytest.raises(ZeroDivisionError):
            refuse(tmp_path / name)
        assert [p.name for p in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(ZeroDivisionError):  # a run that has begun stays
        refuse(tmp_path / "run", write=True)
    assert (tmp_path / "run" / "config.json").exists()


def test_a_run_does_not_lie_in_another(tmp_path):
    """Its files would be taken for those of the other."""
    with claim(tmp_path / "run", SAVED):
        (tmp_path / "run" / "config.json").write_text(json.dumps(SAVED))
    with (
        pytest.raises(ValueError, match=r"lie outside of other runs.*/run'. Choose"),
        claim(tmp_path / "run" / "arm" / "seed_0", SAVED),
    ):
        pass
    assert not (tmp_path / "run" / "arm").exists()
    # the config.json of something else is no run
    (tmp_path / "config.json").write_text("{}")
    with claim(tmp_path / "another", SAVED):
        pass


@pytest.mark.parametrize("given", ["gs://bucket/run", "s3://bucket"])
def test_the_address_of_a_bucket_is_refused_as_it_was_given(given):
    with (
        pytest.raises(ValueError, match=rf"be a path, got '{given}'. Mount the bucket"),
        claim(Path(given), SAVED),
    ):
        pass
    assert not Path(given).exists()


def test_empty_folders_are_no_reason_to_refuse(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with claim(tmp_path, SAVED):
        pass


TREE = {"a": jnp.arange(64.0).reshape(8, 8), "b": jnp.ones(3, jnp.bfloat16)}


def test_a_fingerprint_is_of_names_types_and_values():
    first = fingerprint(TREE)
    assert fingerprint(jax.tree.map(jnp.copy, TREE)) == first
    others = [
        {**TREE, "a": TREE["a"].at[0, 0].set(1e-6)},
        {**TREE, "a": TREE["a"].reshape(64)},
        {**TREE, "b": TREE["b"].astype(jnp.float16)},
        {"c": TREE["a"], "b": TREE["b"]},
        {"a": TREE["a"]},
    ]
    assert len({first, *map(fingerprint, others)}) == 6


def test_a_fingerprint_does_not_depend_on_the_devices_or_on_random_streams():
    mesh = mesh_from_string("data=2,fsdp=4")
    sharded = jax.device_put(TREE, tree_shardings(TREE, mesh, min_size=1))
    assert not sharded["a"].sharding.is_fully_replicated
    assert fingerprint(sharded) == fingerprint(TREE)
    assert fingerprint({**TREE, "key": jax.random.key(1)}) == fingerprint(TREE)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    config = load_experiment(TINY).config(0)
    train(replace(config, steps=5), workdir, programs=Programs())
    return workdir


def test_a_trained_run_is_a_teacher_on_any_mesh(run):
    inputs = jnp.asarray(load_experiment(TINY).config(0).test().inputs)
    alone = TrainedRun(str(run))()
    assert alone.layers[0].kernel[...].devices() == {jax.devices()[0]}
    mesh = mesh_from_string("data=2,fsdp=4")
    sharded = TrainedRun(str(run))(mesh)
    assert sharded.layers[0].kernel[...].sharding.mesh == mesh
    np.testing.assert_array_equal(
        alone.layers[0].kernel[...], sharded.layers[0].kernel[...]
    )
    for module in (alone, sharded):
        module.eval()
    np.testing.assert_allclose(alone(inputs), sharded(inputs), rtol=1e-5)


def test_a_trained_run_needs_of_its_config_the_student_alone(run, tmp_path):
    saved = read_json(run / "config.json")
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    (tmp_path / "results.json").symlink_to(run / "results.json")
    saved["data"] = {"_type": "a_module_that_is_gone:Source"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    a, b = TrainedRun(str(run))(), TrainedRun(str(tmp_path))()
    np.testing.assert_array_equal(a.layers[0].kernel[...], b.layers[0].kernel[...])


def test_a_run_that_is_not_finished_is_no_teacher(tmp_path):
    run = TrainedRun(str(tmp_path))
    for use in (run, run.untrained):  # to train, and to plan
        with pytest.raises(ValueError, match="hold a finished run") as error:
            use()
        assert "distilljax train CONFIG --workdir" in str(error.value)
        assert "--teacher.workdir" in str(error.value)


def test_the_saved_config_is_the_resolved_one(run):
    config = replace(load_experiment(TINY).config(0), steps=5)
    assert read_json(run / "config.json") == to_json(config)
