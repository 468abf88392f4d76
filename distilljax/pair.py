"""The two models of a run: a frozen teacher, a student's structure, their measures."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilljax._checks import check_type, fail, inputs_in_errors
from distilljax._functional import (
    default_forward,
    default_teacher_forward,
    module_apply,
    split_module,
)
from distilljax.config import Config, to_json
from distilljax.data import Source, prefetch_to_device
from distilljax.data.prefetch import this_process
from distilljax.evaluation.cost import Model, costs
from distilljax.evaluation.evaluate import Evaluation, Evaluator
from distilljax.evaluation.flops import count_flops
from distilljax.evaluation.measures import of_text
from distilljax.frozen import Teacher, one_module
from distilljax.losses import LinearHead
from distilljax.losses._heads import map_positions
from distilljax.sharding import batch_sharding, tree_shardings
from distilljax.terms import as_outputs
from distilljax.throughput import Flops

# Under which key an evaluation finds them in its batches; no example has such a key.
TEACHER_LOGITS = "the teacher's logits"
# Of one source, they stay on the devices; more are computed again each time.
KEPT_BYTES = 2**28


def key_of(what: str, config: Config, fields: tuple[str, ...]) -> str:
    """What distinguishes two configs of which only these fields matter."""
    parts = {name: to_json(getattr(config, name)) for name in fields}
    return json.dumps([what, parts], sort_keys=True)


def starts_from_files(config: Config) -> bool:
    """Whether the student is called with a mesh, as one that is loaded onto it is.

    Its arrays would be constants of a compiled program.
    """
    return "mesh" in inspect.signature(config.student).parameters


def make_student(config: Config, rngs: nnx.Rngs, mesh: Mesh) -> nnx.Module:
    """The student of a config, with its arrays where the rules say, if it is loaded."""
    if not starts_from_files(config):
        return config.student(rngs)
    rules = config.student_rules
    module = config.student(rngs, mesh, rules)
    arrays = nnx.state(module)
    nnx.update(module, jax.device_put(arrays, tree_shardings(arrays, mesh, rules)))
    return module


def _abstract_student(config: Config, mesh: Mesh) -> nnx.Module:
    """Its structure and shapes."""
    if not starts_from_files(config):
        return nnx.eval_shape(lambda: config.student(nnx.Rngs(0)))
    graphdef, state = nnx.split(make_student(config, nnx.Rngs(0), mesh))
    return nnx.merge(graphdef, jax.eval_shape(lambda: state))


def _split_head(logits: Any) -> tuple[Any, Any]:
    """What of logits belongs to the batch, and what is the same for all batches."""
    if not isinstance(logits, LinearHead):
        return logits, None
    return logits.hidden, dataclasses.replace(logits, hidden=None)


def _with_head(of_batch: Any, head: Any) -> Any:
    return of_batch if head is None else dataclasses.replace(head, hidden=of_batch)


def _predictions(logits: Any) -> Any:
    """The logits, or of a head, which makes them in parts, the class of the largest."""
    if not isinstance(logits, LinearHead):
        return logits
    return map_positions(lambda z: jnp.argmax(z, axis=-1), logits)


class Student:
    """The structure of a student, without arrays, and what is measured of it."""

    def __init__(self, config: Config, teacher: Teacher | None, mesh: Mesh):
        self.trainable = config.trainable or nnx.Param
        self.abstract = _abstract_student(config, mesh)
        self.forward = config.student_forward or default_forward
        self.teacher = teacher
        self.real_classes = getattr(config.objective, "num_classes", None)
        self._sharding = batch_sharding(mesh)
        self._evaluator = Evaluator(
            self.abstract,
            None if teacher is None else lambda _, batch: batch[TEACHER_LOGITS],
            mesh=mesh,
            student_forward=self.forward,
            trainable=self.trainable,
            num_classes=self.real_classes,
        )
        self._costs: dict[str, Any] = {}
        self._probed: dict[str, Any] = {}
        self._kept: dict[Any, list[Any]] = {}
        self._teacher_head: tuple[Any] | None = None
        if teacher is not None:
            here = teacher.beside()
            self._teacher_logits = jax.jit(
                lambda state, batch: _split_head(here.logits(state, batch))[0],
                out_shardings=self._sharding,
            )
            self._head = jax.jit(
                lambda state, batch: _split_head(here.logits(state, batch))[1]
            )

    def num_classes(self, batch: Any) -> int | None:
        """How many classes it knows, found without compute; None without logits.

        Args:
          batch: Shapes of a batch.
        """
        graphdef, params, rest = split_module(
            self.abstract, self.trainable, training=False
        )
        apply = module_apply(graphdef, self.trainable, self.forward)
        key = jax.random.key(0)
        with inputs_in_errors("student", batch):
            z = jax.eval_shape(
                lambda p, r, b: apply(p, r, b, key)[0], params, rest, batch
            )
        z = as_outputs(z).logits
        return None if z is None else min(z.shape[-1], self.real_classes or z.shape[-1])

    def check(self, config: Config, num_classes: int | None, batch: Any) -> None:
        """Its teacher has the same classes, and those in focus exist; without compute.

        Args:
          config: The config, for messages.
          num_classes: How many the student has.
          batch: Shapes of a batch.
        """
        if num_classes is None:
            return
        outside = [c for c in config.focus_classes if not 0 <= c < num_classes]
        if outside:
            fail(
                "train",
                "--focus-classes",
                f"lie in [0, {num_classes}), the classes of the student",
                ", ".join(map(str, outside)),
                "Classes count from 0.",
            )
        if self.teacher is None:
            return
        known = self.teacher.num_classes(batch)
        if known is not None:
            known = min(known, self.real_classes or known)
        if known not in (None, num_classes):
            fail(
                "train",
                "the teacher",
                f"have the student's classes, {num_classes}",
                known,
                f"Change the student of {config.name!r}, or name another teacher with "
                "--teacher.workdir. If the last classes of one are padding, say how "
                "many are none: LogitKD(num_classes=...).",
            )

    def arrays(self, field: str) -> dict[str, Any]:
        """What of a checkpoint is measured: shapes of `params` or `ema`, and `rest`."""
        _, params, rest = split_module(self.abstract, self.trainable, training=False)
        return {field: params, "rest": rest}

    def evaluate(
        self, config: Config, params: Any, rest: Any, source: Source
    ) -> Evaluation:
        """Quality of these parameters, and of the teacher, on a source."""
        batches = config.loader.eval_batches(
            source,
            batch_size=config.eval_batch_size,
            **this_process(self._sharding),
        )
        sent = (batch for batch, _ in prefetch_to_device(batches, self._sharding))
        if self.teacher is not None:
            # sources are kept open: an id is that of one of them alone
            key = id(source), key_of("batches", config, ("loader", "eval_batch_size"))
            sent = self._beside_teacher(self.teacher, sent, key)
        return self._evaluator(params, rest, None, sent)

    def _beside_teacher(
        self, teacher: Teacher, batches: Iterable[Any], key: Any
    ) -> Iterator[Any]:
        """The batches with the teacher's logits: it is frozen, and so is run once."""
        kept = self._kept.get(key, [])
        found, size = [], 0
        for number, batch in enumerate(batches):
            state, seen = teacher.state, batch
            if teacher.away is not None and not (kept and self._teacher_head):
                state = teacher.away.find_head(batch)
                seen = teacher.away.with_outputs(batch)
            if self._teacher_head is None:
                head = jax.eval_shape(self._head, state, seen)
                if head is not None:
                    head = self._head(state, seen)
                self._teacher_head = (head,)
            logits = kept[number] if kept else self._teacher_logits(state, seen)
            jax.block_until_ready(logits)  # simulated devices run one program at a time
            size += sum(x.nbytes for x in jax.tree.leaves(logits))
            found = [*found, logits] if size <= KEPT_BYTES else []
            yield {**batch, TEACHER_LOGITS: _with_head(logits, *self._teacher_head)}
        self._kept[key] = found

    def measure(
        self, config: Config, params: Any, rest: Any, source: Source
    ) -> tuple[dict[str, Any], bytes]:
        """Quality and cost of student and teacher; every prediction, as npz."""
        found = self.evaluate(config, params, rest, source)
        cost = self._cost(params, rest, _example(config, source))
        measured = _with_text(found, source)
        for who, spent in cost.items():
            if measured[who] is not None:  # a teacher may have features alone
                measured[who] = {**measured[who], **spent}
        arrays: dict[str, Any] = {"labels": found.labels}
        arrays["student"] = found.student_predictions
        if found.teacher is not None:
            arrays["teacher"] = found.teacher_predictions
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        num_classes = len(found.student["per_class"]["count"])
        names = getattr(source, "class_names", None) or range(num_classes)
        return {
            "num_examples": found.student["num_examples"],
            "class_names": [str(name) for name in names],
            **measured,
        }, buffer.getvalue()

    def quality(
        self, config: Config, params: Any, rest: Any, source: Source
    ) -> dict[str, Any]:
        """The numbers of `measure` that are neither cost nor of single classes."""
        found = self.evaluate(config, params, rest, source)
        count = found.student["num_examples"]
        models = {
            who: summary and {k: v for k, v in summary.items() if _is_number(v)}
            for who, summary in _with_text(found, source).items()
        }
        return {"num_examples": count, **models}

    def probe(self, config: Config, params: Any, rest: Any) -> dict[str, Any]:
        """What the config's probes say of the student and, if it has one, the teacher.

        Of several teachers none is probed.
        """
        graphdef, _, _ = split_module(self.abstract, self.trainable, training=False)
        model = nnx.merge(graphdef, params, rest)
        found = {"student": _probed(config.probes, model, self.forward)}
        teacher = self.teacher
        if teacher is not None and isinstance(teacher.module, nnx.Module):
            key = key_of("probes", config, ("probes", "teacher_forward"))
            if key not in self._probed:
                frozen = nnx.merge(*nnx.split(teacher.module))
                frozen.eval()
                forward = config.teacher_forward or default_teacher_forward
                mesh: Any = teacher.mesh or self._sharding.mesh
                with jax.set_mesh(mesh):
                    self._probed[key] = _probed(config.probes, frozen, forward)
            found["teacher"] = self._probed[key]
        return found

    def _cost(self, params: Any, rest: Any, example: Any) -> dict[str, Any]:
        """Size and speed of student and teacher, measured once, and in turn."""
        if not self._costs:
            graphdef, _, _ = split_module(self.abstract, self.trainable, training=False)

            def student(arrays, batch):
                model = nnx.merge(graphdef, *arrays, copy=True)
                return _predictions(as_outputs(self.forward(model, batch)).logits)

            models = {"student": Model(student, (params, rest), params)}
            if (teacher := self.teacher) is not None:
                own = nnx.to_pure_dict(nnx.state(one_module(teacher.module), nnx.Param))
                models["teacher"] = Model(
                    lambda state, batch: _predictions(teacher.logits(state, batch)),
                    teacher.on_one_mesh(),
                    own,
                )
            self._costs = costs(models, example)
        return self._costs


