"""Objectives: functions ``(student, teacher, batch) -> {name: Term}``.

An objective is any such function; those here are frozen dataclasses, so that a config
can hold them, print them and override their fields. A weight or a temperature is a
number or a schedule: a function of the number of updates made so far.
"""

from ..students.layers import evenly_spaced as evenly_spaced
from ._combine import MeanOfLogits as MeanOfLogits
from ._combine import MeanOfProbabilities as MeanOfProbabilities
from ._combine import Only as Only
from ._combine import Routed as Routed
from ._features import FeatureKD as FeatureKD
from ._features import FeatureLoss as FeatureLoss
from ._hard import HardDistillation as HardDistillation
from ._logits import CrossEntropy as CrossEntropy
from ._logits import LogitKD as LogitKD
from ._logits import Schedule as Schedule
from ._logits import value_at as value_at
from ._relations import AttentionKD as AttentionKD
from ._relations import ContrastiveKD as ContrastiveKD
from ._relations import RelationKD as RelationKD
from ._signals import Divergence as Divergence
from ._sum import Sum as Sum
from ._taid import TAID as TAID
from ._teachers import MultiTeacher as MultiTeacher
from ._teachers import SelfDistillation as SelfDistillation
