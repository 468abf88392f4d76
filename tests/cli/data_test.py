"""`distilljax data`: what is printed of text, of images, and of what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilljax.cli import main
from tests.data.text.tiny import (
    conversation,
    documents,
    train_tokenizer,
    write_jsonl,
)

TINY = str(Path(__file__).parent / "tiny.py")
TEXT = str(Path(__file__).parent / "tiny_text.py")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    folder = train_tokenizer(tmp_path_factory.mktemp("tiny_text"))
    write_jsonl(folder / "texts.jsonl", [{"text": t} for t in [*documents(40), ""]])
    talks = [conversation(f"Who {i}?", "Her aunt.") for i in range(15)]
    write_jsonl(folder / "talks.jsonl", [{"messages": talk} for talk in talks])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLJAX_TINY_TEXT", str(folder))
        patch.setenv("DISTILLJAX_CACHE", str(folder / "cache"))
        yield folder


def test_numbers_and_examples_are_printed_with_the_mask(capsys):
    assert main(["data", TEXT, "--examples", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "data: texts, 75.0 % of the rows\n" in out
    assert "data: talks, 25.0 % of the rows\n" in out
    assert "documents     40 of 41; dropped: 1 empty\n" in out
    assert "supervised    100.0 % of " in out
    assert "[[Her aunt.<|im_end|>]]" in out
    assert "talks.jsonl:" in out
    assert "\nvalidation\n" in out
    assert out.count("\n  1. ") == out.count("\n  2. ") == 3
    assert "\x1b" not in out


def test_on_a_terminal_the_mask_is_coloured(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["data", TEXT, "--examples", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[32mHer aunt.<|im_end|>\x1b[0m" in out
    assert "[[" not in out


def test_a_page_is_written(capsys, tmp_path):
    page = tmp_path / "data.html"
    assert main(["data", TEXT, "--html", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    assert text.count("<h2>") == 3
    assert "<mark>Her aunt." in text


def test_arms_and_overrides_change_what_is_shown(capsys):
    assert main(["data", TEXT, "--arm", "texts", "--data.context=32"]) == 0
    out = capsys.readouterr().out
    assert "of 32 tokens" in out
    assert "talks" not in out
    with pytest.raises(SystemExit):
        main(["data", TEXT, "--arm", "texts", "--data.contxt=32"])
    assert "Did you mean --data.context?" in capsys.readouterr().err


def test_of_a_part_the_text_and_the_chosen_rows_are_shown(capsys):
    assert main(["data", TEXT, "--arm", "part", "--examples", "1"]) == 0
    out = capsys.readouterr().out
    assert "data: texts, 75.0 % of the rows\n" in out
    assert "documents     40 of 41; dropped: 1 empty\n" in out
    assert "chosen        6 of these rows, " in out
    assert "chosen        2 of these rows, " in out
    assert "\nother_tests, talks\n" in out
    assert "[[Her aunt.<|im_end|>]]" in out
    assert main(["data", TEXT, "--arm", "part", "--examples", "-1"]) == 1
    assert "--examples must be at least 0, got -1" in capsys.readouterr().err


def test_other_sources_are_described(capsys):
    assert main(["data", TINY]) == 0
    out = capsys.readouterr().out
    assert "examples      " in out
    assert "classes       3, the rarest with 1" in out


def test_bad_data_is_an_error_that_names_the_line(capsys, folder, monkeypatch):
    bad = folder / "bad"
    train_tokenizer(bad)
    (bad / "texts.jsonl").write_text('{"text": "one"}\n{"text": \n')
    path = str(bad / "texts.jsonl")
    words = ["data", TEXT, "--arm", "texts", "--data.text.documents.paths", path]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert f"error: Jsonl: {path}:2 must be one JSON object, got" in err


def test_help_says_what_is_shown_and_has_the_fields_of_the_config(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", TEXT, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "usage: distilljax data CONFIG [options]" in out
    assert "how many were dropped and why" in out
    assert "--workdir" not in out
    assert "--loader.batch-size" in out
