"""The state of GRPO within a round: written and read back bit for bit, put together from several ranks."""

import pytest
import torch

from tunesmith.executors.kernel.loops import groups
from tunesmith.executors.kernel.loops.groups import Group, Written
from tunesmith.orchestrator.errors import InputError


def make(at, seed=0, old=True):
    draw = torch.Generator().manual_seed(seed + at)

    def answer(length):
        logps = [torch.randn(length, generator=draw) for _ in range(2)]
        return Written(list(range(length)), length > 2, 0.1 * length, logps[0], logps[1] if old else None)

    return Group(at, (answer(2), answer(5)))


def same(one, other):
    assert [group.at for group in one] == [group.at for group in other]
    for mine, theirs in zip(one, other, strict=True):
        for a, b in zip(mine.written, theirs.written, strict=True):
            assert (a.ids, a.ended, a.gain) == (b.ids, b.ended, b.gain)
            for name in ("sampled", "old", "reference"):
                x, y = getattr(a, name), getattr(b, name)
                assert (x is None and y is None) or torch.equal(x, y), name


def test_what_is_saved_is_read_back(tmp_path):
    made = [make(3), make(1, old=False)]
    groups.save(tmp_path, made, 7)
    same(groups.load(tmp_path, 7), made)


def test_another_round_or_none_is_refused(tmp_path):
    with pytest.raises(InputError):
        groups.load(tmp_path, 0)
    groups.save(tmp_path, [make(1)], 7)
    with pytest.raises(InputError) as caught:
        groups.load(tmp_path, 8)
    assert caught.value.code == "checkpoint.other_task"


def test_the_groups_of_ranks_are_put_in_order():
    parts = [[make(4), make(2, seed=9)], [make(2), make(8)]]
    assert [group.at for group in groups.merged(parts, [2, 4, 8, 2])] == [2, 4, 8, 2]


def test_ranks_complete_each_others_knowledge():
    knows, does_not = [make(1)], [make(1, old=False)]
    same(groups.completed([does_not, knows]), [make(1)])
