"""The two commands: what they install, when again, and what they say if they cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PINS = sorted((REPOSITORY / "constraints").glob("py*.txt"))


@pytest.fixture
def project(stage):
    """A copy of the Makefile, with a Python whose environments are stand-ins too."""
    root = stage.root / "project"
    shutil.copytree(REPOSITORY / "constraints", root / "constraints")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root)
    stage.add("distilljax", folder=root / "stand-ins")

    def play(version: tuple[int, int]) -> str:
        return (
            f"version = {version!r}\n"
            "if argv[:1] == ['-c']:\n"
            "    sys.version_info = version\n"
            "    exec(argv[1])\n"
            "if argv == ['--version']: print('Python %d.%d' % version)\n"
        )

    def python(version=(3, 11), in_venv=None, body: str = ""):
        inside = play(in_venv or version) + body
        kept = stage.add("python-of-venv", inside, folder=root / "stand-ins")
        make_venv = (
            "if argv[:2] == ['-m', 'venv']:\n"
            "    os.makedirs(argv[-1] + '/bin', exist_ok=True)\n"
            f"    for name, target in [('python', {str(kept)!r}),\n"
            f"        ('distilljax', {str(root / 'stand-ins' / 'distilljax')!r})]:\n"
            "        link = argv[-1] + '/bin/' + name\n"
            "        os.path.lexists(link) or os.symlink(target, link)\n"
        )
        for name in ("python3.11", "python3", "python3.12", "python3.13"):
            stage.add(name, play(version) + make_venv)

    def make(*words: str):
        # `make test VENV=... PYTHON=...` hands these down to whatever it starts.
        ours = ("MAKE", "MFLAGS", "VENV", "PYTHON", "WORKERS", "DEMO_DIR")
        env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        env["PATH"] = f"{stage.bin}:{os.environ['PATH']}"
        return subprocess.run(
            ["make", *words], cwd=root, env=env, capture_output=True, text=True
        )

    def installs() -> list[list[str]]:
        calls = stage.calls("python-of-venv")
        return [call for call in calls if call[:3] == ["-m", "pip", "install"]]

    python()
    stage.python, stage.make, stage.installs = python, make, installs
    stage.project = root
    return stage


def pytest_runs(project) -> int:
    return sum(c[:2] == ["-m", "pytest"] for c in project.calls("python-of-venv"))


@pytest.mark.parametrize(
    ("version", "pins"), [((3, 11), "py311"), ((3, 12), "py312"), ((3, 13), "py312")]
)
def test_the_first_test_run_installs_with_the_pins_of_its_python(
    project, version, pins
):
    project.python(version)

    done = project.make("test")

    assert done.returncode == 0, done.stderr
    (install,) = project.installs()
    assert install[-4:] == [
        "-c", f"constraints/{pins}.txt",
        "-e", ".[train,report,text,llm,quant,plan,test]",
    ]  # fmt: skip
    assert pytest_runs(project) == 1


def test_a_second_run_installs_nothing(project):
    project.make("test")
    project.make("test")

    assert len(project.installs()) == 1
    assert pytest_runs(project) == 2


@pytest.mark.parametrize("pins", ["pyproject.toml", "constraints/py311.txt"])
def test_changed_pins_are_installed_again(project, pins):
    project.make("test")
    later = (project.project / ".venv" / ".test-installed").stat().st_mtime + 10
    os.utime(project.project / pins, (later, later))

    project.make("test")

    assert len(project.installs()) == 2


def test_an_interrupted_installation_is_taken_up_again(project):
    project.python(body="if 'install' in argv: sys.exit(1)\n")
    assert project.make("test").returncode != 0
    assert pytest_runs(project) == 0

    project.python()
    assert project.make("test").returncode == 0
    assert len(project.installs()) == 2


def test_other_packages_have_environments_with_our_pins_but_few(project):
    kept = project.project / "stand-ins" / "python-of-venv"
    project.python(
        body="if argv[:2] == ['-m', 'venv']:\n"
        "    os.makedirs(argv[-1] + '/bin')\n"
        f"    os.symlink({str(kept)!r}, argv[-1] + '/bin/python')\n"
    )

    done = project.make("test-others")

    assert done.returncode == 0, done.stderr
    own = [c for c in project.calls("python-of-venv") if "--python" in c]
    ours = (project.project / "constraints/py311.txt").read_text().splitlines()
    for call, name, extras, left_out in zip(
        own,
        ("trackers", "torch", "tunix"),
        ("train,wandb,trackio", "train,llm,text", "train,llm,tunix"),
        (
            {"pillow"},
            set(),
            {"safetensors", "tokenizers", "huggingface_hub", "hf-xet"},
        ),
        strict=True,
    ):
        assert call[3] == f".venv-{name}/bin/python"
        assert call[-2:] == ["-e", f".[{extras}]"]
        theirs = (project.project / f".venv-{name}/pins.txt").read_text().splitlines()
        missing = {line.split("==")[0] for line in ours if line not in theirs}
        assert missing == left_out
    tests = [
        c[2:] for c in project.calls("python-of-venv") if c[:2] == ["-m", "pytest"]
    ]
    assert tests == [
        ["tests/trackers_real_test.py"],
        ["tests/models/pretrained", "-k", "transformers_reads"],
        ["tests/other_models_test.py", "-k", "tunix"],
    ]


def test_demo_is_the_main_job_as_a_user_would_type_it(project):
    done = project.make("demo", "DEMO_DIR=elsewhere")

    assert done.returncode == 0, done.stderr
    assert project.installs()[0][-1] == ".[train,report]"
    calls = project.calls("distilljax")
    assert [call[0] for call in calls] == ["train"] * 4 + ["report"]
    for call in calls[:4]:
        assert (REPOSITORY / call[1]).exists(), f"{call[1]} is not there"
        assert call[2:4] == ["--workdir", f"elsewhere/{Path(call[1]).stem}"]
    assert calls[4] == ["report", "elsewhere"]


def test_an_old_python_is_named_with_the_way_out(project):
    project.python((3, 9))

    done = project.make("demo")

    assert done.returncode != 0
    assert "needs Python 3.11 or newer, and found Python 3.9" in done.stderr
    assert "make demo PYTHON=/path/to/python3.11" in done.stderr
    assert not (project.project / ".venv").exists()


def test_a_shim_that_does_not_run_is_passed_over(project):
    project.add("python3.11", "sys.exit(127)")

    assert project.make("test").returncode == 0
    assert ["-m", "venv", ".venv"] in project.calls("python3")


def test_an_environment_of_an_old_python_is_named_with_the_way_out(project):
    project.python(in_venv=(3, 10))

    done = project.make("test")

    assert done.returncode != 0
    assert ".venv holds Python 3.10" in done.stderr
    assert "Remove .venv and run this again" in done.stderr


def test_help_is_the_default_and_names_every_target(project):
    done = project.make()

    assert done.returncode == 0
    phony = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)
    assert phony is not None
    shown = [line.split()[1] for line in done.stdout.splitlines()]
    assert sorted(shown) == sorted(phony[1].split())


@pytest.mark.parametrize("pins", PINS, ids=lambda path: path.name)
def test_pins_are_versions_and_nothing_else(pins):
    lines = pins.read_text().splitlines()
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert lines == sorted(lines, key=lambda line: line.split("==")[0].lower())
    assert not any(line.startswith("distilljax") for line in lines)


@pytest.mark.parametrize("pins", PINS, ids=lambda path: path.name)
def test_every_requirement_is_pinned(pins):
    import tomllib

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {plain(line.split("==")[0]) for line in pins.read_text().splitlines()}
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [
        line for extra in ("train", "report", "text", "test") for line in extras[extra]
    ]
    names = {plain(re.split(r"[\[<>=;! ]", line)[0]) for line in wanted}
    assert names <= pinned, f"run `make constraints`: {names - pinned} are not pinned"
