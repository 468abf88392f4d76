"""Scalars out of their domain that nobody knows before the program runs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests.losses.contract import UNOPTIMIZED

Z = jnp.array([[0.5, 1.0, 0.0, 0.0], [3.0, 0.0, 1.0, 2.0]])
V = jnp.array([[2.0, 1.0, 0.0, -1.0], [0.0, 1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("loss", "argument", "bad"),
    [
        (losses.forward_kl, "temperature", (-1.0, 0.0, np.inf, np.nan)),
        (losses.jensen_shannon, "beta", (-0.1, 1.1, np.nan)),
        (functools.partial(losses.jensen_shannon, normalized=True), "beta", (1.1,)),
        (losses.skew_forward_kl, "skew", (-0.1, np.nan)),
        (losses.skew_reverse_kl, "skew", (1.1, np.nan)),
        (losses.adaptive_kl, "mu", (1.1, np.nan)),
        (losses.alpha_beta, "teacher_power", (np.nan,)),
        (losses.hinge_ranking, "margin", (-1.0, np.nan)),
        (losses.universal_logit, "temperature", (-1.0, np.nan)),
        (losses.dist, "temperature", (-1.0,)),
        (losses.dist, "inter_weight", (-1.0, np.nan)),
        (losses.contrastive, "temperature", (-1.0, 0.0)),
        (losses.embedding_relation, "temperature", (-1.0,)),
        (losses.correlation_congruence, "gamma", (-1.0, np.nan)),
    ],
)
def test_a_schedule_that_leaves_its_domain_gives_nan(loss, argument, bad):
    """Value and gradient: a run that stops, and not one that learns something else."""
    options = {"k": 2} if loss is losses.hinge_ranking else {}

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def run(z, number):
        def total(z):
            return jnp.sum(loss(z, V, **{argument: number}, **options))

        return jax.value_and_grad(total)(z)

    for number in bad:
        value, gradient = run(Z, jnp.float32(number))
        assert np.isnan(value), number
        assert np.isnan(gradient).any(), number
