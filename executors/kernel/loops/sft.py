"""Supervised fine-tuning: a method is how an optimizer step's rows become batches, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tunesmith.executors.kernel.loops.batches import Batch, Row, packed, padded
from tunesmith.executors.kernel.loops.model import Net


class Method(Protocol):
    """What the engine needs of a method.

    `loss` is a sum over `batch.weight` units (supervised tokens, preference pairs...); the engine divides by the units
    of the whole optimizer step, so that no layout changes the gradient.
    """

    @property
    def rows(self) -> Sequence[Row]: ...

    def batches(self, picked: Sequence[int]) -> list[Batch]:
        """The micro-batches of one optimizer step, from indices into `rows`."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of a batch."""
        ...


class Sft:
    """Next-token cross-entropy on supervised tokens.

    `micro_batch` rows go through the model at once; packed, as many tokens as that many rows of `max_length` hold.
    """

    def __init__(
        self, net: Net, rows: Sequence[Row], *, micro_batch: int, max_length: int, packing: bool, pad_id: int
    ) -> None:
        self.net = net
        self.rows = rows
        self.micro_batch = micro_batch
        self.max_length = max_length
        self.packing = packing
        self.pad_id = pad_id

    def batches(self, picked: Sequence[int]) -> list[Batch]:
        """Packed where asked and proven exact on this model, else padded."""
        chosen = [self.rows[index] for index in picked]
        if self.packing and self.net.packed:
            return packed(chosen, self.micro_batch * self.max_length)
        return padded(chosen, self.micro_batch, self.pad_id)

    def loss(self, batch: Batch) -> Tensor:
        """Summed cross-entropy over the supervised tokens."""
        return self.net.summed_loss(batch)
