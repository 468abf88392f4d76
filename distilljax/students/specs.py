"""Students as parts of a config: frozen dataclasses whose call makes the module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from distilljax._checks import check_count, check_instance, check_positive
from distilljax._functional import Batch
from distilljax.models.pooling import mean_pool
from distilljax.models.pretrained import load_pretrained
from distilljax.sharding import Rule
from distilljax.students._linears import IN_LAYERS
from distilljax.students.depth import keep_layers
from distilljax.students.heads import add_head
from distilljax.students.importance import measure_importance
from distilljax.students.lora import add_lora
from distilljax.students.made import Made
from distilljax.students.quantization import fake_quantize, quantize_weights
from distilljax.students.scratch import Narrowing, from_scratch, projected_embedding
from distilljax.students.untrained import Untrained, check_shape, shaped
from distilljax.students.width import slice_width


def _made(
    student: Any, rngs: nnx.Rngs, mesh: Mesh | None, rules: Sequence[Rule]
) -> nnx.Module:
    """What another part of the config makes: loaded onto the mesh, or fresh."""
    if "mesh" in inspect.signature(student).parameters:
        return student(rngs, mesh, rules)
    return student(rngs)


@dataclass(frozen=True)
class Pretrained:
    """A model of `load_pretrained`, as a teacher or for a student to be made of.

    Example:
      >>> Pretrained("HuggingFaceTB/SmolLM2-135M", scan=True).path_or_id
      'HuggingFaceTB/SmolLM2-135M'
    """

    path_or_id: str
    """A directory, a GGUF file, or a name on the hub."""
    dtype: str | None = None
    """Type of the parameters, such as "bfloat16"; None is that of the file."""
    scan: bool = False
    """Whether layers are stacked and scanned."""
    remat: Callable[..., Any] | None = None
    """What of a layer is kept for the gradient, as in `DecoderConfig`."""
    shape: Any = None
    """What it is, such as a `DecoderConfig`: it is checked when the files are read, and
    without them a run can be planned. None: as the files say."""

    def __call__(
        self, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The module, on the mesh by the rules of its kind, or on one device."""
        del rules
        options: Any = {"dtype": self.dtype, **self._options}
        model: Any = load_pretrained(self.path_or_id, mesh=mesh, **options)
        check_shape(self.path_or_id, model.config, self.shape)
        return model

    @property
    def _options(self) -> dict[str, Any]:
        asked = {"scan": self.scan, "remat": self.remat}
        # models of images have neither
        return {name: value for name, value in asked.items() if value}

    def untrained(self) -> Untrained:
        """The same model without its weights, for a plan."""
        return shaped(self.path_or_id, self.dtype, self.shape, self._options)


