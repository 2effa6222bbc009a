"""What is read out of compiled programs' text: pieces of what compilers write."""

import pytest

from hybrid_flax.costs.hlo_text import (
    Collective,
    collectives,
    find_collectives,
    gathered,
    largest,
)

PROGRAM = """HloModule jit_step, num_partitions=8

%all-reduce-scatter (input: f32[32,8]) -> f32[16,8] {
  %whole = f32[32,8]{1,0} all-reduce(%input), replica_groups={{0,1},{2,3}}, to_apply=%sum
  ROOT %part = f32[16,8]{1,0} dynamic-slice(%whole, %i), dynamic_slice_sizes={16,8}
}

ENTRY %main (param: f32[8,8]) -> f32[16,8] {
  %param = f32[8,8]{1,0} parameter(0), metadata={op_name="state[\\'params\\'][\\'kernel\\']"}
  %moment = f32[16]{0} parameter(1), metadata={op_name="state[\\'opt_state\\'][0]"}
  %ar = (f32[16,8]{1,0:T(8,128)S(1)}, /*index=1*/bf16[4]{0}) all-reduce(%a, %b), channel_id=1
  %half = bf16[8,8]{1,0} convert(%param)
  %ag = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%half), replica_groups=[4,2]<=[8]
  %done = bf16[16,8]{1,0} all-gather-done(%ag)
  %moments = f32[32]{0} all-gather(%moment), replica_groups=[4,2]<=[8]
  %own = f32[99]{0} all-reduce(%e), replica_groups={{0},{1}}, to_apply=%sum
  %scattered = f32[16,8]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter
  %recv = (f32[16,8]{1,0}, u32[], token[]) recv(%t), is_host_transfer=true, frontend_attributes={\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %big = bf16[64,64]{1,0} fusion(%done), kind=kLoop, metadata={op_name="jit(step)/stem/conv"}
}
"""


LOOP = """HloModule jit_step, num_partitions=8

%body (state: (s32[], f32[8], f32[9,8])) -> (s32[], f32[8], f32[9,8]) {
  %state = (s32[], f32[8]{0}, f32[9,8]{1,0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %sum = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %next = (s32[], f32[8]{0}, f32[9,8]{1,0}) tuple(%i, %sum, %stack)
}

ENTRY %main (param: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]{0}, f32[9,8]{1,0}) while(%start), condition=%until, body=%body, \
backend_config={"known_trip_count":{"n":"9"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %end = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_are_counted_with_their_bytes():
    assert collectives(PROGRAM) == {
        "within": {
            "reduce-scatter": {"count": 1, "bytes": 16 * 8 * 4, "sent": 16 * 8 * 4},
            "all-reduce": {"count": 1, "bytes": 16 * 8 * 4 + 4 * 2, "sent": 910},  # 7/8, twice
            "all-gather": {
                "count": 2,
                "bytes": 16 * 8 * 2 + 32 * 4,
                "sent": (16 * 8 * 2 + 32 * 4) // 2,
            },
        },
        "between": {"all-reduce": {"count": 1, "bytes": 16 * 8 * 4, "sent": 16 * 8 * 4}},
    }


def alone(line: str) -> str:
    return f"HloModule x, num_partitions=8\n\nENTRY %main () -> f32[] {{\n{line}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", 2),
        ("replica_groups={}", 8),
    ],
)
def test_how_many_chips_take_part(groups, chips):
    text = f"  %x = f32[6]{{0}} all-gather(%y), {groups}, a=1"
    assert list(find_collectives(alone(text))) == [Collective("all-gather", 24, chips, False)]


def test_what_is_sent_around_a_ring():
    sent = {kind: Collective(kind, 800, 4, False).sent for kind in ("all-reduce", "all-to-all")}
    assert sent == {"all-reduce": 1200, "all-to-all": 600}
    pairs = "  %x = u8[5]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}, a=1"
    assert [one.sent for one in find_collectives(alone(pairs))] == [5]


def test_what_is_gathered_names_the_arguments_it_is_made_of():
    weights, moments = gathered(PROGRAM)
    assert weights == ("bf16[16,8]", {"state['params']['kernel']"})
    assert moments == ("f32[32]", {"state['opt_state'][0]"})


def test_the_largest_arrays_say_where_they_come_from():
    first, *_, last = largest(PROGRAM)
    assert first == {"array": "bf16[64,64]", "by": "stem/conv", "bytes": 64 * 64 * 2}
    assert len(largest(PROGRAM)) == 5
    assert last["bytes"] < first["bytes"]


def test_what_a_loop_does_counts_each_time():
    assert collectives(LOOP) == {
        "within": {"all-reduce": {"count": 9, "bytes": 9 * 32, "sent": 9 * 56}}
    }
