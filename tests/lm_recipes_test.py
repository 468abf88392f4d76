"""The recipes for pods: models of the published sizes, and smallest forms that run."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import jax
import pytest
from flax import nnx

from distilljax.config import from_json, load_experiment, to_json
from distilljax.train import train

RECIPES = Path(__file__).resolve().parents[1] / "configs/lm"
# Parameters, as the index of each model's safetensors files counts them.
PUBLISHED = {
    "llama_70b_to_8b": (70_553_706_496, 8_030_261_248),
    "qwen3_32b_to_0.6b": (32_762_123_264, 596_049_920),
    "gemma2_9b_to_2b": (9_241_705_984, 2_614_341_888),
}


def num_parameters(shape) -> int:
    params = nnx.state(nnx.eval_shape(lambda: shape(nnx.Rngs(0))), nnx.Param)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_numbers_of_parameters(name):
    module = load_experiment(RECIPES / f"{name}.py").module
    shapes = module.TEACHER_SHAPE, module.STUDENT_SHAPE
    assert tuple(map(num_parameters, shapes)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_smallest_form_differs_from_the_recipe_in_sizes_alone(name):
    experiment = load_experiment(RECIPES / f"{name}.py")
    shape, smoke = experiment.module.STUDENT_SHAPE, experiment.arms(0)["smoke"].student
    sizes = {
        "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim",
        "ffn_width", "max_length", "window", "embed_scale", "attention_scale",
    }  # fmt: skip
    names = {field.name for field in fields(shape)} - sizes
    assert {n: getattr(shape, n) for n in names} == {
        n: getattr(smoke, n) for n in names
    }
    assert (shape.window is None) == (smoke.window is None)
    full = experiment.arms(0)["distilled"]
    assert from_json(to_json(full)) == full


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, "data=2,fsdp=2,tensor=2") for name in PUBLISHED),
        ("gemma2_9b_to_2b", ""),
    ],
)
def test_the_smallest_form_trains_and_is_measured(name, mesh, tmp_path):
    """Split as on a pod, and as it is: all eight devices have a part of the batch."""
    smoke = load_experiment(RECIPES / f"{name}.py").arms(0)["smoke"]
    results = train(replace(smoke, mesh=mesh or smoke.mesh), tmp_path, arm="smoke")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kd = [r["kd"] for r in map(json.loads, lines) if r["split"] == "train"]
    assert kd[-1] < 0.8 * kd[0]
    assert 0 < results["student"]["kl_to_teacher"] < kd[0]
