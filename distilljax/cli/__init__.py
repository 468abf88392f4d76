"""The command line: ``distilljax VERB ...``, one thin file per verb."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from types import TracebackType

VERBS = {
    "train": "train a student (or a teacher), or resume: CONFIG --workdir W",
    "data": "show what is in the data, and what of it is learnt: CONFIG",
    "cache": "ask the teacher once and keep what it says: CONFIG --out DIR --kind K",
    "evaluate": "measure a trained run on a split: CONFIG --workdir W --split test",
    "watch": "show how runs are doing, while they run: W...",
    "report": "compare runs with each other and with their teacher: W...",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0, 1 for an error, 2 for a wrong command."""
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # who read the output, such as head, has gone: what is left would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: distilljax VERB ...\n")
        for verb, text in VERBS.items():
            print(f"  {verb:10}{text}")
        print("\n`distilljax VERB --help` says more; --version says which this is.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"distilljax {metadata.version('distilljax')}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(
            f"distilljax: the verb must be one of {', '.join(VERBS)}, got {verb!r}."
            f"{hint}",
            file=sys.stderr,
        )
        return 2
    try:
        return import_module(f"distilljax.cli.{verb}").main(rest)
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, FloatingPointError, OSError, ImportError) as error:
        expected = isinstance(error, OSError) or _ours(error.__traceback__)
        if not expected or os.environ.get("DISTILLJAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        print("(DISTILLJAX_TRACEBACK=1 shows where.)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


def _ours(traceback: TracebackType | None) -> bool:
    """True if distilljax itself raised: an error in a user's code shows where it is."""
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.split(".")[0] == "distilljax"
