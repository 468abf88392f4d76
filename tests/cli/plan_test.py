"""`distilljax plan`: what it says, writes and exits with, by what is known to fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilljax.cli import main
from distilljax.planning import Topology

TINY = str(Path(__file__).parent / "tiny.py")
NOT_KNOWN = "whether it fits is not known"


@pytest.mark.parametrize(
    ("limit", "fits", "words", "code"),
    [
        (None, None, NOT_KNOWN, 0),
        (2**30, True, "fits", 0),
        (1000, False, "does not fit", 3),
    ],
)
@pytest.mark.parametrize("topology", ["local", "cpu:8"])
def test_it_ends_with_3_only_where_a_step_is_known_not_to_fit(
    tmp_path, capsys, monkeypatch, topology, limit, fits, words, code
):
    if limit is not None:  # of a CPU none is known
        monkeypatch.setattr(Topology, "memory_bytes", limit)
    out = ["--topology", topology, "--out", str(tmp_path)]
    assert main(["plan", TINY, *out]) == code
    said = capsys.readouterr().out.lower()
    result = json.loads((tmp_path / "plan.json").read_text())
    drawn = (tmp_path / "plan.html").read_text()
    step = result["programs"]["step"]
    assert result["fits"] is step["fits"] is fits
    assert step["limit"] == limit
    left = f"{(step['headroom'] or 0) / 2**20:.2f} MiB left"
    assert (left in drawn) == (fits is True)
    assert ("it does not fit as it is: --search" in said) == (fits is False)
    for text in (said, drawn):
        assert words in text
        assert ("does not fit" in text) == (fits is False)
        assert (NOT_KNOWN in text) == (fits is None)
