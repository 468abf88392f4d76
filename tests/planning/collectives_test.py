"""What a program sends is read with its size, its axes and how often."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distilljax.planning.collectives import Collective, by_kind, by_part, collectives
from distilljax.planning.hlo import Program, Shape
from distilljax.sharding import mesh_from_string

MESH = "data=2,fsdp=2,tensor=2"


def sent(function, spec, out=None, shape=(16, 32), axes=MESH):
    mesh = mesh_from_string(axes)
    out = spec if out is None else out
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False
    )
    x = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
    text = jax.jit(mapped).lower(x).compile().as_text()
    return collectives(Program(text), mesh)


P = PartitionSpec


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_an_all_gather_sends_the_others_shares(axis):
    (one,) = sent(lambda x: jax.lax.all_gather(x, axis, tiled=True), P(axis), P(None))
    assert (one.kind, one.axes, one.group_size) == ("all-gather", (axis,), 2)
    assert str(one.shapes[0]) == "f32[16,32]"
    assert one.bytes_per_step == 16 * 32 * 4 // 2


def test_a_sum_over_two_axes_is_sent_twice_around():
    (one,) = sent(lambda x: jax.lax.psum(x, ("data", "fsdp")), P())
    assert (one.kind, one.axes, one.group_size) == ("all-reduce", ("data", "fsdp"), 4)
    assert one.bytes_per_step == 2 * 16 * 32 * 4 * 3 // 4


def test_a_scattered_sum_counts_what_it_began_with():
    found = sent(
        lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True), P(), P("tensor")
    )
    (one,) = found
    assert (one.kind, one.axes) == ("reduce-scatter", ("tensor",))
    assert one.bytes_per_step == 16 * 32 * 4 // 2


def test_a_permutation_sends_an_array_whole():
    ring = [(0, 1), (1, 0)]
    (one,) = sent(lambda x: jax.lax.ppermute(x, "fsdp", ring), P("fsdp"))
    assert (one.kind, one.axes) == ("collective-permute", ("fsdp",))
    assert one.bytes_per_step == 8 * 32 * 4


def test_in_a_loop_it_is_sent_each_time():
    def summed(x):
        body = lambda x, _: (jax.lax.psum(jnp.sin(x), "data"), None)  # noqa: E731
        return jax.lax.scan(body, x, length=5)[0]

    (one,) = sent(summed, P())
    assert one.times == 5
    assert one.bytes_per_step == 5 * one.nbytes == 5 * 16 * 32 * 4
    assert by_kind([one, one]) == {
        "all-reduce over data": {
            "instructions": 2,
            "times": 10,
            "bytes_per_step": 10 * 16 * 32 * 4,
        }
    }


def test_nothing_is_sent_where_nothing_has_to_be():
    assert sent(jnp.sin, P(("data", "fsdp", "tensor"))) == []


SCATTERED = """
HloModule m

%all-reduce-scatter (p: f32[16,32]) -> f32[4,32] {
  %p = f32[16,32]{1,0} parameter(0)
  %r = f32[16,32]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %s = f32[4,32]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={4,32}
}

ENTRY %main (p: f32[16,32]) -> f32[4,32] {
  %p = f32[16,32]{1,0} parameter(0)
  ROOT %f = f32[4,32]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
}
"""
SHIFTED = """
HloModule m

ENTRY %main (p: f32[16,32]) -> f32[16,32] {
  %p = f32[16,32]{1,0} parameter(0)
  ROOT %c = f32[16,32]{1,0} collective-permute(%p), source_target_pairs={{0,0},{1,2}}
}
"""


def test_a_scattered_sum_of_a_tpu_is_told_from_a_whole_one():
    mesh = mesh_from_string("fsdp=4", jax.devices()[:4])
    (one,) = collectives(Program(SCATTERED), mesh)
    assert (one.kind, one.axes) == ("reduce-scatter", ("fsdp",))
    assert one.bytes_per_step == 16 * 32 * 4 * 3 // 4


def test_a_permutation_is_named_by_those_that_really_send():
    mesh = mesh_from_string("data=2,fsdp=2", jax.devices()[:4])
    (one,) = collectives(Program(SHIFTED), mesh)
    assert one.axes == (
        "data",
        "fsdp",
    )  # from 1, which is (0, 1), to 2, which is (1, 0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(_update)/jvp(teacher)/while/body/dot_general", "teacher"),
        ("jit(run)/teacher/while/body/dot_general", "teacher"),
        ("jit(_update)/transpose(jvp(student))/dot_general", "student"),
        ("jit(_update)/jvp(fused_loss)/jit(local)/psum", "loss"),
        ("jit(_update)/jvp(my_teacher)/dot_general", "other"),
        ("state.params['teacher']['kernel']", "other"),
        ("", "other"),
    ],
)
def test_what_is_sent_belongs_to_the_scope_that_it_is_in(name, part):
    shapes = (Shape("f32", (64,)),)
    one = Collective("collective-permute", shapes, 2, ("fsdp",), 3, name)
    sent = by_part([one])
    assert {part: n for part, n in sent.items() if n} == {part: 3 * 64 * 4}
    alone = by_part([one], unnamed="teacher")
    assert alone["other"] == 0
