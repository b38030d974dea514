"""The optimizer: AdamW over what is trained, in float32 or with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import TrainSpec

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def make(trained: Iterable[Tensor], train: TrainSpec, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over what is trained, fused; weight decay on matrices only, as transformers does."""
    trained = list(trained)
    matrices = [item for item in trained if item.dim() > 1]
    others = [item for item in trained if item.dim() <= 1]
    groups = [
        {"params": chosen, "weight_decay": decay}
        for chosen, decay in ((matrices, train.weight_decay), (others, 0.0))
        if chosen
    ]
    rate = float(train.learning_rate)
    if train.optimizer == "adamw-8bit":
        return _eight_bit(groups, rate, device)
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPSILON, fused=True)


def _eight_bit(groups: list[dict[str, Any]], rate: float, device: torch.device) -> torch.optim.Optimizer:
    try:
        if device.type not in ("cuda", "cpu"):
            raise ImportError(f"its 8-bit optimizer does not know the device {device.type}")
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "The 8-bit optimizer is not available here.",
            code="train.optimizer",
            why=f"bitsandbytes: {error}.",
            where="train.optimizer",
            fix="Install it (pip install 'tunesmith[train]'), or set train.optimizer to adamw.",
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=rate, betas=BETAS, eps=EPSILON)
    return optimizer
