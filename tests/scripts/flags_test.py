"""The presets of compiler flags: their form, and that real libraries know each flag."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PRESETS = sorted((REPOSITORY / "scripts" / "flags").glob("*.env"))
LINE = re.compile(r'(LIBTPU_INIT_ARGS|XLA_FLAGS)\+=" (--\w+=[\w.,:-]+)"')

# libtpu reads its flags when it is loaded, and a topology needs no chip.
TPU = """
from jax.experimental import topologies
devices = topologies.get_topology_desc(platform="tpu", topology_name="{}").devices
print(devices[0].platform)
"""
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def flags(preset: Path) -> list[tuple[str, str]]:
    """``(variable, --flag=value)`` of each line that is not a comment."""
    return [
        (match[1], match[2])
        for line in preset.read_text().splitlines()
        if (match := LINE.fullmatch(line))
    ]


def load(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a Python that has no device but its CPU."""
    keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=keep | {"JAX_PLATFORMS": "cpu"} | env,
    )


def load_libtpu(topology: str, words: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'distilljax[plan]'")
    return load(
        TPU.format(topology),
        LIBTPU_INIT_ARGS=words,
        ALLOW_MULTIPLE_LIBTPU_LOAD="true",  # several tests, and no chips here
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
    )


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_each_flag_has_a_line_above_that_explains_it(preset):
    lines = preset.read_text().splitlines()
    assert flags(preset)
    for before, line in zip(["", *lines], lines, strict=False):
        assert not line or line.startswith("#") or LINE.fullmatch(line), line
        assert len(line) <= 88
        if LINE.fullmatch(line):
            assert before.startswith("# "), f"{line} needs a line on what it does"
    assert re.search(r"^# Source: ", preset.read_text(), re.M)
    names = [flag.partition("=")[0] for _, flag in flags(preset)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_a_preset_can_be_sourced(preset):
    variable = flags(preset)[0][0]
    done = subprocess.run(
        ["bash", "-uc", f'set -a; {variable}=--x=1; . "$1"; env', "bash", preset],
        capture_output=True,
        text=True,
        check=True,
    )
    words = " ".join(["--x=1", *(flag for _, flag in flags(preset))])
    assert f"{variable}={words}" in done.stdout.splitlines()


@pytest.mark.parametrize("generation", TOPOLOGY)
def test_libtpu_knows_each_flag(generation):
    preset = REPOSITORY / "scripts" / "flags" / f"{generation}.env"
    assert {variable for variable, _ in flags(preset)} == {"LIBTPU_INIT_ARGS"}

    words = " ".join(flag for _, flag in flags(preset))
    done = load_libtpu(TOPOLOGY[generation], words)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tpu"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--xla_tpu_no_such_flag=true", "Unknown command line flag"),
        ("--xla_tpu_scoped_vmem_limit_kib=much", "Illegal value 'much'"),
    ],
)
def test_libtpu_refuses_what_it_does_not_know(word, message):
    """Or the test above could not fail."""
    done = load_libtpu("v5e:2x2", word)

    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_xla_knows_each_flag_for_gpus():
    """The flags of every backend are read on each, and so on a CPU."""
    preset = REPOSITORY / "scripts" / "flags" / "gpu.env"
    assert {variable for variable, _ in flags(preset)} == {"XLA_FLAGS"}
    words = " ".join(flag for _, flag in flags(preset))

    done = load("import jax; jax.devices()", XLA_FLAGS=words)
    wrong = load("import jax; jax.devices()", XLA_FLAGS=words + " --xla_gpu_none=true")

    assert done.returncode == 0, done.stderr
    assert wrong.returncode != 0
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_none=true" in wrong.stderr


def test_every_preset_is_checked():
    assert {preset.stem for preset in PRESETS} == {*TOPOLOGY, "gpu"}
