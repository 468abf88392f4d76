"""Every public name says what it is, shows how it is used, and stands in the docs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import distilljax
from distilljax import losses

REPOSITORY = Path(__file__).resolve().parents[1]

# What users import from. A module is added here when it is made.
MODULES = [
    "distilljax",
    "distilljax.losses",
    "distilljax.objectives",
    "distilljax.students",
    "distilljax.models",
    "distilljax.data",
    "distilljax.data.text",
    "distilljax.optimizers",
    "distilljax.sharding",
    "distilljax.evaluation",
    "distilljax.config",
    "distilljax.train",
    "distilljax.teachers",
    "distilljax.caching",
]

# Where a reader looks a name up; other modules may stand on any page.
PAGES = {"distilljax.losses": "*losses.md"}


# Nobody makes these by hand: the example of the function that returns one shows it.
RETURNED = {
    "DistillState", "Experiment", "Importance", "PairedDifference", "Report", "Spread",
}  # fmt: skip


def public_names(module: ModuleType) -> list[str]:
    """What a module exports, or what is defined in it if it exports nothing.

    A package's ``__init__`` is a list of exports, ``from ._x import y as y``; in any
    other module only what is defined there is its own.
    """
    listed = Path(module.__file__ or "").name == "__init__.py"
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and (listed or value.__module__ == module.__name__)
    ]


NAMES = [
    pytest.param(module, name, id=f"{module.removeprefix('distilljax.')}.{name}")
    for module in MODULES
    for name in public_names(importlib.import_module(module))
]
LOSSES = [
    p
    for p in NAMES
    if p.values[0] == "distilljax.losses"
    and inspect.isfunction(getattr(losses, p.values[1]))
]


def docstring(module: str, name: str) -> str:
    """The docstring that was written, and not the one that a dataclass makes up."""
    value = getattr(importlib.import_module(module), name)
    doc = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    if not doc or doc.startswith(f"{name}("):
        pytest.fail(f"{module}.{name} must have a docstring. Say what it is, and why.")
    return inspect.cleandoc(doc)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    found = importlib.import_module(module)
    assert found.__doc__, f"{module} must have a docstring"
    assert public_names(found), f"{module} must export something"


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_name_has_a_runnable_example(module, name):
    """That the examples are right is seen by pytest, which runs them as doctests."""
    doc = docstring(module, name)
    value = getattr(importlib.import_module(module), name)
    if name in RETURNED or getattr(value, "_is_protocol", False):
        return
    if inspect.isclass(value):  # a class may show itself in one of its methods
        doc += "".join(
            f"\n\n{inspect.getdoc(method)}"
            for key, method in vars(value).items()
            if not key.startswith("_") and inspect.isfunction(method)
        )
    examples = doctest.DocTestParser().get_examples(doc)
    assert examples, f"{module}.{name} must have an example: >>> and what it prints"


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_docstring_opens_with_one_sentence(module, name):
    summary = docstring(module, name).split("\n\n")[0].splitlines()
    assert len(summary) == 1, f"{module}.{name}: one line first, then a blank one"
    assert summary[0].endswith((".", ":", "?")), f"{module}.{name}: {summary[0]!r}"


@pytest.mark.parametrize(("module", "name"), LOSSES)
def test_every_loss_names_its_arguments_and_its_source(module, name):
    doc = docstring(module, name)
    for section in ("Args:", "Returns:", "Example:"):
        assert f"\n{section}" in doc, f"{name} must have the section {section}"
    if not name.startswith("masked_"):  # the reductions are nobody's invention
        assert re.search(r"\nReference:.*\b(19|20)\d\d\b", doc, re.S), (
            f"{name} must have a Reference with its authors, title, venue and year"
        )
        assert "\nNumerics:" in doc, f"{name} must say how it is computed"
    function = getattr(importlib.import_module(module), name)
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"\n  {argument}:|\n  .*\b{argument}\b.*:", doc), (
            f"{name} must say what {argument} is"
        )


@pytest.mark.parametrize(("module", "name"), LOSSES)
def test_losses_take_student_and_teacher_first_and_the_rest_by_name(module, name):
    parameters = inspect.signature(
        getattr(importlib.import_module(module), name)
    ).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert len(positional) <= 2, f"{name} must take {positional[2:]} by keyword only"
    assert positional[0] in ("student", "values", "logits"), positional
    assert "alpha" not in [p.name for p in parameters] or name == "alpha_beta", (
        "alpha means opposite things in two well-known libraries: name the weight"
    )


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_name_stands_in_the_docs(module, name):
    pages = sorted((REPOSITORY / "docs").glob(PAGES.get(module, "*.md")))
    assert pages, f"docs/{PAGES.get(module, '*.md')} is missing"
    text = "".join(page.read_text() for page in pages)
    assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`|^[^\n]*\b{name}\(", text, re.M), (
        f"{module}.{name} must be mentioned in docs/{PAGES.get(module, '*.md')}"
    )


def test_every_exception_is_in_use():
    assert {param.values[1] for param in NAMES} >= RETURNED


def test_the_version_is_that_of_the_package():
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert f'version = "{distilljax.__version__}"' in text
