"""What a program reads and writes, in the forms in which XLA writes it."""

from __future__ import annotations

import pytest

from distilljax.planning.hlo import Program
from distilljax.planning.traffic import memory_traffic

MIB = 2**20  # f32[512,512]

SLICE = """
HloModule m

%fused (p: f32[8,512,512], i: s32[]) -> f32[1,512,512] {
  %p = f32[8,512,512]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,512,512]{2,1,0} bitcast(%p)
  ROOT %s = f32[1,512,512]{2,1,0} dynamic-slice(%b, %i), dynamic_slice_sizes={1,512,512}
}

ENTRY %main (p: f32[8,512,512], i: s32[]) -> f32[1,512,512] {
  %p = f32[8,512,512]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1,512,512]{2,1,0} fusion(%p, %i), kind=kLoop, calls=%fused
}
"""
UPDATE = """
HloModule m

%fused (p: f32[8,512,512], x: f32[1,512,512], i: s32[]) -> f32[8,512,512] {
  %p = f32[8,512,512]{2,1,0} parameter(0)
  %x = f32[1,512,512]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %d = f32[8,512,512]{2,1,0} dynamic-update-slice(%p, %x, %i)
  ROOT %b = f32[8,512,512]{2,1,0} bitcast(%d)
}

ENTRY %main (p: f32[8,512,512], x: f32[1,512,512], i: s32[]) -> f32[8,512,512] {
  %p = f32[8,512,512]{2,1,0} parameter(0)
  %x = f32[1,512,512]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[8,512,512]{2,1,0} fusion(%p, %x, %i), kind=kLoop, calls=%fused
}
"""
COPY = """
HloModule m

ENTRY %main (p: f32[512,512]) -> f32[512,512] {
  %p = f32[512,512]{1,0} parameter(0)
  %c = (f32[512,512]{1,0:S(1)}, f32[512,512]{1,0}, u32[]) copy-start(%p)
  ROOT %d = f32[512,512]{1,0:S(1)} copy-done(%c)
}
"""
GATHER = """
HloModule m

ENTRY %main (p: f32[128,512]) -> f32[512,512] {
  %p = f32[128,512]{1,0} parameter(0)
  %c = (f32[128,512]{1,0}, f32[512,512]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %d = f32[512,512]{1,0} all-gather-done(%c)
}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SLICE, 2 * MIB),  # a slice of eight is read, and written
        (UPDATE, 3 * MIB),  # the new part is read, and written over the old one
        (COPY, 1 * MIB),  # read from memory; the chip's own is no memory
        (GATHER, 1.25 * MIB),  # its share is read, and all of it written
    ],
    ids=["slice", "update", "copy", "gather"],
)
def test_what_moves_is_counted_once(text, expected):
    assert memory_traffic(Program(text)) == pytest.approx(expected, abs=16)
