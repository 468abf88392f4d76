"""The glosses of WordNet, and the supersense of each noun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from distilljax._checks import fail
from distilljax.data.text.documents import Document, Documents, Errors, digest
from distilljax.data.text.files import PlannedFile, decode
from distilljax.data.text.spans import line_spans, where_in

# Where scripts/fetch_assets.sh unpacks it.
_FETCHED = "deb/usr/share/wordnet"
# The lexicographer files of nouns, number 3 to 28.
SUPERSENSES = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition",
    "communication", "event", "feeling", "food", "group", "location", "motive",
    "object", "person", "phenomenon", "plant", "possession", "process", "quantity",
    "relation", "shape", "state", "substance", "time",
)  # fmt: skip
_FIRST_NOUN = 3


@dataclass(frozen=True)
class WordNetGlosses:
    """The definition and the examples of each synset: 117,659 short texts.

    Those of nouns alone, 82,115, have ``labels``: which of 26 supersenses ("animal",
    "feeling") the noun belongs to.

    Attributes:
      directory: Holds ``data.noun`` and the others, or is what
        ``scripts/fetch_assets.sh DIR wordnet`` filled.
      parts: Of speech, in order.

    Example:
      >>> WordNetGlosses("assets", parts=("noun",)).class_names[2]    # opens nothing
      'animal'

    Reference: Fellbaum (ed.), "WordNet: An electronic lexical database", MIT Press
    1998. Ciaramita, Johnson, "Supersense tagging of unknown nouns in WordNet", EMNLP
    2003.
    """

    directory: str
    parts: tuple[str, ...] = ("noun", "verb", "adj", "adv")
    errors: Errors = "strict"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The supersenses, for nouns alone."""
        return SUPERSENSES if self.parts == ("noun",) else ()

    def __call__(self) -> Documents:
        """Find the synsets; their glosses are read when they are asked for."""
        folder = Path(self.directory)
        if not (folder / "data.noun").exists():
            folder = folder / _FETCHED
        files = []
        for part in self.parts:
            path = folder / f"data.{part}"
            if not path.is_file():
                fail(
                    "WordNetGlosses",
                    "directory",
                    f"hold data.{part}",
                    self.directory,
                    "Fetch it with scripts/fetch_assets.sh DIR wordnet.",
                )
            files.append(PlannedFile("WordNetGlosses", str(path)))
        return Glosses(files, self)


class Glosses:
    """The documents of a `WordNetGlosses`."""

    def __init__(self, files: list[PlannedFile], config: WordNetGlosses):
        self._files, self._config = files, config
        spans, which, senses = [], [], []
        for number, file in enumerate(files):
            data = file.read()
            for start, stop in line_spans(file).tolist():
                if data[start] == ord(" "):  # the licence
                    continue
                spans.append((data.index(b"| ", start, stop) + 2, stop))
                which.append(number)
                senses.append(int(data[start:stop].split(b" ", 2)[1]))
        self._spans, self._which = np.array(spans), np.array(which)
        self._senses = np.array(senses, np.int32)

    @property
    def fingerprint(self) -> str:
        """Of the bytes of all files."""
        files = [file.fingerprint() for file in self._files]
        return digest("WordNetGlosses", files, self._config.errors)

    @property
    def labels(self) -> Int32[np.ndarray, " documents"] | None:
        """The supersense of each, for nouns alone."""
        return self._senses - _FIRST_NOUN if self.class_names else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The supersenses, for nouns alone."""
        return self._config.class_names

    def __len__(self) -> int:
        """How many synsets there are."""
        return len(self._spans)

    def __getitem__(self, index: int) -> Document:
        """The gloss of synset ``index``."""
        file, start, stop = self._place(index)
        data = file.read(start, stop)
        return decode("WordNetGlosses", data, file, start, self._config.errors).strip()

    def where(self, index: int) -> str:
        """The file and the line."""
        file, start, _ = self._place(index)
        return where_in(file, start)

    def _place(self, index: int) -> tuple[PlannedFile, int, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start, stop = self._spans[index].tolist()
        return self._files[self._which[index]], start, stop
