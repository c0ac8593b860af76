import pytest

from user_llm.ahead.collectives import Collective, collectives

PROGRAM = """HloModule step

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  %x = f32[8,4]{{1,0}} get-tuple-element(%p), index=1
  {inner}
}}

%condition.1 (p: (s32[], f32[8,4])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {{
  {outer}
  %loop = (s32[], f32[8,4]) while(%start), condition=%condition.1, body=%body.1
}}
"""
GROUP = "channel_id=1, replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        # Of n = 4 devices each sends 3/4 of the whole array.
        (f"%a = f32[8,4]{{1,0}} all-gather(%x), {GROUP}, dimensions={{0}}", "all-gather", 3 / 4 * 128),
        (f"%a = bf16[8,4]{{1,0}} all-gather(%x), {GROUP}, dimensions={{0}}", "all-gather", 3 / 4 * 64),
        (f"%a = f32[8,4]{{1,0}} all-reduce(%x), {GROUP}, to_apply=%sum", "all-reduce", 2 * 3 / 4 * 128),
        (f"%a = (f32[8,4]{{1,0}}, s32[2]{{0}}) all-reduce(%x, %y), {GROUP}, to_apply=%sum", "all-reduce", 2 * 3 / 4 * 136),
        # The result of a reduce-scatter is a quarter of the array.
        (f"%a = f32[2,4]{{1,0}} reduce-scatter(%x), {GROUP}, dimensions={{0}}, to_apply=%sum", "reduce-scatter", 3 / 4 * 128),
        (f"%a = f32[8,4]{{1,0}} all-to-all(%x), {GROUP}, dimensions={{0}}", "all-to-all", 3 / 4 * 128),
        ("%a = f32[8,4]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1}}", "collective-permute", 128),
        ("%a = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}", "all-gather", 64),
        (
            "%a = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}",
            "all-gather",
            3 / 4 * 128,
        ),
        # Started and ended apart: the larger of what it reads and what it writes, once.
        (f"%a = (f32[2,4]{{1,0}}, f32[8,4]{{1,0}}) all-gather-start(%x), {GROUP}, dimensions={{0}}", "all-gather", 3 / 4 * 128),
    ],
)
def test_bytes_by_hand(line, kind, sent):
    assert collectives(PROGRAM.format(outer=line, inner="%z = f32[] constant(0)")) == [Collective(kind, sent, 1)]


def test_a_loop_repeats_what_it_holds():
    inner = f"%a = f32[8,4]{{1,0}} all-gather(%x), {GROUP}, dimensions={{0}}"
    outer = inner.replace("channel_id=1", "channel_id=2")
    assert collectives(PROGRAM.format(outer=outer, inner=inner)) == [
        Collective("all-gather", 96, 1),
        Collective("all-gather", 96, 12),
    ]


def test_what_runs_beside_a_loop_counts_once():
    """Its fusions, some in the loop's body, share a channel, as do others that are not of it."""
    line = f"%a = f32[8,4]{{1,0}} all-gather(%x), {GROUP}, dimensions={{0}}"
    part = """, backend_config={"async_collective_fusion_config":{"flag_start":"FLAG","flag_end":"8"}}"""
    start, going = line + part.replace("FLAG", "-1"), line + part.replace("FLAG", "2")
    assert (
        collectives(PROGRAM.format(outer=f"{start}\n  {line}\n  {going}", inner=going)) == [Collective("all-gather", 96, 1)] * 2
    )
    assert collectives(PROGRAM.format(outer="%y = f32[] constant(1)", inner=start)) == [Collective("all-gather", 96, 12)]


def test_a_program_of_one_device_sends_nothing():
    assert collectives(PROGRAM.format(outer="%y = f32[] constant(1)", inner="%z = f32[] constant(0)")) == []
