"""Every shell script passes shellcheck, and is executable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = [
    *sorted((REPOSITORY / "scripts").glob("*.sh")),
    *sorted((REPOSITORY / "scripts").glob("*.sbatch")),
    REPOSITORY / ".ci" / "run",
]
SOURCED = sorted((REPOSITORY / "scripts" / "lib").glob("*.sh"))


@pytest.mark.parametrize("script", [*SCRIPTS, *SOURCED], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "--external-sources", script],  # what is sourced, with it
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_executable_and_stops_at_the_first_error(script: Path):
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()
