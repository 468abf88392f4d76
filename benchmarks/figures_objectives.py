"""The figure of docs/objectives.md: goals and gradients in a short training.

    python benchmarks/figures_objectives.py

A network of 4 blocks of 32 units teaches one of 2 blocks of 16, with the objectives of
that page. It takes half a minute, most of it compilation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from drawing import BLUE, GREEN, GREY, ORANGE, STYLE, write
from flax import nnx
from matplotlib.figure import Figure

from distilljax import DistillState, make_distill_step
from distilljax.evaluation.plot_layout import grid
from distilljax.objectives import TAID, CrossEntropy, FeatureKD, LogitKD, Sum
from distilljax.optimizers import Linear
from distilljax.students import Projection

NUM_STEPS = 200
NUM_CLASSES = 4


class Net(nnx.Module):
    """Blocks of one width, and a head."""

    def __init__(self, width: int, depth: int, seed: int):
        rngs = nnx.Rngs(seed)
        widths = [8] + [width] * depth
        pairs = itertools.pairwise(widths)
        self.blocks = nnx.List(nnx.Linear(a, b, rngs=rngs) for a, b in pairs)
        self.head = nnx.Linear(width, NUM_CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.head(x)


def examples() -> dict[str, jax.Array]:
    """1,024 points; the class is given by two signs, but for a fifth it is chance."""
    inputs, noise, chance = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(inputs, (1024, 8))
    labels = 2 * (x[:, 0] > 0) + (x[:, 1] * x[:, 2] > 0)
    random = jax.random.randint(noise, labels.shape, 0, NUM_CLASSES)
    wrong = jax.random.bernoulli(chance, 0.2, labels.shape)
    return {"inputs": x, "labels": jnp.where(wrong, random, labels)}


def states(
    objective: Any, teacher: nnx.Module | None, student: nnx.Module, num_steps: int
) -> Iterator[tuple[DistillState, Any]]:
    """The state before each update and after the last, and what the last one logged.

    A state is donated to the next update: read or copy it before going on.
    """
    tx = optax.adam(5e-3)
    step = make_distill_step(objective, teacher, student=student, tx=tx)
    state, metrics, batch = step.init(student), {}, examples()
    for _ in range(num_steps):
        yield state, metrics
        state, metrics = step.pure(state, step.teacher_state, batch)
    yield state, metrics


def trained_teacher(num_steps: int = 150) -> Net:
    """On the labels alone."""
    teacher = Net(32, 4, 1)
    *_, (last, _) = states(CrossEntropy(), None, teacher, num_steps)
    nnx.update(teacher, last.params, last.rest)
    return teacher


def taid(
    teacher: Net, num_steps: int = NUM_STEPS
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By step: the teacher's share in the goal, and the KL of student and goal.

    The shares are those of three settings of `TAID`; the KL that of the first of them,
    to its goal and to the teacher, beside the one to the teacher under `LogitKD`.
    """
    share, logged = {}, {}
    objectives = {
        "rate=5e-4, the default": TAID(num_steps),
        "rate=0.03": TAID(num_steps, rate=0.03),
        "LogitKD": LogitKD(),
    }
    for name, one in objectives.items():
        run, found = states(one, teacher, Net(16, 2, 2), num_steps), []
        for state, metrics in run:
            if state.objective_state is not None:
                t = float(state.objective_state["t"])
                share.setdefault(name, []).append(t)
            found.append({key: float(mean.value) for key, mean in metrics.items()})
        logged[name] = found[1:]
    line = Linear(0.4, 1.0, num_steps=num_steps // 2)
    name = f"interpolation=Linear(0.4, 1.0, {num_steps // 2})"
    share[name] = [float(line(step)) for step in range(num_steps + 1)]
    first = logged["rate=5e-4, the default"]
    distances = {
        "to the teacher, LogitKD": [step["kl"] for step in logged["LogitKD"]],
        "to the teacher, TAID": [step["kl"] for step in first],
        "to the goal, TAID": [step["taid"] for step in first],
    }
    return tuple(
        {name: np.array(values) for name, values in curves.items()}
        for curves in (share, distances)
    )


def objective(num_steps: int = NUM_STEPS) -> Sum:
    """Logits, labels and a hint that fades out over the first half."""
    return Sum(
        {
            "logits": LogitKD(temperature=2.0),
            "labels": CrossEntropy(),
            "hint": FeatureKD(
                {"blocks/1": "blocks/3"},
                projection=Projection(16, 32),
                weight=Linear(1.0, 0.0, num_steps=num_steps // 2),
            ),
        }
    )


def by_part(
    whole: Sum, teacher: Net, num_steps: int = NUM_STEPS, every: int = 5
) -> dict[str, np.ndarray]:
    """Norms of the gradients of each part, with respect to the student alone.

    A part is a sum in which the others weigh nothing. One step of gradient descent of
    rate 1 from the state of the run moves the parameters by its gradient.
    """
    student, batch, probes = Net(16, 2, 2), examples(), {}
    for name in whole.parts:
        weights = {other: float(other == name) for other in whole.parts}
        part = dataclasses.replace(whole, weights=weights)
        probes[name] = make_distill_step(
            part, teacher, student=student, tx=optax.sgd(1.0)
        )
    found = {name: [] for name in probes}
    for i, (state, _) in enumerate(states(whole, teacher, student, num_steps)):
        for name, probe in probes.items() if i % every == 0 else ():
            descent = probe.init(student).opt_state
            at = dataclasses.replace(jax.tree.map(jnp.copy, state), opt_state=descent)
            moved, _ = probe.pure(at, probe.teacher_state, batch)
            before, after = (probe.student_of(s.params) for s in (state, moved))
            change = jax.tree.map(jnp.subtract, before, after)
            found[name].append(float(optax.tree.norm(change)))
    return {name: np.array(norms) for name, norms in found.items()}


def draw(
    share: dict[str, np.ndarray],
    kls: dict[str, np.ndarray],
    parts: dict[str, np.ndarray],
) -> Figure:
    """Three panels over the steps of a run."""
    with mpl.rc_context(STYLE):
        figure, (left, middle, right) = grid(3, width=3.5, height=3.2)
        for (name, t), color in zip(share.items(), (GREY, BLUE, ORANGE), strict=True):
            left.plot(t, color=color, lw=2, label=name)
        left.set_title("TAID: the teacher's share t")
        left.set_ylim(0, 1.05)
        left.legend(loc="lower right", fontsize=8.5)

        lines = zip(kls.items(), (GREY, ORANGE, BLUE), strict=True)
        for (name, kl), color in lines:  # the wide one may lie below another
            width = 5 if color == GREY else 2
            middle.plot(kl, color=color, lw=width, alpha=2 / width, label=name)
        middle.set_title("KL of the student, in nats")

        lines = zip(parts.items(), (ORANGE, GREY, GREEN), strict=True)
        for (name, norm), color in lines:
            steps = np.linspace(0, len(kls["to the goal, TAID"]), len(norm))
            right.plot(steps, norm, color=color, lw=2, label=name)
        right.set_title("Sum: norms of the parts' gradients")
        for axis in (middle, right):
            axis.legend(loc="upper right", fontsize=8.5)
            axis.set_ylim(0, None)
        for axis in (left, middle, right):
            axis.set_xlabel("step")
    return figure


def main() -> None:
    teacher = trained_teacher()
    share, kls = taid(teacher)
    parts = by_part(objective(), teacher)
    for name, values in (share | kls | parts).items():
        print(name, values[:: max(1, len(values) // 8)].round(4).tolist())
    write("objectives_training", draw(share, kls, parts))


if __name__ == "__main__":
    main()
