"""Label-free bias calibration: give back to a student the classes it never saw.

A student distilled on a transfer set without some class learns what that class looks
like from the teacher's small probabilities, but also that it never occurs. The second
lesson sits in one number per class, the bias of its logit, and can be undone without
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from distilljax._checks import check_logits, check_where, fail

_MAX_ITERATIONS = 500


def softmax_mass(
    logits: Float[Array, "*batch classes"], where: Bool[Array, "*batch"] | None = None
) -> Float[np.ndarray, " classes"]:
    """Mean softmax probability of each class over a set of inputs (no unit, sums to 1).

    Formula: ``mass[c] = mean_i softmax(logits_i)[c]``.

    Args:
      logits: Logits of a model on unlabelled inputs.
      where: True for the inputs that count; None counts all.

    Numerics:
      Computed on the host in float64.

    Example:
      >>> softmax_mass(jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))).round(3).tolist()
      [0.7, 0.3]

    Reference:
      M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the Outputs of a Classifier to
      New a Priori Probabilities", Neural Computation 14, 2002, section 2.
    """
    rows = _rows("softmax_mass", "logits", logits, where)
    return _softmax(rows).mean(axis=0)


def bias_calibration(
    student_logits: Float[Array, "*batch classes"],
    teacher_mass: Float[Array, " classes"] | Float[np.ndarray, " classes"],
    *,
    classes: Sequence[int] | None = None,
    where: Bool[Array, "*batch"] | None = None,
    tolerance: float = 1e-6,
) -> Float[Array, " classes"]:
    """Bias to add to the student's logits (nats), found without a single label.

    It is the bias with which the student's mean softmax mass on the calibrated classes
    equals the teacher's over the same unlabelled inputs::

        mean_i softmax(student_logits_i + bias)[c] = teacher_mass[c]   for c in classes
        bias[c] = 0                                                    for other c

    With all classes calibrated, the bias is fixed up to a constant; its mean is then 0.

    Args:
      student_logits: The student's logits on unlabelled inputs, at temperature 1.
      teacher_mass: The teacher's mean probability of each class over those inputs:
        ``softmax_mass(teacher_logits)``. Only the entries of `classes` are used.
      classes: The classes to correct, such as those missing from the transfer set; None
        for all.
      where: True for the inputs that count; None counts all.
      tolerance: Largest relative error of the mass on a calibrated class.

    Returns:
      The bias, float32. Use ``logits + bias``, or add it to the bias of the last layer.

    Numerics:
      The equations are the zero gradient of the convex function ``mean_i logsumexp(z_i
      + b) - teacher_mass . b``. It is minimised in float64 on the host by Newton's
      method, with a Sinkhorn step, which always descends, wherever Newton's does not.
      Cost and memory grow with the square of the number of calibrated classes.

    Example:
      Two inputs, alike for the student, and a teacher that gives class 1 half the mass:

      >>> student = jnp.log(jnp.array([[0.8, 0.2], [0.8, 0.2]]))
      >>> bias = bias_calibration(student, jnp.array([0.5, 0.5]), classes=[1])
      >>> [f"{b:.4f}" for b in bias.tolist()]                    # log(0.8 / 0.2)
      ['0.0000', '1.3863']

    Reference:
      G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network",
      2015, section 3, corrects the bias of the omitted class, chosen there on the test
      set; the label-free choice follows the class-prior equations of Saerens et al.,
      2002.
    """
    rows = _rows("bias_calibration", "student_logits", student_logits, where)
    target = np.asarray(teacher_mass, np.float64)
    chosen = _chosen_classes(classes, rows.shape[1])
    _check_target(target, chosen, rows.shape[1])
    # -inf everywhere means that no finite bias can give the class any mass.
    dead = chosen[~np.isfinite(rows[:, chosen]).any(axis=0)]
    if dead.size:
        fail(
            "bias_calibration",
            "student_logits",
            "be finite somewhere for every calibrated class",
            f"none for classes {dead.tolist()}",
            "Leave these classes out: no bias brings them back.",
        )
    bias = _match_mass(rows, target[chosen], chosen, tolerance)
    if chosen.size == rows.shape[1]:
        bias -= bias.mean()
    return jnp.asarray(bias, jnp.float32)


def _match_mass(
    rows: np.ndarray, target: np.ndarray, chosen: np.ndarray, tolerance: float
) -> np.ndarray:
    """Newton's method on the convex objective, with Sinkhorn steps as its safeguard."""
    bias = np.zeros(rows.shape[1])
    # All classes together may move by a constant: the last stays, so that the Hessian
    # is not singular, and its mass is right when all others are.
    free = chosen[:-1] if chosen.size == rows.shape[1] else chosen
    goal = target[: free.size]
    for _ in range(_MAX_ITERATIONS):
        probs = _softmax(rows + bias)
        mass = probs.mean(axis=0)[chosen]
        if np.max(np.abs(mass - target) / target, initial=0.0) <= tolerance:
            return bias
        p = probs[:, free]
        hessian = np.diag(p.mean(axis=0)) - p.T @ p / len(p)
        newton = bias.copy()
        step = np.linalg.lstsq(hessian, goal - p.mean(axis=0), rcond=None)[0]
        newton[free] += step
        before = _objective(rows, bias, goal, free)
        if _objective(rows, newton, goal, free) < before:
            bias = newton
        else:
            bias[chosen] += np.log(target) - np.log(mass)
    return fail(
        "bias_calibration",
        "student_logits",
        "allow the teacher's mass to be matched",
        f"a relative error over {tolerance:g} after {_MAX_ITERATIONS} iterations",
        "Raise the tolerance, or calibrate fewer classes.",
    )


