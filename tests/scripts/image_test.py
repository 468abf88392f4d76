"""The image build file and the task of SkyPilot: what they name exists, and runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "scripts" / "Dockerfile"
TASK = REPOSITORY / "scripts" / "sky.yaml"


def instructions() -> list[tuple[str, str]]:
    """``(name, text)`` of each, with lines that are continued joined."""
    lines = DOCKERFILE.read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    text = re.sub(r"\\\n", "", text)
    return [
        (name, rest.strip())
        for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def texts(name: str) -> list[str]:
    return [text for found, text in instructions() if found == name]


def test_the_image_is_small_and_without_rights():
    stages = texts("FROM")
    assert all(stage.startswith("python:${PYTHON}-slim") for stage in stages)
    assert len(stages) == 2, "what the build leaves behind stays in the first"
    assert texts("USER") == ["${USER_ID}"]
    assert "USER_ID=1000" in texts("ARG")
    names = [name for name, _ in instructions()]
    assert names.index("USER") > len(names) - 3, "nothing is installed after it"
    assert "--no-cache-dir" in texts("RUN")[0]


def test_what_is_copied_exists_and_is_not_ignored():
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert lines[0] == "*", "assets, runs and environments stay outside"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    copied = [
        word
        for text in texts("COPY")
        if not text.startswith("--from")
        for word in text.split()[:-1]
    ]
    assert sorted(copied) == sorted(allowed)
    for path in copied:
        assert (REPOSITORY / path).exists()
        assert not any(fnmatch(path, line) for line in lines[len(allowed) + 1 :])


@pytest.fixture
def build(stage):
    """Runs the commands of the first stage, in the folder as it is copied."""
    root = stage.root / "distilljax"
    (root / "constraints").mkdir(parents=True)
    body = (
        "if argv[0] == '-c':\n"
        "    sys.version_info = tuple(map(int, os.environ['VERSION'].split('.')))\n"
        "    exec(argv[1])\n"
        "if argv[:2] == ['-m', 'venv']:\n"
        "    os.makedirs('.venv/bin')\n"
        "    os.symlink(sys.argv[0], '.venv/bin/python')\n"
    )
    stage.add("python", body)

    def run(variant: str, version: str):
        arguments = dict(text.split("=", 1) for text in texts("ARG"))
        return subprocess.run(
            ["sh", "-c", texts("RUN")[0]],
            cwd=root,
            env=arguments
            | {"PATH": f"{stage.bin}:/usr/bin:/bin"}
            | {"VARIANT": variant, "VERSION": version},
            capture_output=True,
            text=True,
        )

    stage.build = run
    return stage


@pytest.mark.parametrize("variant", ["tpu", "cuda"])
@pytest.mark.parametrize(("version", "pins"), [("3.11", "py311"), ("3.12", "py312")])
def test_the_pins_and_extras_of_the_variant_are_installed(
    build, variant, version, pins
):
    done = build.build(variant, version)

    assert done.returncode == 0, done.stderr
    install = build.calls("python")[-1]
    assert install[:3] == ["-m", "pip", "install"]
    constraints = install[install.index("-c") + 1]
    assert constraints == f"constraints/{pins}.txt"
    assert (REPOSITORY / constraints).exists()
    extras = re.findall(r"\w+", install[-1].partition("[")[2])
    assert extras[-1] == variant
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        assert set(extras) <= set(
            tomllib.load(file)["project"]["optional-dependencies"]
        )


def test_an_unknown_variant_is_refused(build):
    done = build.build("gpu", "3.12")

    assert done.returncode == 2
    assert "VARIANT must be tpu or cuda, got 'gpu'" in done.stderr
    assert build.calls("python") == []


# --- the task of SkyPilot -------------------------------------------------------------

AWKWARD = ["train", "a b.py", '--note=it\'s "so"', "$HOME `id` \\ ; *", ""]
STOPPED = "few: stopped and saved at step 7 of 9; the same command resumes."


@pytest.fixture
def task(stage):
    """Runs ``setup`` and ``run`` of the task as SkyPilot does, in a copy of scripts."""
    found = yaml.safe_load(TASK.read_text())
    root = stage.root / "sky_workdir"
    shutil.copytree(REPOSITORY / "scripts", root / "scripts")
    (root / "constraints").mkdir()
    venv = root / ".venv" / "bin"
    stage.add("python", "print('py312')", folder=venv)
    stage.install = lambda body="": stage.add("distilljax", body, folder=venv)
    stage.install()

    def run(part: str, nodes: int = 1, rank: int = 0, **env: str):
        env = {k: v for k, v in found["envs"].items() if v is not None} | env
        ips = "\n".join(f"10.0.0.{i + 1}" for i in range(nodes))
        env |= {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": str(rank)}
        env |= {"SKYPILOT_NODE_IPS": ips, "PATH": f"{stage.bin}:/usr/bin:/bin"}
        return subprocess.run(
            ["bash", "-c", found[part]],
            cwd=root,
            env=env,
            capture_output=True,
            text=True,
        )

    stage.play = run
    stage.task = found
    return stage


def test_the_task_recovers_and_its_runs_outlive_the_machines(task):
    assert task.task["resources"]["use_spot"] is True
    recovery = task.task["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert task.task["workdir"] == "."
    mount = task.task["file_mounts"]["/mnt/runs"]
    assert mount == {"source": "gs://${BUCKET}", "mode": "MOUNT"}
    # null: SkyPilot asks for them
    assert [k for k, v in task.task["envs"].items() if v is None] == [
        "BUCKET",
        "COMMAND",
    ]


def test_the_task_installs_its_variant(task):
    done = task.play("setup", VARIANT="cuda")

    assert done.returncode == 0, done.stderr
    assert task.calls("python")[-1][-1] == ".[train,report,cuda]"


def test_the_task_runs_the_words_as_they_were_given(task):
    done = task.play("run", COMMAND=shlex.join(AWKWARD))

    assert done.returncode == 0, done.stderr
    assert task.calls("distilljax") == [AWKWARD]


@pytest.mark.parametrize("variant", ["tpu", "cuda"])
def test_several_machines_are_told_their_place_where_they_need_it(task, variant):
    done = task.play("run", nodes=2, rank=1, VARIANT=variant, COMMAND="train c.py")

    assert done.returncode == 0, done.stderr
    place = [
        "--coordinator",
        "10.0.0.1:8476",
        "--num-processes",
        "2",
        "--process-id",
        "1",
    ]
    words = ["train", "c.py", "--multihost", *(place if variant == "cuda" else [])]
    assert task.calls("distilljax") == [words]


def test_a_stopped_run_ends_with_the_code_that_is_recovered(task):
    task.install(f"print({STOPPED!r})")
    assert task.play("run", COMMAND="train c.py").returncode == 75
    task.install("sys.exit(3)")
    assert task.play("run", COMMAND="train c.py").returncode == 3


def test_flags_of_a_preset_reach_the_run(task):
    task.install("print(json.dumps(os.environ['LIBTPU_INIT_ARGS']))")

    done = task.play("run", COMMAND="train c.py", FLAGS="scripts/flags/v6e.env")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).split()[0].startswith("--xla_tpu_enable_async")
