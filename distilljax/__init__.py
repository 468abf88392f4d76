"""Distil large models into small ones with JAX and Flax NNX.

The step is in `distilljax.distill`, the losses are in `distilljax.losses`. Importing
this package loads jax, flax and optax, and nothing heavier.
"""

from distilljax import losses as losses
from distilljax import objectives as objectives
from distilljax.distill import DistillState as DistillState
from distilljax.distill import make_distill_step as make_distill_step
from distilljax.terms import Outputs as Outputs
from distilljax.terms import Term as Term
from distilljax.terms import reduce_terms as reduce_terms
from distilljax.typing import Mean as Mean

__version__ = "0.1.0"
