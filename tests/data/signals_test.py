"""A teacher's sparse signal is refused before it can teach something else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax.data import check_signal
from distilljax.losses import SampledLogits, SparseLogits


def test_a_class_that_does_not_exist_or_is_there_twice():
    """Compiled programs cannot raise: a class that is there twice would count twice."""
    good = SparseLogits.top_k(jnp.arange(24.0).reshape(2, 3, 4), 3)
    check_signal(good, 4)
    ids = np.array(good.ids)
    ids[1, 2, 0] = 7
    message = r"ids must lie in \[0, 4\), .* got 7 at position \(1, 2\)"
    with pytest.raises(ValueError, match=message):
        check_signal(dataclasses.replace(good, ids=ids), 4)
    ids[1, 2, 0] = ids[1, 2, 1]
    with pytest.raises(ValueError, match=r"at most once .* twice at position \(1, 2\)"):
        check_signal(dataclasses.replace(good, ids=ids), 4)
    check_signal(dataclasses.replace(good, ids=ids), 4, np.arange(6).reshape(2, 3) < 5)
    log_probs, log_tail = np.array(good.log_probs), np.array(good.log_tail)
    log_tail[1, 2] = np.logaddexp(log_tail[1, 2], log_probs[1, 2, 0])
    log_probs[1, 2, 0] = -np.inf  # then its id means nothing
    check_signal(SparseLogits(ids, log_probs, log_tail), 4)


def test_logits_are_no_log_probabilities():
    good = SparseLogits.top_k(jnp.arange(24.0).reshape(2, 3, 4), 3)
    shifted = dataclasses.replace(good, log_probs=good.log_probs + 5)
    with pytest.raises(ValueError, match=r"log_probs must be .* got a total of 1[0-9]"):
        check_signal(shifted, 4)


def test_a_sample_has_copies():
    sample = SampledLogits.draw(jax.random.key(0), jnp.zeros((2, 4)), 9)
    check_signal(sample, 4)
    with pytest.raises(ValueError, match="ids must lie"):
        check_signal(sample, int(sample.ids.max()))
