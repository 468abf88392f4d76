"""Six novels by Jane Austen as text files, from what `fetch_assets.sh` fetched.

    python scripts/austen_to_text.py assets novels

The Debian package has them as R objects, one string for each printed line; `rdata` (pip
install rdata) reads those. A paragraph becomes one line, so that a model sees sentences
and not the width of a page, and paragraphs are separated by a blank line.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_FETCHED = "deb/usr/lib/R/site-library/janeaustenr/data"


def main() -> None:
    """Write a file for each novel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("assets", type=Path, help="what fetch_assets.sh filled")
    parser.add_argument("folder", type=Path, help="where the text files go")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, lines in novels(args.assets / _FETCHED):
        text = "\n\n".join(paragraphs(lines)) + "\n"
        path = args.folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(text):,} characters")


def novels(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """The name of each novel, and its lines."""
    index = _unpickled(gzip.decompress((directory / "Rdata.rdx").read_bytes()))
    data = (directory / "Rdata.rdb").read_bytes()
    for name, (start, size) in index["variables"].items():
        # four bytes with the length of what follows, once it is decompressed
        lines = _unpickled(zlib.decompress(data[start + 4 : start + size]))
        yield str(name), [str(line) for line in lines]


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Lines that are not separated by an empty one, joined."""
    for blank, block in itertools.groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield " ".join(line.strip() for line in block)


def _unpickled(data: bytes) -> Any:
    import rdata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these objects have no header of a file
        return rdata.conversion.convert(rdata.parser.parse_data(data))


if __name__ == "__main__":
    main()
