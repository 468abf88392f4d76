"""Configs: a Python file that returns one frozen dataclass.

    def config(seed: int = 0) -> Config: ...                 # required
    def arms(seed: int = 0) -> dict[str, Config]: ...        # optional, named variants

The parts of a `Config` are frozen dataclasses whose call builds the real thing, so a
config can be printed, compared, overridden field by field, and saved with its run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from distilljax._checks import (
    check_count,
    check_instance,
    check_positive,
    check_type,
    fail,
    suggest_field,
)
from distilljax.optimizers import AdamW
from distilljax.sharding import Rule


@dataclass(frozen=True)
class Config:
    """One run: a student, what it learns from, and how.

    Example:
      >>> from distilljax import models, objectives
      >>> config = Config(
      ...     name="example",
      ...     student=models.MLP(num_features=64, hidden=(32,), num_classes=10),
      ...     objective=objectives.CrossEntropy(),
      ...     data=lambda: [],
      ...     loader=None,
      ...     steps=100,
      ... )
      >>> config.steps
      100
    """

    name: str
    """Name of the experiment; runs of one name are compared with each other."""
    student: Any
    """The model: a callable from `nnx.Rngs` to an NNX module."""
    objective: Any
    """What is minimised: `(student, teacher, batch) -> {name: Term}`."""
    data: Any
    """Training examples: a callable that opens a random-access source."""
    loader: Any
    """How examples become batches: order, augmentation, size."""
    steps: int
    """Number of updates."""
    teacher: Any = None
    """The teacher: a callable that loads an NNX module; None for none."""
    optimizer: Any = AdamW()  # noqa: RUF009  frozen
    """Callable that builds the optax transformation."""
    validation: Any = None
    """Examples that select the best checkpoint; None selects the last."""
    test: Any = None
    """Examples for the results at the end; they never select anything."""
    other_tests: Any = None
    """Further test data by name, such as what a student may forget; None for none."""
    probes: Any = None
    """Further measures of the result by name: `probe(model, forward) -> dict`, numbers
    and texts, of student and teacher; such as `evaluation.Samples`. None for none."""
    seed: int = 0
    """Seed of the parameters, of dropout, of the order of the data."""
    trainable: Any = None
    """NNX filter of what is trained; None is every `nnx.Param`."""
    student_forward: Any = None
    """`(model, batch) -> Outputs | logits`; None is `model(batch["inputs"])`."""
    teacher_forward: Any = None
    """The same for the teacher; None prefers `batch["teacher_inputs"]`."""
    accumulate: int = 1
    """Microbatches per update; the gradient is that of the whole batch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward passes; parameters and losses are float32."""
    ema_decay: float | None = None
    """Decay per step of an average of the parameters, to be evaluated; None: none."""
    mesh: str = "data=-1"
    """Devices by axis, such as "data=4,fsdp=2"; -1 takes the remaining ones."""
    student_rules: tuple[Rule, ...] = ()
    """Where the student's parameters lie, by path; else over fsdp, by size."""
    teacher_rules: tuple[Rule, ...] = ()
    """The same for the teacher."""
    log_every_steps: int = 50
    """Steps between lines of metrics, each the mean over those steps."""
    diagnostics: bool = True
    """Whether these say accuracy, agreement, entropies and KL, which no loss needs."""
    eval_every_steps: int = 200
    """Steps between evaluations on `validation`; the best so far has a checkpoint."""
    eval_batch_size: int = 256
    """Examples per batch of an evaluation, over all processes."""
    checkpoint_every_steps: int = 1000
    """Steps between further checkpoints."""
    checkpoint_every_secs: float | None = None
    """Seconds after which one is written before that many steps; None: steps alone."""
    keep_last: int = 2
    """How many of the newest checkpoints stay on disk, besides the best: of a damaged
    one, a run goes on from the one before."""
    select: str | None = "accuracy"
    """Measure on `validation` by which the checkpoint is chosen; None: the last."""
    select_mode: Literal["max", "min"] | None = None
    """Which value of `select` is the best; None: as the measure says."""
    baseline: str | None = None
    """Name of the arm that this one is compared with, on the same budget."""
    description: str = ""
    """One sentence for the report: what this arm is."""
    expected: str | None = None
    """The number that this config should reach, and where it is from."""
    focus_classes: tuple[int, ...] = ()
    """Classes whose recall the report shows by itself."""
    licenses: Any = None
    """Licences by what they are of, such as {"teacher": "Apache-2.0", "data": "CC0"}:
    whatever is made of the two, such as a store of the teacher's signal, says them."""
    headline: str | None = None
    """What the report compares arms by: "accuracy", "nll", or "probes.NAME.NUMBER", of
    which more is better; None: accuracy, or the nll of text."""

    def __post_init__(self):
        for name in (
            "steps",
            "accumulate",
            "log_every_steps",
            "eval_every_steps",
            "eval_batch_size",
            "checkpoint_every_steps",
            "keep_last",
        ):
            check_count("Config", name, getattr(self, name))
        if (secs := self.checkpoint_every_secs) is not None:
            check_positive("Config", "checkpoint_every_secs", secs, "Or leave it out.")
        for name in ("objective", "optimizer", "loader"):
            check_instance("Config", name, getattr(self, name))
        for name in ("other_tests", "probes", "licenses"):
            parts = getattr(self, name)
            if parts is not None:
                remedy = 'Write {"name": ...}.'
                check_type("Config", name, parts, Mapping, remedy)
        for name, choices in (
            ("select_mode", (None, "max", "min")),
            ("compute_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                fail(
                    "Config",
                    name,
                    f"be one of {', '.join(map(str, choices))}",
                    repr(getattr(self, name)),
                    "Check its spelling.",
                )
        if not 0 <= self.seed < 2**31:
            fail(
                "Config",
                "seed",
                "lie in [0, 2^31)",
                self.seed,
                "Seeds of JAX are small.",
            )


# How a name that is defined in a config file begins: then the path, a colon, the name.
_FILE = "_distilljax_config:"


@dataclass(frozen=True)
class Experiment:
    """A config file: its default config and its arms, as functions of the seed."""

    path: Path
    module: ModuleType

    def config(self, seed: int) -> Config:
        """The default config."""
        found, what = self._call("config", seed), f"config(seed) of {self.path}"
        check_type("load_experiment", what, found, Config, "Return Config(...).")
        return found

    def arms(self, seed: int) -> Mapping[str, Config]:
        """The named variants; none if the file has no such function."""
        found = self._call("arms", seed) if hasattr(self.module, "arms") else {}
        what, remedy = f"arms(seed) of {self.path}", "Return {name: Config(...)}."
        check_type("load_experiment", what, found, Mapping, remedy)
        for name, arm in found.items():
            check_type("load_experiment", f"{what}, {name!r},", arm, Config, remedy)
        return found

    def _call(self, function: str, seed: int) -> Any:
        try:
            return getattr(self.module, function)(seed)
        except TypeError as error:
            suggest_field(error, str(self.path))
            raise


@functools.cache
def load_module(path: Path) -> ModuleType:
    """Run a Python file as a module, once; for config files and what they share."""
    name = f"{_FILE}{path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        fail(
            "load_experiment",
            "CONFIG",
            "be a Python file",
            repr(str(path)),
            "Pass the path of a config such as configs/digits/few_labels.py.",
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def load_experiment(path: str | Path) -> Experiment:
    """Load a config file.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "mine.py"
      ...     _ = path.write_text(
      ...         "from distilljax.config import Config\\n"
      ...         "def config(seed=0):\\n"
      ...         "    return Config('mine', *[None] * 4, steps=9, seed=seed)\\n"
      ...     )
      ...     load_experiment(path).config(3).seed
      3
    """
    path = Path(path)
    module = load_module(path)
    if not callable(getattr(module, "config", None)):
        fail(
            "load_experiment",
            "CONFIG",
            "define config(seed=0) -> Config",
            f"{str(path)!r} without it",
            "See configs/digits/teacher.py for a short one.",
        )
    return Experiment(path, module)


def _reference(x: Any) -> str:
    module = x.__module__
    if "<lambda>" in x.__qualname__ or "<locals>" in x.__qualname__:
        fail(
            "to_json",
            "a part of the config",
            "be importable by name",
            f"{x.__qualname__} of {module}",
            "Define it with def or class at the top level of a file.",
            TypeError,
        )
    return f"{module}:{x.__qualname__}"


def to_json(x: Any) -> Any:
    """A config as JSON: dataclasses, functions and classes by their import path.

    Arrays become a digest: it tells whether they are the same, and cannot be read back.

    Example:
      >>> to_json({"optimizer": AdamW, "widths": (32, 16)})
      {'optimizer': {'_ref': 'distilljax.optimizers:AdamW'}, 'widths': [32, 16]}
    """
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {f.name: to_json(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return {"_type": _reference(type(x)), **fields}
    if isinstance(x, Mapping):
        return {str(k): to_json(v) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return [to_json(v) for v in x]
    if isinstance(x, functools.partial):
        inner = {"_partial": to_json(x.func), "args": to_json(x.args)}
        return {**inner, "keywords": to_json(x.keywords)}
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, Path):
        return str(x)
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.ndarray):
        digest = hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=8)
        return {
            "_array": digest.hexdigest(),
            "shape": list(x.shape),
            "dtype": str(x.dtype),
        }
    if not callable(x):
        fail(
            "to_json",
            "a part of the config",
            "be a number, text, tuple, function, class or frozen dataclass",
            f"{type(x).__name__}: {x!r}",
            "Pass a dataclass whose call builds the object.",
            TypeError,
        )
    return {"_ref": _reference(x)}


def _import(reference: str) -> Any:
    module, _, name = reference.rpartition(":")
    if module.startswith(_FILE):
        found: Any = load_module(Path(module.removeprefix(_FILE)))
    else:
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def from_json(x: Any) -> Any:
    """The inverse of `to_json`; lists come back as tuples.

    Example:
      >>> from distilljax.models import MLP
      >>> spec = MLP(num_features=64, hidden=(32,), num_classes=10)
      >>> from_json(to_json(spec)) == spec
      True
    """
    if isinstance(x, list):
        return tuple(from_json(v) for v in x)
    if not isinstance(x, dict):
        return x
    if "_ref" in x:
        return _import(x["_ref"])
    if "_array" in x:
        fail(
            "from_json",
            "a part of the config",
            "be a description",
            f"an array of shape {x['shape']}",
            "Arrays are not saved with a config: build it from its file.",
            TypeError,
        )
    if "_partial" in x:
        func, args = from_json(x["_partial"]), from_json(x["args"])
        return functools.partial(func, *args, **from_json(x["keywords"]))
    values = {k: from_json(v) for k, v in x.items() if k != "_type"}
    if "_type" not in x:
        return values
    kind = _import(x["_type"])
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"from_json: _type must be a dataclass, got {x['_type']}.")
    make: Any = kind
    return make(**values)
