"""All benchmarks are in one table, run by one command, and shown on one page.

The page is what the committed results give; a benchmark that fails, or cannot run, or
was run before, does not stop the others; nothing is measured on this page's behalf.
"""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
bench = importlib.import_module("bench")
page = importlib.import_module("bench_page")
plan = importlib.import_module("bench_plan")
rows = importlib.import_module("bench_rows")

HELPERS = {"parity_peers.py"}
"""Scripts that answer another one, and publish nothing."""
FACTS = {"date": "2000-01-01", "machine": {"platform": "cpu"}, "versions": {"a": "1"}}


def test_the_page_is_what_the_results_give():
    expected = page.render(plan.BENCHMARKS, bench.RESULTS)
    assert bench.PAGE.read_text() == expected, "run python benchmarks/bench.py --page"


def test_every_results_file_is_of_a_benchmark():
    files = {path.name for path in bench.RESULTS.glob("*.json")}
    assert files <= {b.results for b in plan.BENCHMARKS}


def test_every_script_that_writes_results_is_in_the_table():
    known = {b.script for b in plan.BENCHMARKS}
    known |= {b.quick.script for b in plan.BENCHMARKS if b.quick is not None}
    writes = re.compile(r'"--out"|write_atomically\(RESULTS|RESULTS\.write_text')
    scripts = {
        path.name
        for path in BENCHMARKS.glob("*.py")
        if "__main__" in path.read_text() and writes.search(path.read_text())
    }
    assert len(scripts) > 10
    assert scripts - HELPERS - {"bench.py"} <= known


def test_each_benchmark_has_rows_and_a_name_of_its_own():
    names = [b.name for b in plan.BENCHMARKS]
    assert len(set(names)) == len(names)
    assert set(names) == rows.ROWS.keys()
    for b in plan.BENCHMARKS:
        assert not b.page or (ROOT / "docs" / b.page).exists()
        for form in filter(None, (b.full, b.quick)):
            assert ("{out}" in form.args) or form.script is None
            assert form.minutes > 0


def test_arguments_are_those_that_the_scripts_have():
    for b in plan.BENCHMARKS:
        for form in filter(None, (b.full, b.quick)):
            script = BENCHMARKS / (form.script or b.script)
            more = [word for _, args in form.peers for word in args]
            for word in (*form.args, *more):
                assert not word.startswith("--") or f'"{word}"' in script.read_text()


def test_a_missed_goal_is_marked():
    row = rows.row("time", 0.83, most=0.5)
    assert (row.value, row.goal, row.met) == ("0.83", "at most 0.50", False)
    assert page.verdict(row) == "**missed**"
    assert page.verdict(rows.row("time", 0.5, most=0.5)) == "met"
    assert page.verdict(rows.row("rate", 0.9, least=0.97)) == "**missed**"
    assert page.verdict(rows.row("time", 0.83)) == ""


def test_what_was_not_run_is_said(tmp_path):
    text = page.render(plan.BENCHMARKS, tmp_path)
    assert text.count("**Not run.**") == len(plan.BENCHMARKS)
    assert 'JAX finds no GPU: `pip install "distilljax[cuda]"`' in text


def test_results_of_a_gpu_are_shown(tmp_path):
    ran = {"seconds": 0.5, "tokens_per_second": 100, "mfu": 0.4, "peak_bytes": 2e9}
    variants = {
        "plain": {"error": "does not run: out of memory"},
        "ours": ran,
        "liger": {**ran, "version": "0.8.5"},
    }
    found = json.loads((bench.RESULTS / "step.json").read_text())
    found = {k: found[k] for k in ("date", "machine", "versions")}
    found["pairs"] = {"1B to 0.5B": {"variants": variants}}
    (tmp_path / "lm_gpu.json").write_text(json.dumps(found))
    text = page.render(plan.BENCHMARKS, tmp_path)
    assert (
        "| 1B to 0.5B: **distilljax** |  | 500 ms | 100 | 0.40 | 2,000.0 MB |" in text
    )
    assert "does not run: out of memory" in text
    assert "lm_gpu, 1B to 0.5B: time | hand-written JAX does not run" in text


