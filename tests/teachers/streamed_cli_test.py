"""A teacher on its own devices, as `distilljax train` streams it. What is protected:

the student learns what it learns with the teacher in its step, batch by batch; the
teacher is ahead by as many batches as was asked for, whose outputs are split over the
batch; a run that is stopped goes on with the batch that it has not been trained on; and
a long one holds no more memory than a short one.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from distilljax.cli import main
from distilljax.teachers.streamed import Stream, StreamedTeacher
from tests.saved import losses, saved_arrays, saved_steps

pytestmark = pytest.mark.slow

PLACING = str(Path(__file__).with_name("placing.py"))
WORDS = ["--arms", "one", "--seeds", "0", "--log-every-steps=1", "--keep-last=9"]
DEPTH = 3


def run(workdir: Path, *words: str) -> Path:
    """Where the run of the arm is."""
    depth = f"--teacher.depth={DEPTH}"
    command = ["train", PLACING, "--workdir", str(workdir), *WORDS, depth, *words]
    assert main(command) == 0
    return workdir / "one" / "seed_0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("whole"), "--steps=10")


def assert_same_run(a: Path, b: Path) -> None:
    left, right = saved_arrays(a, 10), saved_arrays(b, 10)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)
    assert losses(a) == losses(b)
    assert len(losses(a)) == 10


def test_each_step_has_the_loss_of_a_teacher_in_the_step(tmp_path, whole):
    """Batches are shuffled: those of another step have another loss."""
    words = ["--steps=10", "--teacher.in-step", "True", "--teacher.mesh=tensor=8"]
    inside = losses(run(tmp_path, *words))
    streamed = losses(whole)
    assert streamed == pytest.approx(inside, rel=1e-5)
    assert len(set(streamed.values())) == 10


def test_the_teacher_is_ahead_and_what_it_says_is_split_over_the_batch(
    tmp_path, monkeypatch
):
    asked, seen = [], []
    ask, give = StreamedTeacher.with_outputs, Stream.__next__

    def counted(teacher, batch):
        asked.append(batch)
        return ask(teacher, batch)

    def given(stream):
        item = give(stream)
        seen.append((len(asked), item[0]["teacher"].logits.sharding))
        return item

    monkeypatch.setattr(StreamedTeacher, "with_outputs", counted)
    monkeypatch.setattr(Stream, "__next__", given)
    run(tmp_path, "--steps=6")
    assert [count for count, _ in seen] == [number + DEPTH for number in range(1, 7)]
    for _, sharding in seen:
        assert sharding.spec[0] is not None
        assert sharding.shard_shape((16, 3)) == (4, 3)
        assert sharding.device_set == set(jax.devices()[:4])


def test_a_run_goes_on_after_the_batch_last_trained_on(tmp_path, whole):
    """Not after those that the teacher has read."""
    run(tmp_path, "--steps=4")
    assert_same_run(run(tmp_path, "--steps=10"), whole)


def test_sigterm_saves_the_batch_last_trained_on(tmp_path, whole, monkeypatch):
    taken, original = [], Stream.__next__

    def signalled(stream):
        taken.append(None)
        if len(taken) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(stream)

    with monkeypatch.context() as during:
        during.setattr(Stream, "__next__", signalled)
        stopped = run(tmp_path, "--steps=10")
    assert saved_steps(stopped)[-1] == 6
    assert_same_run(run(tmp_path, "--steps=10"), whole)


def test_memory_does_not_grow_over_1000_steps(tmp_path, monkeypatch):
    """And nothing is fetched between two lines of metrics."""
    sizes, original = [], Stream.__next__

    def counted(stream):
        sizes.append(sum(x.nbytes for x in jax.live_arrays()))
        with jax.transfer_guard_device_to_host("disallow"):
            return original(stream)

    monkeypatch.setattr(Stream, "__next__", counted)
    words = ["--steps=1000", "--log-every-steps=10", "--eval-every-steps=1000"]
    run(tmp_path, *words)
    assert len(sizes) == 1000
    # a window of metrics comes and goes
    assert max(sizes[800:]) <= max(sizes[20:60])
