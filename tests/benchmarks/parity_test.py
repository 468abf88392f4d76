"""Parity without the peers: formulas, coverage, and the committed numbers repeated."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from distilljax import losses

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
parity, cases, papers, page = map(
    importlib.import_module,
    ("parity", "parity_cases", "parity_papers", "parity_page"),
)

RESULTS = json.loads(parity.RESULTS.read_text())
COMMITTED = {case["name"]: case for case in RESULTS["cases"]}
ALL = [pytest.param(case, id=case.name) for case in parity.CASES]
WITH_FORMULA = [p for p in ALL if p.values[0].paper is not None]


def test_every_public_name_is_compared_or_says_why_not():
    public = {
        name
        for name, value in vars(losses).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
    }
    compared = {case.loss for case in parity.CASES}
    assert compared <= public
    assert public - compared == set(parity.EXEMPT)


def test_the_committed_results_are_of_these_cases():
    assert list(COMMITTED) == [case.name for case in parity.CASES]
    assert len(COMMITTED) == len(parity.CASES)
    for case in parity.CASES:
        found = COMMITTED[case.name]
        assert found["factor_value"] == case.factor.value
        assert not found["verdict"].startswith("not "), case.name
        texts = (case.peer, case.factor.text, case.why, case.differs)
        assert tuple(found[k] for k in ("peer", "factor", "why", "differs")) == texts
    assert RESULTS["tolerance"] == parity.TOLERANCE
    assert RESULTS["exempt"] == parity.EXEMPT


def test_the_page_is_what_the_results_give():
    assert parity.PAGE.read_text() == page.render(RESULTS)


@pytest.mark.parametrize("case", ALL)
def test_ours_still_gives_the_committed_numbers(case):
    """The reference was the peer's or the paper's: parity holds without the peer."""
    example = COMMITTED[case.name]["examples"][0]
    found = parity.ours(case, example["seed"], "float64").times(case.factor.value)
    limit = parity.TOLERANCE["float32" if case.single else "float64"]
    np.testing.assert_allclose(found.value, example["reference"], limit, atol=limit)
    largest = max(np.max(np.abs(g)) for g in found.gradients.values())
    entries = sum(g.size for g in found.gradients.values())
    along = parity.slope(found.gradients, example["seed"])
    assert abs(along - example["slope"]) <= limit * largest * entries


@pytest.mark.parametrize("case", WITH_FORMULA)
def test_ours_is_the_formula_of_the_paper(case):
    found = parity.ours(case, 3, "float64").times(case.factor.value)
    sizes = parity.gap(found, parity.paper(case, 3))
    assert max(sizes.values()) <= parity.TOLERANCE["float64"], sizes


def test_a_case_with_a_peer_says_how_it_differs_if_it_does():
    for case in parity.CASES:
        assert (case.peer is None and case.paper is None) is False, case.name
        assert bool(case.differs) == (case.peer is not None and case.paper is not None)


def test_central_differences_are_exact_for_polynomials_of_degree_six():
    x = {"student": np.array([0.5, -2.0]), "teacher": np.array([3.0])}
    found = papers.central_differences(lambda x: (x["student"] ** 6).sum(), x)
    assert list(found) == ["student"]
    np.testing.assert_allclose(found["student"], [6 / 32, -6 * 32.0], rtol=1e-10)


FAKE_WORKER = """
import json, sys
from pathlib import Path
import numpy as np
folder = Path(sys.argv[1])
requests = json.loads((folder / "requests.json").read_text())
inputs, answers, gradients = np.load(folder / "inputs.npz"), [], {}
for number, request in enumerate(requests):
    student = inputs[request["inputs"] + "/student"].astype(request["dtype"])
    if request["options"].get("alpha", 0) is None:
        answers.append({"error": "TypeError: no alpha"})
    else:
        answers.append({"value": float(student.sum())})
        gradients[f"{number}/student"] = student
