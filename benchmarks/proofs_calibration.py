"""The missing class gets its bias back: without labels, and by an oracle.

The label-free bias sees the 5,000 training images of the split, of all ten classes, and
not one label: the student's mean mass of the missing class over them becomes the
teacher's. The oracle is chosen on the test labels, for comparison only: it is the best
that any bias of that class can do.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distilljax.config import Config, from_json
from distilljax.data import load_in_memory
from distilljax.evaluation import bias_calibration, softmax_mass
from distilljax.evaluation.runs import Run
from distilljax.workdir import TrainedRun, read_json

# Images whose two best classes are equal to rounding may go either way.
MAX_FLIPS = 3


@dataclass(frozen=True)
class Calibrated:
    """One student with one bias moved."""

    bias: float
    """Added to the logit of the missing class, nats."""
    predictions: np.ndarray
    """On the test set, in its order."""


@dataclass(frozen=True)
class Calibration:
    """Both biases of a student, and the masses that they come from."""

    label_free: Calibrated
    oracle: Calibrated
    student_mass: float
    """Mean probability of the missing class over the unlabelled images."""
    teacher_mass: float


def calibrate(run: Run) -> Calibration:
    """Both calibrations of a finished run, from its checkpoint and its teacher's.

    Paths in the run's config are taken from the current folder.
    """
    config: Config = from_json(read_json(run.path.with_name("config.json")))
    (label,) = config.focus_classes
    unlabelled = config.data.source  # WithoutClasses(all ten classes)
    student = TrainedRun(str(run.path.parent))()
    on_unlabelled = logits_of(student, config, unlabelled)
    on_test = logits_of(student, config, config.test)
    saved = run.predictions()
    if saved is None:
        raise FileNotFoundError(f"{run.path.with_name('predictions.npz')} is not there")
    flips = int((on_test.argmax(-1) != saved["student"]).sum())
    if flips > MAX_FLIPS:
        raise ValueError(
            f"calibrate: the checkpoint of {run.path.parent} must predict what its "
            f"results say, got {flips} other classes. Train the run again."
        )
    mass = softmax_mass(jnp.asarray(logits_of(config.teacher(), config, unlabelled)))
    bias = bias_calibration(jnp.asarray(on_unlabelled), mass, classes=(label,))
    return Calibration(
        label_free=_moved(on_test, label, float(bias[label])),
        oracle=_moved(on_test, label, oracle_bias(on_test, saved["labels"], label)),
        student_mass=float(softmax_mass(jnp.asarray(on_unlabelled))[label]),
        teacher_mass=float(mass[label]),
    )


def logits_of(model: nnx.Module, config: Config, source_config) -> np.ndarray:
    """Logits of a model in inference mode, [examples, classes], labels unread."""
    model.eval()
    forward = nnx.jit(lambda model, inputs: model(inputs))
    source = load_in_memory(source_config())
    parts = [
        np.asarray(jax.device_get(forward(model, batch["inputs"])))[batch["loss_mask"]]
        for batch in config.loader.eval_batches(
            source, batch_size=config.eval_batch_size
        )
    ]
    return np.concatenate(parts)


def oracle_bias(logits: np.ndarray, labels: np.ndarray, label: int) -> float:
    """The bias of one class with the fewest errors on labelled data.

    It is the middle of the interval of such biases; of several, the one closest to 0.
    An example is predicted as `label` once the bias exceeds its margin: the best other
    logit less that of `label`. So only the margins matter, and all are tried.
    """
    others = np.delete(logits.astype(np.float64), label, axis=1)
    margin = others.max(axis=1) - logits[:, label].astype(np.float64)
    names = np.delete(np.arange(logits.shape[1]), label)
    right_below = names[others.argmax(axis=1)] == labels
    order = np.argsort(margin, kind="stable")
    # Crossing a margin wins an example of the class, and loses one that was right.
    change = right_below[order].astype(int) - (labels[order] == label)
    errors = np.concatenate([[0], np.cumsum(change)])
    edges = margin[order]
    between = (edges[1:] + edges[:-1]) / 2
    candidates = np.concatenate([[edges[0] - 1], between, [edges[-1] + 1]])
    # Between equal margins there is no bias: the errors there cannot be had.
    possible = np.concatenate([[True], edges[1:] > edges[:-1], [True]])
    best = candidates[possible & (errors == errors[possible].min())]
    return float(best[np.abs(best).argmin()])


def _moved(logits: np.ndarray, label: int, bias: float) -> Calibrated:
    moved = logits.astype(np.float64)
    moved[:, label] += bias
    return Calibrated(bias, moved.argmax(axis=1))
