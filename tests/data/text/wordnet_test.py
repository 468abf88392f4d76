"""The glosses, from a few lines of the files, and all of them where they are there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from distilljax.data.text import WordNetGlosses

# The files have two spaces at the end of each line.
NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
  2 Princeton University
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is perceived
02084071 05 n 02 dog 0 domestic_dog 0 001 @ 02083346 n 0000 | a member of the genus; \
"the dog barked all night"
07555863 13 n 01 food 0 000 | a solid | with a bar in it
""".replace("\n", "  \n")
VERBS = "00001740 29 v 01 breathe 0 000 01 + 02 00 | draw air into the lungs  \n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.noun").write_text(NOUNS)
    (tmp_path / "data.verb").write_text(VERBS)
    return str(tmp_path)


def test_a_document_is_what_follows_the_bar(folder):
    documents = WordNetGlosses(folder, parts=("noun", "verb"))()
    assert [documents[i] for i in range(len(documents))] == [
        "that which is perceived",
        'a member of the genus; "the dog barked all night"',
        "a solid | with a bar in it",
        "draw air into the lungs",
    ]
    assert documents.where(1).endswith("data.noun:4")
    assert documents.labels is None


def test_nouns_have_a_supersense(folder):
    documents = WordNetGlosses(folder, parts=("noun",))()
    names = [documents.class_names[k] for k in documents.labels]
    assert names == ["Tops", "animal", "food"]
    assert len(documents.class_names) == 26


def test_what_is_missing_is_named(folder):
    with pytest.raises(ValueError, match=r"directory must hold data\.adj"):
        WordNetGlosses(folder, parts=("noun", "adj"))()


def test_the_whole_of_wordnet():
    assets = Path(os.environ.get("DISTILLJAX_ASSETS", "assets"))
    if not (assets / "deb/usr/share/wordnet/data.noun").exists():
        pytest.skip("not fetched: scripts/fetch_assets.sh assets wordnet")
    assert len(WordNetGlosses(str(assets))()) == 117_659
    nouns = WordNetGlosses(str(assets), parts=("noun",))()
    assert len(nouns) == 82_115
    counts = np.bincount(nouns.labels, minlength=26)
    assert (counts > 0).all()
    assert nouns.class_names[int(counts.argmax())] == "artifact"
