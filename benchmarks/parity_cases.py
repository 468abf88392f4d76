"""What is compared: which loss of ours with which function of whom, and how scaled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from distilljax import losses

Arrays = Mapping[str, Any]
Loss = Callable[..., Any]
"""(arrays, **options) -> one number."""

BATCH, CLASSES = 16, 10
POINTS, WIDTH = 12, 8
IMAGES, HEIGHT, SPAN, CHANNELS = 4, 5, 6, 7
EARLY, LATE = 3, 4
TEXTS, TIME, VOCABULARY = 3, 6, 17


class Factor(NamedTuple):
    """What the reference is, in units of ours."""

    text: str
    value: float


ONE = Factor("1", 1.0)


@dataclass(frozen=True)
class Case:
    """One comparison. A gradient is taken of every array whose name begins "student".

    With a peer alone, the two must agree. With a peer and the paper's formula, the peer
    must differ from the formula, as `differs` says, and ours must agree with it. With
    the formula alone, `why` says why no peer is there.
    """

    loss: str
    """Public name in `distilljax.losses`."""
    ours: Loss
    inputs: str
    """Key of `INPUTS`."""
    peer: str | None = None
    """Key of `PEERS` in `parity_peers`, which another interpreter executes."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Given to ours, to the peer and to the formula alike."""
    theirs: Mapping[str, Any] = field(default_factory=dict)
    """Given to the peer beside them."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Given to ours beside them."""
    factor: Factor = ONE
    """The peer, or the formula if there is one, is so many times ours."""
    why: str = ""
    """What the factor is, or why no peer is there: one sentence."""
    differs: str = ""
    """What the peer does that its paper does not: one sentence."""
    paper: Loss | None = None
    """The paper's formula in NumPy, from `parity_papers`."""
    paper_gradient: Callable[..., dict[str, np.ndarray]] | None = None
    """Its gradient, where central differences would differentiate a constant."""
    raises: bool = False
    """The peer differs by failing."""
    single: bool = False
    """The peer computes in float32 whatever its inputs are."""

    @property
    def name(self) -> str:
        """Unique, and readable: it is how results are found again."""
        ours, theirs = (
            ", ".join(f"{key}={value!r}" for key, value in options.items())
            for options in ({**self.options, **self.own}, self.theirs)
        )
        against = f"{self.peer}({theirs})" if self.peer else "the paper's formula"
        return f"{self.loss}({ours}) against {against}"


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "logits": {"student": (BATCH, CLASSES), "teacher": (BATCH, CLASSES)},
    "tokens": dict.fromkeys(("student", "teacher"), (TEXTS, TIME, VOCABULARY)),
    "vocabularies": {"student": (TEXTS, TIME, 13), "teacher": (TEXTS, TIME, 19)},
    "scores": dict.fromkeys(("student", "teacher"), (2, 3, TIME, TIME)),
    "states": {"student": (2, TIME, 12), "teacher": (2, TIME, 24)},
    "points": {"student": (POINTS, WIDTH), "teacher": (POINTS, WIDTH)},
    "clouds": {"student": (POINTS, WIDTH), "teacher": (POINTS, WIDTH + 2)},
    "maps": dict.fromkeys(("student", "teacher"), (IMAGES, HEIGHT, SPAN, CHANNELS)),
    "gaussian": {
        "student": (IMAGES, HEIGHT, SPAN, CHANNELS),
        "student_scale": (CHANNELS,),
        "teacher": (IMAGES, HEIGHT, SPAN, CHANNELS),
    },
    "flows": {
        f"{side}_{layer}": (IMAGES, HEIGHT, SPAN, width)
        for side in ("student", "teacher")
        for layer, width in (("early", EARLY), ("late", LATE))
    },
    "heads": {
        "student_hidden": (TEXTS, TIME, 8),
        "student_kernel": (8, VOCABULARY),
        "student_bias": (VOCABULARY,),
        "teacher_hidden": (TEXTS, TIME, 12),
        "teacher_kernel": (12, VOCABULARY),
        "teacher_bias": (VOCABULARY,),
    },
}
"""Normal numbers: twice the size for logits, so that distributions are not flat."""

INTEGERS: dict[str, tuple[tuple[int, ...], int]] = {
    "logits": ((BATCH,), CLASSES),
    "tokens": ((TEXTS, TIME), VOCABULARY),
}


def inputs_of(name: str, seed: int) -> dict[str, np.ndarray]:
    """Random float64 arrays that float32 holds exactly, with labels and a mask."""
    # RandomState, whose stream is fixed for good: committed numbers are repeated.
    rng = np.random.RandomState(seed)
    size = 2.0 if name in ("logits", "tokens", "vocabularies") else 1.0
    arrays: dict[str, np.ndarray] = {
        key: (size * rng.standard_normal(shape)).astype(np.float32).astype(np.float64)
        for key, shape in SHAPES[name].items()
    }
    if name in INTEGERS:
        shape, classes = INTEGERS[name]
        arrays["labels"] = rng.randint(0, classes, shape)
    if name in ("tokens", "heads"):
        arrays["mask"] = np.arange(TIME)[None] < np.array([[6], [4], [1]])
    return arrays


def of(loss: Callable[..., Any]) -> Loss:
    """The mean of a loss over its positions, those of the mask if there is one."""

    def ours(x: Arrays, **options: Any) -> Any:
        where = x.get("mask")
        masked = {} if where is None else {"where": where}
        values = loss(x["student"], x["teacher"], **masked, **options)
        return losses.masked_mean(values, where)

    return ours
