"""Every distilljax command that the launchers and their page show is one that works."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest

from distilljax.cli import train
from distilljax.config import Config

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = "docs/launch.md"
PLACES = {"CONFIG": "configs/digits/all_data.py", "HOST:PORT": "n1:8476"}
PLACES |= {"DIR": "/shared/run", "N": "2", "I": "0"}


def shown(source: str) -> list[list[str]]:
    """The words of each train command of a page, or of what a script prints."""
    if source == PAGE:
        text = (REPOSITORY / source).read_text()
        found = re.findall(r"```(?:bash|text)\n(.*?) *```", text, re.S)
        text = "\n".join(map(textwrap.dedent, found))
    else:
        script = REPOSITORY / "scripts" / source
        done = subprocess.run([script, "--help"], capture_output=True, text=True)
        text = done.stdout.partition("\nexample")[2]
    found = []
    # a command begins at the margin, and its quotes may hold line breaks
    for call in re.split(r"\n(?=(?: {2})?\S)", text.replace("\\\n", " ")):
        words = [PLACES.get(word, word) for word in shlex.split(call)]
        if "train" in words:
            rest = words[words.index("train") + 1 :]
            place = words.index("--workdir")
            # the launchers for TPUs take it before the --, and pass it on
            given = [] if "--workdir" in rest else words[place : place + 2]
            found.append(rest + given)
    return found


def planned(monkeypatch, words: list[str]) -> list[Config]:
    """The configs that a command would train."""
    found = []

    def note(runs, *_) -> int:
        found.extend(run.config for run in runs)
        return 0

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(train, "initialize", lambda args: None)
    monkeypatch.setattr(train, "_train_all", note)
    assert train.main(words) == 0
    return found


@pytest.mark.parametrize("source", [PAGE, "tpu_vm.sh", "gpu.sh", "slurm.sh", "xpk.sh"])
def test_shown_commands_are_understood_and_their_batches_divide(monkeypatch, source):
    commands = shown(source)

    assert len(commands) == {PAGE: 13}.get(source, 1)
    for words in commands:
        for config in planned(monkeypatch, words):
            sizes = re.findall(r"=(\d+)", config.mesh)
            devices = math.prod(map(int, sizes)) if sizes else 4  # a v4-8
            assert config.loader.batch_size % devices == 0, words
            assert config.eval_batch_size % devices == 0, words


def test_options_named_in_the_text_are_fields(monkeypatch):
    text = (REPOSITORY / PAGE).read_text()
    options = re.findall(r"`(--[a-z][a-z.-]*=[^`]+)`", text)

    assert '--mesh="data=8"' in options
    for option in options:
        words = ["configs/digits/all_data.py", "--workdir", "w", *shlex.split(option)]
        (config,) = planned(monkeypatch, words)
        assert config != planned(monkeypatch, words[:3])[0], f"{option} does nothing"
