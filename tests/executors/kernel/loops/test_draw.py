"""Tokens are drawn as often as they are likely, and by names alone."""

import pytest
import torch

from tunesmith.executors.kernel.loops.draw import BLOCK, chances, pick


def test_chances_follow_from_their_names():
    first = chances("1:0", 5, 2, 100)
    assert torch.equal(first, chances("1:0", 5, 2, 100))
    assert torch.equal(first[:10], chances("1:0", 5, 2, 10))
    for other in (("1:1", 5, 2), ("1:0", 6, 2), ("1:0", 5, 3)):
        assert not torch.equal(first, chances(*other, 100))
    many = torch.cat([chances("k", row, 0, 500) for row in range(40)])
    assert float(many.min()) >= 0
    assert float(many.max()) < 1
    assert float(many.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(many.var()) == pytest.approx(1 / 12, abs=0.002)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_probabilities(temperature):
    """Chi-square of 20,000 draws over 40 tokens: 39 degrees of freedom stay under 73 with 999 in 1,000."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    wanted = (logits / temperature).softmax(-1)
    drawn = torch.cat([chances("chi", row, 0, 1000) for row in range(20)])
    token, logp = pick(logits.expand(len(drawn), -1), drawn, temperature)
    seen = torch.bincount(token, minlength=40).double()
    expected = wanted.double() * len(drawn)
    assert float(((seen - expected) ** 2 / expected).sum()) < 73
    assert (logp - wanted.log()[token]).abs().max() < 1e-5


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((6, 3 * BLOCK + 5), -torch.inf)
    logits[:, [3, BLOCK, 3 * BLOCK + 4]] = 0.0
    edges = torch.tensor([0.0, 1 / 3 - 1e-12, 1 / 3, 2 / 3 - 1e-12, 2 / 3, 1 - 2**-53], dtype=torch.float64)
    token, logp = pick(logits, edges, 1.0)
    assert set(token.tolist()) == {3, BLOCK, 3 * BLOCK + 4}
    assert token[0] == 3
    assert token[-1] == 3 * BLOCK + 4
    assert logp == pytest.approx(torch.full((6,), -1.0986123), abs=1e-6)


def test_without_chances_the_likeliest_is_taken():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(1))
    token, logp = pick(logits, None, 0.3)
    assert torch.equal(token, logits.argmax(-1))
    assert (logp - (logits / 0.3).log_softmax(-1).max(-1).values).abs().max() < 1e-5