np.savez(folder / "gradients.npz", **gradients)
found = {"versions": {"fake": "1"}, "answers": answers}
(folder / "answers.json").write_text(json.dumps(found))
"""


def test_each_answer_goes_to_the_case_that_asked(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE_WORKER)
    monkeypatch.setattr(parity, "WORKER", worker)
    asked = [c for c in parity.CASES if c.inputs == "logits" and c.peer is not None]
    found, peers = parity.ask(Path(sys.executable), asked)
    assert peers == {"fake": "1"}
    assert len(found) == len(asked) * len(parity.SEEDS) * len(parity.DTYPES)
    for (name, seed, _), result in found.items():
        if "alpha=None" in name:
            assert result.error == "TypeError: no alpha"
            continue
        student = cases.inputs_of("logits", seed)["student"]
        np.testing.assert_allclose(result.value, student.sum(), rtol=1e-5)
        np.testing.assert_array_equal(result.gradients["student"], student)


def test_an_environment_is_made_once_for_its_pins(tmp_path, monkeypatch):
    commands = []

    def run(command, check):
        assert check
        commands.append(command)
        (tmp_path / "env").mkdir(exist_ok=True)

    monkeypatch.setattr(parity.subprocess, "run", run)
    for _ in range(2):
        with parity.environment(tmp_path / "env") as python:
            assert python == tmp_path / "env" / "bin" / "python"
    assert len(commands) == 1 + len(parity.INSTALLS)
    assert all("==" in name for name in commands[1][-3:])
    monkeypatch.setattr(parity, "INSTALLS", (("torch==2.14.0",),))
    with parity.environment(tmp_path / "env"):
        assert commands[-1][-1] == "torch==2.14.0"


def test_an_environment_never_replaces_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(parity.subprocess, "run", None)  # not even tried
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(ValueError, match="environment: path must be new"),
        parity.environment(tmp_path),
    ):
        pass


def test_the_exit_status_tells_whether_all_is_as_expected(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(parity, "PAGE", tmp_path / "parity.md")
    assert parity.main(["--page"]) == 0
    wrong = json.loads(json.dumps(RESULTS))
    wrong["cases"][0]["verdict"] = "not in agreement"
    monkeypatch.setattr(parity, "RESULTS", tmp_path / "parity.json")
    parity.RESULTS.write_text(json.dumps(wrong))
    assert parity.main(["--page"]) == 1
    name = wrong["cases"][0]["name"]
    assert f"**Not as expected:** {name}." in parity.PAGE.read_text()
    assert name in capsys.readouterr().err


CASE = cases.Case("forward_kl", cases.of(losses.forward_kl), "logits", "peer", why=".")
WORSE = {"value": 1e-3, "gradient": 1e-3}
FINE = {"value": 1e-12, "gradient": 1e-12}


@pytest.mark.parametrize(
    ("paper", "peer", "sizes", "expected"),
    [
        (None, "p", {"float64": FINE, "float32": FINE}, "agrees"),
        (None, "p", {"float64": WORSE, "float32": FINE}, "not in agreement"),
        (None, "p", {"float64": FINE, "float32": WORSE}, "not in agreement"),
        (None, "p", {}, "not in agreement"),  # it raised
        ("f", "p", {"float64": FINE, "float32": FINE, "peer": WORSE}, "differs"),
        ("f", "p", {"float64": FINE, "float32": FINE, "peer": FINE}, "not different"),
        ("f", "p", {"float64": WORSE, "float32": FINE, "peer": WORSE}, "not the pap"),
        ("f", None, {"float64": FINE, "float32": FINE}, "no peer; agrees"),
        ("f", None, {"float64": WORSE, "float32": FINE}, "not the paper's"),
    ],
)
def test_verdicts(paper, peer, sizes, expected):
    formula = papers.masked_kl if paper else None
    case = cases.Case("forward_kl", CASE.ours, "logits", peer, paper=formula)
    assert parity.verdict(case, sizes, None).startswith(expected)


def test_a_peer_may_raise_only_where_the_case_says_so():
    close = {"float64": FINE, "float32": FINE}
    differs = dataclasses.replace(CASE, paper=papers.masked_kl)
    raises = dataclasses.replace(differs, raises=True)
    assert parity.verdict(raises, close, "TypeError: x").startswith("differs")
    assert parity.verdict(differs, close, "TypeError: x").startswith("not ")
    assert parity.verdict(CASE, {}, "TypeError: x").startswith("not ")
    answered = close | {"peer": WORSE}
    assert parity.verdict(raises, answered, None).startswith("not ")


def test_a_gap_is_relative_and_finds_a_wrong_gradient():
    reference = parity.Result(2.0, {"student": np.array([10.0, 0.1])})
    found = parity.Result(2.002, {"student": np.array([10.0, 0.2])})
    sizes = parity.gap(found, reference)
    assert sizes == pytest.approx({"value": 1e-3, "gradient": 1e-2})
