"""Advantages of a group's rewards: what nobody could score, and what all did alike, teaches nothing."""

import pytest
import torch

from tunesmith.executors.kernel.loops import policy

NAN = float("nan")


def test_advantages_of_unscorable_answers():
    assert policy.advantages([[NAN, NAN], [1.0, 3.0]], "none") == [[0.0, 0.0], [-1.0, 1.0]]
    (group,) = policy.advantages([[1.0, NAN, 3.0]], "group")
    assert group[1] == 0.0
    assert group[2] == -group[0] == pytest.approx(1 / (2**0.5 + 1e-4))
    assert torch.isfinite(torch.tensor(policy.advantages([[NAN]], "batch"))).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("count", range(2, 17))
def test_equal_rewards_have_no_advantage(count, scale):
    """None at all: one that is only nearly zero would take its group through the training pass."""
    for value in (0.1, 0.7, 1 / 3, 2.0):
        found = policy.advantages([[value] * count, [value, NAN] * count, [0.0, 1.0]], scale)
        assert found[:2] == [[0.0] * count, [0.0] * (2 * count)]
        assert found[2][1] > 0
