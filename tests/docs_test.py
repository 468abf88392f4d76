"""What the README and the docs show is run, and what they name is there.

Python blocks of a page are executed in order, in one namespace. Commands are not run,
but parsed: targets of make, extras of pip, the launchers with --dry-run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distilljax.cli import VERBS

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").rglob("*.md"))]
PAGES += [REPOSITORY / "CONTRIBUTING.md"]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``line`` is that of its first line of text."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines() if page.exists() else []
    start, language = None, ""
    for number, line in enumerate(lines, start=1):
        fence = re.fullmatch(r"\s*```(\S*).*", line)
        if not fence:
            continue
        if start is None:
            start, language = number + 1, fence[1]
        else:
            text = "\n".join(lines[start - 1 : number - 1])
            yield Block(page, start, language, text)
            start = None
    assert start is None, f"{page.name}: the block that opens on {start} never closes"


def commands() -> Iterator[tuple[Block, str]]:
    """Each command in a ``bash`` block, lines that end in a backslash joined."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                    command = line.split(" #")[0].strip()
                    if command and not command.startswith("#"):
                        yield block, command


def of(program: str) -> list:
    """The commands of one program, as pytest parameters."""
    return [
        pytest.param(shlex.split(command), id=f"{block.page.stem}:{block.line}")
        for block, command in commands()
        if re.match(rf"(\S*/)?{program}(\s|$)", command)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


PYTHON_PAGES = [p for p in PAGES if any(b.language == "python" for b in blocks(p))]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a page writes, it writes here
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            # Blank lines before it let a traceback point at the line of the page.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(page), "exec"), namespace)


def test_readme_is_short_and_soon_runs():
    lines = README.read_text().splitlines()
    assert len(lines) <= 110, "move the longest part of README.md to a page in docs"
    first = next(block for block in blocks(README) if block.language == "python")
    assert first.line < 20, "running Python should come before line 20 of README.md"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_their_language(page):
    """A block without one is not checked by anything here."""
    known = {"python", "bash", "text", "json", "toml", "bibtex"}
    for block in blocks(page):
        assert block.language in known, (
            f"{page.name}:{block.line}: {block.language!r}. Use one of {sorted(known)}"
        )


def cells(row: str) -> int:
    """Cells of a table's row, whose text holds no pipe."""
    return row.strip().strip("|").count("|") + 1


def stray_rows(text: str) -> list[str]:
    """Rows that a renderer would show as text: not below a header of as many cells."""
    text = re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.DOTALL | re.MULTILINE)
    stray = []
    for block in re.split(r"\n\s*\n", text):
        rows = [line for line in block.splitlines() if line.lstrip().startswith("|")]
        if len(rows) < 3 or not re.fullmatch(r"\s*(\|\s*:?-+:?\s*)+\|\s*", rows[1]):
            stray += rows
        else:
            stray += [row for row in rows if cells(row) != cells(rows[0])]
    return stray


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_rows_belong_to_tables(page):
    assert stray_rows(page.read_text()) == []


def test_a_blank_line_ends_a_table():
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n"
    assert stray_rows(table) == []
    assert stray_rows(table.replace("| 3", "\n| 3")) == ["| 3 | 4 |"]
    assert stray_rows(table.replace(" 4 |", " 4 | 5 |")) == ["| 3 | 4 | 5 |"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), (
                f"{page.name}: {target} is not there"
            )
    folders = "configs|scripts|benchmarks|notebooks|constraints|docs|tests"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*\w\.\w+", text):
        assert (REPOSITORY / path).exists(), f"{page.name}: {path} is not there"


@pytest.mark.parametrize("words", of("distilljax"))
def test_commands_of_ours_have_their_verb_and_config(words):
    assert words[1] in VERBS or words[1] == "--help"
    for word in words[2:]:
        if word.endswith(".py"):
            assert (REPOSITORY / word).exists(), f"{word} is not there"


@pytest.mark.parametrize("words", of("make"))
def test_targets_of_make_exist(words):
    goals = [word for word in words[1:] if "=" not in word]
    makefile = (REPOSITORY / "Makefile").read_text()
    for goal in goals:
        assert re.search(rf"^{goal}:", makefile, re.M), f"make {goal}: no such target"


@pytest.mark.parametrize("words", of("pip"))
def test_extras_of_pip_exist(words):
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        known = tomllib.load(file)["project"]["optional-dependencies"]
    for extras in re.findall(r"(?:\.|distilljax)\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known)


@pytest.mark.parametrize("words", of("(tpu_vm|gpu|slurm|xpk).sh"))
def test_launchers_understand_their_commands(words):
    end = words.index("--") if "--" in words else len(words)
    done = subprocess.run(
        [REPOSITORY / words[0], *words[1:end], "--dry-run", *words[end:]],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_ours_exist(page):
    """``distilljax.losses.forward_kl`` on a page is a module, or a name in one."""
    names = re.findall(r"(?<![\w/.-])distilljax(?:\.[A-Za-z_]\w*)+", page.read_text())
    for path in sorted(set(names)):
        found = importlib.import_module("distilljax")
        parts = path.split(".")
        for depth, part in enumerate(parts[1:], start=2):
            if not hasattr(found, part):
                with contextlib.suppress(ModuleNotFoundError):
                    importlib.import_module(".".join(parts[:depth]))
            assert hasattr(found, part), f"{page.name}: there is no {path}"
            found = getattr(found, part)
