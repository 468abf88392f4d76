"""The experiment behind docs/figures/responses_modes.png: what it shows is so."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from distilljax import losses

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
responses = importlib.import_module("figures_responses")


def fitted(loss):
    parameters, finals = (np.asarray(x) for x in responses.fit(loss, num_starts=8))
    return parameters, responses.describe(parameters[np.argmin(finals)])


def test_forward_kl_covers_both_bumps():
    """It matches the teacher's moments, and so believes in what lies between."""
    parameters, best = fitted(losses.forward_kl)
    assert np.all(parameters[:, 1] > 3)
    assert best["first_moment_error"] == pytest.approx(0, abs=1e-3)
    assert best["second_moment_error"] == pytest.approx(0, abs=1e-2)
    assert best["low_density_mass"] > 0.4


def test_reverse_kl_seeks_one_of_them():
    """From every narrow start; which one it finds is chance."""
    parameters, best = fitted(losses.reverse_kl)
    np.testing.assert_allclose(parameters[:, 1], 0.4, rtol=0.1)
    np.testing.assert_allclose(np.abs(parameters[:, 0]), 2.5, atol=0.1)
    assert {-1.0, 1.0} == set(np.sign(parameters[:, 0]).tolist())
    assert best["mean"] == pytest.approx(2.5, abs=0.1)  # the larger one has less loss
    assert best["low_density_mass"] < 0.02


def test_learnt_targets_are_in_the_order_of_their_bias():
    full, sampled, bucket = (
        responses.kl(q)
        for q in (
            responses.ZIPF,
            responses.learnt("sampled", 12),
            responses.learnt("tail bucket", 12),
        )
    )
    assert full == 0
    assert 0.004 < sampled < 0.009
    assert bucket == pytest.approx(0.293, abs=1e-3)
    assert responses.kl(responses.learnt("sampled ids, weights p", 12)) > 0.8
    assert np.isinf(responses.kl(responses.learnt("renormalised", 12)))
