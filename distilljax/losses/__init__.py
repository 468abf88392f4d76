"""The mathematics: pure functions of arrays, one value for each position or example.

Student first, teacher second, the rest by keyword. Nothing is averaged and no factor is
hidden: reduce with `masked_mean`, and multiply by T^2 where you want it. Each loss
keeps the contract in ``docs/losses.md``, and one test suite holds all of them to it.
"""

from distilljax.losses._adaptive_kl import adaptive_kl as adaptive_kl
from distilljax.losses._alpha_beta import alpha_beta as alpha_beta
from distilljax.losses._attention import attention_map_kl as attention_map_kl
from distilljax.losses._attention import attention_relation as attention_relation
from distilljax.losses._contrastive import MemoryQueue as MemoryQueue
from distilljax.losses._contrastive import contrastive as contrastive
from distilljax.losses._cross_entropy import cross_entropy as cross_entropy
from distilljax.losses._cross_entropy import soft_cross_entropy as soft_cross_entropy
from distilljax.losses._decoupled_kd import decoupled_kd as decoupled_kd
from distilljax.losses._dist import dist as dist
from distilljax.losses._feature_maps import activation_boundary as activation_boundary
from distilljax.losses._feature_maps import attention_transfer as attention_transfer
from distilljax.losses._feature_maps import flow_of_solution as flow_of_solution
from distilljax.losses._feature_maps import neuron_selectivity as neuron_selectivity
from distilljax.losses._fused import fused_divergence as fused_divergence
from distilljax.losses._heads import LinearHead as LinearHead
from distilljax.losses._hidden import hidden_cosine as hidden_cosine
from distilljax.losses._hidden import hidden_mse as hidden_mse
from distilljax.losses._hinge_ranking import hinge_ranking as hinge_ranking
from distilljax.losses._interchannel import (
    interchannel_correlation as interchannel_correlation,
)
from distilljax.losses._kl import forward_kl as forward_kl
from distilljax.losses._kl import reverse_kl as reverse_kl
from distilljax.losses._linear_cka import linear_cka as linear_cka
from distilljax.losses._logit_mse import logit_mse as logit_mse
from distilljax.losses._margin_mse import margin_mse as margin_mse
from distilljax.losses._mixtures import jensen_shannon as jensen_shannon
from distilljax.losses._mixtures import skew_forward_kl as skew_forward_kl
from distilljax.losses._mixtures import skew_reverse_kl as skew_reverse_kl
from distilljax.losses._reductions import masked_mean as masked_mean
from distilljax.losses._reductions import masked_sum as masked_sum
from distilljax.losses._rkd import rkd_angle as rkd_angle
from distilljax.losses._rkd import rkd_distance as rkd_distance
from distilljax.losses._similarities import (
    correlation_congruence as correlation_congruence,
)
from distilljax.losses._similarities import embedding_relation as embedding_relation
from distilljax.losses._similarities import (
    probabilistic_transfer as probabilistic_transfer,
)
from distilljax.losses._similarities import (
    similarity_preserving as similarity_preserving,
)
from distilljax.losses._sparse import SampledLogits as SampledLogits
from distilljax.losses._sparse import SparseLogits as SparseLogits
from distilljax.losses._standardize import standardize_logits as standardize_logits
from distilljax.losses._total_variation import total_variation as total_variation
from distilljax.losses._universal_logit import universal_logit as universal_logit
from distilljax.losses._variational_information import (
    variational_information as variational_information,
)
