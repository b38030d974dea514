"""Learning rates over a run: the formulas of transformers' schedules (optimization.py), without any state."""

from __future__ import annotations

import math
from typing import Literal


def factor(kind: Literal["cosine", "linear", "constant"], step: int, total: int, warmup: int) -> float:
    """What the peak rate is multiplied with in optimizer step `step`, which counts from 0.

    Warm-up rises by 1/warmup a step from 0; cosine and linear then fall to 0 at `total`; constant stays.
    """
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
