"""The report on synthetic runs: its numbers, its files, and what it refuses."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from distilljax.evaluation import paired_difference, plots, report
from distilljax.evaluation.comparison import compare
from distilljax.evaluation.runs import find_runs
from distilljax.evaluation.tables import tables


class _Page(HTMLParser):
    """Collects what a browser would load or follow, and checks that tags close."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.images, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [values[k] for k in ("href", "srcset", "action") if k in values]
        self.images += [values["src"]] if "src" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(three_experiments, tmp_path_factory):
    return report([three_experiments], tmp_path_factory.mktemp("report"))


@pytest.mark.slow
def test_numbers_of_the_three_experiments(written):
    data = json.loads(written.data.read_text())
    few = next(e for e in data["experiments"] if e["name"] == "digits/few_labels")
    shifts = np.array([0, 2, -3, 4, -1])
    hard, soft = 105 + shifts, 91 + shifts + np.arange(5) % 2
    expected = paired_difference((1 - soft / 400).tolist(), (1 - hard / 400).tolist())
    comparison = few["comparisons"][0]
    found = comparison["differences"]["accuracy"]
    for key in ("mean", "low", "high", "t_p_value"):
        assert found[key] == pytest.approx(getattr(expected, key), rel=1e-9)
    assert comparison["verdict"] == "helped"
    spread = few["arms"][0]["metrics"]["accuracy"]
    assert spread["mean"] == pytest.approx(1 - 105.4 / 400)
    np.testing.assert_allclose(spread["values"], 1 - hard / 400)

    text = written.markdown.read_text()
    assert (
        "“soft targets” helped against “hard labels”. Accuracy +3.4 points (95 % "
        "interval +3.2 to +3.6, without 0; 5 of 5 pairs better), 13.6 fewer errors "
        "of 400. Beyond accuracy: better KL to teacher, agreement, calibration "
        "error, NLL."
    ) in text
    assert "| hard labels | 73.7 ± 0.7 | 105.4 ± 2.7 of 400 |" in text
    assert "| teacher | 97.0 | 12 of 400 (right: 94.8 to 98.3 %) |" in text
    assert "“soft targets” against “hard labels”: no difference shown." in text
    assert "Recall on 3: 0.0 % to 95.5 %" in text
    assert "| 2.41 k (1/125) | 9.64 kB (1/125) |" in text
    assert "| hard labels | 600 | 21,600 | 1.70 s |" in text
    assert "| arm | steps | examples seen | training |" in text
    assert "the first run of each shape in a process includes its compilation" in text
    # medians 0.02 + parameters / 5e6 and p90 0.03 + parameters / 4e6, in ms
    assert "| latency, ms (p90) |" in text
    assert "| 602 k | 0.0802 (0.105) | 133 k/s |" in text
    assert "| 4.82 k (1/125) | 0.0205 (0.0306), 1/3.9 | 16.6 M/s (125×) |" in text
    assert (
        "Both vary with what else the machine is doing: their ratios are within" in text
    )
    assert written.headlines[0].startswith("digits/few_labels: “soft targets” helped")
    assert written.headlines[-1].startswith("digits/all_data: “soft targets” against")
    for figure in written.figures:
        assert f"](figures/{figure.name})" in text
        assert figure.read_bytes().startswith(b"\x89PNG")
    assert len(written.figures) == 15


