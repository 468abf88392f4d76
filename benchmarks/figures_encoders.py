"""The figure and the tables of docs/embedding.md, from results/encoders.json.

    python benchmarks/figures_encoders.py

Takes seconds: what it shows was measured by benchmarks/encoders.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from drawing import BLUE, FAINT, GREEN, GREY, INK, ORANGE, STYLE, TEACHER, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distilljax.evaluation.plot_layout import grid

RESULTS = Path(__file__).parent / "results" / "encoders.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "embedding.md"


def mean(seeds: list[dict[str, Any]], *path: str) -> float:
    """The mean over seeds of a number in each."""
    values = []
    for found in seeds:
        for name in path:
            found = found[name]
        values.append(found)
    return float(np.mean(values))


def embedding_rows(found: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """Name, description, held-out cosine and agreement with people of each model."""
    start = found["untrained"]
    names = {"kept3": "Three layers kept, untrained.", "kept2": "Two, untrained."}
    models = [("teacher", "all-MiniLM-L6-v2, six layers.", [found["teacher"]])]
    models += [(name, names[name], [start[name]]) for name in names]
    arms = found["arms"].items()
    models += [(name, arm["description"], arm["seeds"]) for name, arm in arms]
    return [
        (
            name,
            text,
            mean(seeds, "glosses", "cosine"),
            mean(seeds, "human", "pearson"),
        )
        for name, text, seeds in models
    ]


def supersense_rows(found: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Name, description and accuracy of each model."""
    rows = [
        ("teacher", "MiniLM, fine-tuned.", found["teacher"]["accuracy"]),
        (
            "bag of words",
            "Logistic regression, every label.",
            found["bag_of_words"]["accuracy"],
        ),
        (
            "bag of words, few",
            f"The same on {found['num_few']} labels.",
            found["bag_of_words_few"]["accuracy"],
        ),
    ]
    rows += [
        (name, arm["description"], mean(arm["seeds"], "accuracy"))
        for name, arm in found["arms"].items()
        if arm["seeds"]  # else it was not run
    ]
    return rows


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the page, by the name between its markers."""
    lines = ["| model | what it is | cosine to the teacher | people, Pearson |"]
    lines += ["| --- | --- | ---: | ---: |"]
    for name, text, cosine, people in embedding_rows(results["embedding"]):
        lines.append(f"| `{name}` | {text} | {cosine:.3f} | {people:.3f} |")
    embedding = "\n".join(lines)
    lines = ["| model | what it is | accuracy |", "| --- | --- | ---: |"]
    for name, text, share in supersense_rows(results["supersense"]):
        lines.append(f"| `{name}` | {text} | {share:.3f} |")
    return {"embedding": embedding, "supersense": "\n".join(lines)}


def filled(page: str, found: Mapping[str, str]) -> str:
    """The page with the tables between its markers."""
    for name, table in found.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        between = f"{begin}\n\n{table}\n\n{end}"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        page = re.sub(pattern, lambda _, text=between: text, page, flags=re.DOTALL)
    return page


def draw(results: Mapping[str, Any]) -> Figure:
    """Left: embeddings, kept and fresh. Right: supersenses, few labels and many."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = grid(2, width=4.9, height=3.9, columns=2)
        _embeddings(left, results["embedding"])
        _supersenses(right, results["supersense"])
    return figure


def _embeddings(axis: Axes, found: Mapping[str, Any]) -> None:
    rows = embedding_rows(found)[::-1]
    for y, (name, _, cosine, people) in enumerate(rows):
        axis.plot([people, cosine], [y, y], color=FAINT, lw=2, zorder=1)
        axis.plot(cosine, y, "o", color=BLUE, ms=8, mec="white")
        axis.plot(people, y, "s", color=ORANGE, ms=7, mec="white")
        words = name.replace("_", ", ")
        words += ", untrained" if name in found["untrained"] else ""
        axis.text(-0.04, y, words, ha="right", va="center", fontsize=9, color=INK)
    people = found["teacher"]["human"]["pearson"]
    axis.axvline(people, color=TEACHER, lw=1, ls="--", zorder=0)
    axis.set_yticks([])
    axis.set_xlim(-0.02, 1.03)
    axis.set_ylim(-0.6, len(rows))
    top = len(rows) - 0.55
    axis.text(1.03, top, "cosine to the teacher", color=BLUE, ha="right", fontsize=9)
    axis.text(
        0.64, top, "correlation with people", color=ORANGE, ha="right", fontsize=9
    )
    axis.spines["left"].set_visible(False)
    axis.set_title("Embeddings: teacher, and students by arm")


def _supersenses(axis: Axes, found: Mapping[str, Any]) -> None:
    names = ("labels", "teacher", "transfer", "all_labels")
    words = ("few labels", "teacher,\nsame texts", "teacher,\nall texts", "all labels")
    lines = (
        ("the teacher\n", found["teacher"], TEACHER),
        ("bag of words,\nall labels", found["bag_of_words"], GREY),
        ("bag of words,\nfew labels", found["bag_of_words_few"], GREY),
    )
    for text, measured, color in lines:
        axis.axhline(measured["accuracy"], color=color, lw=1, ls="--")
        place = (3.55, measured["accuracy"])
        axis.text(*place, text, color=color, fontsize=9, va="center")
    for student, color, shift in (("kept", BLUE, -0.2), ("small", GREEN, 0.2)):
        seeds = [found["arms"][f"{student}_{name}"]["seeds"] for name in names]
        run = [i for i, of_arm in enumerate(seeds) if of_arm]
        heights = [mean(seeds[i], "accuracy") for i in run]
        places = np.array(run) + shift
        label = {"kept": "2 layers of MiniLM", "small": "small, fresh"}[student]
        axis.bar(places, heights, 0.38, color=color, label=label)
        for place, height in zip(places, heights, strict=True):
            axis.text(
                place, height - 0.045, f"{height:.2f}", ha="center", color="white",
                fontsize=9,
            )  # fmt: skip
    axis.set_xticks(range(4), words, fontsize=9)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.5, 3.5)
    axis.set_ylim(0, 0.95)
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0.86), ncols=2, fontsize=9)
    axis.set_title("Accuracy on held-out glosses, 26 supersenses")


def main() -> None:
    results = json.loads(RESULTS.read_text())
    write("embedding", draw(results))
    PAGE.write_text(filled(PAGE.read_text(), tables(results)))
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
