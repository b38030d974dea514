"""Supervised fine-tuning: next-token cross-entropy on supervised tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor

from tunesmith.executors.kernel.loops.batches import Batch, Row, fed, packed, padded
from tunesmith.executors.kernel.loops.method import Plain, Turn
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.ranks import ALONE, Ranks
from tunesmith.executors.kernel.loops.room import Room, fullest


class Sft(Plain):
    """Next-token cross-entropy on supervised tokens, each of which is a unit.

    `micro_batch` rows go through the model at once; packed, as many tokens as that many rows of `max_length` hold.
    """

    rows: Sequence[Row]

    def __init__(
        self,
        net: Net,
        rows: Sequence[Row],
        *,
        micro_batch: int,
        max_length: int,
        packing: bool,
        pad_id: int,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(net, rows, ranks)
        self.micro_batch = micro_batch
        self.max_length = max_length
        self.packing = packing
        self.pad_id = pad_id

    def batches(self, picked: Sequence[int], turn: Turn) -> list[Batch]:
        """Packed where asked and proven exact on this model, else padded."""
        chosen = [self.rows[index] for index in picked]
        if self.packing and self.net.packed:
            return packed(chosen, self.room.tokens)
        return padded(chosen, self.room.rows, self.pad_id)

    @property
    def room(self) -> Room:
        """As many rows as a micro-batch has, or their tokens where each is as long as it may be."""
        return Room(self.micro_batch, self.micro_batch * self.max_length).within(self.limit)

    def rehearsal(self, most: int) -> tuple[Self, Batch]:
        """The longest rows, or those that fill the room best. Reads every row once, about 10 us each."""
        packing = self.packing and self.net.packed
        chosen = fullest([fed(row) for row in self.rows], self.room, most, packed=packing)
        return self, max(self.batches(chosen, Turn(0, 0)), key=lambda batch: batch.ids.numel())

    def loss(self, batch: Batch) -> Tensor:
        """Summed cross-entropy over the supervised tokens."""
        return self.net.summed_loss(batch)
