"""Planning a run: what its step needs, compiled ahead of time for devices not here.

from distilljax.planning import plan
plan(config, topology="v5p:4x4x8").programs["step"].memory.owners
"""

from .plan import Plan as Plan
from .plan import ProgramPlan as ProgramPlan
from .plan import plan as plan
from .topology import Topology as Topology
from .topology import open_topology as open_topology
