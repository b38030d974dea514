"""What a method makes of a row, against what the loops do with one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.executors.kernel.sizing import rows as module
from tunesmith.executors.kernel.sizing.rows import Rows
from tunesmith.orchestrator.nouns import METHODS, DistillSpec, DpoSpec, GrpoSpec


def rows(make, method, *, length=512, packing=True, share=0.5, **more):
    return Rows(spec=make.spec(method=method, **more), length=length, packing=packing, share=share)


def test_tokens_of_the_longest_row(make):
    group = GrpoSpec(num_generations=8, max_completion=64)
    assert rows(make, "sft").budget() == 512
    assert rows(make, "dpo").budget() == rows(make, "reward").budget() == 2 * 512
    assert rows(make, "grpo", grpo=group).budget() == (512 - 64) + 8 * 64  # one prompt, eight answers
    assert rows(make, "grpo", grpo=group, packing=False).budget() == 8 * 512
    assert rows(make, "rloo", grpo=group).budget() == 512  # its micro-batches count sequences
    assert rows(make, "grpo", grpo=group).most(200) == (200 - 64) + 8 * 64


def test_tokens_in_training(make):
    """A prompt of 100 tokens; answers of 40 in data, and of 50 where they are written."""
    group = GrpoSpec(num_generations=8, max_completion=64)
    assert rows(make, "sft").trained(140, 0) == 140
    assert rows(make, "grpo", grpo=group).trained(100, 50) == 100 + 8 * 50
    assert rows(make, "rloo", grpo=group, packing=False).trained(100, 50) == 8 * 150
    assert rows(make, "distill", packing=False).trained(100, 50) == 150
    pair = rows(make, "dpo", share=40 / 140)
    assert pair.trained(140, 0) == pytest.approx(100 + 40 + module.SHORTER * 40)
    assert rows(make, "dpo", packing=False).trained(140, 0) == 2 * 140


def test_passes_without_gradients(make):
    pair = rows(make, "dpo", share=0.5)
    assert pair.read(100, 0, again=1.0) == pair.trained(100, 0)
    assert pair.read(100, 0, again=0.25) == pair.trained(100, 0) / 4  # the table is filled in the first of four epochs
    assert rows(make, "dpo", dpo=DpoSpec(reference="none")).read(100, 0, again=1.0) == 0
    assert rows(make, "sft").read(100, 0, again=1.0) == 0
    assert rows(make, "kto").read(100, 0, again=1.0) == 2 * 100
    usual, held = (rows(make, "grpo", grpo=GrpoSpec(beta=beta)) for beta in (0.0, 0.1))
    assert usual.read(100, 50, again=1.0) == 100  # prompts, before they are answered
    assert held.read(100, 50, again=1.0) == 100 + held.trained(100, 50)


def test_what_is_held_while_answers_are_written(make):
    group = GrpoSpec(num_generations=8, max_completion=100)
    some = rows(make, "grpo", length=228, grpo=group)
    assert (some.slots(4, "cpu"), some.slots(400, "cpu"), some.slots(400, "cuda")) == (32, 64, 256)
    assert some.cached(4, "cpu", "float32") == 32 * 128 + 4 * 128  # each prompt once
    assert some.cached(4, "cuda", "float32") == some.cached(4, "cpu", "float32")
    assert some.cached(4, "cuda", "bfloat16") == 32 * (256 + 256)  # whole pages for every answer
    assert (some.paged("cuda", "bfloat16"), some.paged("cuda", "float32"), some.paged("cpu", "bfloat16")) == (
        True,
        False,
        False,
    )
    trl = rows(make, "rloo", length=228, grpo=group, packing=False)
    assert (trl.slots(400, "cpu"), trl.cached(4, "cpu", "float32")) == (3200, 32 * 228)
    assert rows(make, "dpo").slots(4, "cpu") == rows(make, "dpo").cached(4, "cpu", "float32") == 0


def test_prompts_share_few_rooms():
    assert [module.filled(length) for length in (1, 128, 129, 1000, 1025, 2049)] == [128, 128, 256, 1024, 1280, 2560]
    rooms = [module.filled(length) for length in range(1, 32_769)]
    assert rooms == sorted(rooms)
    assert all(length <= room <= max(length + 127, 1.25 * length) for length, room in enumerate(rooms, 1))
    assert len(set(rooms)) == 28


def test_the_constants_are_those_of_the_loops():
    from tunesmith.executors.kernel.loops import cells, methods, paged, trl

    assert {name: module.SLOTS[name] for name in methods.SLOTS} == methods.SLOTS
    assert (cells.ROOM, paged.PAGE) == (module.CELLS, module.PAGE)
    assert set(trl.METHODS) == set(module.THROUGH_TRL) == set(METHODS) - set(methods.OWN)


@pytest.mark.parametrize("answers", [2, 8])
def test_a_forked_batch_is_as_large_as_foretold(make, answers):
    from tunesmith.executors.kernel.loops.forks import Tree, forked

    written, prompt = 24, 40
    some = rows(
        make, "grpo", length=prompt + written, grpo=GrpoSpec(num_generations=answers, max_completion=written)
    )  # fmt: skip
    trees = [Tree(number, [1] * prompt, ([2] * written,) * answers) for number in range(3)]
    (batch,) = forked(trees, 3 * some.budget())
    fed = batch.ids.numel()
    assert fed <= 3 * some.budget() <= fed + 3 * answers  # an answer's last token is not fed
    assert batch.forks is not None
    seen = len(batch.forks.keys) - fed
    assert seen == answers * 3 * prompt
    assert some.looked(3 * some.budget()) == pytest.approx(seen, rel=0.01)
    assert some.branched(3 * some.budget()) == 3 * answers * written


specs = st.builds(
    dict,
    method=st.sampled_from(METHODS),
    grpo=st.builds(
        GrpoSpec,
        num_generations=st.integers(2, 64),
        max_completion=st.integers(1, 4096),
        beta=st.floats(0, 1),
        num_iterations=st.integers(1, 4),
    ),
    distill=st.builds(DistillSpec, max_completion=st.integers(1, 4096)),
)


@given(specs, st.integers(8, 1 << 15), st.booleans(), st.floats(0, 1), st.integers(1, 512))
def test_nothing_falls_where_rows_grow(make, given_, more, packing, share, effective):
    spec = make.spec(**given_)
    length = module.written(spec) + more
    packing = packing and spec.method not in module.THROUGH_TRL
    small, large = (Rows(spec=spec, length=each, packing=packing, share=share) for each in (length, 2 * length))
    assert small.budget() <= large.budget()
    assert small.most(length) == small.budget()
    assert small.trained(more, 10) <= large.trained(2 * more, 20)
    assert 0 <= small.read(more, 10, again=0.5) <= large.read(2 * more, 20, again=0.5)
    assert 0 <= small.scored() <= 1
    assert 0 <= small.branched(small.budget()) <= small.budget()
    assert small.looked(small.budget()) >= 0
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        assert small.cached(effective, device, dtype) <= large.cached(effective, device, dtype)
        assert small.slots(effective, device) <= small.slots(2 * effective, device)
