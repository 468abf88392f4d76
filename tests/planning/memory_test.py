"""What is live at the peak has an owner."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distilljax import students
from distilljax.planning import plan
from distilljax.planning.hlo import Shape
from distilljax.planning.liveness import Live
from distilljax.planning.memory import is_gradient
from distilljax.planning.words import peak_note
from tests.planning.small import SMALL, language_model, needs_libtpu

BACKWARD = "jit(_update)/transpose(jvp(student))"


@pytest.mark.parametrize(
    ("dtype", "shape", "name", "opcode", "is_one"),
    [
        ("f32", (4, 8), "", "fusion", True),
        ("f32", (8, 4), "", "fusion", False),
        ("s32", (4, 8), f"{BACKWARD}/dot_general", "fusion", False),
        # as libtpu compiles a scan over layers in bfloat16: sums that begin as zeros
        ("bf16", (1, 4, 8), f"{BACKWARD}/broadcast_in_dim", "broadcast", True),
        ("bf16", (4, 8), "broadcast.82", "broadcast", True),
        ("bf16", (4, 8), f"{BACKWARD}/dot_general", "fusion", True),
        ("bf16", (4, 4), f"{BACKWARD}/dot_general", "fusion", False),
        # a copy of the parameter, one in another layout, and what is computed again
        ("bf16", (4, 8), "jit(_update)/jvp()/convert_element_type", "convert", False),
        ("bf16", (4, 8), "state.params['kernel']", "copy", False),
        ("bf16", (4, 8), f"{BACKWARD}/convert_element_type", "convert", False),
        ("bf16", (4, 8), f"{BACKWARD}/rematted_computation/mul", "fusion", False),
        ("bf16", (4, 8), "jit(_update)/jvp(student)/broadcast_in_dim", "fusion", False),
    ],
)
def test_a_gradient_is_told_from_other_arrays_of_its_shape(
    dtype, shape, name, opcode, is_one
):
    assert is_gradient(Live(Shape(dtype, shape), name, opcode), {(4, 8)}) is is_one


@needs_libtpu
@pytest.mark.slow
def test_gradients_in_bfloat16_are_gradients():
    """In the backward pass they are in the type of the pass, if there is one part."""
    sizes = replace(
        SMALL, vocab_size=1024, width=1024, num_layers=8, num_heads=8, head_dim=128,
        num_kv_heads=8, ffn_width=4096,
    )  # fmt: skip
    config = language_model(
        student=sizes,
        teacher=students.Untrained(replace(SMALL, vocab_size=1024)),
        mesh="fsdp=2,tensor=2",
        compute_dtype="bfloat16",
    )
    memory = plan(config, "v5e:2x2").programs["step"].memory
    kernel = 2 * 8 * 1024 * 4096 // 4  # of a layer's first product, in all layers
    owners = memory.owners
    assert kernel <= owners["gradients"] <= owners["student parameters"] // 2
    assert memory.predicted_peak == pytest.approx(memory.peak, rel=0.05)
    assert peak_note(memory.predicted_peak, memory.peak) == ""


def test_a_note_says_why_two_peaks_differ():
    assert peak_note(100, 104) == peak_note(100, 96) == peak_note(100, 0) == ""
    assert "the chip's own memory" in peak_note(50, 100)
    assert peak_note(50, 100).startswith("walk and compiler differ by 50%")
    assert "the chip's own memory" not in peak_note(120, 100)
