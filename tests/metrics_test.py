from __future__ import annotations

import io
import json
import os
import pty
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax.metrics import (
    ConsoleWriter,
    JsonlWriter,
    NonFiniteError,
    TensorBoardWriter,
    Window,
    open_writers,
    write_atomically,
)
from distilljax.typing import Mean, Metrics


def metrics(loss: float, **more: tuple[float, float]) -> Metrics:
    found = {"loss": Mean(loss, 1.0), "grad_norm": Mean(1.0, 1.0)}
    return Metrics.of(found | {k: Mean(*pair) for k, pair in more.items()})


def test_what_a_step_returns_is_read_by_name():
    found = metrics(2.0, kl=(6.0, 4.0))
    assert list(found) == ["grad_norm", "kl", "loss"]
    assert found["kl"].value == 1.5
    assert found["kl"].count == 4.0
    assert "ce" not in found
    assert found.get("ce") is None
    with pytest.raises(KeyError, match=r"one of .*'grad_norm'.* got 'ce'"):
        found["ce"]
    twice = jax.tree.map(jnp.add, found, found)
    assert twice["kl"] == found["kl"] + found["kl"]
    with jax.transfer_guard("disallow"):  # whoever reads one moves nothing
        jax.block_until_ready([found["loss"].sum, found["kl"].count])
    fetched = jax.device_get(found)
    assert isinstance(fetched["kl"].sum, np.float32)
    shapes = jax.eval_shape(lambda: found)
    assert shapes["kl"].count == jax.ShapeDtypeStruct((), jnp.float32)
    assert jax.tree.map(lambda _: "here", found)["loss"].sum == "here"


INDEX = np.arange(4)


def ended(window: Window, params: Any = None) -> dict[str, Any]:
    window.close(params)
    return window.read()


def test_a_window_is_read_when_the_next_has_begun():
    window = Window()
    assert window.read() == {}
    window.add(1, metrics(2.0), INDEX)
    window.close()
    window.add(2, metrics(8.0), INDEX)
    first = window.read()
    assert (first["step"], first["loss"]) == (1, 2.0)
    assert window.read() == {}
    second = ended(window)
    assert (second["step"], second["loss"]) == (2, 8.0)


def test_a_window_divides_once():
    """3 right of 4 and 0 right of 1 are 3 of 5, and not the mean of .75 and 0."""
    window = Window()
    window.add(1, metrics(2.0, accuracy=(3, 4)), INDEX)
    window.add(2, metrics(4.0, accuracy=(0, 1)), INDEX)
    record = ended(window)
    assert record["step"] == 2
    assert record["loss"] == 3.0
    assert record["accuracy"] == pytest.approx(0.6)
    assert record["examples_per_second"] > 0
    assert ended(window) == {}
    window.add(3, metrics(1.0, accuracy=(0, 0)), INDEX)
    assert ended(window)["accuracy"] == 0.0  # nothing counted


def test_the_rate_counts_the_rows_of_all_who_read(monkeypatch):
    """Of processes that read the same rows, each row counts once."""
    for num_readers in (1, 2):
        clock = iter([0.0, 4.0])
        monkeypatch.setattr("time.perf_counter", lambda clock=clock: next(clock))
        window = Window(num_readers)
        for step in (1, 2):
            window.add(step, metrics(1.0), INDEX)
        rate = ended(window)["examples_per_second"]
        assert rate == num_readers * 2 * len(INDEX) / 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_step_that_is_not_finite_is_named(value):
    window = Window()
    for step, loss in enumerate([1.0, value, value], start=5):
        window.add(step, metrics(loss), INDEX + step)
    with pytest.raises(NonFiniteError, match=f"loss must be finite, got {value}") as e:
        ended(window)
    assert e.value.step == 6
    assert e.value.index.tolist() == [6, 7, 8, 9]


