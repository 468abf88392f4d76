"""Universal logits: models of different vocabularies, and what the loss cannot see."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from distilljax import losses


def test_by_hand_with_unequal_classes():
    """(.7, .2, .1) against (.5, .5, 0): .2 + .3 + .1, whatever the order."""
    three, two = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(losses.universal_logit(two, three), 0.6, rtol=1e-6)
    np.testing.assert_allclose(losses.universal_logit(three, two), 0.6, rtol=1e-6)


def test_it_does_not_know_which_class_is_which():
    """So it cannot teach alone: the docs say to keep the cross-entropy."""
    logits = jnp.array([3.0, 1.0, 0.0])
    assert losses.universal_logit(logits[::-1], logits) == 0


def test_padded_classes_are_like_classes_that_are_not_there():
    wide = jnp.array([3.0, -jnp.inf, 1.0, -jnp.inf])
    narrow, teacher = jnp.array([3.0, 1.0]), jnp.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose(
        losses.universal_logit(wide, teacher),
        losses.universal_logit(narrow, teacher),
        rtol=1e-6,
    )
