"""`distilljax train --profile`: a trace of the steps that were named, and no others.

What can name no step of the run is refused before anything is computed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from jax.profiler import ProfileData

from distilljax.cli import main

# Python 3.12 says it of the types that read a trace; as an error it ends the process.
pytestmark = pytest.mark.filterwarnings(
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning"
)

TINY = str(Path(__file__).parent / "tiny.py")


def traced(workdir: Path) -> tuple[list[int], int]:
    """The steps that a run's only trace names, and how many updates it has seen run."""
    (path,) = (workdir / "profile").rglob("*.xplane.pb")
    planes = ProfileData.from_file(str(path)).planes
    lines = [line for plane in planes for line in plane.lines]
    events = [event for line in lines for event in line.events]
    steps = [dict(e.stats)["step_num"] for e in events if e.name == "train"]
    stats = [dict(e.stats) for e in events if not e.name.startswith("$")]  # of XLA
    updates = [x for x in stats if x.get("hlo_module", "").endswith("_update")]
    return sorted(steps), len({x["run_id"] for x in updates})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--profile", "3:5"], [3, 4, 5]),
        (["--profile=4:4"], [4]),
        (["--profile", "5:9"], [5, 6]),  # the run has no more
        (["--profile"], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_trace_has_the_steps_that_were_named_and_no_others(
    tmp_path, one_device, words, expected
):
    where = ["--workdir", str(tmp_path), "--steps=6", "--eval-every-steps=6"]
    assert main(["train", *words, TINY, *where]) == 0
    steps, updates = traced(tmp_path)
    assert steps == expected
    assert updates == len(expected)


def test_a_run_that_is_resumed_beyond_them_is_not_traced_again(tmp_path, one_device):
    words = ["train", TINY, "--workdir", str(tmp_path), "--profile=2:3"]
    assert main([*words, "--steps=4"]) == 0
    assert main([*words, "--steps=6"]) == 0
    assert traced(tmp_path) == ([2, 3], 2)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--profile", "5:3"], 2, "must be FIRST:LAST, such as 100:110"),
        (["--profile", "0:3"], 2, "counted from 1, got '0:3'"),
        (["--profile", "x"], 2, "got 'x'"),
        (["--profile=x"], 2, "got 'x'"),
        (["--profile", "1:2:3"], 2, "got '1:2:3'"),
        (["--profile", "3"], 2, "got '3'"),
        (["--profile="], 2, "got ''"),
        (["--profile", "7:9"], 1, "begin with a step of the run, which has 6, got 7:9"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_names_no_step_of_the_run_is_refused(
    tmp_path, capsys, words, code, message
):
    where = [TINY, "--workdir", str(tmp_path / "run"), "--steps=6"]
    try:
        found = main(["train", *where, *words])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert found == code
    assert "--profile" in error
    assert message in error
    assert not (tmp_path / "run").exists()
