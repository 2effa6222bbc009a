"""Bytes to and from memory, as the text of compiled programs has them."""

import jax
import jax.numpy as jnp

from hybrid_flax.costs.traffic import memory_traffic


def test_what_lies_beside_the_cores_is_left_out():
    text = """HloModule x

ENTRY %main () -> f32[8] {
  %param = f32[64]{0} parameter(0)
  %copy = (f32[64]{0:S(1)}, f32[64]{0}, u32[]) copy-start(%param)
  %near = f32[64]{0:S(1)} copy-done(%copy)
  %slice = ((f32[64]{0}), f32[16]{0:S(1)}, s32[]) slice-start(%param), slice={[0:16]}
  ROOT %sum = f32[64]{0} add(%near, %param)
}
"""
    assert memory_traffic(text) == 64 * 4 + 16 * 4 + 2 * 64 * 4


LOOP = """HloModule x

%take (stack.0: f32[9,64], at.0: s32[]) -> f32[1,64] {
  %stack.0 = f32[9,64]{1,0} parameter(0)
  %at.0 = s32[] parameter(1)
  ROOT %taken = f32[1,64]{1,0} dynamic-slice(%stack.0, %at.0, %zero), dynamic_slice_sizes={1,64}
}

%put (stack.1: f32[9,64], row.1: f32[1,64], at.1: s32[]) -> f32[9,64] {
  %stack.1 = f32[9,64]{1,0} parameter(0)
  %row.1 = f32[1,64]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  %flat = f32[9,64]{1,0} bitcast(%stack.1)
  ROOT %placed = f32[9,64]{1,0} dynamic-update-slice(%flat, %row.1, %at.1, %zero)
}

%body (state: (s32[], f32[9,64])) -> (s32[], f32[9,64]) {
  %state = (s32[], f32[9,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = f32[9,64]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,64]{1,0} fusion(%stack, %i), kind=kLoop, calls=%take
  %new = f32[9,64]{1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%put
  ROOT %next = (s32[], f32[9,64]{1,0}) tuple(%i, %new)
}

ENTRY %main (param: f32[9,64]) -> f32[9,64] {
  %param = f32[9,64]{1,0} parameter(0)
  %start = (s32[], f32[9,64]{1,0}) tuple(%zero, %param)
  %loop = (s32[], f32[9,64]{1,0}) while(%start), condition=%until, body=%body, \
backend_config={"known_trip_count":{"n":"9"}}
  ROOT %end = f32[9,64]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_each_time_and_a_row_of_a_stack_counts_alone():
    row, index = 64 * 4, 4
    assert memory_traffic(LOOP) == 9 * (2 * row + index + 2 * row + index)


def test_a_stack_is_read_once_by_a_loop_over_it():
    stack, x = jnp.ones((64, 256, 256)), jnp.ones((8, 256))

    def run(x, stack):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, stack)[0]

    moved = memory_traffic(jax.jit(run).lower(x, stack).compile().as_text())
    # Read, and where the compiler does not fuse, written as a slice and read again.
    assert stack.nbytes <= moved < 3.3 * stack.nbytes


def test_a_loop_without_a_known_count_runs_to_the_bound_of_its_condition():
    until = """
%until (state.3: (s32[], f32[9,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(9)
  %state.3 = (s32[], f32[9,64]{1,0}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state.3), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %bound), direction=LT
}

ENTRY"""
    silent = LOOP.replace(', backend_config={"known_trip_count":{"n":"9"}}', "")
    assert silent != LOOP
    assert memory_traffic(silent.replace("\nENTRY", until)) == memory_traffic(LOOP)
