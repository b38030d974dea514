"""What the engine needs of a method: batches for the rows of an optimizer step, and the loss of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops.batches import Batch
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.ranks import ALONE, Ranks
from tunesmith.executors.kernel.loops.room import Room


class Numbered(Protocol):
    """Anything with the number of its source row."""

    @property
    def row(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """When rows are taken up: the optimizer step (from 0), the epoch it lies in, and whether it trains or evaluates."""

    step: int
    epoch: int
    training: bool = True


class Interrupted(Exception):
    """A method was told to stop in the middle of a step; nothing of the step counts."""


class Meter:
    """Means that a method gathers between two log lines, on the device: nobody waits for them.

    The names are known from the start, so that every rank speaks of the same ones in the same order.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add to a mean: the sum of some values and how many they are."""
        if name not in self.names:
            raise KeyError(name)
        device = next((item.device for item in (total, count) if isinstance(item, Tensor)), None)
        pair = torch.stack([_double(item, device) for item in (total, count)])
        self._sums[name] = self._sums[name] + pair.detach() if name in self._sums else pair.detach()

    def mark(self) -> Mapping[str, Tensor]:
        """What has been gathered so far, to come back to."""
        return dict(self._sums)

    def back(self, mark: Mapping[str, Tensor]) -> None:
        """Forget what was gathered since a mark."""
        self._sums = dict(mark)

    def drain(self, device: torch.device) -> Tensor:
        """(sum, count) of each mean gathered since the last call, float64 [names, 2]."""
        nothing = torch.zeros(2, dtype=torch.float64, device=device)
        found = [self._sums.get(name, nothing).to(device) for name in self.names]
        self._sums.clear()
        return torch.stack(found) if found else torch.zeros((0, 2), dtype=torch.float64, device=device)

    def means(self, drained: Sequence[float]) -> dict[str, float]:
        """What `drain` gave, read from the device and flattened, as means; names without a value are left out."""
        pairs = zip(self.names, drained[::2], drained[1::2], strict=True)
        return {name: total / count for name, total, count in pairs if count}


def _double(item: Tensor | float, device: torch.device | None) -> Tensor:
    if isinstance(item, Tensor):
        return item.to(device=device, dtype=torch.float64)
    return torch.full((), item, dtype=torch.float64, device=device)  # filled there; to copy it would wait for a GPU


@contextmanager
def evaluating(net: Net) -> Iterator[None]:
    """The net without dropout, whatever it does; then as it was."""
    training = net.outer.training
    net.outer.eval()
    try:
        yield
    finally:
        net.outer.train(training)


class Method(Protocol):
    """One way to train.

    rows      what the sampler picks from
    repeats   optimizer steps taken on the same rows before others are picked
    foreseen  whether the batches follow from the rows alone, so that they can be made a step ahead
    at_once   rows that are best evaluated together, where an optimizer step has fewer
    room      what a micro-batch holds; never more than `limit`, which is set where memory has run out
    breadth   rows that may go through the model together in an evaluation
    slots     answers that are written at a time, as far as that is ours to say; 0 where none are
    measure   what an evaluation's number is called; `higher` says whether more of it is better
    `loss` is a sum over `batch.weight` units (supervised tokens, preference pairs...); the engine divides by the units
    of the whole optimizer step, so that no layout changes the gradient.
    """

    @property
    def rows(self) -> Sequence[Numbered]: ...
    @property
    def repeats(self) -> int: ...
    @property
    def foreseen(self) -> bool: ...
    @property
    def at_once(self) -> int: ...
    @property
    def room(self) -> Room: ...
    @property
    def limit(self) -> Room | None: ...
    @limit.setter
    def limit(self, room: Room | None) -> None: ...
    @property
    def breadth(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def measure(self) -> str: ...
    @property
    def higher(self) -> bool: ...
    @property
    def meter(self) -> Meter: ...

    def batches(self, picked: Sequence[int], turn: Turn) -> list[Batch]:
        """The micro-batches of one optimizer step, from indices into `rows`. Raises Interrupted."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of a batch."""
        ...

    def assess(self, picked: Sequence[int], turn: Turn) -> Iterator[tuple[Tensor | float, int]]:
        """For some rows that are evaluated, sums of the measure and how many units they are of. No gradients."""
        ...

    def assessed(self, step: int) -> None:
        """All rows have been through `assess`: what it has gathered beside the measure can be told. Every rank does."""

    def forget(self) -> None:
        """Drop what an evaluation has gathered so far: it begins anew."""

    def narrow(self, slots: int) -> None:
        """Write only so many answers at a time."""

    def rehearsal(self, most: int) -> tuple[Self, Batch]:
        """The largest micro-batch that a step of `most` rows may meet, and a method to use up on it: this one stays."""
        ...

    def updated(self) -> None:
        """The weights have changed."""

    def save(self, folder: Path, step: int) -> None:
        """Add to a checkpoint of this step what the method cannot make again."""

    def load(self, folder: Path, step: int) -> None:
        """Read back what `save` wrote."""


class Plain(ABC):
    """What methods share whose batches follow from their rows alone, and whose evaluation is their loss."""

    repeats = 1
    foreseen = True
    at_once = 1
    slots = 0
    measure = "loss"
    higher = False

    def __init__(self, net: Net, rows: Sequence[Numbered], ranks: Ranks = ALONE, names: Sequence[str] = ()) -> None:
        self.net = net
        self.rows = rows
        self.ranks = ranks
        self.meter = Meter(*names)
        self.limit: Room | None = None

    @property
    @abstractmethod
    def room(self) -> Room:
        """What a micro-batch holds."""

    @property
    def breadth(self) -> int:
        """Rows of a micro-batch."""
        return self.room.rows

    @abstractmethod
    def batches(self, picked: Sequence[int], turn: Turn) -> list[Batch]:
        """The micro-batches of these rows."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of a batch."""

    def assess(self, picked: Sequence[int], turn: Turn) -> Iterator[tuple[Tensor | float, int]]:
        """The loss of each batch, over its units."""
        for batch in self.ranks.share(self.batches(picked, turn)):
            if batch.weight:
                yield self.loss(batch.to(self.net.device)), batch.weight

    def assessed(self, step: int) -> None:
        """There is nothing beside the measure."""
        return

    def forget(self) -> None:
        """Empty the meter."""
        self.meter.drain(self.net.device)

    def narrow(self, slots: int) -> None:
        """Nothing is written."""
        return

    @abstractmethod
    def rehearsal(self, most: int) -> tuple[Self, Batch]:
        """The largest micro-batch of a step of `most` rows, and a method to use up on it."""

    def updated(self) -> None:
        """Nothing here depends on the weights."""
        return

    def save(self, folder: Path, step: int) -> None:
        """Nothing to add."""
        return

    def load(self, folder: Path, step: int) -> None:
        """Nothing to read."""
        return
