"""The command line: ``distilljax VERB ...``, one thin file per verb."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from types import TracebackType
from typing import Any

VERBS = {
    "train": "train a student (or a teacher), or resume: CONFIG --workdir W",
    "data": "show what is in the data, and what of it is learnt: CONFIG",
    "cache": "ask the teacher once and keep what it says: CONFIG --out DIR --kind K",
    "evaluate": "measure a trained run on a split: CONFIG --workdir W --split test",
    "plan": "what a step needs on a TPU slice that is not here: CONFIG --topology T",
    "watch": "show how runs are doing, while they run: W...",
    "report": "compare runs with each other and with their teacher: W...",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0, 1 for an error, 2 for a wrong command."""
    try:
        try:
            code = _main(list(sys.argv[1:] if argv is None else argv))
        except BaseException as error:
            if _peers() is not None and not isinstance(error, BrokenPipeError):
                traceback.print_exc()
                _peers().await_cause(error)
                _peers().leave(1)
            raise
        finally:
            sys.stdout.flush()
        if _peers() is not None:
            _peers().leave(code)
        return code
    except BrokenPipeError:
        # who read the output, such as head, has gone: what is left would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _peers() -> Any:
    """Who watches the other processes, if this is one of several; see `peers`."""
    module = sys.modules.get("distilljax.cli.multihost")
    return None if module is None else module.PEERS


# libtpu on a machine that is no TPU: as `distilljax[plan]` brings it. JAX would ask the
# cloud's metadata server, and write of what it does not find.
_NOT_ON_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def _quiet_without_tpu() -> None:
    """Settings of the environment, if libtpu is installed where there is no TPU."""
    has_chips = any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("vfio/*"))
    if not has_chips and importlib.util.find_spec("libtpu") is not None:
        for name, value in _NOT_ON_A_TPU.items():
            os.environ.setdefault(name, value)


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
    _quiet_without_tpu()
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


def _ours(frame: TracebackType | None) -> bool:
    """True if distilljax itself raised: an error in a user's code shows where it is."""
    module = ""
    while frame is not None:
        module = frame.tb_frame.f_globals.get("__name__", "")
        frame = frame.tb_next
    return module.split(".")[0] == "distilljax"