def test_checkpoints_that_cost_too_much_are_marked():
    cost = {"every_steps": 50, "step_ms": 20.0, "checkpoint_ms": [60.0, 90.0, 100.0]}
    cost |= {"ratio": [0.9, 0.93, 0.98], "share_checkpoint": 0.007}
    found = {
        "checkpoints": cost,
        "longer_steps": cost | {"step_ms": 200.0, "ratio": [0.9, 0.99, 1.0]},
        "restart": {"to_warm": 1.0, "to_cold": 0.5},
        "load_before": 6.0,
    }
    met = [row.met for row in rows.resume(found)]
    assert met == [False, True, None, True, True, None, None, True, None]


def test_a_compilation_that_does_not_fit_is_an_answer():
    memory = {"peak": 100e6, "predicted_peak": 104e6}
    fits = {"fits": True, "memory": memory}
    cases = {
        "a": {"plain": False, "programs": {"step": fits}, "plan_seconds": 301.0},
        "a, plain": {
            "plain": True,
            "programs": {"step": {"fits": False, "memory": None}},
        },
    }
    found = list(rows.scale({"cases": cases}))
    assert [row.met for row in found] == [True, True, False, None]
    assert found[0].value == "fits, peak 100.0 MB on a chip"
    assert found[3].value == "does not fit"


def script(tmp_path, name, text):
    """A benchmark whose script is this text; it counts how often it was run."""
    path = tmp_path / f"{name}.py"
    count = f"open({str(tmp_path / name)!r}, 'a').write('x')\n"
    write = "import sys; write = lambda: open(sys.argv[1], 'w').write('{}')\n"
    path.write_text(count + write + text)
    form = plan.Form(("{out}",), 1)
    return plan.Benchmark(name, str(path), "Nothing.", f"{name}.json", form, form)


def runs_of(tmp_path, name):
    path = tmp_path / name
    return len(path.read_text()) if path.exists() else 0