def model_flops(student: Student, teacher: Teacher | None, batch: Any) -> Flops:
    """Model FLOPs of an example of a batch, counted from what the models trace to.

    The backward pass takes as much as the forward pass for what flows through, and
    again as much for the gradients of the weights, of which a part may be frozen.

    Args:
      student: The student.
      teacher: The teacher, if it runs for each batch.
      batch: Shapes of a batch.
    """
    graphdef, params, rest = split_module(
        student.abstract, student.trainable, training=False
    )
    apply = module_apply(graphdef, student.trainable, student.forward)

    def forward(p: Any, r: Any, b: Any) -> Any:
        return _with_logits(apply(p, r, b, jax.random.key(0))[0])

    weights = nnx.to_pure_dict(nnx.state(student.abstract, nnx.Param))
    trained = _num_weights(params) / max(_num_weights(weights), 1)
    rows = jax.tree.leaves(batch)[0].shape[0]
    asked = 0
    if teacher is not None:
        taught = teacher.apply
        asked = count_flops(
            lambda state, b: _with_logits(taught(state, b)), teacher.state, batch
        )
    own = (2 + min(trained, 1.0)) * count_flops(forward, params, rest, batch)
    return Flops(teacher=asked / rows, student=own / rows)


def _num_weights(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree) if hasattr(x, "size"))


