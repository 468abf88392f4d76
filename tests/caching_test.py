"""Writing a store, and training from it. What these tests protect:

a student that learns from exact signals takes the steps that it takes online, whatever
the order, the packing, the epoch and the number of readers; a job that is stopped ends
in the same bytes; what does not belong together is refused; nothing is half written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import Outputs, caching, objectives, optimizers, students
from distilljax.caching import cache
from distilljax.data import Loader, RandomShift, Slice
from distilljax.data.units import Cover, num_units, units_of
from distilljax.losses import SampledLogits, SparseLogits
from distilljax.sharding import mesh_from_string
from distilljax.teachers import CachedTeacher, Dense, Hidden, Sampled, TopK
from distilljax.train import train
from distilljax.verifying import verify
from tests import disks
from tests.processes import environment
from tests.saved import records
from tests.teachers.tiny import (
    DECODER,
    MLP,
    OTHERS,
    Seeded,
    Telling,
    digits,
    files,
    image_config,
    mixture,
    rows,
    tell,
    text_config,
)


def halved(model: Any, batch: Any) -> Any:
    return model(batch["inputs"]) / 2


def with_a_broken_kernel(model: Any, batch: Any) -> Any:
    head = model(batch["tokens"], batch["positions"], batch["segment_ids"]).logits
    return Outputs(replace(head, kernel=head.kernel.at[0, 7].set(jnp.nan)))


LOADER = Loader(batch_size=16, scale=16.0, flatten=True)
EXACT = [Hidden(), Dense()]
KINDS = [*EXACT, Hidden("int8"), TopK(8, (1.0, 2.0)), Sampled(20)]


def curve(workdir: Path) -> np.ndarray:
    """The loss of each step."""
    return np.array([r["loss"] for r in records(workdir) if r["split"] == "train"])


def trained(config: Any, workdir: Path, **how: Any) -> np.ndarray:
    train(config, workdir, **how)
    return curve(workdir)


def from_store(config: Any, store: Path, **fields: Any) -> Any:
    return replace(config, teacher=CachedTeacher(str(store)), **fields)


# --- the same training ----------------------------------------------------------------


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "data", [rows(), rows(repack=False), mixture()], ids=["packed", "fixed", "mixture"]
)
def test_exact_signals_give_the_steps_of_a_teacher_in_the_step(tmp_path, kind, data):
    """Through several epochs, each packed anew."""
    config = text_config(data=data, steps=8)
    manifest = cache(config, tmp_path / "store", logits=kind)
    assert manifest["counts"]["units"] == num_units(data())
    want = trained(config, tmp_path / "online")
    got = trained(from_store(config, tmp_path / "store"), tmp_path / "cached")
    if data != mixture():  # whose epoch is longer
        assert len(data()) < 8 * 8
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [Dense(), TopK(10, (1.0, 2.0), "float32")])
def test_images_are_learnt_from_a_store_as_from_a_teacher(tmp_path, accumulate, kind):
    """All ten classes, exactly coded, are the dense teacher."""
    config = image_config(
        accumulate=accumulate, mesh="data=4,fsdp=2", loader=LOADER, steps=6
    )
    cache(config, tmp_path / "store", logits=kind)
    want = trained(config, tmp_path / "online")
    got = trained(from_store(config, tmp_path / "store"), tmp_path / "cached")
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_features_are_kept_for_each_position(tmp_path):
    features = objectives.FeatureKD({"layers/0": "layers/1"})
    objective = objectives.Sum({"logits": objectives.LogitKD(), "features": features})
    config = text_config(objective=objective)
    manifest = cache(config, tmp_path / "store", logits=Hidden(), features=["layers/1"])
    assert manifest["signal"]["features"]["layers/1"] == {
        "dtype": "float32", "shape": [16], "per_position": True,
    }  # fmt: skip
    want = trained(config, tmp_path / "online")
    got = trained(from_store(config, tmp_path / "store"), tmp_path / "cached")
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert verify(tmp_path / "store")["same"]


def test_features_of_whole_examples_are_kept_alone(tmp_path):
    objective = objectives.FeatureKD({"layers/0": "layers/0"})
    teacher = Seeded(MLP)
    config = image_config(objective=objective, teacher=teacher)
    cache(config, tmp_path / "store", logits=None, features=["layers/0"])
    want = trained(config, tmp_path / "online")
    got = trained(from_store(config, tmp_path / "store"), tmp_path / "cached")
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_in_half_precision_the_hidden_states_are_those_of_the_step(tmp_path):
    config = text_config(compute_dtype="bfloat16")
    manifest = cache(config, tmp_path / "store", logits=Hidden())
    assert manifest["signal"]["logits"]["arrays"]["hidden"]["dtype"] == "bfloat16"
    want = trained(config, tmp_path / "online")
    got = trained(from_store(config, tmp_path / "store"), tmp_path / "cached")
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    # two programs round a student in half precision otherwise
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_a_run_from_a_store_resumes_where_it_was(tmp_path):
    config = from_store(text_config(steps=8), tmp_path / "store")
    cache(text_config(), tmp_path / "store", logits=Sampled(20))
    whole = trained(config, tmp_path / "whole")
    train(replace(config, steps=3), tmp_path / "parts")
    parts = trained(config, tmp_path / "parts")
    np.testing.assert_array_equal(parts, whole)


def test_the_teacher_itself_is_there_to_be_compared_with(tmp_path):
    config = text_config(test=Slice(rows(OTHERS, repack=False), 0, 8))
    cache(config, tmp_path / "store", logits=Sampled(20))
    cached = CachedTeacher(str(tmp_path / "store"), teacher=config.teacher)
    found = train(replace(config, teacher=cached), tmp_path / "with")
    assert found["student"]["kl_to_teacher"] > 0
    assert found["teacher"]["nll"] > 0
    found = train(from_store(config, tmp_path / "store"), tmp_path / "without")
    assert found["teacher"] is None
    other = replace(cached, teacher=students.Untrained(DECODER, seed=8))
    with pytest.raises(ValueError, match="teacher must be the one that the store"):
        train(replace(config, teacher=other), tmp_path / "other")


def test_labels_alone_do_not_open_the_store(tmp_path):
    objective = objectives.CrossEntropy()
    config = from_store(text_config(objective=objective), tmp_path / "none")
    assert len(trained(config, tmp_path / "run")) == 6


# --- every example with its own signal ------------------------------------------------


def sums(signal: Any) -> np.ndarray:
    """A number for each position that tells signals apart."""
    return np.asarray(signal.logits, np.float64).sum(-1)


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_every_piece_keeps_its_signal_wherever_it_is(tmp_path, readers):
    """The teacher's logits here are the token and its position in the text."""
    config = text_config(
        teacher=Telling(), teacher_forward=tell, data=mixture(), eval_batch_size=24
    )
    cache(config, tmp_path / "store", logits=Dense(), shard_rows=24)
    source = config.data()
    signals = CachedTeacher(str(tmp_path / "store"))().of(source)
    loader = Loader(batch_size=8, shuffle=True)
    seen = 0
    for process in range(readers):
        shard = {"process_index": process, "process_count": readers}
        batches = signals.on_host(loader(source, seed=3, **shard))
        for _ in range(12):
            batch = next(batches)
            mask = batch["loss_mask"]
            logits = batch["teacher"].logits
            np.testing.assert_array_equal(logits[mask][:, 0], batch["tokens"][mask])
            np.testing.assert_array_equal(logits[mask][:, 1], batch["positions"][mask])
            assert not logits[~mask].any()
            seen += len(batch["index"])
    assert seen == 12 * 8


