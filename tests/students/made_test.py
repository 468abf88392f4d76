"""Parameters are counted where they belong, and each of them once."""

from __future__ import annotations

import pytest
from flax import nnx

from distilljax.students import ParameterTable
from distilljax.students.made import count_by_part, layer_pairs
from tests.students.small import arrays_of, decoder


@pytest.mark.parametrize("scan", [False, True])
def test_every_parameter_is_counted_once(scan):
    model = decoder(
        scan=scan, num_layers=2, tied=False, post_norm=True, qk_norm=True, qkv_bias=True
    )
    counts = count_by_part(model)
    assert sum(counts.values()) == sum(x.size for x in arrays_of(model).values())
    assert counts == {
        "embedding": 32 * 16,
        "attention": 2 * (2 * 16 * 16 + 2 * 16 * 8 + 16 + 8 + 8),
        "mlp": 2 * 3 * 16 * 24,
        "norms": 2 * (4 * 16 + 2 * 4) + 16,
        "head": 16 * 32,
    }


def test_other_models_are_counted_too():
    assert count_by_part(nnx.Linear(3, 2, rngs=nnx.Rngs(0))) == {"other": 8}


def test_a_part_that_one_side_lacks_is_shown():
    text = str(ParameterTable({"mlp": 10, "head": 5}, {"mlp": 1000}))
    assert text.splitlines() == [
        "part   student  teacher  ratio",
        "mlp         10    1,000   0.01",
        "head         5        0      -",
        "total       15    1,000   0.01",
    ]


def test_the_deeper_one_may_be_the_student():
    assert layer_pairs(2, 4) == {"layers/0": "layers/0", "layers/1": "layers/3"}
    assert layer_pairs(4, 2) == {"layers/0": "layers/0", "layers/3": "layers/1"}
    assert layer_pairs(1, 4) == {"layers/0": "layers/3"}
