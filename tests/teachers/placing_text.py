"""A language model whose teachers can be placed, and its arms, for the command line."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from distilljax import models, objectives, students
from distilljax.config import Config, load_module
from distilljax.teachers import Placed

tiny = load_module(Path(__file__).with_name("tiny.py"))

OBJECTIVE = objectives.Sum(
    {
        "kd": objectives.LogitKD(temperature=2.0),
        "hidden": objectives.FeatureKD({"layers/0": "layers/1"}),
    }
)
AWAY = "data=2,tensor=2"
CALLS = itertools.count(1)


def failing(model: Any, batch: Any) -> Any:
    """A teacher that answers so many batches, and then raises."""
    outputs = model(batch["tokens"], batch.get("positions"), batch.get("segment_ids"))

    def count(hidden: Any) -> Any:
        if next(CALLS) > int(os.environ["ANSWERS"]):
            raise RuntimeError("the teacher has had enough")
        return hidden

    head = outputs.logits
    hidden = jax.pure_callback(count, head.hidden, head.hidden)
    return replace(outputs, logits=replace(head, hidden=hidden))


def config(seed: int = 0) -> Config:
    """A language model of half the layers, and its teacher in the step."""
    return tiny.text_config(
        name="placing text",
        objective=OBJECTIVE,
        accumulate=2,
        seed=seed,
        mesh="data=4,tensor=2",
        teacher_rules=models.DECODER_RULES,
    )


def arms(seed: int = 0) -> dict[str, Config]:
    """Each with the teacher in the step, and on devices of its own."""
    inline = config(seed)
    teacher = inline.teacher
    int8 = students.QuantizedTeacher(teacher, "int8")
    wide = students.Untrained(replace(tiny.DECODER, width=24), seed=8)
    mean = objectives.MultiTeacher(objectives.LogitKD())
    two = {"a": teacher, "b": wide}
    placed = {"a": Placed(teacher, "tensor=2"), "b": Placed(wide, "data=2")}
    away = replace(inline, mesh="data=4", teacher=Placed(teacher, AWAY))
    one = replace(away, mesh="data=7", accumulate=1, teacher=Placed(teacher, "data=1"))
    one = replace(one, loader=replace(one.loader, batch_size=7), eval_batch_size=7)
    return {
        "inline": inline,
        "away": away,
        "int8": replace(inline, teacher=int8),
        "int8_away": replace(away, teacher=Placed(int8, "data=4")),
        "two": replace(inline, teacher=two, objective=mean),
        "two_away": replace(away, teacher=placed, objective=mean),
        "raises": replace(
            one,
            teacher_forward=failing,
            checkpoint_every_steps=2,
            objective=objectives.LogitKD(),
        ),
    }