def test_a_cover_has_every_unit_once():
    for data in (rows(), mixture(), rows(repack=False)):
        source = data()
        cover = Cover(source)
        keys = np.concatenate([cover.units(row).keys for row in range(len(cover))])
        np.testing.assert_array_equal(np.sort(keys), np.arange(num_units(source)))
        for index in (0, len(source) - 1):
            units = units_of(source, index)
            assert units.places.sum() == source[index]["loss_mask"].sum()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_store_says_what_its_teacher_says(tmp_path, kind):
    manifest = cache(text_config(), tmp_path / "store", logits=kind)
    found = verify(tmp_path / "store")
    assert found["same"]
    assert found["rows"] == min(32, len(Cover(rows()())))
    lossy = kind.name == "top_k" or kind == Hidden("int8")
    assert (manifest["coding_kl"] is not None) == lossy
    for value in (manifest["coding_kl"] or {}).values():
        assert 0 <= value < 3e-4


def test_draws_belong_to_their_row_whatever_the_batch(tmp_path):
    found = []
    for size in (8, 16):
        out = tmp_path / str(size)
        cache(text_config(eval_batch_size=size), out, logits=Sampled(20), shard_rows=16)
        found.append((out / "shard-00000.array_record").read_bytes())
    assert found[0] == found[1]


