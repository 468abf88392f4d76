"""``distilljax report W...``."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

DESCRIPTION = """\
Compare all finished runs below some folders: every arm with its teacher and with the
same student without the teacher, on the same budget, over all seeds. Writes report.md,
report.html (opens from disk), report.json and figures.
"""


def main(argv: Sequence[str]) -> int:
    """Write the report and print its headlines."""
    parser = ArgumentParser(
        prog="distilljax report",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workdirs", nargs="+", metavar="W", help="folders with runs")
    parser.add_argument("--out", help="folder of the report (default: the first W)")
    args = parser.parse_args(argv)
    from distilljax.evaluation.report import report

    written = report(args.workdirs, args.out)
    for headline in written.headlines:
        print(headline)
    for path in (written.markdown, written.html, written.data):
        print(path)
    return 0
