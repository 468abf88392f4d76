"""An experiment that is one model by itself: mostly the teacher of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from distilljax.evaluation.arms import Arm
from distilljax.evaluation.runs import Run


def is_single(runs: Sequence[Run]) -> bool:
    """Whether an experiment is one run that claims nothing about a teacher.

    A student with a teacher but without a baseline is not: that nothing shows what its
    teacher was worth is a fault of the experiment, and has to be said.
    """
    return len(runs) == 1 and runs[0].baseline is None and runs[0].teacher is None


def describe_single(run: Run, teachers: Sequence[tuple[str, Arm]]) -> str:
    """One neutral sentence, and a second one if the model is certainly a teacher.

    Args:
      run: The only run of its experiment.
      teachers: Names of the other experiments of the report, and their teachers.

    Returns:
      Text for the place where other experiments have their verdicts.
    """
    text = "A single model, without teacher or baseline: it is measured, not compared."
    taught = [name for name, teacher in teachers if _is_teacher(run, teacher)]
    if taught:
        *most, last = taught
        listed = f"{', '.join(most)} and {last}" if most else last
        text += f" It is the teacher of {listed}."
    return text


def _is_teacher(run: Run, teacher: Arm) -> bool:
    """Whether a model is the teacher of all runs of an arm, beyond doubt.

    Equal accuracies are common among good models. The same prediction on each example
    *and* the same NLL to six digits are not: only the same weights have both.
    """
    predicted = run.predictions()
    if predicted is None:
        return False
    return all(_same_model(run, predicted, other) for other in teacher.runs)


def _same_model(run: Run, predicted: dict[str, np.ndarray], other: Run) -> bool:
    ours, theirs = run.student, other.teacher
    if theirs is None or run.class_names != other.class_names:
        return False
    if ours.get("parameters") is None:
        return False
    if ours["parameters"] != theirs.get("parameters"):
        return False
    # Sums of float32 in batches of another size differ in the seventh digit. An NLL of
    # exactly 0 is that of any model whose softmax has saturated.
    if ours["nll"] == 0 or not math.isclose(ours["nll"], theirs["nll"], rel_tol=1e-6):
        return False
    arrays = other.predictions()
    if arrays is None or "teacher" not in arrays:
        return False
    return np.array_equal(predicted["labels"], arrays["labels"]) and np.array_equal(
        predicted["student"], arrays["teacher"]
    )
