"""Every benchmark of the project on this machine, and the page of their results.

    python benchmarks/bench.py                 # all that can run here: hours
    python benchmarks/bench.py --quick         # small forms of them: minutes
    python benchmarks/bench.py --only step,lm
    python benchmarks/bench.py --list          # what there is, and what is missing here
    python benchmarks/bench.py --page          # docs/benchmarks.md from the JSON alone

Each runs in a process of its own, whose output is kept in runs/bench/NAME.log. One that
fails does not stop the others, and the exit status is 1 then. What cannot run here is
skipped, with the reason and the command that would change it. What was measured today
on this machine, with these versions, arguments and sources, is not measured again.

Full forms write benchmarks/results, and docs/benchmarks.md is made of it at the end;
quick forms write runs/bench/quick, with a page of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_page
from bench_plan import BENCHMARKS, ROOT, Benchmark, Form, Place

from distilljax.metrics import write_atomically

RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks.md"
LOGS = ROOT / "runs/bench"
HERE = """
import json
from distilljax.workdir import machine, today, versions
print(json.dumps({"date": today(), "machine": machine(), "versions": versions()}))
"""


@dataclass(frozen=True)
class Session:
    """What is common to all benchmarks of one call."""

    place: Place
    quick: bool
    logs: Path
    results: Path
    facts: dict[str, Any]
    """Date, machine and versions."""

    def form(self, benchmark: Benchmark) -> Form | None:
        """The one that is asked for."""
        return benchmark.quick if self.quick else benchmark.full

    def script(self, benchmark: Benchmark) -> Path:
        """What is run."""
        form = self.form(benchmark)
        name = form.script if form is not None and form.script else benchmark.script
        return ROOT / "benchmarks" / name

    def out(self, benchmark: Benchmark) -> Path:
        """Where the JSON goes: that of another script is not taken for the results."""
        script = self.script(benchmark)
        other = script.name != benchmark.script
        return self.results / (f"{script.stem}.json" if other else benchmark.results)

    def args(self, benchmark: Benchmark) -> list[str]:
        """With those that depend on what is there."""
        form = self.form(benchmark)
        assert form is not None
        args = list(form.args)
        for need, more in form.peers:
            args += more if need.is_there(self.place) else ()
        words = {k: str(v) for k, v in asdict(self.place).items()}
        words |= {"out": str(self.out(benchmark)), "parity": str(self.place.parity)}
        return [word.format(**words) for word in args]

    def record(self, benchmark: Benchmark) -> dict[str, Any]:
        """What must be equal for a measurement to be kept."""
        sources = [*sorted((ROOT / "distilljax").rglob("*.py")), self.script(benchmark)]
        digest = hashlib.sha256()
        for path in sources:
            digest.update(path.read_bytes())
        args = {"args": self.args(benchmark), "sources": digest.hexdigest()}
        return {"script": self.script(benchmark).name} | args | self.facts


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.page:
        write_page(RESULTS, PAGE)
        return 0
    chosen = [
        b
        for b in BENCHMARKS
        if (not args.only or b.name in args.only) and b.name not in args.skip
    ]
    facts = facts_of_here()
    platform = facts["machine"]["platform"]
    peers, tunix = args.peers.absolute(), args.tunix.absolute()
    place = Place(platform, peers=peers, tunix=tunix)
    logs = LOGS / "quick" if args.quick else LOGS
    results = logs if args.quick else RESULTS
    session = Session(place, args.quick, logs, results, facts)
    if args.list:
        print("\n".join(line for b in chosen for line in listed(session, b)))
        return 0
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcomes = run_all(session, chosen, args.again)
    page = logs / "benchmarks.md" if args.quick else PAGE
    write_page(results, page)
    width = max((len(name) for name in outcomes), default=0)
    print("\n" + "\n".join(f"{n:{width}}  {o}" for n, o in outcomes.items()))
    return int(any(o.startswith("FAILED") for o in outcomes.values()))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        known = [b.name for b in BENCHMARKS]
        for name in (found := text.split(",")):
            if name not in known:
                message = f"{name!r} is none of {', '.join(known)}"
                raise argparse.ArgumentTypeError(message)
        return found

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, place = parser.add_argument, Place()
    add("--only", type=names, help="these, joined by commas")
    add("--skip", type=names, default=(), help="all but these")
    add("--quick", action="store_true", help="small forms, in minutes")
    add("--list", action="store_true", help="run nothing")
    add("--page", action="store_true", help="run nothing, and write the page")
    add("--again", action="store_true", help="what was measured today too")
    add("--peers", type=Path, default=place.peers, help="environment with PyTorch")
    add("--tunix", type=Path, default=place.tunix, help="environment with Tunix")
    return parser.parse_args(argv)


def environment() -> dict[str, str]:
    """Of a benchmark: it finds this repository's package."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def facts_of_here() -> dict[str, Any]:
    """Date, machine and versions; by a process that then holds no accelerator."""
    command = [sys.executable, "-c", HERE]
    done = subprocess.run(
        command, env=environment(), check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def why_not(session: Session, benchmark: Benchmark) -> str | None:
    """The reason to skip a benchmark, and what would remove it."""
    form = session.form(benchmark)
    if form is None:
        return f"it has no quick form; {_command(benchmark)}"
    if not session.script(benchmark).exists():
        return f"benchmarks/{session.script(benchmark).name} is not there"
    for need in form.needs:
        if not need.is_there(session.place):
            return f"{need.reason}; {need.command}"
    return None


def _command(benchmark: Benchmark) -> str:
    return f"python benchmarks/bench.py --only {benchmark.name}"


def listed(session: Session, benchmark: Benchmark) -> list[str]:
    """A benchmark in a few lines."""
    form, reason = session.form(benchmark), why_not(session, benchmark)
    time_ = "" if form is None else f", about {form.minutes:g} min"
    lines = [f"{benchmark.name} ({session.script(benchmark).name}{time_})"]
    lines += [f"    {benchmark.measures}"]
    if reason is not None:
        return [*lines, f"    not here: {reason}"]
    return [*lines, *(f"    without: {word}" for word in lacking(session, benchmark))]


def lacking(session: Session, benchmark: Benchmark) -> list[str]:
    """What a benchmark does without."""
    form = session.form(benchmark)
    return [
        f"{need.reason}; {need.command}"
        for need, _ in (() if form is None else form.peers)
        if not need.is_there(session.place)
    ]


def run_all(
    session: Session, chosen: Sequence[Benchmark], again: bool
) -> dict[str, str]:
    """One after the other; how each ended, in words."""
    outcomes: dict[str, str] = {}
    for number, benchmark in enumerate(chosen, 1):
        start = f"[{number}/{len(chosen)}] {benchmark.name}"
        if (reason := why_not(session, benchmark)) is not None:
            outcome = f"skipped: {reason}"
        elif not again and is_measured(session, benchmark):
            outcome = "kept: measured today on this machine; --again measures it again"
        else:
            form = session.form(benchmark)
            assert form is not None
            log = log_of(session, benchmark)
            print(f"{start}: about {form.minutes:g} min, {log}", flush=True)
            for word in lacking(session, benchmark):
                print(f"    without: {word}", flush=True)
            outcome = run(session, benchmark)
        outcomes[benchmark.name] = outcome
        print(f"{start}: {outcome}", flush=True)
    return outcomes


def log_of(session: Session, benchmark: Benchmark) -> Path:
    """What the script printed."""
    return session.logs / f"{benchmark.name}.log"


def is_measured(session: Session, benchmark: Benchmark) -> bool:
    """Whether the same was measured before, and what was found is still there."""
    record = record_of(session, benchmark)
    if not record.exists() or not session.out(benchmark).exists():
        return False
    found = json.loads(record.read_text())
    return {k: v for k, v in found.items() if k != "seconds"} == session.record(
        benchmark
    )


def record_of(session: Session, benchmark: Benchmark) -> Path:
    """The note that a benchmark was run to its end."""
    return session.logs / f"{benchmark.name}.record.json"


def run(session: Session, benchmark: Benchmark) -> str:
    """In a process group of its own, which ends with this program."""
    record, start = session.record(benchmark), time.perf_counter()
    record_of(session, benchmark).unlink(missing_ok=True)
    command = [sys.executable, str(session.script(benchmark))]
    log = log_of(session, benchmark)
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *session.args(benchmark)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    seconds = time.perf_counter() - start
    if code != 0:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        return f"FAILED with {code} after {minutes(seconds)}: {' '.join(last)} ({log})"
    if not session.out(benchmark).exists():
        return f"FAILED: it wrote no {session.out(benchmark)} ({log})"
    text = json.dumps(record | {"seconds": round(seconds, 1)}, indent=1) + "\n"
    write_atomically(record_of(session, benchmark), text)
    return f"measured in {minutes(seconds)}: {session.out(benchmark)}"


def minutes(seconds: float) -> str:
    """As one says it."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def write_page(results: Path, page: Path) -> None:
    """From all JSON that is there."""
    write_atomically(page, bench_page.render(BENCHMARKS, results))
    print(f"wrote {page}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on from here")