@dataclass(frozen=True)
class QuantizedTeacher:
    """A teacher with weights of few bits: `quantize_weights` of another.

    Example:
      >>> teacher = QuantizedTeacher(Pretrained("runs/teacher"), "int4", tile_size=32)
      >>> teacher.weight_qtype
      'int4'
    """

    teacher: Any
    """What loads it in full: a callable from a mesh and rules, such as `Pretrained`."""
    weight_qtype: str = "int8"
    """Type of the kernels: "int8", "int4" or "nf4"."""
    tile_size: int | None = None
    """How many values share a scale; None is all inputs of a map."""
    modules: str = IN_LAYERS
    """Regular expression of the paths of linear maps."""

    def __post_init__(self):
        check_instance("QuantizedTeacher", "teacher", self.teacher)
        if self.tile_size is not None:
            check_count("QuantizedTeacher", "tile_size", self.tile_size)

    def __call__(
        self, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The module, on the mesh or on one device."""
        options = {"tile_size": self.tile_size, "modules": self.modules}
        return quantize_weights(self.teacher(mesh, rules), self.weight_qtype, **options)


@dataclass(frozen=True)
class Copied:
    """A student that starts as another model is: one that was trained before.

    Example:
      >>> Copied(Pretrained("runs/small")).source.path_or_id
      'runs/small'
    """

    source: Any
    """What loads it: a callable from a mesh and rules, such as `Pretrained`."""

    def __post_init__(self):
        check_instance("Copied", "source", self.source)

    def __call__(
        self, rngs: nnx.Rngs, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The module, on the mesh or on one device."""
        del rngs
        return self.source(mesh, rules)


@dataclass(frozen=True)
class KeptLayers:
    """A student that is some of the teacher's layers: `keep_layers`.

    Example:
      >>> KeptLayers(Pretrained("runs/teacher"), layers=8).layers
      8
    """

    teacher: Any
    """What loads the teacher: called with a mesh and rules, such as `Pretrained`."""
    layers: int | tuple[int, ...]
    """How many, evenly spaced, or which."""
    keep_first: bool = True
    """Of a number of layers, whether the first is kept."""

    def __post_init__(self):
        check_instance("KeptLayers", "teacher", self.teacher)

    def make(self, mesh: Mesh | None = None, rules: Sequence[Rule] = ()) -> Made:
        """The student, its pairs of layers and its table."""
        teacher = self.teacher(mesh, rules)
        return keep_layers(teacher, self.layers, keep_first=self.keep_first)

    def __call__(
        self, rngs: nnx.Rngs, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The student, on the mesh or on one device."""
        del rngs
        return self.make(mesh, rules).student


@dataclass(frozen=True)
class SlicedWidth:
    """A student that is a slice of the teacher: `measure_importance`, `slice_width`.

    Example:
      >>> SlicedWidth(Pretrained("runs/teacher"), calibration=list, width=384).width
      384
    """

    teacher: Any
    """What loads the teacher: called with a mesh and rules, such as `Pretrained`."""
    calibration: Callable[[], Iterable[Batch]]
    """What gives the batches on which importance is measured."""
    width: int | None = None
    """Channels to keep; None is all."""
    num_kv_heads: int | None = None
    """Groups of heads to keep in each layer; None is all."""
    ffn_width: int | None = None
    """Neurons to keep in each layer; None is all."""

    def __post_init__(self):
        check_instance("SlicedWidth", "teacher", self.teacher)

    def make(self, mesh: Mesh | None = None, rules: Sequence[Rule] = ()) -> Made:
        """The student, its pairs of layers and its table."""
        teacher = self.teacher(mesh, rules)
        found = measure_importance(teacher, self.calibration())
        return slice_width(
            teacher,
            found,
            width=self.width,
            num_kv_heads=self.num_kv_heads,
            ffn_width=self.ffn_width,
        )

    def __call__(
        self, rngs: nnx.Rngs, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The student, on the mesh or on one device."""
        del rngs
        return self.make(mesh, rules).student


@dataclass(frozen=True)
class WithEmbedding:
    """A fresh student whose embedding is the teacher's, narrowed: `from_scratch`.

    Example:
      >>> from distilljax import models, students
      >>> small = models.DecoderConfig(
      ...     vocab_size=64, width=16, num_layers=2, num_heads=2, num_kv_heads=1,
      ...     head_dim=8, ffn_width=24)
      >>> student = WithEmbedding(small, Pretrained("runs/teacher"))
      >>> student.embedding is students.projected_embedding
      True
    """

    student: Any
    """What builds it: a callable from random streams, such as `DecoderConfig`."""
    teacher: Any
    """What loads the teacher: called with a mesh and rules, such as `Pretrained`."""
    embedding: Narrowing = projected_embedding
    """How the embedding gets its width."""

    def __post_init__(self):
        check_instance("WithEmbedding", "student", self.student)
        check_instance("WithEmbedding", "teacher", self.teacher)

    def make(
        self, rngs: nnx.Rngs, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> Made:
        """The student, its pairs of layers and its table."""
        teacher = self.teacher(mesh, rules)
        return from_scratch(self.student, teacher, rngs, embedding=self.embedding)

    def __call__(
        self, rngs: nnx.Rngs, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The student, on the mesh or on one device."""
        return self.make(rngs, mesh, rules).student


@dataclass(frozen=True)
class WithHead:
    """A student that is an encoder with a fresh head over classes: `add_head`.

    Example:
      >>> WithHead(Copied(Pretrained("runs/encoder")), num_classes=26).num_classes
      26
    """

    student: Any
    """What builds the encoder: a callable from random streams, such as `Copied`."""
    num_classes: int
    """Classes of a text."""
    pool: Callable[..., Any] = mean_pool
    """What the head sees of a row, as `EncoderConfig.pool`."""

    def __post_init__(self):
        check_instance("WithHead", "student", self.student)
        check_count("WithHead", "num_classes", self.num_classes)

    def __call__(
        self, rngs: nnx.Rngs, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The student, on the mesh or on one device."""
        encoder = _made(self.student, rngs, mesh, rules)
        return add_head(encoder, self.num_classes, rngs=rngs, pool=self.pool)


@dataclass(frozen=True)
class LoRA:
    """A student with low-rank updates: `add_lora`; with `trainable=nnx.LoRAParam`.

    Example:
      >>> LoRA(Copied(Pretrained("runs/teacher")), rank=16, weight_qtype="nf4").rank
      16
    """

    student: Any
    """What builds the model below: a callable from random streams, such as `Copied`."""
    rank: int
    """Columns of the updates' first factor."""
    alpha: float | None = None
    """Scale of the updates times the rank; None is the rank."""
    modules: str = IN_LAYERS
    """Regular expression of the paths of linear maps."""
    weight_qtype: str | None = None
    """Type in which the kernels are kept, such as "nf4"; None leaves them."""
    tile_size: int | None = None
    """How many values of a kernel share a scale; None is all inputs of a map."""

    def __post_init__(self):
        check_instance("LoRA", "student", self.student)
        check_count("LoRA", "rank", self.rank)
        if self.alpha is not None:
            check_positive("LoRA", "alpha", self.alpha, "None is the rank.")

    def __call__(
        self, rngs: nnx.Rngs, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The student, on the mesh or on one device."""
        return add_lora(
            _made(self.student, rngs, mesh, rules),
            rank=self.rank,
            rngs=rngs,
            alpha=self.alpha,
            modules=self.modules,
            weight_qtype=self.weight_qtype,
            tile_size=self.tile_size,
        )


@dataclass(frozen=True)
class FakeQuantized:
    """A student that trains as if its weights were of few bits: `fake_quantize`.

    Example:
      >>> FakeQuantized(Copied(Pretrained("runs/small")), "int4").weight_qtype
      'int4'
    """

    student: Any
    """What builds it: a callable from random streams."""
    weight_qtype: str = "int8"
    """Type of the kernels."""
    act_qtype: str | None = None
    """Type of what goes into a map; None leaves it."""
    tile_size: int | None = None
    """How many values of a kernel share a scale; None is all inputs of a map."""
    modules: str = IN_LAYERS
    """Regular expression of the paths of linear maps."""

    def __post_init__(self):
        check_instance("FakeQuantized", "student", self.student)

    def __call__(
        self, rngs: nnx.Rngs, mesh: Mesh | None = None, rules: Sequence[Rule] = ()
    ) -> nnx.Module:
        """The student, on the mesh or on one device."""
        return fake_quantize(
            _made(self.student, rngs, mesh, rules),
            self.weight_qtype,
            act_qtype=self.act_qtype,
            tile_size=self.tile_size,
            modules=self.modules,
        )


__all__ = [
    "Copied",
    "FakeQuantized",
    "KeptLayers",
    "LoRA",
    "Pretrained",
    "QuantizedTeacher",
    "SlicedWidth",
    "Untrained",
    "WithEmbedding",
    "WithHead",
]
