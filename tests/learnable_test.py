"""A store is not written for a loss that could not be trained from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distilljax import losses, objectives
from distilljax.caching import cache
from distilljax.learnable import check_learnable
from distilljax.objectives import CrossEntropy, LogitKD, Sum
from distilljax.teachers import Dense, Hidden, Sampled, TopK
from distilljax.train import train
from tests.caching_test import from_store
from tests.teachers.tiny import image_config


def always_two(step):
    return 2.0 + 0 * step


GRID = TopK(8, (1.0, 2.0))
FEATURES = objectives.FeatureKD({"layers/0": "layers/0"})
CASES = [
    (LogitKD(), Sampled(5), None),
    (LogitKD(2.0), Sampled(5), "temperature must be 1"),
    (LogitKD(divergence=losses.reverse_kl), Sampled(5), "SampledLogits"),
    (LogitKD(2.0), GRID, None),
    (LogitKD(3.0), GRID, r"\(1.0, 2.0\)"),
    (LogitKD(always_two), GRID, None),
    (LogitKD(2.0, ce_weight=1.0), GRID, None),
    (LogitKD(divergence=losses.reverse_kl), GRID, None),
    (LogitKD(divergence=losses.logit_mse), GRID, "logit_mse"),
    (LogitKD(standardize=True), GRID, "SparseLogits"),
    (LogitKD(divergence=losses.logit_mse), Hidden(), None),
    (LogitKD(divergence=losses.decoupled_kd), Dense(), None),
    (CrossEntropy(), Sampled(5), None),
    (Sum({"a": CrossEntropy(), "b": LogitKD(2.0)}), Sampled(5), "temperature"),
    (Sum({"a": LogitKD(), "b": LogitKD(2.0)}), GRID, None),
    (FEATURES, None, "features must have those that FeatureKD reads"),
    (Sum({"a": LogitKD(), "b": FEATURES}), Sampled(5), "none of the name 'layers/0'"),
]


@pytest.mark.parametrize(("objective", "kind", "message"), CASES)
def test_what_cannot_be_learnt_from_is_said(objective, kind, message):
    if message is None:
        check_learnable(objective, kind, 10)
        return
    with pytest.raises(ValueError, match=message) as refused:
        check_learnable(objective, kind, 10)
    assert str(refused.value).startswith("cache: ")


def test_features_that_are_kept_are_not_missing():
    check_learnable(FEATURES, None, None, ("layers/0", "layers/1"))


@pytest.mark.parametrize(
    ("objective", "kind"),
    [(o, k) for o, k, m in CASES if k is not None and o != FEATURES],
)
def test_training_from_the_store_says_the_same(tmp_path, objective, kind):
    """What is let through is learnt from; what is refused would fail only then."""
    config = image_config(objective=objective, steps=1)
    refused = None
    try:
        check_learnable(objective, kind, 10)
    except ValueError as error:
        refused = error
    if refused is not None:
        with pytest.raises(ValueError, match="cache: "):
            cache(config, tmp_path / "store", logits=kind)
        assert not list((tmp_path / "store").glob("shard*"))
    config = replace(config, objective=CrossEntropy())  # of which any may be kept
    if isinstance(kind, Hidden):
        return  # images have no head
    cache(config, tmp_path / "store", logits=kind)
    run = from_store(config, tmp_path / "store", objective=objective)
    if refused is None:
        train(run, tmp_path / "run")
    else:
        with pytest.raises((TypeError, ValueError)):
            train(run, tmp_path / "run")
