"""The real command line, in processes of its own that are killed and interrupted."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from distilljax.cli import main
from distilljax.programs import Training
from tests.processes import environment
from tests.saved import losses, records, saved_arrays, saved_steps

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(Path(__file__).parent / "tiny.py")
DIGITS = str(REPOSITORY / "configs" / "digits" / "teacher.py")

STEPS = 240
SHORT = [f"--steps={STEPS}", "--log-every-steps=1", "--eval-every-steps=60"]
SHORT += ["--checkpoint-every-steps=10", "--student.hidden", "256", "256"]


def start(*arguments: str, **kwargs) -> subprocess.Popen:
    """``distilljax ...`` as a user runs it, on one device."""
    return subprocess.Popen(
        [sys.executable, "-m", "distilljax", *arguments],
        env=environment(num_devices=1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(
    process: subprocess.Popen, timeout_secs: float = 240
) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_secs)
    finally:
        process.kill()
    return process.returncode, out, err


def interrupt(
    process: subprocess.Popen, when: Callable[[], bool], signum: int
) -> tuple[int, str, str]:
    """Send a signal as soon as something holds; it must, before the process ends."""
    try:
        deadline = time.monotonic() + 240
        while not when():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signum)
    except BaseException:
        process.kill()
        raise
    return finish(process)


def last_step(workdir: Path) -> int:
    return max((r["step"] for r in records(workdir)), default=0)


def half_written(workdir: Path) -> list[Path]:
    return [p for p in (workdir / "checkpoints").glob("*") if not p.name.isdigit()]


@pytest.mark.slow
def test_killed_interrupted_and_resumed_equals_never_stopped(tmp_path):
    """train(2N) == train(N) + kill -9 + resume, bit for bit, at several moments."""
    command = ["train", DIGITS, *SHORT, "--workdir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, _, err = finish(start(*command, str(whole)))
    assert code == 0, err

    # 1. kill -9 between two checkpoints
    code, *_ = interrupt(
        start(*command, str(parts)), lambda: last_step(parts) >= 35, signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    assert 35 <= last_step(parts) < STEPS
    first = saved_steps(parts)[-1]

    # 2. kill -9 while a later checkpoint is being written
    code, *_ = interrupt(
        start(*command, str(parts)),
        lambda: last_step(parts) >= first + 25 and half_written(parts) != [],
        signal.SIGKILL,
    )
    assert code == -signal.SIGKILL
    second = saved_steps(parts)[-1]
    assert first < second < STEPS

    # 3. SIGTERM: saves where it is, and says so
    code, out, err = interrupt(
        start(*command, str(parts)),
        lambda: saved_steps(parts)[-1] > second,
        signal.SIGTERM,
    )
    assert code == 0, err
    third = saved_steps(parts)[-1]
    assert second < third < STEPS
    assert f"stopped and saved at step {third} of {STEPS}" in out
    assert records(parts)[-1]["step"] == third

    # 4. the rest
    code, _, err = finish(start(*command, str(parts)))
    assert code == 0, err
    assert f"step {third + 1}/{STEPS}" in err
    assert f"step {third}/{STEPS}" not in err
    assert not half_written(parts)

    one, other = saved_arrays(whole, STEPS), saved_arrays(parts, STEPS)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    assert losses(whole) == losses(parts)
    results = [json.loads((w / "results.json").read_text()) for w in (whole, parts)]
    assert results[0]["student"]["nll"] == results[1]["student"]["nll"]
    assert results[0]["selected"] == results[1]["selected"]


# --- several runs in one process ------------------------------------------------------


@pytest.mark.slow
def test_arms_and_seeds_are_resumed_in_the_middle(tmp_path):
    """kill -9 in the third of four runs; the finished ones are not run again."""
    command = ["train", TINY, "--workdir", str(tmp_path), "--seeds", "0..1"]
    third = tmp_path / "hard_labels" / "seed_1"
    code, out, _ = interrupt(
        start(*command, "--checkpoint-every-steps=1"),
        lambda: last_step(third) >= 3,
        signal.SIGKILL,
    )
    assert code == -signal.SIGKILL
    done = [
        tmp_path / arm / "seed_0" / "results.json"
        for arm in ("hard_labels", "distilled")
    ]
    before = [path.stat().st_mtime_ns for path in done]
    code, out, err = finish(start(*command))
    assert code == 0, err
    assert [path.stat().st_mtime_ns for path in done] == before
    assert out.count("already finished") == 2
    assert len(list(tmp_path.rglob("results.json"))) == 4
    assert "distilled" in out
    assert "against its baseline" in out


def test_arms_and_seeds_share_compilations(tmp_path, caplog, one_device):
    """Two arms, three seeds: two steps, one evaluation, one of everything else."""
    with jax.log_compiles():
        code = main(["train", TINY, "--workdir", str(tmp_path), "--seeds", "0..2"])
    assert code == 0
    compiled = [
        r.getMessage().split("jit(")[1].split(")")[0]
        for r in caplog.records
        if r.getMessage().startswith("Compiling jit(")
    ]
    assert compiled.count("_update") == 2
    assert compiled.count("init") == 2
    assert compiled.count("run") == 1
    runs = sorted(
        str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("results.json")
    )
    assert runs == [
        f"{arm}/seed_{seed}"
        for arm in ("distilled", "hard_labels")
        for seed in range(3)
    ]
    first, *_ = (json.loads(p.read_text()) for p in tmp_path.rglob("results.json"))
    assert first["teacher"]["accuracy"] < 0.8 < first["student"]["accuracy"]


def test_the_same_seed_is_the_same_student_in_every_arm(tmp_path, one_device):
    """Arms are compared in pairs: same first parameters, same order of the data."""
    command = ["train", TINY, "--workdir", str(tmp_path), "--seeds=4", "--steps=1"]
    assert main(command) == 0
    entropies = []
    for arm in ("hard_labels", "distilled"):
        first = records(tmp_path / arm / "seed_4")[0]
        entropies.append(
            (first["student_entropy"], first["accuracy"], first["kl"])
            if "kl" in first
            else (first["student_entropy"], first["accuracy"])
        )
    assert entropies[0][:2] == entropies[1][:2]


def test_an_override_reaches_the_run(tmp_path, capsys, one_device):
    command = ["train", TINY, "--workdir", str(tmp_path), "--seed=3"]
    assert main([*command, "--objective.temperature=1", "--steps", "2"]) == 0
    note = capsys.readouterr().err
    assert "schedule ends at step" in note
    assert "--optimizer.learning-rate.num-steps=2" in note
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["objective"]["temperature"] == 1.0
    assert saved["steps"] == 2
    assert saved["seed"] == 3
    assert saved["data"]["num_examples"] == 48
    first = records(tmp_path)[0]
    # loss = kd_weight T^2 kd + ce_weight ce, with T = 1
    assert first["loss"] == pytest.approx(0.1 * first["kd"] + first["ce"], rel=1e-5)


# --- bad input ------------------------------------------------------------------------


def run(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and what went to standard error."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def files(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_workdir_of_another_config_names_the_differences(
    tmp_path, capsys, one_device
):
    command = ["train", TINY, "--workdir", str(tmp_path), "--steps=2"]
    assert main(command) == 0
    before = files(tmp_path)
    code, err = run(capsys, *command, "--student.dropout=0.5", "--loader.batch-size=8")
    assert code == 1
    assert "student.dropout: 0.2 -> 0.5" in err
    assert "loader.batch_size: 16 -> 8" in err
    assert "Choose another folder" in err
    assert files(tmp_path) == before
    # but what does not change the result may be changed
    code, err = run(capsys, *command, "--keep-last=3", "--description=x")
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--stepz=3"], 2, "Did you mean --steps?"),
        (["--objective.temperatur=3"], 2, "Did you mean --objective.temperature?"),
        (["--temperature=3"], 2, "Did you mean --objective.temperature?"),
        (["--sedes=0..3"], 2, "Did you mean --seeds,"),
        (["--student=3"], 2, "--student.num-features"),
        (["--steps=many"], 2, "--steps"),
        (["--loader.teacher-view=same_as"], 2, "teacher-view"),
        (["--steps=0"], 2, "steps must be at least 1, got 0"),
        (["--seed=-1"], 1, "seed must lie in"),
        (["--mesh=data=3"], 1, "multiply to the number of devices, 1"),
        (["--accumulate=3"], 1, "accumulate=3, got 16"),
        (["--loader.batch-size=64"], 1, "at most the size of the source, 48"),
        (["--teacher.num-classes=4"], 1, "have the student's classes, 3, got 4"),
        (["--student.num-classes=2"], 1, "labels must lie in [0, 2)"),
        (["--student.num-features=63"], 1, "num_features must be 8, the values of"),
        (["--focus-classes", "2", "3"], 1, "[0, 3), the classes of the student, got 3"),
        (["--student.dropout=1.5"], 2, "dropout must lie in [0, 1), got 1.5"),
        (["--student.hidden", "9", "0"], 2, "hidden must be at least 1, got 0"),
        (["--optimizer.learning-rate.peak=0"], 2, "peak must be positive and finite"),
        (["--optimizer.learning-rate.num-steps=0"], 2, "num_steps must be at least 1"),
        (
            ["--optimizer.learning-rate.warmup-steps=20"],
            2,
            "be less than num_steps, 20",
        ),
        (["--select=acuracy"], 1, "one of accuracy, nll, ece"),
        (["--arms=distiled"], 1, "Did you mean distilled?"),
        (["--seeds=3..1"], 1, "--seeds must be like 0..4"),
        (["--seeds=a"], 1, "--seeds must be like 0..4"),
        (["--seeds=1,1"], 1, "each once"),
        (["--seeds=0..1", "--seed=1"], 2, "give one"),
        (["--process-id=0"], 1, "--multihost"),
        (
            ["--seeds=0", "--objective.temperature=3"],
            2,
            "config of the arm 'hard_labels'",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_command_is_explained_and_leaves_nothing(
    tmp_path, capsys, one_device, words, code, message
):
    found, err = run(capsys, "train", TINY, "--workdir", str(tmp_path / "run"), *words)
    # boxes on the way may break lines
    assert message in " ".join(err.replace("│", " ").split()), err
    assert found == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "CONFIG must be a Python file"),
        ("x = 1\n", "define config(seed=0) -> Config"),
        (
            "from distilljax.config import load_module\nfrom pathlib import Path\n"
            f"tiny = load_module(Path({TINY!r}))\n"
            "def config(seed=0):\n    return tiny.config()\n",
            "pass its seed on",
        ),
        (
            "def config(seed=0):\n    return {'seed': seed}\n",
            "must be a Config, got a dict",
        ),
    ],
    ids=["missing", "without config", "one seed for all", "dict"],
)
def test_a_wrong_config_file_is_explained(tmp_path, capsys, text, message):
    path = tmp_path / "wrong.py"
    if text is not None:
        path.write_text(text)
    words = ["train", str(path), "--workdir", str(tmp_path / "run"), "--seed=1"]
    code, err = run(capsys, *words)
    assert code == 1
    assert message in err
    assert not (tmp_path / "run").exists()


def test_an_error_in_a_users_code_keeps_its_traceback(tmp_path, one_device):
    path = tmp_path / "mine.py"
    path.write_text(
        "from distilljax.config import load_module\nfrom pathlib import Path\n"
        "from dataclasses import replace\n"
        f"tiny = load_module(Path({TINY!r}))\n"
        "def forward(model, batch):\n    raise ValueError('a bug of mine')\n"
        "def config(seed=0):\n"
        "    return replace(tiny.config(seed), student_forward=forward)\n"
    )
    with pytest.raises(ValueError, match="a bug of mine"):
        main(["train", str(path), "--workdir", str(tmp_path / "run")])


@pytest.mark.parametrize("folder", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_explained(
    tmp_path, capsys, one_device, folder
):
    (tmp_path / "file").write_text("in the way")
    code, err = run(capsys, "train", TINY, "--workdir", str(tmp_path / folder))
    assert code == 1
    assert "--workdir must be a folder that can be written" in err
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_explained(tmp_path, capsys, one_device):
    tmp_path.chmod(0o500)
    code, err = run(capsys, "train", TINY, "--workdir", str(tmp_path / "run"))
    tmp_path.chmod(0o700)
    assert code == 1
    assert "folder that can be written" in err


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys, one_device):
    (tmp_path / "thesis.tex").write_text("...")
    code, err = run(capsys, "train", TINY, "--workdir", str(tmp_path))
    assert code == 1
    assert "'thesis.tex' and no config.json" in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_a_second_process_in_a_workdir_and_then_a_full_disk(tmp_path):
    """The second is refused while the first runs; it goes on when there is room."""
    command = ["train", TINY, "--workdir", str(tmp_path / "run"), "--steps=100000"]
    command += ["--checkpoint-every-steps=100", "--optimizer.learning-rate.end=1e-3"]
    first = start(*command)
    try:
        deadline = time.monotonic() + 120
        while not saved_steps(tmp_path / "run"):
            assert first.poll() is None, first.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = (tmp_path / "run" / "config.json").read_bytes()
        code, _, err = finish(start(*command))
        assert code == 1
        assert "--workdir must be used by one process at a time" in err
        assert (tmp_path / "run" / "config.json").read_bytes() == before
        first.send_signal(signal.SIGTERM)
        code, _, err = finish(first)
        assert code == 0, err
    finally:
        first.kill()
    # A limit on the size of files stands for a full disk: writing fails in the middle.
    at = saved_steps(tmp_path / "run")[-1]
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size + 2_000
    limited = ["bash", "-c", f'ulimit -f {size // 1024}; exec "$0" "$@"']
    process = subprocess.run(
        [*limited, sys.executable, "-m", "distilljax", *command],
        env=environment(num_devices=1),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 1, process.stderr
    assert "File too large" in process.stderr
    assert saved_steps(tmp_path / "run")[-1] >= at
    last = saved_steps(tmp_path / "run")[-1]
    code, _, err = finish(start(*command[:-3], f"--steps={last + 5}", *command[-2:]))
    assert code == 0, err


def test_a_loss_that_is_not_finite_exits_with_1(tmp_path, capsys, one_device):
    words = ["train", TINY, "--workdir", str(tmp_path), "--checkpoint-every-steps=2"]
    words += ["--loader.scale=1e-20", "--optimizer.learning-rate.peak=1e30"]
    code, err = run(capsys, *words)
    assert code == 1
    assert "must be finite" in err
    assert "at step " in err
    assert "Its batch (keys: inputs, labels) has the 16 examples" in err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated", "without metadata", "foreign"])
def test_a_damaged_or_foreign_checkpoint_exits_with_1(
    tmp_path, capsys, one_device, damage
):
    words = ["train", TINY, "--workdir", str(tmp_path / "run"), "--steps=5"]
    assert main(words) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "5"
    if damage == "truncated":
        found = (p for p in checkpoint.rglob("*") if p.is_file())
        largest = max(found, key=os.path.getsize)
        os.truncate(largest, os.path.getsize(largest) // 2)
    elif damage == "without metadata":
        (checkpoint / "_CHECKPOINT_METADATA").unlink()
    else:
        other = ["--workdir", str(tmp_path / "other"), "--student.hidden", "7"]
        assert main([*words[:2], *other, "--steps=5"]) == 0
        shutil.rmtree(checkpoint)
        shutil.copytree(tmp_path / "other" / "checkpoints" / "5", checkpoint)
    before = files(tmp_path)
    code, err = run(capsys, *words[:-1], "--steps=10")
    assert code == 1
    assert "must be complete and of this student and optimizer" in err
    assert files(tmp_path) == before
    gc.collect()  # Orbax drops what it was reading; complained about here


def test_sigterm_ends_a_comparison_after_the_run_it_came_in(
    tmp_path, capsys, one_device, monkeypatch
):
    update = Training.update.func

    def update_with_signal(self):
        run = update(self)

        def step(state, batch):
            os.kill(os.getpid(), signal.SIGTERM)
            return run(state, batch)

        return step

    words = ["train", TINY, "--workdir", str(tmp_path), "--seeds=0..1"]
    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", property(update_with_signal))
        assert main([*words, "--steps=3"]) == 0
        assert "stopped and saved at step 1 of 3" in capsys.readouterr().out
        # and where it comes in the last step, that run is finished
        assert main([*words, "--steps=2"]) == 0
        assert "stopped after 1 of 4 runs" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("config.json"))) == 1


# --- help -----------------------------------------------------------------------------


def test_help_describes_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", TINY, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for name in ("--steps INT", "--objective.temperature FLOAT", "--data.num-examples"):
        assert name in words
    assert "Number of updates. (default: 20)" in words
    assert "How many points. (default: 48)" in words
    assert "distilled Labels and an untrained teacher." in words  # its arms
    assert "0x" not in out  # no addresses of functions
    assert "Which value of `select` is the best; None: as the measure says." in words
    assert "show this help message" not in out  # it would name no option
    assert "(default: ())" in words
    assert "'()'" not in out


def test_help_shows_an_apostrophe_as_it_is_written(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from distilljax.config import load_module\nfrom pathlib import Path\n"
        "from dataclasses import replace\n"
        f"tiny = load_module(Path({TINY!r}))\n"
        "def config(seed=0):\n"
        '    return replace(tiny.config(seed), description="The teacher\'s.")\n'
    )
    with pytest.raises(SystemExit):
        main(["train", str(path), "--help"])
    assert "(default: 'The teacher's.')" in " ".join(capsys.readouterr().out.split())


def test_help_without_a_config_is_useful(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "distilljax train configs/digits/teacher.py --workdir" in words
    assert "--checkpoint-every-steps INT Steps between" in words
    assert (
        "--optimizer.learning-rate FLOAT Number or schedule. (default: 0.001)" in words
    )
