"""Samples without any of our own attention: one prompt at a time, by the model in training and its own cache.

Slow, and right for every model that transformers can continue: what rollouts fall back to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.executors.kernel.loops.batches import Batch
from tunesmith.executors.kernel.loops.draw import chances, pick
from tunesmith.executors.kernel.loops.model import Net


class Plain:
    """Writes all samples of a prompt in step, `slots` at most, until the last one has ended.

    They are of the same length until then, so nothing is padded and nothing masked.
    """

    def __init__(self, net: Net, *, slots: int, limit: int, stops: Collection[int], temperature: float) -> None:
        self.net = net
        self.slots = slots
        self.limit = limit
        self.stops = torch.tensor(sorted(stops), dtype=torch.int64, device=net.device)
        self.temperature = temperature

    def write(
        self,
        row: int,
        prompt: Sequence[int],
        samples: Sequence[int],
        *,
        key: str | None,
        stopped: Callable[[], bool] | None = None,
    ) -> list[tuple[list[int], list[float]]] | None:
        """Ids and log-probabilities of these samples; the likeliest tokens without a key, None where it was stopped."""
        written: list[tuple[list[int], list[float]]] = []
        for start in range(0, len(samples), self.slots):
            part = self._together(row, prompt, samples[start : start + self.slots], key, stopped)
            if part is None:
                return None
            written += part
        return written

    def _together(
        self,
        row: int,
        prompt: Sequence[int],
        samples: Sequence[int],
        key: str | None,
        stopped: Callable[[], bool] | None,
    ) -> list[tuple[list[int], list[float]]] | None:
        device, count = self.net.device, len(samples)
        lines = None
        if key is not None:
            lines = torch.stack([chances(key, row, sample, self.limit) for sample in samples]).to(device)
        fed = torch.tensor([list(prompt)] * count, device=device)
        first, cache = 0, None
        alive = torch.ones(count, dtype=torch.bool, device=device)
        tokens: list[Tensor] = []
        logps: list[Tensor] = []
        lengths = torch.zeros(count, dtype=torch.int64, device=device)
        while len(tokens) < self.limit and alive.any():
            if stopped is not None and stopped():
                return None
            logits, cache = self._forward(fed, first, cache)
            token, logp = pick(logits, None if lines is None else lines[:, len(tokens)], self.temperature)
            tokens.append(token)
            logps.append(logp)
            lengths += alive
            alive &= ~(token[:, None] == self.stops).any(1)
            first += fed.shape[1]
            fed = token[:, None]
        made = zip(torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist(), lengths.tolist(), strict=True)
        return [(ids[:length], line[:length]) for ids, line, length in made]

    def _forward(self, ids: Tensor, first: int, cache: Any) -> tuple[Tensor, Any]:
        """Logits after the last of `ids` [rows, T], which stand from position `first` on, and the cache behind them."""

        def last(_: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (states[0][:, -1:], *states[1:])

        places = torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)
        none = torch.zeros(0, dtype=torch.int64, device=ids.device)
        inputs = self.net.use(Batch(ids, places, none, none, rows=(), tokens=0))
        hook = self.net.head.register_forward_pre_hook(last)
        try:
            with self.net.amp():
                out = self.net.causal(**{**inputs, "use_cache": True, "past_key_values": cache})
        finally:
            hook.remove()
        return out.logits[:, -1], out.past_key_values
