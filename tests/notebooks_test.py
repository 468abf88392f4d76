"""The notebooks: both halves of a pair are the same, stripped, and ready for Colab.

They are executed by ``make notebooks``, not here.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import jupytext
import pytest

from distilljax import losses

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
SCRIPTS = sorted((REPOSITORY / "notebooks").glob("*.py"))
ids = [path.stem for path in NOTEBOOKS]


def code_cells(path: Path) -> list:
    return [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]


def test_there_are_notebooks_and_all_are_paired():
    assert NOTEBOOKS
    assert [path.stem for path in NOTEBOOKS] == [path.stem for path in SCRIPTS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_the_script_says_what_the_notebook_says(path):
    script = path.with_suffix(".py").read_text()
    assert jupytext.writes(jupytext.read(path), fmt="py:percent") == script, (
        f"{path.name} differs from its script: jupytext --sync notebooks/{path.name}"
    )


def test_the_tour_shows_or_names_every_loss():
    tour = (REPOSITORY / "notebooks" / "losses_tour.py").read_text()
    public = {name for name, x in vars(losses).items() if callable(x)} - {"masked_sum"}
    assert len(public) > 40
    assert {name for name in public if not re.search(rf"\b{name}\b", tour)} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_no_outputs_are_kept(path):
    for cell in code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_it_is_ready_for_colab(path):
    notebook = jupytext.read(path)
    badge = notebook.cells[0].source.splitlines()[0]
    assert badge.startswith("[![Open in Colab](")
    assert badge.endswith(f"/blob/main/notebooks/{path.name})"), badge
    assert notebook.metadata["accelerator"] in ("TPU", "GPU")
    assert notebook.metadata["colab"]["gpuType"]

    install, *rest = code_cells(path)
    assert 'if "google.colab" in sys.modules:' in install.source
    assert "import jax" not in install.source  # what is loaded cannot be replaced
    assert any(cell.metadata.get("tags") == ["parameters"] for cell in rest)
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"distilljax\[([\w,]+)\]", install.source)
    assert set(wanted.split(",")) <= set(extras)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_every_parameter_has_a_form(path):
    (cell,) = [c for c in code_cells(path) if c.metadata.get("tags") == ["parameters"]]
    title, *lines = cell.source.splitlines()
    assert title.startswith("# @title ")
    for line in lines:
        assert re.search(r"  # @param (\{type:|\[)", line), line
