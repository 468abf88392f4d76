"""Where the teacher's outputs come from, if not from the student's own step.

A teacher in the step is a module in `Config.teacher`. Any other is a provider: an
iterator transform, ``for batch in provider(batches)``, whose batches have the outputs
under ``teacher``, for a step that is made with ``teacher_head=provider.head``.
"""

from __future__ import annotations

from distilljax.teachers._coding import SampledCoding as SampledCoding
from distilljax.teachers._coding import TopKCoding as TopKCoding
from distilljax.teachers.cached import CachedTeacher as CachedTeacher
from distilljax.teachers.placed import Placed as Placed
from distilljax.teachers.provider import Provider as Provider
from distilljax.teachers.signals import Dense as Dense
from distilljax.teachers.signals import Hidden as Hidden
from distilljax.teachers.signals import Sampled as Sampled
from distilljax.teachers.signals import TopK as TopK
from distilljax.teachers.store import SignalStore as SignalStore
from distilljax.teachers.streamed import StreamedTeacher as StreamedTeacher