def test_a_gradient_that_is_not_finite_is_an_error_too():
    window = Window()
    window.add(1, metrics(1.0, grad_norm=(jnp.nan, 1.0)), INDEX)
    with pytest.raises(NonFiniteError, match="grad_norm"):
        ended(window)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_parameters_that_are_not_finite_are_an_error_too(value):
    """No loss has seen what the last step has made."""
    window = Window()
    for step in (1, 2):
        window.add(step, metrics(1.0), INDEX + step)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2).at[1].set(value)}
    with pytest.raises(NonFiniteError, match="params must be finite") as error:
        ended(window, (params, None))
    assert error.value.step == 2
    assert error.value.index.tolist() == [2, 3, 4, 5]
    window.add(3, metrics(1.0), INDEX)
    assert ended(window, ({"kernel": jnp.ones((2, 2))}, None))["step"] == 3


def test_lines_beyond_the_checkpoint_are_dropped_on_resumption(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, 0)
    for step in (1, 2, 3):
        writer.write({"step": step, "split": "train", "loss": float(step)})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 4, "split": "tra')  # killed while writing
    writer = JsonlWriter(path, 2)
    writer.write({"step": 3, "split": "train", "loss": float("nan")})
    writer.close()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in found] == [1, 2, 3]
    assert found[-1]["loss"] is None  # nan is no JSON
    JsonlWriter(path, 0).close()
    assert path.read_text() == ""  # a run that begins anew


@pytest.mark.parametrize("resume_step", [0, 7])  # 0: killed before a checkpoint
def test_tensorboard_drops_what_lies_beyond_the_checkpoint(tmp_path, resume_step):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    writer = TensorBoardWriter(tmp_path, resume_step)
    writer.write({"step": 8, "split": "train", "loss": 0.5, "seconds": 1.0})
    writer.close()
    restarts, tags = [], []
    for path in tmp_path.iterdir():
        blob = path.read_bytes()
        while blob:
            size = int.from_bytes(blob[:8], "little")
            event = Event.FromString(blob[12 : 12 + size])
            blob = blob[16 + size :]
            if event.session_log.status == SessionLog.START:
                restarts.append(event.step)
            tags += [(value.tag, event.step) for value in event.summary.value]
    assert restarts == [resume_step + 1]
    assert tags == [("train/loss", 8)]


RECORDS = [
    {"step": 10, "split": "train", "loss": 0.5, "kd": 3e-5, "seconds": 1.0},
    {"step": 10, "split": "validation", "accuracy": 0.75, "nll": 0.1, "seconds": 1.0},
]


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    writer = ConsoleWriter("digits", 20, 0, stream)
    for record in RECORDS:
        writer.write(record)
    writer.close()
    assert stream.getvalue().splitlines() == [
        "digits  step 10/20  train loss 0.5000  kd 3.000e-05",
        "digits  step 10/20  validation accuracy 0.7500  nll 0.1000",
    ]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_bar_on_a_terminal(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        writer = ConsoleWriter("a title of thirty characters..", 20, 5, stream)
        for record in RECORDS:
            writer.write(record)
        writer.close()
        stream.write("<end>")
        stream.flush()
        shown = ""  # a terminal hands over what it has, which may be part of a frame
        while "<end>" not in shown:
            shown += os.read(ours, 100_000).decode(errors="replace")
    os.close(ours)
    shown = shown.removesuffix("<end>")
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).strip().split("\r")[-1]
    assert "10/20" in last
    assert "━" in last
    # a narrow terminal cuts the title
    assert ("a title of thirty characters.." in last) == (columns == 200)
    assert ("a ti" in last) == (columns > 60)
    assert "loss 0.5000 val accuracy 0.7500" in last


def test_the_bar_moves_with_every_step_and_is_drawn_less_often(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("distilljax.metrics.time.monotonic", lambda: now[0])
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        writer = ConsoleWriter("digits", 1000, 0, stream)
        (task,), shown = writer._bar.tasks, []
        for step in range(1, 101):
            now[0] += 0.01
            writer.advance(step)
            shown.append(task.completed)
        writer.close()
    os.close(ours)
    assert shown[-1] >= 90
    assert len(set(shown)) <= 11


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert open_writers(tmp_path, "title", 10, 0) == ()
    assert list(tmp_path.iterdir()) == []
