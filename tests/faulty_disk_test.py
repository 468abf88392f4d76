"""A folder on a disk like a mounted bucket: each change of it waits, and some fail.

What is protected: a fault that passes must not end a run of days, and none may damage
what a run leaves. `faulty.c` lets operations of the real command fail below libc, so
those of Orbax and TensorStore do too.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distilljax.metrics import TensorBoardWriter, write_atomically
from distilljax.patience import append_line, patiently
from tests.disks import faulty_library
from tests.processes import environment
from tests.saved import losses, saved_arrays, saved_steps

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["--student.hidden=32", "--loader.batch-size=96"]
WORDS += ["--log-every-steps=1", "--checkpoint-every-steps=5", "--eval-every-steps=10"]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return faulty_library(tmp_path_factory.mktemp("faulty"))


def run(
    workdir: Path, *, steps: int = 30, **faults: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distilljax", "train"]
    command += [str(ROOT / "configs/digits/teacher.py"), "--workdir", str(workdir)]
    return subprocess.run(
        [*command, *WORDS, f"--steps={steps}"],
        env={**environment(num_devices=1), **faults},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """The same run on a disk without faults."""
    workdir = tmp_path_factory.mktemp("sound")
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def assert_equal(workdir: Path, sound: Path) -> None:
    """To the last bit, and every step was logged once."""
    ours, theirs = saved_arrays(workdir, 30), saved_arrays(sound, 30)
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    assert losses(workdir) == losses(sound)
    assert not list(workdir.glob(".*.tmp"))
    assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_a_slow_disk_changes_nothing(tmp_path, library, sound):
    done = run(
        tmp_path,
        LD_PRELOAD=str(library),
        FAULTY_DIR=f"{tmp_path}/",
        FAULTY_DELAY_US="5000",
    )
    assert done.returncode == 0, done.stderr
    assert_equal(tmp_path, sound)


@pytest.mark.slow
def test_faults_that_pass_cost_a_checkpoint_and_nothing_else(tmp_path, library, sound):
    """One operation in a hundred fails, on whatever file that is."""
    log, workdir = tmp_path / "faults", tmp_path / "run"
    done = run(
        workdir,
        LD_PRELOAD=str(library),
        FAULTY_DIR=f"{workdir}/",
        FAULTY_DELAY_US="200",
        FAULTY_EVERY="101",
        FAULTY_AFTER="90",  # a folder that cannot be used is said at once
        FAULTY_LOG=str(log),
    )
    assert done.returncode == 0, done.stderr
    failed = log.read_text().splitlines()
    assert any("orbax-checkpoint-tmp" in line for line in failed), failed
    assert "was not written and read back" in done.stderr
    assert "The run goes on" in done.stderr
    assert saved_steps(workdir)[-1] == 30
    assert_equal(workdir, sound)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """Half of that run."""
    workdir = tmp_path_factory.mktemp("half")
    assert run(workdir, steps=15).returncode == 0
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("every", ["41", "59"])
def test_reads_that_fail_for_a_moment_are_no_damage(
    tmp_path, library, sound, half, every
):
    """Of half a run, which is then gone on with: one read in so many fails."""
    log, workdir = tmp_path / "faults", tmp_path / "run"
    shutil.copytree(half, workdir)
    done = run(
        workdir,
        LD_PRELOAD=str(library),
        FAULTY_DIR=f"{workdir}/",
        FAULTY_READS="1",
        FAULTY_EVERY=every,
        FAULTY_LOG=str(log),
    )
    assert done.returncode == 0, done.stderr
    failed = log.read_text().splitlines()
    assert any("checkpoints/15/" in line for line in failed), failed
    assert "must be complete" not in done.stderr
    assert not (workdir / "checkpoints.damaged").exists()
    assert_equal(workdir, sound)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboards_thread_may_end_and_nobody_waits_for_it(tmp_path, capfd):
    """It ends without a word, and its queue, once full, would hold the run for ever."""
    writer = TensorBoardWriter(tmp_path, 0)
    broken = writer._events

    def fail(event):
        raise OSError(5, "Input/output error")

    broken._ev_writer.write_event = fail
    record = {"split": "train", **{f"m{i}": float(i) for i in range(40)}}
    writer.write({**record, "step": 1})
    broken._worker.join(timeout=20)
    assert not broken._worker.is_alive()
    writer.write({**record, "step": 2})
    assert "could not be written; another is begun" in capfd.readouterr().err
    writer.close()
    assert not writer._is_alive()
    assert any(b"train/m39" in path.read_bytes() for path in tmp_path.iterdir())


def test_the_end_of_tensorboards_file_is_tried_again_and_told(tmp_path, capfd):
    record = {"split": "train", "step": 1, "loss": 2.0}
    for failures in (2, 99):
        writer = TensorBoardWriter(tmp_path / str(failures), 0)
        writer.write(record)
        real, left = writer._events.flush, [None] * failures

        def flush(real=real, left=left):
            if left:
                left.pop()
                raise OSError(5, "Input/output error")
            real()

        writer._events.flush = flush
        writer.close()
        told = "the last lines for TensorBoard" in capfd.readouterr().err
        assert told == (failures > 5)
        assert writer._events._closed == (failures < 5)


# --- what is small is tried again -----------------------------------------------------


def test_what_passes_is_tried_again_and_what_stays_is_raised_at_once():
    calls = []

    def fail(number: int, times: int) -> str:
        calls.append(number)
        if len(calls) <= times:
            raise OSError(number, "no answer")
        return "done"

    assert patiently(lambda: fail(5, 2), [0.0] * 4) == "done"
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(OSError, match="no answer"):
        patiently(lambda: fail(5, 9), [0.0] * 4)
    assert len(calls) == 5
    calls.clear()
    with pytest.raises(OSError, match="no answer"):
        patiently(lambda: fail(28, 9), [0.0] * 4)  # a full disk
    assert len(calls) == 1


class Faulty:
    """A file whose first calls of `write` fail, after a part of what is given."""

    def __init__(self, file, left: list[int]):
        self._file, self._left = file, left

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if self._left:
            self._file.write(data[: self._left.pop()])
            self._file.flush()
            raise OSError(5, "Input/output error")
        return self._file.write(data)


@pytest.fixture
def torn(monkeypatch):
    """The next writes write so many bytes, and fail."""
    left: list[int] = []
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: Faulty(real(self, *a, **k), left)
    )
    monkeypatch.setattr("time.sleep", lambda _: None)
    return left


def test_a_line_is_whole_though_a_write_broke_off(tmp_path, torn):
    path = tmp_path / "lines"
    append_line(path, "one")
    torn += [3, 2]
    append_line(path, "two and more")
    append_line(path, "three")
    assert path.read_bytes() == b"one\ntwo and more\nthree\n"


def test_a_file_is_whole_though_a_write_broke_off(tmp_path, torn):
    path = tmp_path / "whole"
    write_atomically(path, "before")
    torn += [1, 4]
    write_atomically(path, "after")
    assert path.read_bytes() == b"after"
    torn += [1] * 9
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(path, "never")
    torn.clear()
    assert path.read_bytes() == b"after"
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]