def _with_logits(outputs: Any) -> Any:
    """The arrays of outputs; heads, which a loss would multiply out, are so here."""
    heads = jax.tree.leaves(outputs, is_leaf=lambda x: isinstance(x, LinearHead))
    return [x.logits() if isinstance(x, LinearHead) else x for x in heads]


def _with_text(found: Evaluation, source: Source) -> dict[str, Any]:
    """The summaries of student and teacher, with what is said of text alone."""
    text = of_text(getattr(source, "tokenizer", None), found.labels)
    return {
        who: summary and {**summary, **text(summary)}
        for who, summary in (("student", found.student), ("teacher", found.teacher))
    }


def _probed(probes: Any, model: nnx.Module, forward: Any) -> dict[str, Any]:
    found = {}
    for name, probe in probes.items():
        try:
            found[name] = probe(model, forward)
            returned = f"what the probe {name!r} returns"
            check_type("train", returned, found[name], Mapping, "Name the numbers.")
            json.dumps(found[name])
        except Exception as error:
            error.add_note(
                f"This came from the probe {name!r}. The checkpoints are whole: the "
                "same command measures again, and does not train."
            )
            raise
    return found


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float)


def _example(config: Config, source: Source) -> dict[str, np.ndarray]:
    """What the models read of one example."""
    batch = next(config.loader.eval_batches(source, batch_size=1))
    not_read = ("labels", "loss_mask", "index")
    return {name: x for name, x in batch.items() if name not in not_read}
