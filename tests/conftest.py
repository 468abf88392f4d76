"""The world that the tests run in: eight simulated devices, and checked shapes."""

from __future__ import annotations

import os

from tests.processes import FAST_COMPILATION, compiled_before

# Before jax is imported: it reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# The time of these tests is that of compiling small programs, and a third of it that of
# making them fast. Commands in processes of their own are compiled as users' are.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}"

# Many tests compile the same, and processes that they start do.
os.environ.update(compiled_before())

import beartype
import hypothesis
import jaxtyping
import pytest

# An int is a float to Python's type checkers, and so it is here: temperature=4.
typechecker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

# Before distilljax is imported: the hook rewrites its modules as they are loaded, so
# that every call checks the shapes and types that its signature promises.
jaxtyping.install_import_hook("distilljax", f"{__name__}.typechecker")

# Helpers of the tests that are not tests get the same clear assertions.
pytest.register_assert_rewrite("tests.losses.contract", "tests.meshes")

# The same examples in every run: a red run is a fault, and never a draw.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None
)
hypothesis.settings.load_profile("repeatable")
