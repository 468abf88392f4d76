"""A language model from files to the report: loaded, distilled, measured, compared."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from distilljax import evaluation, models, objectives, optimizers, students
from distilljax.config import Config
from distilljax.data import Loader, Slice
from distilljax.data.text import Packed, TextFiles, Tokenized, TokenizerJson
from distilljax.pair import Student, Teacher
from distilljax.programs import Programs
from distilljax.sharding import mesh_from_string
from distilljax.train import evaluate, train
from tests.data.text.tiny import documents, train_tokenizer

TEACHER = models.DecoderConfig(
    vocab_size=1024, width=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8,
    ffn_width=24, scan=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, its tokenizer, and three texts."""
    folder = tmp_path_factory.mktemp("lm")
    models.save_pretrained(TEACHER(nnx.Rngs(0)), folder / "teacher")
    train_tokenizer(folder / "teacher")
    for seed, name in enumerate(("train", "test", "other")):
        text = "\n".join(documents(40, seed))
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def config(folder) -> Config:
    tokenizer = TokenizerJson(str(folder / "teacher"))
    teacher = students.Pretrained(str(folder / "teacher"), scan=True)

    def rows(name: str) -> Packed:
        text = TextFiles((str(folder / f"{name}.txt"),))
        cache = str(folder / "cache")
        return Packed(Tokenized(text, tokenizer, cache_dir=cache), 32, repack=False)

    return Config(
        name="lm",
        student=students.KeptLayers(teacher, layers=2),
        teacher=teacher,
        objective=objectives.LogitKD(),
        optimizer=optimizers.AdamW(learning_rate=3e-3),
        data=rows("train"),
        validation=Slice(rows("test"), 0, 8),
        test=Slice(rows("test"), 8, 24),
        other_tests={"other": Slice(rows("other"), 0, 8)},
        probes={"samples": evaluation.Samples(("Her rich",), tokenizer, num_tokens=4)},
        loader=Loader(batch_size=8),
        steps=6,
        eval_every_steps=3,
        eval_batch_size=8,
        select="nll",
        mesh="data=2,fsdp=2,tensor=2",
        student_rules=models.DECODER_RULES,
        teacher_rules=models.DECODER_RULES,
    )


def test_a_student_that_is_loaded_is_where_its_rules_say(config):
    """And is the same on the mesh as on one device, without being in the program."""
    mesh = mesh_from_string(config.mesh)
    with jax.set_mesh(mesh):
        training = Programs().training(config, mesh)
        state = training.init(3)
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    assert tuple(kernel.sharding.spec) == (None, "fsdp", "tensor")
    alone = config.student(nnx.Rngs(0))
    np.testing.assert_array_equal(kernel, alone.layers.mlp.up.kernel[...])
    assert kernel.shape == (2, 16, 24)


def test_a_teacher_is_evaluated_without_a_copy_of_its_kernel_for_each_batch(config):
    mesh = mesh_from_string("data=1", jax.devices()[:1])
    teacher = Teacher.load(config, mesh)
    student = Student(config, teacher, mesh)
    with jax.set_mesh(mesh):
        state = Programs().training(config, mesh).init(0)
        found = student.evaluate(config, state.params, state.rest, config.test())
    (kept,) = student._kept.values()
    assert [x.shape for x in kept] == [(8, 32, 16), (8, 32, 16)]
    assert found.teacher["kl_to_teacher"] is None
    again = student.evaluate(config, state.params, state.rest, config.test())
    assert again.student == found.student


@pytest.mark.slow
def test_a_run_is_measured_as_a_language_model_and_reported(config, tmp_path):
    arms = {
        "labels": replace(config, objective=objectives.CrossEntropy()),
        "distilled": replace(config, baseline="labels"),
    }
    programs = Programs()
    for arm, one in arms.items():
        train(one, tmp_path / arm, programs=programs, arm=arm)
    results = json.loads((tmp_path / "distilled/results.json").read_text())
    student, teacher = results["student"], results["teacher"]
    for found in (student, teacher):
        assert found["perplexity"] == pytest.approx(np.exp(found["nll"]))
        assert found["per_class"]["count"] == []
        assert list(found["probes"]["samples"]) == ["Her rich"]
    arrays = np.load(tmp_path / "distilled/predictions.npz")
    assert arrays["labels"].shape == (results["num_examples"],)
    num_bytes = TokenizerJson(config.data.text.tokenizer.path)().num_bytes()
    bits = student["nll"] * results["num_examples"] / np.log(2)
    expected = bits / num_bytes[arrays["labels"]].sum()
    assert student["bits_per_byte"] == pytest.approx(expected)
    other = results["other_tests"]["other"]
    assert other["num_examples"] > 0
    assert {"perplexity", "nll", "bits_per_byte"} <= other["student"].keys()
    assert other["teacher"]["nll"] != teacher["nll"]

    lines = (tmp_path / "distilled/metrics.jsonl").read_text().splitlines()
    trained = [r for r in map(json.loads, lines) if r["split"] == "train"]
    assert all(
        r["tokens_per_second"] == pytest.approx(32 * r["examples_per_second"])
        for r in trained
    )
    measured = evaluate(config, tmp_path / "distilled", split="test", programs=programs)
    assert measured["student"]["perplexity"] == pytest.approx(student["perplexity"])

    written = evaluation.report([tmp_path])
    text = written.markdown.read_text()
    assert "NLL, nats ↓ | perplexity ↓ | bits per byte ↓" in text
    assert "### Other test data" in text
    assert "| Her rich | teacher |" in text
    assert "### Tests of the accuracy" not in text
    (line,) = written.headlines
    assert "too few for a claim. NLL" in line
    assert os.path.exists(written.figures[0])


@dataclass(frozen=True)
class Raises:
    """A probe that cannot measure."""

    def __call__(self, model, forward):
        raise ArithmeticError("no such number")


@dataclass(frozen=True)
class NoNumbers(Raises):
    def __call__(self, model, forward):
        return 3.0


@pytest.mark.slow
def test_a_probe_that_fails_is_named_and_nothing_is_lost(config, tmp_path):
    """What was trained is there, and the next attempt measures it."""
    config = replace(config, steps=2, eval_every_steps=2, other_tests=None)
    programs = Programs()
    for probe, kind in ((Raises(), ArithmeticError), (NoNumbers(), TypeError)):
        failing = replace(config, probes={"mine": probe})
        with pytest.raises(kind) as caught:
            train(failing, tmp_path, programs=programs)
        assert "'mine'" in " ".join([str(caught.value), *caught.value.__notes__])
    steps = (tmp_path / "metrics.jsonl").read_text().count('"train"')
    results = train(config, tmp_path, programs=programs)
    assert results["student"]["probes"]["samples"]
    assert (tmp_path / "metrics.jsonl").read_text().count('"train"') == steps


@pytest.mark.parametrize("field", ["probes", "other_tests"])
def test_parts_without_names_are_refused_when_a_config_is_written(config, field):
    with pytest.raises(TypeError, match=f"{field} must be"):
        replace(config, **{field: [Raises()]})
