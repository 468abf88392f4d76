from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "scripts" / "austen_to_text.py"


def test_lines_of_a_page_become_lines_of_a_paragraph():
    spec = importlib.util.spec_from_file_location("austen_to_text", PATH)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = [
        "",
        "CHAPTER I",
        "",
        "",
        "Emma Woodhouse, handsome,",
        "clever, ",
        "and rich",
    ]
    assert list(script.paragraphs(lines)) == [
        "CHAPTER I",
        "Emma Woodhouse, handsome, clever, and rich",
    ]
