"""Files of documents: what is read, and what is wrong with a file and where."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from distilljax.data.text import (
    ArrayRecordText,
    Documents,
    Jsonl,
    Parquet,
    TextFiles,
    Texts,
    TfdsText,
)
from distilljax.data.text.documents import check_errors
from distilljax.data.text.files import expand
from tests.data.text.tiny import conversation, write_jsonl

TEXTS = ["Emma Woodhouse,", "", "café 😀\nsecond line", " spaces "]


def write_records(path: Path, records: list[bytes]) -> str:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def write_parquet(path: Path, texts: list, **options) -> str:
    parquet.write_table(pyarrow.table({"text": texts}), path, **options)
    return str(path)


def opened(kind: str, folder: Path) -> Documents:
    """The same documents in two files of each kind."""
    halves = (TEXTS[:2], TEXTS[2:])
    if kind == "jsonl":
        paths = [
            write_jsonl(folder / f"{i}.jsonl", [{"text": t} for t in half])
            for i, half in enumerate(halves)
        ]
        return Jsonl(tuple(paths))()
    if kind == "parquet":
        paths = [
            write_parquet(folder / f"{i}.parquet", half, row_group_size=1)
            for i, half in enumerate(halves)
        ]
        return Parquet(tuple(paths))()
    if kind == "array_record":
        paths = [
            write_records(folder / f"{i}.array_record", [t.encode() for t in half])
            for i, half in enumerate(halves)
        ]
        return ArrayRecordText(tuple(paths))()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_bytes(text.encode())
    return TextFiles((f"{folder}/*.txt",))()


KINDS = ("jsonl", "parquet", "array_record", "files")


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_read_as_they_were_written(kind, tmp_path):
    documents = opened(kind, tmp_path)
    assert isinstance(documents, Documents)
    assert len(documents) == 4
    for i in (3, 0, 2, 1):  # at random
        assert documents[i] == TEXTS[i]
    copy = pickle.loads(pickle.dumps(documents))
    assert [copy[i] for i in range(4)] == TEXTS
    for wrong in (4, -1):
        with pytest.raises(IndexError):
            documents[wrong]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_follows_the_content_and_not_the_place(kind, tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    here, there = (opened(kind, folder) for folder in folders[:2])
    assert here.fingerprint == there.fingerprint
    TEXTS.append(TEXTS.pop(0))  # the same documents in another order
    try:
        other = opened(kind, folders[2])
    finally:
        TEXTS.insert(0, TEXTS.pop())
    assert other.fingerprint != here.fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "files"])
def test_a_file_that_changes_after_it_was_planned_is_an_error(kind, tmp_path):
    documents = opened(kind, tmp_path)
    path = sorted(p for p in tmp_path.iterdir() if p.is_file())[0]
    data = path.read_bytes()
    path.write_bytes(data + b" ")
    with pytest.raises(ValueError, match=f"{path.name} must stay as it was"):
        documents[0]
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))  # as long as before, and written at another time
    with pytest.raises(ValueError, match="as many bytes, written later"):
        documents[0]
    path.unlink()
    with pytest.raises(ValueError, match="it was removed"):
        documents[0]


@pytest.mark.parametrize("config", [Jsonl, Parquet, TextFiles, ArrayRecordText])
def test_paths_must_lead_to_files(config, tmp_path):
    for paths in ((f"{tmp_path}/none.x",), (f"{tmp_path}/*.x",), (str(tmp_path),)):
        with pytest.raises(ValueError, match="paths must be files that exist"):
            config(paths)()
    with pytest.raises(ValueError, match="not compressed"):
        config(("train.jsonl.gz",))()


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="paths must be a tuple of at least one file"):
        expand("Jsonl", "train.jsonl")
    with pytest.raises(TypeError, match="paths must be a tuple of at least one file"):
        expand("Jsonl", ())
    with pytest.raises(ValueError, match='errors must be "strict" or "replace"'):
        check_errors("Jsonl", "ignore")
    words = TextFiles(("a.txt",))
    object.__setattr__(words, "unit", "word")
    with pytest.raises(ValueError, match='unit must be "file", "paragraph" or "line"'):
        words()


# --- JSON lines -----------------------------------------------------------------------


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "tw\n{"text": "three"}\n')
    documents = Jsonl((str(path),))()
    assert (documents[0], documents[2]) == ("one", "three")
    with pytest.raises(ValueError, match=r"a\.jsonl:3 must be one JSON object, got"):
        documents[1]


def test_a_line_without_the_field_is_named(tmp_path):
    records = [{"text": "one"}, {"body": "two"}, {"text": None}, ["text"], {"text": 5}]
    documents = Jsonl((write_jsonl(tmp_path / "a.jsonl", records),))()
    with pytest.raises(ValueError, match=r"a\.jsonl:2 must have the field 'text', got"):
        documents[1]
    with pytest.raises(ValueError, match=r"a\.jsonl:3 must have the field"):
        documents[2]
    with pytest.raises(TypeError, match=r":4 must be one JSON object, got list"):
        documents[3]
    with pytest.raises(TypeError, match=r"a\.jsonl:5 must be a text or a list"):
        documents[4]


def test_bytes_that_are_no_utf8_are_named_or_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    where = path.read_bytes().index(b"\xe9")
    with pytest.raises(ValueError, match=rf"must be UTF-8, .*0xe9 at offset {where}"):
        Jsonl((str(path),))()[1]
    assert Jsonl((str(path),), errors="replace")()[1] == "caf\ufffd"


def test_half_a_surrogate_pair_is_named_or_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 must be Unicode"):
        Jsonl((str(path),))()[1]
    assert Jsonl((str(path),), errors="replace")()[1] == "half ?"


def test_messages_are_checked_as_texts_are(tmp_path):
    """Wherever in a message the text is."""
    call = {"function": {"name": "look", "arguments": ["half \ud83d"]}}
    for extra in ({"content": "half \ud83d"}, {"content": "", "tool_calls": [call]}):
        talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", **extra}]
        path = write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}])
        with pytest.raises(ValueError, match=r"a\.jsonl:1 must be Unicode"):
            Jsonl((path,), "messages")()[0]
        replaced = Jsonl((path,), "messages", "replace")()[0]
        assert "half ?" in str(replaced)


def test_windows_breaks_marks_and_blank_lines_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n\n{"text": "two"}')
    documents = Jsonl((str(path),))()
    assert [documents[i] for i in range(len(documents))] == ["one", "two"]
    assert documents.where(1) == f"{path}:4"


def test_an_empty_file_has_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"")
    assert len(Jsonl((str(path),))()) == 0
    assert len(TextFiles((str(path),), unit="line")()) == 0
    assert len(TextFiles((str(path),), unit="paragraph")()) == 0
    assert len(TextFiles((str(path),), unit="file")()) == 1


def test_a_document_may_be_a_conversation(tmp_path):
    talk = conversation("Who?", "Emma.")
    path = write_jsonl(tmp_path / "a.jsonl", [{"m": talk}, {"m": [{"content": "x"}]}])
    documents = Jsonl((path,), field="m")()
    assert documents[0] == talk
    with pytest.raises(ValueError, match=r"message 0 at .*a\.jsonl:2 must have a role"):
        documents[1]


# --- plain text -----------------------------------------------------------------------


def test_paragraphs_and_lines_are_found(tmp_path):
    path = tmp_path / "a.txt"
    text = "\n\nVOLUME I\n\nEmma,\nhandsome\n \t\n\nclever\r\n\r\nand rich\n"
    path.write_bytes(text.encode())
    documents = TextFiles((str(path),), unit="paragraph")()
    found = [documents[i] for i in range(len(documents))]
    assert found == ["VOLUME I", "Emma,\nhandsome", "clever", "and rich"]
    lines = [int(documents.where(i).rpartition(":")[2]) for i in range(4)]
    assert lines == [3, 5, 9, 11]
    lines = TextFiles((str(path),), unit="line")()
    found = [lines[i] for i in range(len(lines))]
    assert [line for line in found if line.strip()] == [
        line.strip() for line in text.splitlines() if line.strip()
    ]


def test_text_that_is_no_utf8_is_named_by_its_place_in_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo caf\xe9\n")
    for unit in ("file", "paragraph", "line"):
        documents = TextFiles((str(path),), unit=unit)()
        with pytest.raises(ValueError, match=r"must be UTF-8, .*0xe9 at offset 12"):
            documents[len(documents) - 1]
    replaced = TextFiles((str(path),), "line", "replace")()
    assert replaced[1] == "two caf\ufffd"


# --- Parquet --------------------------------------------------------------------------


def test_a_parquet_file_that_was_cut_short_is_named(tmp_path):
    path = Path(write_parquet(tmp_path / "a.parquet", TEXTS))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet must be a whole Parquet file"):
        Parquet((str(path),))()


def test_damage_in_the_middle_of_a_parquet_file_is_named(tmp_path):
    texts = [f"text {i} " * 50 for i in range(100)]
    path = Path(write_parquet(tmp_path / "a.parquet", texts, compression="gzip"))
    data = bytearray(path.read_bytes())
    data[20:200] = bytes(180)
    path.write_bytes(data)
    documents = Parquet((str(path),))()
    with pytest.raises(ValueError, match=r"a\.parquet must be a whole Parquet file"):
        documents[50]


def test_columns_and_nulls_of_parquet_are_checked(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one", None])
    with pytest.raises(ValueError, match=r"have the column 'body', got the columns"):
        Parquet((path,), field="body")()
    with pytest.raises(ValueError, match=r"row 1 must have a value in the column"):
        Parquet((path,))()[1]


def test_parquet_texts_that_are_no_utf8_are_named_or_replaced(tmp_path):
    path = tmp_path / "a.parquet"
    broken = pyarrow.array([b"one", b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": broken}), path)
    with pytest.raises(ValueError, match=r"row 1 must be UTF-8.*0xe9 at offset 3"):
        Parquet((str(path),))()[1]
    assert Parquet((str(path),), errors="replace")()[1] == "caf\ufffd"


def test_parquet_may_hold_conversations_and_large_strings(tmp_path):
    talk = conversation("Who?", "Emma.")
    path = tmp_path / "a.parquet"
    large = pyarrow.array(["one"], pyarrow.large_string())
    parquet.write_table(pyarrow.table({"messages": [talk], "text": large}), path)
    assert Parquet((str(path),), field="messages")()[0] == talk
    assert Parquet((str(path),))()[0] == "one"


def test_messages_of_parquet_have_the_fields_that_are_theirs(tmp_path):
    """Arrow gives every message every field; `'tool_calls' in message` must hold of
    those alone that have them."""
    call = {"name": "look", "arguments": {"at": "Bath"}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    talk = [*conversation("Where?"), asks, {"role": "tool", "content": "Bath"}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": [talk]}), path)
    assert Parquet((str(path),), field="messages")()[0] == talk


def test_messages_of_parquet_that_are_no_utf8_are_named_or_replaced(tmp_path):
    kind = pyarrow.list_(pyarrow.struct({"role": "binary", "content": "binary"}))
    talk = [{"role": b"user", "content": b"caf\xe9"}]
    text = pyarrow.list_(pyarrow.struct({"role": "string", "content": "string"}))
    column = pyarrow.array([talk], kind)
    fields = [x.view("string") for x in column.values.flatten()]
    broken = pyarrow.StructArray.from_arrays(fields, ["role", "content"])
    column = pyarrow.ListArray.from_arrays(column.offsets, broken)
    assert column.type == text
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": column}), path)
    with pytest.raises(ValueError, match=r"row 0 must be UTF-8.*0xe9 at offset 3"):
        Parquet((str(path),), "messages")()[0]
    (message,) = Parquet((str(path),), "messages", "replace")()[0]
    assert message == {"role": "user", "content": "caf\ufffd"}


def test_parquet_is_read_from_many_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    texts = [f"text {i}" for i in range(200)]
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=16)
    documents = Parquet((path,))()
    index = np.random.default_rng(0).permutation(200).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(documents.__getitem__, index)) == [texts[i] for i in index]


# --- ArrayRecord and TFDS -------------------------------------------------------------


def test_records_may_be_json_with_the_text_in_a_field(tmp_path):
    records = [b'{"text": "one"}', b"{", b"[]", b'{"body": ""}', b"\xe9"]
    path = write_records(tmp_path / "a.array_record", records)
    documents = ArrayRecordText((path,), field="text")()
    assert documents[0] == "one"
    for index, error in (
        (1, r"record 1 must be a JSON object"),
        (2, r"record 2 must be a JSON object, got list"),
        (3, r"record 3 must have the field 'text'"),
        (4, r"record 4 must be UTF-8.*0xe9"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            documents[index]
    with pytest.raises(ValueError, match=r"record 4 must be UTF-8"):
        ArrayRecordText((path,))()[4]
    assert ArrayRecordText((path,), errors="replace")()[4] == "\ufffd"


def test_an_array_record_file_that_was_cut_short_is_named(tmp_path):
    path = Path(write_records(tmp_path / "a.array_record", [b"x" * 999] * 200))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="paths must be complete ArrayRecord files"):
        ArrayRecordText((str(path),))()


def test_texts_of_tfds_are_documents():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=5):
        documents = TfdsText("lm1b", "test")()
        assert len(documents) == 5
        assert isinstance(documents[3], str)
        assert documents.where(3) == "lm1b test, record 3"
        with pytest.raises(ValueError, match=r"be features of lm1b, \['text'\], got"):
            TfdsText("lm1b", "test", field="body")()


# --- in memory ------------------------------------------------------------------------


def test_texts_in_memory_are_checked_too():
    with pytest.raises(TypeError, match="texts must be a sequence of documents"):
        Texts("Emma")
    with pytest.raises(TypeError, match="document 1 must be a text or a list"):
        Texts(("Emma", 5))()[1]
    assert Texts(("a",)).fingerprint != Texts(("b",)).fingerprint


def test_a_digest_of_a_large_file_is_kept_until_it_changes(tmp_path, cache):
    path = tmp_path / "a.txt"
    path.write_text("Emma " * 300_000)
    first = TextFiles((str(path),))().fingerprint
    (kept,) = (cache / "digests").iterdir()
    assert re.fullmatch("[0-9a-f]{32}", kept.read_text())
    kept.write_text("0" * 32)  # and is read
    assert TextFiles((str(path),))().fingerprint != first
    path.write_text("Anne " * 300_000)
    os.utime(path, ns=(1, 1))
    assert TextFiles((str(path),))().fingerprint != first
    assert len(list((cache / "digests").iterdir())) == 2
