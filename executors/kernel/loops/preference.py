"""Losses of preference pairs, from the log-probabilities of both sides: TRL's names, one function each.

All take sums over a side's tokens, float [pairs], and give one loss a pair. The formulas are those of the papers named;
where TRL 1.16 departs from a paper (ipo), so does this, since people compare with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

DISCOPOP_TAU = 0.05


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities of some pairs under the model and the reference, and the tokens of each side."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def up(self) -> Tensor:
        """log(model / reference) of the chosen side."""
        return self.chosen - self.reference_chosen

    @property
    def down(self) -> Tensor:
        """log(model / reference) of the rejected side."""
        return self.rejected - self.reference_rejected

    @property
    def apart(self) -> Tensor:
        """How much more the model has come to prefer the chosen side."""
        return self.up - self.down

    @property
    def apart_per_token(self) -> Tensor:
        """The same with each side's mean over its tokens."""
        return self.up / self.chosen_tokens.clamp(min=1) - self.down / self.rejected_tokens.clamp(min=1)


def sigmoid(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7)."""
    return -logsigmoid(beta * pairs.apart)


def hinge(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """SLiC (arXiv 2305.10425) on the log-ratios of RSO (arXiv 2309.06657)."""
    return torch.relu(1 - beta * pairs.apart)


def ipo(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17), with means over tokens as its authors advised TRL."""
    return (pairs.apart_per_token - 1 / (2 * beta)) ** 2


def exo_pair(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """EXO (arXiv 2402.00856, eq. 16): KL of the model's preference from one that errs with `smoothing`, above 0."""
    keep = torch.log1p(torch.as_tensor(-smoothing, dtype=pairs.chosen.dtype))
    flip = torch.log(torch.as_tensor(smoothing, dtype=pairs.chosen.dtype))
    score = beta * pairs.apart
    return torch.sigmoid(score) * (logsigmoid(score) - keep) + torch.sigmoid(-score) * (logsigmoid(-score) - flip)


def nca_pair(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """NCA (arXiv 2402.05369)."""
    up, down = beta * pairs.up, beta * pairs.down
    return -logsigmoid(up) - 0.5 * logsigmoid(-up) - 0.5 * logsigmoid(-down)


def robust(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """Provably robust DPO (arXiv 2403.00409): unbiased where a share `smoothing` of the labels is flipped."""
    score = beta * pairs.apart
    return (-(1 - smoothing) * logsigmoid(score) + smoothing * logsigmoid(-score)) / (1 - 2 * smoothing)


def bco_pair(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """BCO on pairs (arXiv 2404.04656), without its running reward shift."""
    return -logsigmoid(beta * pairs.up) - logsigmoid(-beta * pairs.down)


def sppo_hard(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675, eq. 4.7 with P = 1 and 0)."""
    return (pairs.up - 0.5 / beta) ** 2 + (pairs.down + 0.5 / beta) ** 2


def aot(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """AOT (arXiv 2406.05882): sorted margins of the model against sorted margins of the reference, in a micro-batch."""
    own, _ = torch.sort(pairs.chosen - pairs.rejected)
    reference, _ = torch.sort(pairs.reference_chosen - pairs.reference_rejected)
    return _smoothed(beta * (own - reference), smoothing)


def aot_unpaired(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """AOT for unpaired data: sorted chosen against sorted rejected ratios, in a micro-batch."""
    return _smoothed(beta * (torch.sort(pairs.up)[0] - torch.sort(pairs.down)[0]), smoothing)


def apo_zero(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): for chosen sides better than the model."""
    return 1 - torch.sigmoid(beta * pairs.up) + torch.sigmoid(beta * pairs.down)


def apo_down(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): for chosen sides worse than the model."""
    return torch.sigmoid(beta * pairs.up) + 1 - torch.sigmoid(beta * pairs.apart)


def discopop(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5) with its temperature of 0.05."""
    score = beta * pairs.apart
    share = torch.sigmoid(score / DISCOPOP_TAU)
    return -logsigmoid(score) * (1 - share) + torch.exp(-score) * share


def sft(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """The chosen side's negative log-likelihood; its unit is a token, not a pair."""
    return -pairs.chosen


def sigmoid_norm(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """DPO on means over tokens (length-normalised, arXiv 2411.15124)."""
    return -logsigmoid(beta * pairs.apart_per_token)


def _smoothed(score: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(score) - smoothing * logsigmoid(-score)


LOSSES: dict[str, Callable[[Pairs, float, float], Tensor]] = {
    item.__name__: item
    for item in (
        *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired),
        *(apo_zero, apo_down, discopop, sft, sigmoid_norm),
    )
}
