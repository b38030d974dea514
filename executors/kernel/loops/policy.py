"""The arithmetic of GRPO: advantages of a group's rewards, and the clipped loss of a token, as in TRL 1.16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.orchestrator.nouns import GrpoSpec

_SOFT = 1e-4  # beside a standard deviation that may be zero


def advantages(rewards: Sequence[Sequence[float]], scale: str) -> list[list[float]]:
    """How much better than its group each answer is (arXiv 2402.03300, 4.1.2); one list a group.

    `scale`: divided by the standard deviation (n - 1) of the group's rewards, of all rewards of the step (batch), or by
    nothing (none, arXiv 2503.20783). A NaN is an answer that nobody could score: it has no part in the mean, and 0.
    """
    known = torch.tensor([value for group in rewards for value in group if not math.isnan(value)], dtype=torch.float64)
    whole = float(known.std()) if len(known) > 1 else 0.0
    found = []
    for group in rewards:
        values = torch.tensor(group, dtype=torch.float64)
        scored = values[~values.isnan()]
        if not len(scored) or scored.min() == scored.max():  # the mean of equals may lie beside them by a rounding
            found.append([0.0] * len(group))
            continue
        spread = whole if scale == "batch" else float(scored.std()) if len(scored) > 1 else 0.0
        apart = values - scored.mean()
        if scale != "none":
            apart = apart / (spread + _SOFT)
        found.append(apart.nan_to_num(0.0).tolist())
    return found


@dataclass(frozen=True, slots=True)
class Judged:
    """What is made of some tokens: the loss of each, whether its ratio was clipped, and its divergence (k3)."""

    losses: Tensor
    clipped: Tensor
    divergence: Tensor | None


def judge(logps: Tensor, old: Tensor, gains: Tensor, reference: Tensor | None, spec: GrpoSpec) -> Judged:
    """-min(ratio * A, clip(ratio) * A) + beta * KL of each token; all float32 [n], A the advantage of its answer.

    The divergence is ratio * (exp(d) - d - 1) with d = log(reference / model). The term in brackets is unbiased and
    never negative (http://joschu.net/blog/kl-approx.html); the ratio makes its gradient that of the reverse KL
    (arXiv 2512.02556), also where its value is 1.
    """
    ratio = torch.exp(logps - old)
    high = spec.epsilon if spec.epsilon_high is None else spec.epsilon_high
    bounded = torch.clamp(ratio, 1 - spec.epsilon, 1 + high)
    losses = -torch.min(ratio * gains, bounded * gains)
    clipped = ((ratio < 1 - spec.epsilon) & (gains < 0)) | ((ratio > 1 + high) & (gains > 0))
    divergence = None
    if reference is not None:
        apart = reference - logps
        divergence = (torch.exp(apart) - apart - 1) * ratio
        losses = losses + spec.beta * divergence
    return Judged(losses, clipped, None if divergence is None else divergence.detach())


def weight(spec: GrpoSpec, tokens: int) -> tuple[float, float]:
    """(what each token of an answer of this length counts, the units that the answer adds to the step).

    dapo and bnpo: a token is a unit. grpo: an answer is, and its tokens share it. dr_grpo: an answer is as many units
    as the longest may have tokens, so that length does not matter. TRL's bnpo takes the mean of a micro-batch; here it
    is the mean of the step, so that no layout changes the gradient, and then it is dapo.
    """
    if spec.loss == "grpo":
        return 1 / max(1, tokens), 1
    if spec.loss == "dr_grpo":
        return 1.0, spec.max_completion
    return 1.0, tokens