def test_signals_are_what_their_losses_take(tmp_path):
    config = text_config()
    source = config.data()
    batch = next(config.loader(source, seed=0))
    for kind, expected in ((TopK(8), SparseLogits), (Sampled(20), SampledLogits)):
        out = tmp_path / kind.name
        cache(config, out, logits=kind)
        logits = CachedTeacher(str(out))().of(source).outputs(batch).logits
        assert isinstance(logits, expected)
        assert logits.ids.shape[:2] == batch["tokens"].shape
        if isinstance(logits, SampledLogits):
            mass = np.exp(logits.log_weights).sum(-1)
            np.testing.assert_allclose(mass, batch["loss_mask"], atol=1e-6)


# --- what does not belong together ----------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    cache(text_config(), folder, logits=TopK(8, (1.0, 2.0)))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": rows(OTHERS)}, "the data must be that of the store"),
        ({"data": rows(context=16)}, "the data must be that of the store"),
        ({"data": mixture()}, "the data must be that of the store"),
        (
            {"objective": objectives.LogitKD(temperature=3.0)},
            r"temperature must be .*\(1.0, 2.0\)",
        ),
        ({"data": digits()}, "the tokenizer of the data must be"),
    ],
)
def test_another_config_is_refused_before_any_compute(tmp_path, store, fields, message):
    config = from_store(text_config(), store, **fields)
    with pytest.raises((ValueError, TypeError), match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_order_is_no_other_data(tmp_path, store):
    config = from_store(text_config(data=rows(seed=5, repack=False)), store)
    assert len(trained(config, tmp_path / "run")) == 6


def test_a_store_of_another_tokenizer_is_refused(tmp_path, store):
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "sentencepiece"
    changed = rewritten(store, tmp_path / "changed", manifest)
    with pytest.raises(ValueError, match="the tokenizer of the data must be that"):
        train(from_store(text_config(), changed), tmp_path / "run")


def rewritten(store: Path, folder: Path, manifest: dict[str, Any]) -> Path:
    """A copy of a store with another manifest, whose digest is right."""
    from distilljax.teachers.store import digest_of

    folder.mkdir()
    for name, content in files(store).items():
        (folder / name).write_bytes(content)
    manifest["digest"] = digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_another_version_of_the_format_is_refused(tmp_path, store):
    manifest = json.loads((store / "manifest.json").read_text()) | {"format": 2}
    changed = rewritten(store, tmp_path / "changed", manifest)
    with pytest.raises(ValueError, match="be of format 1, got 2"):
        CachedTeacher(str(changed))()


def test_images_that_the_teacher_saw_otherwise_are_refused(tmp_path):
    config = image_config()
    cache(config, tmp_path / "store", logits=Dense())
    moved = replace(config.loader, augment=RandomShift(1), flatten=True)
    with pytest.raises(ValueError, match='teacher_view must be "clean"'):
        train(from_store(config, tmp_path / "store", loader=moved), tmp_path / "run")
    with pytest.raises(ValueError, match='teacher_view must be "clean"'):
        cache(replace(config, loader=moved), tmp_path / "other", logits=Dense())
    scaled = replace(config.loader, scale=8.0)
    with pytest.raises(ValueError, match=r"example \d+ must be as the teacher saw"):
        train(from_store(config, tmp_path / "store", loader=scaled), tmp_path / "run")
    clean = replace(moved, teacher_view="clean")
    config = from_store(config, tmp_path / "store", loader=clean)
    assert len(trained(config, tmp_path / "clean")) == 12


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"teacher": None}, Dense(), "teacher must be a single one, got none"),
        ({"teacher": {"a": Seeded(MLP)}}, Dense(), "be a single one, got 1 of them"),
        ({}, None, "signal must be of logits, features, or both, got neither"),
        ({}, Hidden(), "the teacher must have a LinearHead"),
        ({}, TopK(11), r"k must lie in \[1, 10\]"),
        ({"data": Slice(digits(), 0, 0)}, Dense(), "at least one example"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, fields, kind, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cache(image_config(**fields), tmp_path / "store", logits=kind)
    assert not (tmp_path / "store").exists()


def test_a_teacher_that_says_nan_is_refused(tmp_path):
    config = image_config(teacher_forward=nan_at_13)
    with pytest.raises(
        ValueError, match="row 13, example 13, must be numbers, got nan"
    ):
        cache(replace(config, loader=config.loader), tmp_path / "store", logits=Dense())
    assert not (tmp_path / "store" / "manifest.json").exists()


def nan_at_13(model: Any, batch: Any) -> Any:
    rows = jnp.arange(len(batch["inputs"])) == 13
    logits = model(batch["inputs"].reshape(len(rows), -1))
    return jnp.where(rows[:, None], jnp.nan, logits)


ANSWERS = {"left": 0}


def answered(x: np.ndarray) -> np.ndarray:
    if ANSWERS["left"] == 0:
        raise RuntimeError("the teacher's device is gone")
    ANSWERS["left"] -= 1
    return x


def failing(model: Any, batch: Any) -> Any:
    """A teacher that fails when it was asked so often."""
    outputs = tell(model, batch)
    logits = outputs.logits
    return Outputs(jax.pure_callback(answered, logits, logits))


def test_what_was_written_before_a_teacher_failed_is_kept(tmp_path, monkeypatch):
    one = mesh_from_string("data=1", jax.devices()[:1])
    monkeypatch.setattr(caching, "mesh_from_string", lambda text: one)
    config = text_config(teacher=Telling(), teacher_forward=failing)
    ANSWERS["left"] = 10**6
    cache(config, tmp_path / "whole", logits=Dense(), shard_rows=8)
    ANSWERS["left"] = 2
    out = tmp_path / "store"
    errors = (jax.errors.JaxRuntimeError, ValueError)  # JAX's, of either type
    with pytest.raises(errors, match="the teacher's device is gone"):
        cache(config, out, logits=Dense(), shard_rows=8)
    assert not (out / "manifest.json").exists()
    assert not list(out.glob(".*.incomplete-*"))
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert there
    ANSWERS["left"] = 10**6
    cache(config, out, logits=Dense(), shard_rows=8)
    assert files(out) == files(tmp_path / "whole")
    for name, written in there.items():
        assert (out / name).stat().st_mtime_ns == written


# --- stopped, damaged, full -----------------------------------------------------------

WRITE = """
import sys
from distilljax.caching import cache
from distilljax.teachers import Sampled
from tests.teachers import telling
from tests.teachers.tiny import text_config
config = text_config(data=telling.config().data)
cache(config, sys.argv[1], logits=Sampled(20), shard_rows=8)
"""


def writer(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITE, str(out)]
    return subprocess.Popen(command, env=environment(1), stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_writer_that_is_killed_goes_on_and_ends_in_the_same_bytes(tmp_path):
    """Killed five times, each time after some more shards; see benchmarks/store.py."""
    assert writer(tmp_path / "whole").wait() == 0
    killed = tmp_path / "killed"
    for number in (0, 1, 10, 25, 40):  # of some 95
        process = writer(killed)
        while process.poll() is None:
            if len(list(killed.glob("shard-*.json"))) > number:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        process.wait()
        assert not (killed / "manifest.json").exists()
        with pytest.raises(ValueError, match="which is not finished"):
            CachedTeacher(str(killed))()
    assert writer(killed).wait() == 0
    assert files(killed) == files(tmp_path / "whole")


def test_a_finished_store_is_left_alone(tmp_path):
    cache(text_config(), tmp_path / "store", logits=Sampled(20))
    before = files(tmp_path / "store")
    found = cache(text_config(), tmp_path / "store", logits=Sampled(20))
    assert found["already_finished"]
    assert files(tmp_path / "store") == before
    with pytest.raises(ValueError, match=r"signal.logits.options.num_samples: 20"):
        cache(text_config(), tmp_path / "store", logits=Sampled(21))
    teacher = students.Untrained(DECODER, seed=8)
    with pytest.raises(ValueError, match=r"differs in teacher\.fingerprint"):
        cache(text_config(teacher=teacher), tmp_path / "store", logits=Sampled(20))
    assert files(tmp_path / "store") == before


def test_a_lost_shard_is_written_again(tmp_path):
    config, out = text_config(), tmp_path / "store"
    cache(config, out, logits=Sampled(20), shard_rows=8)
    before = files(out)
    (out / "shard-00001.array_record").unlink()
    cache(config, out, logits=Sampled(20), shard_rows=8)
    assert files(out) == before


def test_somebodys_files_are_not_written_among(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="be empty or hold a store"):
        cache(text_config(), tmp_path, logits=Sampled(20))


@pytest.fixture
def small_disk(tmp_path):
    with disks.small_disk(tmp_path / "small", "400k") as found:
        yield found


def test_a_full_disk_leaves_no_store_and_room_lets_it_go_on(tmp_path, small_disk):
    mount, remount = small_disk
    config, out = text_config(), mount / "store"
    with pytest.raises(OSError, match="space"):
        cache(config, out, logits=Dense(), shard_rows=8)
    assert not (out / "manifest.json").exists()
    remount("size=8m")
    cache(config, out, logits=Dense(), shard_rows=8)
    cache(config, tmp_path / "store", logits=Dense(), shard_rows=8)
    assert files(out) == files(tmp_path / "store")


def test_a_read_only_folder_is_said_before_the_teacher_is_asked(
    small_disk, monkeypatch
):
    mount, remount = small_disk
    remount("ro")
    monkeypatch.setattr("distilljax.caching.Asked", None)
    with pytest.raises(ValueError, match=r"--out must be .*written.*Read-only"):
        cache(text_config(), mount / "store", logits=Sampled(20))
    assert not list(mount.iterdir())


def test_a_batch_of_a_mesh_is_that_of_one_device(tmp_path):
    """Sharded over eight devices, the store says the same."""
    config = text_config(eval_batch_size=16)
    for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
        out = tmp_path / mesh
        cache(replace(config, mesh=mesh), out, logits=Hidden())
    assert verify(tmp_path / "data=8")["same"]
    one, other = (
        CachedTeacher(str(tmp_path / mesh))().store
        for mesh in ("data=8", "data=2,fsdp=2,tensor=2")
    )
    keys = np.arange(one.manifest["counts"]["units"])
    (a, _), (b, _) = (s.decode(s.units(keys)) for s in (one, other))
    np.testing.assert_allclose(a["hidden"], b["hidden"], rtol=1e-4, atol=1e-5)


def test_optimizers_do_not_matter_to_a_store(tmp_path, store):
    config = from_store(text_config(optimizer=optimizers.SGD(1e-2)), store)
    assert len(trained(config, tmp_path / "run")) == 6


# --- going on -------------------------------------------------------------------------


def begun(config: Any, out: Path, kind: Any, shards: int, **how: Any) -> None:
    """A store of which some shards were written, and then the job was killed."""

    class Killed(BaseException):
        pass

    written = []

    def killed(*args: Any) -> None:
        if len(written) == shards:
            raise Killed
        written.append(args)
        write_shard(*args)

    write_shard = caching._write_shard
    caching._write_shard = killed
    try:
        with pytest.raises(Killed):
            cache(config, out, logits=kind, **how)
    finally:
        caching._write_shard = write_shard


@pytest.mark.parametrize(
    ("fields", "how", "message"),
    [
        ({}, {"shard_rows": 4}, "shard_rows: 8 -> 4"),
        ({"compute_dtype": "bfloat16"}, {}, "compute_dtype: 'float32' -> 'bfloat16'"),
        ({"teacher_forward": halved}, {}, "config.teacher_forward"),
        ({"loader": Loader(batch_size=8, scale=8.0, flatten=True)}, {}, "loader.scale"),
        ({"data": digits(41)}, {}, "num_units: 40 -> 41"),
        ({"data": digits(40, classes=9)}, {}, "config.data"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("finished", [False, True])
def test_a_store_goes_on_with_what_it_was_begun_with(
    tmp_path, fields, how, message, finished
):
    out = tmp_path / "store"
    if finished:
        cache(image_config(), out, logits=Dense(), shard_rows=8)
    else:
        begun(image_config(), out, Dense(), 2, shard_rows=8)
    with pytest.raises(ValueError, match=message):
        cache(image_config(**fields), out, logits=Dense(), **how)
    cache(image_config(), out, logits=Dense())
    cache(image_config(), tmp_path / "whole", logits=Dense(), shard_rows=8)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["shard-00000.array_record", "shard-00001.json"])
def test_what_is_lost_of_a_store_that_was_begun_is_written_again(tmp_path, lost):
    out = tmp_path / "store"
    begun(image_config(), out, Dense(), 2, shard_rows=8)
    (out / lost).unlink()
    cache(image_config(), out, logits=Dense())
    cache(image_config(), tmp_path / "whole", logits=Dense(), shard_rows=8)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["head.bin", "shard-00002.array_record"])
@pytest.mark.parametrize("cut", [False, True])
def test_what_is_lost_of_a_finished_store_is_written_again(tmp_path, name, cut):
    out = tmp_path / "store"
    cache(text_config(), out, logits=Hidden(), shard_rows=8)
    before = files(out)
    (out / name).unlink()
    if cut:
        (out / name).write_bytes(before[name][:100])
    cache(text_config(), out, logits=Hidden())
    assert files(out) == before


def test_the_same_answers_on_another_day_are_the_same_teacher(tmp_path, monkeypatch):
    found = []
    for day in ("2026-01-01", "2026-01-02"):
        monkeypatch.setattr(caching, "today", lambda day=day: day)
        cache(text_config(), tmp_path / day, logits=Sampled(20))
        found.append(CachedTeacher(str(tmp_path / day))().fingerprint)
    assert found[0] == found[1]
    cache(text_config(), tmp_path / "other", logits=Sampled(20, seed=1))
    assert CachedTeacher(str(tmp_path / "other"))().fingerprint != found[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_broken_kernel_is_refused_whatever_is_kept(tmp_path, kind):
    config = text_config(teacher_forward=with_a_broken_kernel)
    with pytest.raises(ValueError, match="what the teacher says of row 0"):
        cache(config, tmp_path / "store", logits=kind)


def test_more_shards_than_files_may_be_open_are_read(tmp_path, monkeypatch):
    cache(text_config(), tmp_path / "store", logits=Sampled(20), shard_rows=1)
    monkeypatch.setattr("distilljax.teachers.store._OPEN_FILES", 2)
    store = CachedTeacher(str(tmp_path / "store"))().store
    keys = np.arange(store.manifest["counts"]["units"])
    assert [unit.key for unit in store.units(keys)] == keys.tolist()
    assert len(store._opened) == 2