@pytest.mark.slow
def test_the_page_needs_nothing_but_itself(written):
    text = written.html.read_text()
    page = _Page(text)
    assert page.open == []
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    ids = set(re.findall(r'id="([^"]+)"', text))
    assert page.links
    assert all(link[0] == "#" and link[1:] in ids for link in page.links)
    assert len(page.images) == 15
    for source, path in zip(
        sorted(page.images), sorted(_data_uri(p) for p in written.figures), strict=True
    ):
        assert source == path
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def _data_uri(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.mark.slow
def test_no_temporary_file_is_left_and_a_second_report_is_the_same(
    written, three_experiments
):
    out = written.html.parent
    assert sorted(p.name for p in out.iterdir()) == [
        "figures",
        "report.html",
        "report.json",
        "report.md",
    ]
    before = written.markdown.read_text(), written.data.read_text()
    again = report([three_experiments], out)
    assert (again.markdown.read_text(), again.data.read_text()) == before


def test_out_is_the_first_workdir_and_stays_readable(write_run, tmp_path):
    write_run(arm="hard labels", baseline=None)
    write_run()
    result = report([tmp_path / "runs"])
    assert result.html == tmp_path / "runs" / "report.html"
    report([tmp_path / "runs"])  # its own files are no runs


def test_one_seed_claims_nothing(write_run, tmp_path):
    write_run(arm="hard labels", errors=105, baseline=None)
    write_run(errors=91)
    text = report([tmp_path / "runs"]).markdown.read_text()
    assert "1 pair, too few for a claim. Accuracy +3.5 points (one pair" in text
    assert "> Note: soft targets: one seed only" in text
    assert "14 fewer errors of 400" in text


def test_unequal_budgets_are_flagged_everywhere(write_run, tmp_path):
    for seed in range(3):
        write_run(arm="hard labels", errors=105, seed=seed, baseline=None)
        write_run(errors=91 + seed, seed=seed, steps=1200)
    result = report([tmp_path / "runs"])
    loud = "NOT A FAIR COMPARISON"
    assert loud in result.headlines[0]
    assert loud in result.markdown.read_text()
    html = result.html.read_text()
    assert loud in html
    assert 'class="headline not-a-fair-comparison"' in html
    assert 'class="better' not in html  # no cell may look like a gain
    data = json.loads(result.data.read_text())
    (comparison,) = data["experiments"][0]["comparisons"]
    assert "training steps 1,200 against 600" in comparison["unfair"]


def test_one_model_has_one_accuracy_in_all_tables(write_run, tmp_path):
    # Five times 0.9825 has a mean just above it, which rounds up.
    for seed in range(5):
        write_run(seed=seed, teacher_errors=7)
    write_run(name="teacher", arm="one", errors=7, baseline=None, teacher_errors=None)
    text = report([tmp_path / "runs"]).markdown.read_text()
    cells = [
        line.split(" | ")[1]
        for line in text.splitlines()
        if "| 7 of 400 (right" in line
    ]
    assert cells == ["98.2", "98.2"]


@pytest.mark.parametrize("shared", [True, False])
def test_one_teacher_for_all_seeds_is_one_model(write_run, tmp_path, shared):
    for seed in range(2):
        write_run(seed=seed, teacher_errors=12 if shared else 12 + seed)
    text = report([tmp_path / "runs"]).markdown.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| teacher | 9"))
    if shared:
        assert row.startswith("| teacher | 97.0 | 12 of 400 (right: ")
        assert row.endswith("| the same |")
    else:
        assert row.startswith("| teacher | 96.9 ± 0.2 | 12.5 ± 0.7 of 400 |")
        assert row.endswith("| 2 |")


def test_data_without_class_names(write_run, tmp_path):
    for seed in range(3):
        common = {"seed": seed, "class_names": [], "focus_classes": [3]}
        write_run(arm="hard labels", errors=14, blind=3, baseline=None, **common)
        write_run(errors=22, **common)
    result = report([tmp_path / "runs"])
    text = result.markdown.read_text()
    assert "Recall on 3: 0.0 % to " in text
    assert "| 9 | 40 | " in text
    (experiment,) = json.loads(result.data.read_text())["experiments"]
    assert experiment["class_names"] == [str(i) for i in range(10)]


def test_a_single_model_gets_one_neutral_line(write_run, tmp_path):
    write_run(
        name="teacher", arm="default", errors=7, baseline=None, teacher_errors=None
    )
    result = report([tmp_path / "runs"])
    text, html = result.markdown.read_text(), result.html.read_text()
    line = "A single model, without teacher or baseline: it is measured, not compared."
    assert f"- **teacher**\n  - {line}\n" in text
    assert f"\n{line}\n" in text
    assert f"<p>{line}</p>" in html
    for page in (text, html):
        assert "Note" not in page
        assert 'class="note"' not in page
        assert "worth" not in page
        assert "relative to the teacher" not in page
        assert "eans over seeds" not in page
        assert "band" not in page
        assert "Each student is compared" not in page
    assert "cost" not in {path.stem.rsplit("_", 1)[-1] for path in result.figures}
    data = json.loads(result.data.read_text())
    assert data["experiments"][0]["single"] == line


def test_a_latency_without_its_tail(write_run, tmp_path):
    path = write_run() / "results.json"
    record = json.loads(path.read_text())
    del record["student"]["latency_ms"]["p90"]
    path.write_text(json.dumps(record))
    text = report([tmp_path / "runs"]).markdown.read_text()
    assert "| 0.0205 (–), 1/3.9 |" in text


def test_a_ratio_that_the_rounds_do_not_agree_on_is_nowhere(write_run, tmp_path):
    path = write_run() / "results.json"
    record = json.loads(path.read_text())
    record["student"]["latency_ms"]["to_teacher"] |= {"low": 0.2, "high": 1.1}
    path.write_text(json.dumps(record))
    result = report([tmp_path / "runs"])
    assert "| 0.0205 (0.0306) | 16.6 M/s (125×) |" in result.markdown.read_text()
    (experiment,) = compare(find_runs([tmp_path])[0])
    figure = plots.quality_and_cost(experiment, plots.arm_colors([experiment]))
    assert figure is not None
    assert [axis.get_xlabel() for axis in figure.axes] == ["parameters"]


def _tones(experiment):
    return [
        cell.tone
        for table in tables(experiment)
        if table.title == "Paired differences"
        for row in table.rows
        for cell in row
        if cell.tone
    ]


@pytest.mark.parametrize(
    ("hard", "soft", "tones"),
    [
        ((105, 107, 102), (91, 92, 89), {"better"}),
        ((91, 92, 89), (105, 107, 102), {"worse"}),
        # Without 0, and yet no verdict: two pairs.
        ((105, 107), (91, 93), set()),
        ((91, 92, 89), (92, 89, 91), set()),
    ],
)
def test_colour_claims_no_more_than_the_verdict(write_run, tmp_path, hard, soft, tones):
    for seed, (a, b) in enumerate(zip(hard, soft, strict=True)):
        write_run(arm="hard labels", errors=a, seed=seed, baseline=None)
        folder = write_run(errors=b, seed=seed)
        # An NLL that improves for certain must not colour a row by itself.
        record = json.loads((folder / "results.json").read_text())
        if not tones:
            record["student"]["nll"] -= 0.3 + 0.0001 * seed
        (folder / "results.json").write_text(json.dumps(record))
    (experiment,) = compare(find_runs([tmp_path])[0])
    (comparison,) = experiment.comparisons
    nll = comparison.differences["nll"]
    assert nll is not None
    assert nll.excludes_zero
    assert set(_tones(experiment)) == tones


def test_missing_pieces_are_stated(write_run, tmp_path):
    for seed in (0, 2):
        write_run(seed=seed, teacher_errors=None, baseline=None, with_files=False)
    (write_run(seed=1, baseline=None) / "results.json").unlink()
    text = report([tmp_path / "runs"]).markdown.read_text()
    assert "No comparison with a baseline" in text
    assert "No teacher was evaluated" in text
    assert "Unfinished runs, not counted here:" in text
    assert "soft_targets-1" in text


def test_optional_costs_may_be_missing(write_run, tmp_path):
    folder = write_run()
    path = folder / "results.json"
    record = json.loads(path.read_text())
    for key in ("parameters", "bytes", "flops_per_example", "latency_ms", "throughput"):
        record["student"][key] = None
        del record["teacher"][key]
    record |= {"train_seconds": None, "selected": None}
    record["student"]["reliability"] = None
    path.write_text(json.dumps(record))
    text = report([tmp_path / "runs"]).markdown.read_text()
    assert "| soft targets | – | – | – | – | – |" in text


def test_a_diverged_run_shows(write_run, tmp_path):
    path = write_run() / "results.json"
    record = json.loads(path.read_text())
    record["student"] |= {"nll": float("nan"), "kl_to_teacher": float("inf")}
    path.write_text(json.dumps(record))
    result = report([tmp_path / "runs"])
    row = next(
        line
        for line in result.markdown.read_text().splitlines()
        if line.startswith("| soft targets |")
    )
    assert "| inf |" in row
    assert "| nan |" in row
    strict = json.loads(result.data.read_text(), parse_constant=pytest.fail)
    assert strict["experiments"][0]["arms"][0]["metrics"]["nll"]["mean"] == "nan"


def test_counts_that_stand_together_share_their_decimals(write_run, tmp_path):
    for seed in range(2):
        write_run(arm="hard labels", errors=91, seed=seed, baseline=None)
        write_run(errors=91, seed=seed)
    for path in tmp_path.rglob("*hard*/results.json"):
        record = json.loads(path.read_text())
        record["student"]["per_class"] |= {"gained": [0] * 10, "lost": [3] * 10}
        path.write_text(json.dumps(record))
    (experiment,) = compare(find_runs([tmp_path])[0])
    (table,) = [t for t in tables(experiment) if t.title.startswith("Gained and lost")]
    assert {row[3].text for row in table.rows} == {"+0.0 −3.0"}
    assert all("." in row[4].text for row in table.rows)


def test_names_are_escaped(write_run, tmp_path):
    write_run(
        name="a/<script>alert(1)</script>",
        arm="T|4 <b>",
        description="x < y & z",
        baseline=None,
    )
    result = report([tmp_path / "runs"])
    html = result.html.read_text()
    assert "<script>" not in html
    assert "x &lt; y &amp; z" in html
    assert "| T\\|4 <b> |" in result.markdown.read_text()
    assert _Page(html).open == []


def test_experiments_with_like_names_do_not_overwrite_each_other(write_run, tmp_path):
    write_run(name="T=4")
    write_run(name="T 4")
    figures = report([tmp_path / "runs"]).figures
    assert len(set(figures)) == len(figures)


@pytest.mark.parametrize("unfinished", [False, True])
def test_no_runs_says_what_to_run(write_run, tmp_path, unfinished):
    (tmp_path / "runs").mkdir()
    if unfinished:
        (write_run() / "results.json").unlink()
    with pytest.raises(ValueError, match="distilljax train CONFIG") as error:
        report([tmp_path / "runs"])
    assert ("1 unfinished" in str(error.value)) == unfinished
    assert list((tmp_path / "runs").glob("report*")) == []


def test_no_folder_at_all():
    with pytest.raises(ValueError, match="at least one folder"):
        report([])


def test_a_broken_file_stops_before_anything_is_written(write_run, tmp_path):
    write_run()
    (write_run(seed=1) / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"-1/results\.json must be a JSON file"):
        report([tmp_path / "runs"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_old_report_survives_a_failed_write(write_run, tmp_path, monkeypatch):
    write_run()
    old = report([tmp_path / "runs"], tmp_path / "out").markdown.read_text()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        report([tmp_path / "runs"], tmp_path / "out")
    assert (tmp_path / "out" / "report.md").read_text() == old
    assert list((tmp_path / "out").rglob("*.tmp")) == []


def test_importing_the_package_loads_no_plotting():
    code = (
        "import sys, distilljax.evaluation; "
        "print(sorted({'matplotlib', 'jinja2', 'scipy.stats'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_extra_says_what_to_install(write_run, tmp_path, monkeypatch, module):
    write_run()
    for name in list(sys.modules):
        if name.split(".")[0] == module or name == "distilljax.evaluation.plots":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("distilljax.evaluation.plots", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"distilljax\[report\]"):
        report([tmp_path / "runs"], tmp_path / "out")
