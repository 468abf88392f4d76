"""`distilljax cache` in several processes: gloo over the loopback. What is protected:

how many wrote a store makes no difference to it, nor do those that were killed on the
way or found the disk full; whoever is left ends soon, and with words.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from distilljax.teachers import CachedTeacher, SignalStore
from tests.disks import faulty_library, small_disk
from tests.processes import Command
from tests.saved import records
from tests.teachers.tiny import files

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).with_name("cached.py")
TELLING = Path(__file__).parents[1] / "teachers" / "telling.py"
SHARDS = ["--kind", "dense", "--shard-rows", "8", "--eval-batch-size=8"]


def run(count: int, words: list[str]) -> None:
    with Command(count, words) as found:
        assert found.codes() == [0] * count, found.outputs


def cached(out: Path, *words: str) -> list[str]:
    return ["cache", str(TELLING), "--out", str(out), *SHARDS, *words]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The store as one process writes it, in one go."""
    out = tmp_path_factory.mktemp("whole") / "store"
    run(1, cached(out))
    assert len(SignalStore(out).manifest["shards"]) > 60
    return files(out)


def complete(out: Path) -> int:
    return len(list(out.glob("shard-*.json")))


def assert_not_finished(out: Path) -> None:
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="which is not finished"):
        CachedTeacher(str(out))()


def assert_ended_with_words(output: str, told: str) -> None:
    """Its own, or its witness's: gloo may abort it before it knows who has gone."""
    (line,) = [x for x in output.splitlines() if x.startswith("error: distilljax:")]
    assert told in line or "its runtime aborted" in line


def test_two_processes_write_what_one_does_and_either_is_read_by_both(tmp_path):
    words = ["--kind", "hidden", "--shard-rows", "4", "--eval-batch-size=8"]
    for count in (2, 1):
        out = str(tmp_path / f"by{count}")
        run(count, ["cache", str(CONFIG), "--out", out, *words])
    one, two = (SignalStore(tmp_path / f"by{count}") for count in (1, 2))
    keys = np.arange(one.manifest["counts"]["units"])
    (a, _), (b, _) = (s.decode(s.units(keys)) for s in (one, two))
    np.testing.assert_allclose(a["hidden"], b["hidden"], rtol=1e-5, atol=1e-6)
    assert len(two.manifest["shards"]) == len(one.manifest["shards"]) > 2
    losses = []
    for count, store in ((1, "by2"), (2, "by1")):
        workdir = tmp_path / f"run{count}"
        words = ["--workdir", str(workdir), "--arms", "cached"]
        run(count, ["train", str(CONFIG), *words,
                    f"--teacher.store={tmp_path / store}"])  # fmt: skip
        found = records(workdir / "cached" / "seed_0")
        losses.append([r["loss"] for r in found if r["split"] == "train"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_one_of_the_writers_is_killed_again_and_again(tmp_path, whole):
    """Of two, of four, of two, each time after some more shards; then one goes on."""
    out, before = tmp_path / "store", 0
    for count, killed in ((2, 1), (4, 2), (2, 0)):
        with Command(count, cached(out, "--peer-timeout-secs=8")) as writers:
            writers.until(lambda least=before + 3: complete(out) >= least, every=0.001)
            start = time.monotonic()
            writers.running[killed].kill()
            codes = writers.codes(timeout_secs=60)
            assert 0 not in codes, writers.outputs
            assert time.monotonic() - start < 45
        del writers.outputs[killed]
        for output in writers.outputs:
            assert_ended_with_words(output, f"process {killed} of {count} must answer")
        before = complete(out)
        assert_not_finished(out)
    run(1, cached(out))
    assert files(out) == whole


@pytest.mark.parametrize("then", [1, 4])
def test_writers_that_are_all_killed_and_others_go_on(tmp_path, whole, then):
    out = tmp_path / "store"
    with Command(2, cached(out)) as writers:
        writers.until(lambda: complete(out) > 20, every=0.001)
        for process in writers.running:
            process.kill()
        writers.codes()
    assert_not_finished(out)
    run(then, cached(out))
    assert files(out) == whole


def test_a_disk_that_fails_under_one_of_them_ends_both(tmp_path, whole):
    """Its error is printed, the other is not left waiting, and the job goes on."""
    out, library = tmp_path / "store", faulty_library(tmp_path)
    faults = {"LD_PRELOAD": str(library), "FAULTY_DIR": f"{out}/"}
    faults |= {"FAULTY_EVERY": "1", "FAULTY_AFTER": "60"}
    one = {name: {1: value} for name, value in faults.items()}
    with Command(2, cached(out), **one) as writers:
        writers.running[1].wait(timeout=120)
        start = time.monotonic()
        assert 0 not in writers.codes(timeout_secs=60), writers.outputs
        assert time.monotonic() - start < 30
        assert "Input/output error" in writers.outputs[1]
        told = "process 1 of 2 must answer within 60 s, got an error there"
        assert_ended_with_words(writers.outputs[0], told)
    assert complete(out) > 0
    assert_not_finished(out)
    run(2, cached(out))
    assert files(out) == whole


def test_a_disk_that_is_full_ends_both_and_room_lets_them_go_on(tmp_path, whole):
    size = sum(map(len, whole.values()))
    with small_disk(tmp_path / "small", str(size // 2)) as (mount, remount):
        out = mount / "store"
        with Command(2, cached(out)) as writers:
            assert 0 not in writers.codes(), writers.outputs
            assert "space" in "".join(writers.outputs)
        assert complete(out) > 0
        assert_not_finished(out)
        remount(f"size={2 * size}")
        run(2, cached(out))
        assert files(out) == whole
