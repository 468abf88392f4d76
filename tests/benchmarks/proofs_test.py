"""The proofs: their statistics, missing runs, the bias search, and the page in sync."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import struct
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import data, models, optimizers
from distilljax.config import load_experiment, load_module, to_json
from distilljax.evaluation import paired_difference, softmax_mass
from distilljax.evaluation.runs import read_run
from distilljax.train import train
from distilljax.workdir import TrainedRun

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
proofs, plan, collecting, calibration, page, figures = map(
    importlib.import_module,
    (
        "proofs",
        "proofs_plan",
        "proofs_collect",
        "proofs_calibration",
        "proofs_page",
        "proofs_figures",
    ),
)

RESULTS = REPOSITORY / "benchmarks" / "results" / "proofs.json"
PROOFS = {proof.name: proof for proof in plan.PROOFS}
NUM_TEST = 200


def write_run(
    runs: Path, proof, arm: str, seed: int, wrong: range, teacher_errors: int = 5
) -> None:
    """A finished run whose student errs on the test examples `wrong`, and no others."""
    folder = proof.folder(runs, arm, seed)
    folder.mkdir(parents=True)
    labels = np.arange(NUM_TEST) % 10
    predicted = labels.copy()
    predicted[list(wrong)] = (labels[list(wrong)] + 1) % 10
    np.savez(folder / "predictions.npz", labels=labels, student=predicted)

    def evaluated(right: np.ndarray) -> dict:
        counts = [int((labels == c).sum()) for c in range(10)]
        correct = [int((right & (labels == c)).sum()) for c in range(10)]
        return {
            "accuracy": float(right.mean()),
            "nll": 0.5,
            "ece": 0.1,
            "kl_to_teacher": 0.2,
            "agreement": 0.9,
            "per_class": {"count": counts, "correct": correct},
            "parameters": 1000,
        }

    experiment = load_experiment(proof.config)
    config = experiment.arms(seed).get(arm) or experiment.config(seed)
    record = {
        "format": 1,
        "name": config.name,
        "arm": arm,
        "seed": seed,
        "baseline": config.baseline,
        "description": config.description,
        "expected": config.expected,
        "split": "test",
        "num_examples": NUM_TEST,
        "class_names": list("0123456789"),
        "focus_classes": list(config.focus_classes),
        "steps": config.steps,
        "examples_seen": config.steps * config.loader.batch_size,
        "train_seconds": 60.0,
        "compile_seconds": 1.0,
        "selected": None,
        "student": evaluated(predicted == labels),
        "teacher": evaluated(np.arange(NUM_TEST) >= teacher_errors),
        "versions": {"jax": "1"},
        "machine": {
            "device": "cpu",
            "num_devices": 1,
            "cpu": "test",
            "cpu_cores": 2,
            "system": "Linux",
        },
        "date": f"2026-01-0{1 + seed % 9}",
    }
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    lines = [
        {"step": step, "split": "train", "loss": 1.0 / step, "seconds": 1.0}
        for step in (1, 2, 4)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def soft_targets(tmp_path):
    """Nine seeds: hard labels err on 20 + seed examples, soft targets on ten."""
    runs = tmp_path / "runs"
    proof = PROOFS["mnist/soft_targets"]
    for seed in range(9):
        write_run(runs, proof, "hard_labels", seed, range(20 + seed))
        write_run(runs, proof, "soft_t20", seed, range(15, 25))
    return runs


def test_numbers_of_a_comparison_are_those_counted_by_hand(soft_targets):
    found = collecting.collect((PROOFS["mnist/soft_targets"],), soft_targets)
    experiment = found["experiments"]["mnist/soft_targets"]
    claim = experiment["claims"][0]

    assert experiment["arms"]["hard_labels"]["errors"]["mean"] == 24  # 20 ... 28
    assert experiment["arms"]["hard_labels"]["errors"]["sd"] == pytest.approx(7.5**0.5)
    assert experiment["arms"]["soft_t20"]["errors"] == {"mean": 10, "sd": 0}
    assert experiment["arms"]["soft_t20"]["train_loss"]["mean"] == 0.25
    assert claim["difference"]["mean"] == -14
    assert (claim["difference"]["negative"], claim["difference"]["n"]) == (9, 9)
    # t = -14 / sqrt(7.5 / 9) = -15.34 with 8 degrees of freedom
    assert claim["difference"]["t_p_value"] == pytest.approx(3.25e-7, rel=0.01)
    # Seeds 0-2, 3-5, 6-8 are splits 0, 1, 2.
    assert claim["split_differences"] == [-11, -14, -17]
    # Hard labels alone are wrong below 15 and from 25 on, the other alone between the
    # two ends: 15 + max(0, seed - 5) and max(0, 5 - seed).
    assert claim["mcnemar"]["gained"] == 9 * 15 + 1 + 2 + 3
    assert claim["mcnemar"]["lost"] == 5 + 4 + 3 + 2 + 1
    assert claim["verdict"] == "reproduced"
    # (24 - 10) / (24 - 5)
    (against,) = experiment["against_hard_labels"]
    assert against["gap_closed"] == pytest.approx(14 / 19)
    # The worst pair has the fewest errors with hard labels: 10 / 20.
    (bound,) = experiment["bounds"]
    assert bound["worst"] == 0.5
    assert bound["met"]


def test_missing_runs_are_named_and_the_rest_is_compared(soft_targets, tmp_path):
    proof = PROOFS["mnist/soft_targets"]
    (proof.folder(soft_targets, "soft_t20", 4) / "results.json").unlink()

    found = collecting.collect(plan.PROOFS, soft_targets)
    experiment = found["experiments"]["mnist/soft_targets"]

    assert experiment["expected_runs"] == 27
    assert "soft_t20, seed 4" in experiment["missing_runs"]
    assert len(experiment["missing_runs"]) == 10  # and all nine of kd_t4
    assert experiment["claims"][0]["seeds"] == [0, 1, 2, 3, 5, 6, 7, 8]
    # No run of the arm, no claim about it.
    assert [claim["arm"] for claim in experiment["claims"]] == ["soft_t20"]
    assert found["experiments"]["mnist/full"]["runs"] == []
    found["figures"] = dict.fromkeys(figures.draw(found), "")
    assert list(found["figures"]) == ["proofs_soft_targets"]
    filled = page.fill(page.PAGE.read_text(), found)
    assert "mnist/soft_targets (10 of 27 runs)" in filled
    assert "Not run yet: `distilljax train configs/mnist/full.py`" in filled


@pytest.mark.parametrize(
    ("measure", "gained", "lost"),
    # Of ten classes, class 3 is 13 and 23 among the gained, 3 among the lost.
    [("errors", 20, 5), ("focus_recall", 2, 1), ("errors_other_classes", 18, 4)],
)
def test_mcnemar_counts_the_examples_that_a_measure_is_about(measure, gained, lost):
    focus = np.arange(40) % 10 == 3
    ours, theirs = np.ones(40, bool), np.ones(40, bool)
    ours[:5] = False
    theirs[10:30] = False
    pair = [collecting.Student({}, right, focus) for right in (ours, theirs)]

    found = collecting._mcnemar([tuple(pair)], collecting.COUNTED[measure])

    assert (found["gained"], found["lost"]) == (gained, lost)


def test_no_runs_at_all_still_make_a_page(tmp_path):
    found = collecting.collect(plan.PROOFS, tmp_path)
    found["figures"] = dict.fromkeys(figures.draw(found), "")

    filled = page.fill(page.PAGE.read_text(), found)

    assert found["figures"] == {}
    assert filled.count("Not run yet") == len(plan.PROOFS)


@pytest.mark.parametrize(
    ("differences", "expected", "verdict"),
    [
        ([-1, -2, -3], -1, "not separated"),  # p is .07, and signs need six
        ([-1, -2, -3, -9, -2, -7], -1, "reproduced"),
        ([-1, -2, -3, -9, -2, -7], +1, "contradicted"),
        ([-1, -2, -3, -9, -2, -7], 0, "less"),
        ([-1, -2, 3], -1, "not separated"),
        ([-1, -2, 0], -1, "not separated"),  # a tie is not the claimed sign
        ([5, 5, 5, 5, 5, 5], +1, "reproduced"),  # no t without spread, but all signs
        ([-9, -9.5, -10, -9.2, -9.8, -9.1, -9.9, -9.4, 0.1], -1, "reproduced"),  # by p
        ([-9, -9.5, -10, -9.2, -9.8, -9.1, -9.9, -9.4, 0.1], +1, "contradicted"),
        ([-5, -6], -1, "too few pairs"),
    ],
)
def test_verdicts_follow_the_rule(differences, expected, verdict):
    found = paired_difference(differences, [0.0] * len(differences))

    assert collecting.verdict(found, expected) == verdict


@pytest.mark.parametrize("proof", plan.PROOFS, ids=lambda proof: proof.name)
def test_the_plan_is_that_of_the_configs(proof):
    expected = proof.expected_runs()
    arms = {arm for arm, _ in expected}
    extra = {a + s for a in proof.calibrate for s in (plan.CALIBRATED, plan.ORACLE)}
    named = {c.arm for c in proof.claims} | {c.baseline for c in proof.claims}
    named |= {*(proof.hard_labels or {}), *(proof.hard_labels or {}).values()}
    named |= {bound.arm for bound in proof.bounds}
    assert named <= arms | extra
    experiment = load_experiment(proof.config)
    for arm, seed in expected:
        config = experiment.arms(seed).get(arm) or experiment.config(seed)
        assert config.seed == seed
        assert config.select is None  # nothing is chosen, on any data
        if config.teacher is not None and proof.name != "mnist/full":
            assert config.teacher.workdir.endswith(f"/seed_{proof.split(seed)}")
        taught = arm in (proof.hard_labels or {})
        is_hard = type(config.objective).__name__ == "CrossEntropy"
        assert not (is_hard and taught)
        if taught:
            hard = experiment.arms(seed)[proof.hard_labels[arm]]
            same = ("student", "data", "loader", "steps", "optimizer", "seed")
            for field in same:
                ours, theirs = getattr(config, field), getattr(hard, field)
                if field == "loader":  # what the teacher sees is what is compared
                    ours = dataclasses.replace(ours, teacher_view="same")
                assert ours == theirs, f"{arm} and its labels differ in {field}"


def test_commands_are_run_in_order_where_the_configs_find_runs_and_assets(
    tmp_path, monkeypatch
):
    (tmp_path / "assets" / "mnist").mkdir(parents=True)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "proofs.md").write_text("# empty\n")
    calls = []

    def run(words, check):
        assert check
        assert Path("assets/mnist").is_dir()
        calls.append((words, Path("runs").resolve()))

    monkeypatch.setattr(proofs.subprocess, "run", run)
    words = ["--runs", str(tmp_path / "here"), "--assets", str(tmp_path / "assets")]
    words += ["--out", str(tmp_path), "--docs", str(docs)]

    assert proofs.main([*words, "--only", "mnist/soft_targets", "mnist/teacher"]) == 0

    configs = [Path(call[4]) for call, _ in calls]
    assert configs == [
        REPOSITORY / "configs/mnist/teacher.py",  # first, whatever was said first
        REPOSITORY / "configs/mnist/soft_targets.py",
    ]
    assert calls[1][0][5:] == [
        "--workdir",
        "runs/mnist/soft_targets",
        "--seeds",
        "0..8",
    ]
    assert {runs for _, runs in calls} == {tmp_path / "here"}


def test_assets_that_are_not_there_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        proofs.main(["--assets", str(tmp_path / "none")])
    assert "fetch_assets.sh" in capsys.readouterr().err


def test_collecting_twice_writes_the_same_files(soft_targets, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "proofs.md").write_text(page.PAGE.read_text())
    words = ["--runs", str(soft_targets), "--assets", str(tmp_path), "--collect-only"]
    words += ["--out", str(tmp_path / "out"), "--docs", str(docs)]
    written = []
    for _ in range(2):
        assert proofs.main([*words, "--note", "Two cores."]) == 0
        names = ("out/proofs.json", "docs/proofs.md")
        written.append([(tmp_path / name).read_bytes() for name in names])

    assert written[0] == written[1]
    assert b"- Two cores." in written[0][1]
    image = docs / "figures" / "proofs_soft_targets.png"
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_marker_that_names_no_section_is_an_error():
    with pytest.raises(ValueError, match="got 'chapter'"):
        page.fill("<!-- begin chapter -->\n<!-- end chapter -->", {})


def test_the_page_is_what_the_committed_results_say():
    results = json.loads(RESULTS.read_text())
    text = page.PAGE.read_text()

    assert page.fill(text, results) == text, (
        "docs/proofs.md differs from benchmarks/results/proofs.json. Change the prose "
        "outside the markers, and run benchmarks/proofs.py --collect-only for the rest."
    )
    drawn = {path.stem for path in (page.PAGE.parent / "figures").glob("proofs_*.png")}
    assert drawn == set(results["figures"])
    for name in PROOFS:
        assert f"<!-- begin experiment {name} -->" in text


def test_a_number_changed_by_hand_would_be_noticed():
    results = json.loads(RESULTS.read_text())
    arm = results["experiments"]["mnist/teacher"]["arms"]["default"]
    arm["errors"]["mean"] += 1

    assert page.fill(page.PAGE.read_text(), results) != page.PAGE.read_text()


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_bias_is_the_best_of_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(60, 4)).round(1)  # with ties among the margins
    labels = rng.integers(0, 4, 60)

    def errors(bias: float) -> int:
        moved = logits.copy()
        moved[:, 2] += bias
        return int((moved.argmax(axis=1) != labels).sum())

    found = calibration.oracle_bias(logits, labels, 2)

    # Margins are multiples of 0.1, so all that can be had lies between them.
    grid = np.arange(-8.05, 8.05, 0.1)
    assert errors(found) == min(errors(bias) for bias in grid)


def test_the_oracle_bias_brings_back_a_class_that_is_only_held_down():
    logits = np.array([[2.0, 0.0], [2.0, 0.0], [2.0, -3.0]])

    # Margins are 2, 2 and 5: a bias between 2 and 5 is right about all three.
    assert calibration.oracle_bias(logits, np.array([1, 1, 0]), 1) == 3.5


@pytest.mark.slow
def test_calibrating_a_trained_student_gives_it_the_teachers_mass(
    tmp_path, monkeypatch
):
    """Real runs on tiny images: teacher, student without class 3, both biases."""
    monkeypatch.chdir(tmp_path)
    write_idx(Path("assets"), np.random.default_rng(0))
    module = load_module(REPOSITORY / "configs/mnist/missing_class.py")
    labelled = data.Stratified(data.Idx("assets", "mnist", "train"), 200)
    small = {
        "student": models.MLP(num_features=784, hidden=(32,), num_classes=10),
        "optimizer": optimizers.AdamW(learning_rate=3e-3),
        "loader": data.Loader(batch_size=40, scale=255.0),
        "validation": None,
        "steps": 60,
        "eval_batch_size": 40,
        "mesh": "data=-1",
    }
    teacher = module.soft_targets.teacher.config(0)
    teacher = dataclasses.replace(teacher, **small, data=labelled)
    train(teacher, "runs/mnist/teacher/default/seed_0")
    student = dataclasses.replace(
        module.config(0), **small, data=data.WithoutClasses(labelled, (3,))
    )
    folder = Path("runs/mnist/missing_class/soft_t20/seed_0")
    train(student, folder, arm="soft_t20")
    run = read_run(folder / "results.json")

    found = calibration.calibrate(run)

    logits = calibration.logits_of(TrainedRun(str(folder))(), student, labelled)
    mass = softmax_mass(jnp.asarray(logits))
    assert mass[3] == pytest.approx(found.student_mass)
    logits[:, 3] += found.label_free.bias
    mass = softmax_mass(jnp.asarray(logits))
    assert mass[3] == pytest.approx(found.teacher_mass, rel=1e-4)
    assert found.label_free.bias > 0
    labels = run.predictions()["labels"]  # pyright: ignore
    errors = [(f.predictions != labels).sum() for f in (found.oracle, found.label_free)]
    assert errors[0] <= errors[1]
    threes = labels == 3
    before = (run.predictions()["student"][threes] == 3).mean()  # pyright: ignore
    assert (found.label_free.predictions[threes] == 3).mean() > before

    # Predictions of another student are noticed.
    with np.load(folder / "predictions.npz") as saved:
        arrays = dict(saved)
    arrays["student"] = (arrays["student"] + 1) % 10
    np.savez(folder / "predictions.npz", **arrays)
    with pytest.raises(ValueError, match="must predict what its results say"):
        calibration.calibrate(run)


def write_idx(assets: Path, rng: np.random.Generator) -> None:
    """Ten classes: a bright bar at the class's row, which overlaps its neighbours'."""
    assets.mkdir()
    for prefix, count in (("train", 400), ("t10k", 200)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 120, (count, 28, 28))
        for i, label in enumerate(labels):
            images[i, 2 * label : 2 * label + 3] += 90
        images = np.clip(images, 0, 255).astype(np.uint8)
        for stem, array in (("images", images), ("labels", labels)):
            header = bytes([0, 0, 8, array.ndim])
            header += struct.pack(f">{array.ndim}I", *array.shape)
            path = assets / f"{prefix}-{stem}-idx{array.ndim}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
