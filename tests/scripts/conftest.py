"""Commands that stand in for the ones a script calls: they log, obey, and may fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


class Stage:
    """A folder at the head of PATH whose commands are played by Python snippets."""

    def __init__(self, root: Path):
        self.root = root
        self.repository = REPOSITORY
        self.bin = root / "bin"
        self.home = root / "home"
        self.log = root / "calls.jsonl"
        for folder in (self.bin, self.home):
            folder.mkdir()
        self.log.touch()

    def add(self, name: str, body: str = "", folder: Path | None = None) -> Path:
        """Make a command that logs its words and place, then runs ``body``."""
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"#!{sys.executable} -S\n"
            "import json, os, subprocess, sys\n"
            "argv = sys.argv[1:]\n"
            f"with open({str(self.log)!r}, 'a') as log:\n"
            f"    print(json.dumps([{name!r}, argv, os.getcwd()]), file=log)\n"
            f"{body}\n"
        )
        path.chmod(0o755)
        return path

    def run(self, script: str, *arguments: str, **env: str):
        """Run ``scripts/<script>`` with the stand-ins first on PATH."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        clean |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.home)}
        clean |= env
        return subprocess.run(
            [self.repository / "scripts" / script, *arguments],
            capture_output=True,
            text=True,
            env=clean,
            timeout=60,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
        )

    def bash_words(self, line: str) -> list[str]:
        """The words of a line as bash reads them, ``$'...'`` included."""
        script = f"printf '%s\\0' {line}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        return done.stdout.split("\0")[:-1]

    def calls(self, name: str) -> list[list[str]]:
        """The words of every call of ``name``, in order."""
        return [call[1] for call in self.full_calls(name)]

    def full_calls(self, name: str) -> list[list]:
        """``[name, words, working directory]`` of each call."""
        lines = map(json.loads, self.log.read_text().splitlines())
        return [call for call in lines if call[0] == name]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)
