"""Where the teacher's outputs come from, if not from the student's own step.

A teacher in the step is a module in `Config.teacher`. Any other is a provider: an
iterator transform, ``for batch in provider(batches)``, whose batches have the outputs
under ``teacher``, for a step that is made with ``teacher_head=provider.head``.
"""

from __future__ import annotations

from distilljax.teachers._coding import SampledCoding as SampledCoding
from distilljax.teachers._coding import TopKCoding as TopKCoding
from distilljax.teachers.provider import Provider as Provider
