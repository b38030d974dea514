"""The samples of one call on their way: asked, waiting with their prompt in the store, being written, done.

As soon as a sample has ended the next one is begun in its place, so none waits for the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops.decode import Decoder
from tunesmith.executors.kernel.loops.draw import chances

PREFILL = {"cpu": 1024, "cuda": 8192}  # tokens of prompts that go through the model at once
LOOK = {"cpu": 1}  # steps between two looks at which rows have ended; 8 elsewhere, where looking waits for the device
IDLE = 8  # one slot in so many may stand empty before prompts are fetched for them

Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Ask:
    """What to write: `samples` are the numbers of the samples wanted of the prompt `ids`, which stands in `row`."""

    row: int
    ids: Sequence[int]
    samples: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sample:
    """What was written: `ids`, with the stop token where it `ended`, and the log-probability of each.

    Log-probabilities are those of the distribution at the rollout's temperature, which tokens are drawn from.
    """

    row: int
    sample: int
    ids: list[int]
    logps: list[float]
    ended: bool


@dataclass(slots=True)
class _Waiting:
    """A prompt in the store, the logits that follow it, and the samples of it still to be begun."""

    ask: int
    prompt: Any
    logits: Tensor
    samples: list[int]


class Refill:
    """Writes what `asks` want, `slots` samples at a time; `key` names the random numbers, None takes the likeliest."""

    def __init__(
        self, decoder: Decoder, asks: Sequence[Ask], *, key: str | None, slots: int, stops: Collection[int]
    ) -> None:
        self.decoder = decoder
        self.asks = asks
        self.key = key
        self.slots = slots
        self.stops = stops
        self._device = decoder.token.device
        self._asked = [at for at, ask in enumerate(asks) if ask.samples]
        self._waiting: list[_Waiting] = []
        self._writing: list[tuple[int, int]] = []
        self._done: dict[tuple[int, int], Sample] = {}
        self._tokens = 0

    def run(self, told: Told | None, stopped: Callable[[], bool] | None) -> list[Sample] | None:
        """All samples by ask, then by sample, as asked; None where `stopped` said so, looked at between steps."""
        looks = LOOK.get(self._device.type, 8)
        while self._asked or self._waiting or self._writing:
            self._begin()
            self._collect()
            if told is not None:
                told(self._tokens + self.decoder.written, len(self._done))
            for _ in range(looks if self._writing else 0):
                if stopped is not None and stopped():
                    return None
                self.decoder.step()
        return [self._done[at, sample] for at, ask in enumerate(self.asks) for sample in ask.samples]

    def _begin(self) -> None:
        """Fill free slots, but not for one or two while many others are being written."""
        free = self.slots - len(self._writing)
        if free <= self.slots // IDLE and self._writing and not self._waiting:
            return
        begun: list[tuple[_Waiting, int]] = []
        while free > len(begun):
            if not self._waiting and not self._fetch():
                break
            first = self._waiting[0]
            if not self.decoder.store.fits(first.prompt):
                break
            begun.append((first, first.samples.pop(0)))
            self.decoder.store.seat(first.prompt)
            if not first.samples:
                self.decoder.store.close(first.prompt)
                self._waiting.pop(0)
        if not begun:
            return
        asks = [self.asks[item.ask] for item, _ in begun]
        drawn = None
        if self.key is not None:
            lines = [
                chances(self.key, ask.row, sample, self.decoder.limit)
                for ask, (_, sample) in zip(asks, begun, strict=True)
            ]
            drawn = torch.stack(lines).to(self._device)
        self.decoder.begin([len(ask.ids) for ask in asks], torch.stack([item.logits for item, _ in begun]), drawn)
        self._writing += [(item.ask, sample) for item, sample in begun]

    def _fetch(self) -> bool:
        """Send the next prompts through the model, as many as go at once and fit into the store; whether there are."""
        chosen = 0
        tokens = 0
        for at in self._asked:
            tokens += len(self.asks[at].ids)
            if chosen and tokens > PREFILL.get(self._device.type, 1024):
                break
            chosen += 1
        chosen = self.decoder.store.room([len(self.asks[at].ids) for at in self._asked[:chosen]])
        now, self._asked = self._asked[:chosen], self._asked[chosen:]
        if now:
            opened, logits = self.decoder.prefill([self.asks[at].ids for at in now])
            self._waiting += [
                _Waiting(at, prompt, line, list(self.asks[at].samples))
                for at, prompt, line in zip(now, opened, logits, strict=True)
            ]
        return bool(now)

    def _collect(self) -> None:
        """Take down the rows that have ended, and free their slots."""
        rows = self.decoder.ended()
        for row, (ids, logps) in zip(rows, self.decoder.take(rows) if rows else (), strict=True):
            at, sample = self._writing[row]
            self._done[at, sample] = Sample(self.asks[at].row, sample, ids, logps, ids[-1] in self.stops)
            self._tokens += len(ids)
        for row in reversed(rows):
            self.decoder.drop(row)
            last = self._writing.pop()
            if row < len(self._writing):
                self._writing[row] = last
