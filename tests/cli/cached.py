"""A config whose teacher is in the step, or was asked before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distilljax.config import Config, load_module
from distilljax.teachers import CachedTeacher

tiny = load_module(Path(__file__).parents[1] / "teachers" / "tiny.py")


def config(seed: int = 0) -> Config:
    return tiny.text_config(seed=seed, steps=4, licenses={"data": "CC0"})


def arms(seed: int = 0) -> dict[str, Config]:
    online = config(seed)
    cached = CachedTeacher("store", teacher=None)
    return {"online": online, "cached": replace(online, teacher=cached)}