@pytest.fixture
def session(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    return bench.Session(plan.Place(), False, logs, tmp_path, FACTS)


def test_one_that_fails_does_not_stop_the_others(tmp_path, session):
    chosen = [
        script(tmp_path, "bad", "raise SystemExit('no such device')"),
        script(tmp_path, "silent", ""),
        script(tmp_path, "good", "write()"),
    ]
    outcomes = bench.run_all(session, chosen, again=False)
    assert outcomes["bad"].startswith("FAILED with 1 after")
    assert "no such device" in outcomes["bad"]
    assert outcomes["silent"].startswith("FAILED: it wrote no")
    assert outcomes["good"].startswith("measured in")
    assert (session.logs / "bad.log").read_text() == "no such device\n"


def test_what_was_measured_is_kept_until_something_changes(tmp_path, session):
    good = script(tmp_path, "good", "write()")

    def outcome(session=session, benchmark=good, again=False):
        return bench.run_all(session, [benchmark], again)["good"].split()[0]

    assert outcome() == "measured"
    assert outcome() == "kept:"
    assert outcome(again=True) == "measured"
    tomorrow = replace(session, facts=FACTS | {"date": "2000-01-02"})
    assert outcome(tomorrow) == "measured"
    newer = replace(tomorrow, facts=tomorrow.facts | {"versions": {"a": "2"}})
    assert outcome(newer) == "measured"
    other = replace(good, full=plan.Form(("{out}", "--more"), 1))
    assert outcome(newer, other) == "measured"
    path = Path(good.script)
    path.write_text(path.read_text() + "\n# changed\n")
    assert outcome(newer, other) == "measured"
    (tmp_path / "good.json").unlink()
    assert outcome(newer, other) == "measured"
    assert outcome(newer, other) == "kept:"
    assert runs_of(tmp_path, "good") == 7


def test_one_that_fails_after_it_was_measured_is_run_again(tmp_path, session):
    good = script(tmp_path, "good", "write()")
    bench.run_all(session, [good], again=False)
    path = Path(good.script)
    whole = path.read_text()
    path.write_text(whole + "\nraise SystemExit(3)\n")
    assert bench.run_all(session, [good], True)["good"].startswith("FAILED with 3")
    path.write_text(whole)
    assert bench.run_all(session, [good], False)["good"].startswith("measured")


def test_what_is_missing_is_said_with_its_remedy(tmp_path, session):
    good = script(tmp_path, "good", "write()")
    needy = replace(good, full=plan.Form(("{out}",), 1, (plan.GPU,)))
    word = 'skipped: JAX finds no GPU; pip install "distilljax[cuda]"'
    assert bench.run_all(session, [needy], False) == {"good": word}
    gone = replace(good, script=str(tmp_path / "gone.py"))
    assert "gone.py is not there" in bench.run_all(session, [gone], False)["good"]
    slow = replace(good, quick=None)
    quick = replace(session, quick=True)
    outcome = bench.run_all(quick, [slow], False)["good"]
    assert outcome.startswith("skipped: it has no quick form; python benchmarks")
    assert runs_of(tmp_path, "good") == 0


def test_peers_are_asked_where_they_are_installed(tmp_path, session, capsys):
    more = ((plan.TORCH, ("--peers", "{peers}")),)
    form = plan.Form(("{out}",), 1, peers=more)
    good = replace(script(tmp_path, "good", "write()"), full=form)
    here = replace(session, place=plan.Place(peers=tmp_path / "env"))
    assert here.args(good) == [str(tmp_path / "good.json")]
    bench.run_all(here, [good], False)
    assert "no PyTorch, Liger and TRL to compare with" in capsys.readouterr().out
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/bin/python").touch()
    assert here.args(good)[1:] == ["--peers", str(tmp_path / "env")]
    assert bench.lacking(here, good) == []
    assert not bench.is_measured(here, good)  # it was, but without them


def test_quick_numbers_do_not_replace_published_ones():
    logs = bench.LOGS / "quick"
    session = bench.Session(plan.Place(), True, logs, logs, FACTS)
    for b in plan.BENCHMARKS:
        if b.quick is not None:
            assert session.out(b).parent == logs
            assert str(session.out(b)) in session.args(b)
    store = next(b for b in plan.BENCHMARKS if b.name == "store")
    assert session.out(store).name == "store_coding.json"  # it is another file


def test_the_command_runs_and_its_status_tells(tmp_path, monkeypatch, capsys):
    chosen = (
        script(tmp_path, "step", "write()"),
        script(tmp_path, "loss", "raise SystemExit(2)"),
    )
    monkeypatch.setattr(bench, "BENCHMARKS", chosen)
    monkeypatch.setattr(bench, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(bench, "facts_of_here", lambda: FACTS)
    monkeypatch.setattr(bench, "write_page", lambda results, page: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert bench.main(["--quick", "--only", "step"]) == 0
        assert bench.main(["--quick", "--skip", "step"]) == 1
        assert bench.main(["--quick"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "kept: measured today" in capsys.readouterr().out
    assert runs_of(tmp_path, "step") == 1
    assert bench.main(["--quick", "--list"]) == 0
    assert "step (step.py, about 1 min)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--only", "stp"])
    assert "'stp' is none of step, loss" in capsys.readouterr().err


STOPPED = """
import sys
sys.path.insert(0, {benchmarks!r})
import bench, bench_plan
from pathlib import Path
form = bench_plan.Form(("{{out}}",), 1)
slow = bench_plan.Benchmark("slow", {script!r}, "", "slow.json", form, form)
bench.BENCHMARKS = (slow,)
bench.LOGS = Path({logs!r})
bench.facts_of_here = lambda: {facts!r}
sys.exit(bench.main(["--quick"]))
"""


def test_a_benchmark_ends_with_the_command(tmp_path):
    """Also the processes that it started itself."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "print(subprocess.Popen(sleep).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    logs = tmp_path / "logs"
    code = STOPPED.format(
        benchmarks=str(BENCHMARKS), script=str(slow), logs=str(logs), facts=FACTS
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    log = logs / "quick/slow.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child = int(log.read_text())
    process.terminate()
    assert process.wait(60) == 143
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