def _objective(
    rows: np.ndarray, bias: np.ndarray, goal: np.ndarray, free: np.ndarray
) -> float:
    shifted = rows + bias
    top = shifted.max(axis=1)
    lse = top + np.log(np.exp(shifted - top[:, None]).sum(axis=1))
    return float(lse.mean() - goal @ bias[free])


def _softmax(rows: np.ndarray) -> np.ndarray:
    weights = np.exp(rows - rows.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _rows(function: str, argument: str, logits: Any, where: Any) -> np.ndarray:
    """The rows that count, as a float64 matrix on the host."""
    check_logits(function, **{argument: logits})
    shape = np.shape(logits)
    check_where(function, where, shape[:-1])
    rows = np.asarray(jax.device_get(logits)).astype(np.float64).reshape(-1, shape[-1])
    if where is not None:
        rows = rows[np.asarray(where, bool).reshape(-1)]
    if len(rows) == 0:
        fail(function, argument, "have at least one row that counts", 0, "Pass inputs.")
    top = rows.max(axis=1)
    if not np.isfinite(top).all():
        bad = int((~np.isfinite(top)).sum())
        fail(
            function,
            argument,
            "be free of nan and +inf",
            f"{bad} bad rows of {len(rows)}",
            "Check the model, or mask these inputs with `where`.",
        )
    return rows


def _chosen_classes(classes: Sequence[int] | None, num_classes: int) -> np.ndarray:
    chosen = np.arange(num_classes) if classes is None else np.asarray(classes, int)
    valid = chosen.size and chosen.min() >= 0 and chosen.max() < num_classes
    if not valid or len(set(chosen.tolist())) != chosen.size:
        fail(
            "bias_calibration",
            "classes",
            f"be distinct classes in [0, {num_classes})",
            None if classes is None else list(classes),
            "Name the classes to correct, or pass None for all.",
        )
    return chosen


def _check_target(target: np.ndarray, chosen: np.ndarray, num_classes: int) -> None:
    function, argument = "bias_calibration", "teacher_mass"
    if target.shape != (num_classes,):
        fail(
            function,
            argument,
            f"have the shape ({num_classes},)",
            target.shape,
            "Pass softmax_mass(teacher_logits), one number for each class.",
        )
    total = float(target[chosen].sum())
    everything = chosen.size == num_classes
    possible = abs(total - 1) <= 1e-3 if everything else total < 1
    if not (np.all(target[chosen] > 0) and possible):
        rule = "sum to 1" if everything else "leave mass for the other classes"
        fail(
            function,
            argument,
            f"be positive on the calibrated classes and {rule}",
            target[chosen].tolist(),
            "Pass softmax_mass(teacher_logits), and leave out classes without mass.",
        )
