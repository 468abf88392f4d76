"""Encoders distilled: from the run folders to benchmarks/results/encoders.json.

    scripts/fetch_assets.sh assets minilm wordnet lee
    distilljax train configs/embedding/minilm_glosses.py \
        --workdir runs/embedding/minilm_glosses --seeds 0
    distilljax train configs/text/supersense_teacher.py \
        --workdir runs/text/supersense_teacher
    distilljax train configs/text/supersense.py --workdir runs/text/supersense --seeds 0
    python benchmarks/encoders.py

Each run was measured by the probes and the test data of its config; two more students
are measured as they start, before any training; and a bag of words is fitted here, on
all labels and on the few that the students have, and scored on the same held-out
glosses. That takes some minutes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from distilljax import data, students
from distilljax.config import load_experiment, load_module
from distilljax.evaluation import wilson_interval
from distilljax.models import sentence_embedding
from distilljax.workdir import machine, read_json, today, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "encoders.json"
GLOSSES = ROOT / "configs/embedding/minilm_glosses.py"
SUPERSENSE = ROOT / "configs/text/supersense.py"
RUNS = Path("runs")


def main() -> None:
    found = {
        "format": 1,
        "date": today(),
        "machine": machine(),
        "versions": versions(),
        "embedding": embedding(RUNS / "embedding/minilm_glosses"),
        "supersense": supersense(RUNS / "text"),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {RESULTS.relative_to(ROOT)}")


def embedding(runs: Path) -> dict[str, Any]:
    """Teacher, students before training, and the students of every arm, by probe."""
    glosses, planned = load_module(GLOSSES), load_experiment(GLOSSES).arms(0)
    probes = planned["kept3_cosine"].probes
    untrained = {}
    for n in (3, 2):
        model = students.KeptLayers(glosses.TEACHER, n)(nnx.Rngs(0))
        untrained[f"kept{n}"] = {
            name: probe(model, sentence_embedding) for name, probe in probes.items()
        }
    arms, taught = {}, []
    for arm, config in planned.items():
        results = results_of(runs / arm)
        taught += results
        arms[arm] = {
            "description": config.description,
            "steps": config.steps,
            "train_seconds": [result["train_seconds"] for result in results],
            "seeds": [result["student"]["probes"] for result in results],
        }
    teacher = taught[0]["teacher"]["probes"]
    return {"teacher": teacher, "untrained": untrained, "arms": arms}


def results_of(arm: Path) -> list[dict[str, Any]]:
    """Of every seed."""
    return [read_json(path) for path in sorted(arm.glob("seed_*/results.json"))]


def supersense(runs: Path) -> dict[str, Any]:
    """Accuracies on the held-out glosses, each with its 95 % interval."""
    experiment = load_module(SUPERSENSE)
    arms = {}
    for arm, planned in load_experiment(SUPERSENSE).arms(0).items():
        results = results_of(runs / "supersense" / arm)
        arms[arm] = {
            "description": planned.description,
            "steps": planned.steps,
            "train_seconds": [result["train_seconds"] for result in results],
            "seeds": [accuracy(r["student"], r["num_examples"]) for r in results],
        }
    taught = read_json(runs / "supersense_teacher" / "results.json")
    glosses = experiment.teacher.glosses
    train, held_out = glosses("train")(), glosses("validation")()
    few = data.Few(glosses("train"), experiment.NUM_LABELS, seed=0)()
    kept = np.asarray(few.chosen)
    return {
        "num_train": len(train),
        "num_few": len(kept),
        "num_held_out": len(held_out),
        "teacher": accuracy(taught["student"], taught["num_examples"]),
        "teacher_examples_seen": taught["examples_seen"],
        "bag_of_words": bag_of_words(train, held_out, np.arange(len(train))),
        "bag_of_words_few": bag_of_words(train, held_out, kept),
        "arms": arms,
    }


def accuracy(measured: dict[str, Any], total: int) -> dict[str, Any]:
    """The share that is right, and its 95 % interval."""
    share = measured["accuracy"]
    return {"accuracy": share, "interval": wilson_interval(share * total, total)}


def bag_of_words(train: Any, held_out: Any, chosen: Sequence[int]) -> dict[str, Any]:
    """Logistic regression on word counts (tf-idf): fitted here on the chosen glosses.

    The strength of its regulariser is the best of three on the held-out glosses, which
    favours it.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    texts = texts_of(train)
    x = vectorizer.fit_transform([texts[i] for i in chosen])
    z, labels = vectorizer.transform(texts_of(held_out)), train.labels[chosen]
    shares = {}
    for strength in (1.0, 4.0, 16.0):  # it does not converge beyond
        model = LogisticRegression(C=strength, max_iter=200).fit(x, labels)
        shares[strength] = float(np.mean(model.predict(z) == held_out.labels))
    best = max(shares, key=lambda strength: shares[strength])
    found = accuracy({"accuracy": shares[best]}, len(held_out.labels))
    return {**found, "inverse_regularisation": best, "words": x.shape[1]}


def texts_of(rows: Any) -> list[str]:
    """The documents of the rows of a `Padded`."""
    documents = rows.config.text.documents()
    return [documents[int(i)] for i in rows.kept]


if __name__ == "__main__":
    main()
