"""The command line: ``distilljax VERB ...``, one thin file per verb."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

VERBS = {
    "train": "train a student (or a teacher), or resume: CONFIG --workdir W",
    "evaluate": "measure a trained run on a split: CONFIG --workdir W --split test",
    "report": "compare runs with each other and with their teacher: W...",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: distilljax VERB ...\n")
        for verb, text in VERBS.items():
            print(f"  {verb:10}{text}")
        print("\n`distilljax VERB --help` says more.")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(
            f"distilljax: the verb must be one of {', '.join(VERBS)}, got {verb!r}."
            f"{hint}",
            file=sys.stderr,
        )
        return 2
    from importlib import import_module

    try:
        return import_module(f"distilljax.cli.{verb}").main(rest)
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("DISTILLJAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        print("(DISTILLJAX_TRACEBACK=1 shows where.)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
