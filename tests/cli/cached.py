"""A config whose teacher is in the step, or was asked before."""

from __future__ import annotations

from dataclasses import replace

from distilljax.config import Config
from distilljax.teachers import CachedTeacher
from tests.teachers.tiny import text_config


def config(seed: int = 0) -> Config:
    return text_config(seed=seed, steps=4, licenses={"data": "CC0"})


def arms(seed: int = 0) -> dict[str, Config]:
    online = config(seed)
    cached = CachedTeacher("store", teacher=None)
    return {"online": online, "cached": replace(online, teacher=cached)}
