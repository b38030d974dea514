"""Direct preference optimisation: both sides of a pair in one pass, the reference's opinion cached."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops.batches import Batch
from tunesmith.executors.kernel.loops.forks import Tree, forked, spread
from tunesmith.executors.kernel.loops.method import Meter, Plain, Turn, evaluating
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.preference import LOSSES, Pairs
from tunesmith.executors.kernel.loops.ranks import ALONE, Ranks
from tunesmith.executors.kernel.loops.reference import Reference
from tunesmith.executors.kernel.loops.room import Room, fullest
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DpoSpec

_NAMES = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "entropy"),
)


class Dpo(Plain):
    """A row is a Tree of two answers, chosen and rejected; a pair is a unit.

    The reference is the model without its adapter, asked when a row comes up first. Where all weights train it is the
    model before step one: call `foresee` before anything is trained or loaded from a checkpoint.
    """

    rows: Sequence[Tree]

    def __init__(
        self,
        net: Net,
        rows: Sequence[Tree],
        spec: DpoSpec,
        *,
        micro_batch: int,
        max_length: int,
        packing: bool,
        pad_id: int,
        reference: Reference | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(net, rows, ranks, _NAMES)
        if spec.loss == "exo_pair" and not spec.label_smoothing:
            raise InputError(
                "The loss exo_pair needs label smoothing.",
                code="dpo.label_smoothing",
                why="It compares with labels that err now and then; with none that do it is infinite.",
                where="dpo.label_smoothing",
                fix="Set dpo.label_smoothing, to 0.001 for example.",
            )
        self.spec = spec
        self.micro_batch = micro_batch
        self.max_length = max_length
        self.packing = packing
        self.pad_id = pad_id
        self.reference = reference or Reference(None, len(rows), 2)
        self._loss = LOSSES[spec.loss]

    def batches(self, picked: Sequence[int], turn: Turn) -> list[Batch]:
        """Pairs with their prompt computed once where that was proven exact on this model, else padded."""
        trees = [self.rows[index] for index in picked]
        if self.packing and self.net.forked:
            found = forked(trees, self.room.tokens)
        else:
            found = spread(trees, self.room.rows, self.pad_id)
        return [self._weighed(batch, picked) for batch in found]

    @property
    def room(self) -> Room:
        """As many pairs as a micro-batch has, or their tokens where both sides are as long as they may be."""
        return Room(self.micro_batch, 2 * self.micro_batch * self.max_length).within(self.limit)

    def rehearsal(self, most: int) -> tuple[Self, Batch]:
        """The longest pairs, or those that fill the room best; where the reference is asked meanwhile, it is here."""
        packing = self.packing and self.net.forked
        if packing:
            lengths = [tree.fed for tree in self.rows]
        else:
            lengths = [len(tree.prompt) + max(map(len, tree.answers)) for tree in self.rows]
        stand_in = copy.copy(self)
        stand_in.meter = Meter(*_NAMES)
        if self.net.adapted:  # else it was asked before, and will not be again
            stand_in.reference = Reference(None, len(self.rows), 2)
        batches = self.batches(fullest(lengths, self.room, most, packed=packing), Turn(0, 0))
        return stand_in, max(batches, key=lambda batch: batch.ids.numel())

    def _weighed(self, batch: Batch, picked: Sequence[int]) -> Batch:
        members = tuple((picked[at], side) for at, side in batch.members)
        tokens = torch.tensor([len(self.rows[row].scored(side)) for row, side in members])
        units = sum(int(count) for count in tokens[::2]) if self.spec.loss == "sft" else len(members) // 2
        return replace(batch, members=members, weight=units, extra={"tokens": tokens})

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of the batch's pairs."""
        logps, entropy = self.net.token_logps(batch)
        sides = _summed(logps, batch)
        known = self._known(batch)
        known = (known.pin_memory() if sides.is_cuda else known).to(sides.device, non_blocking=True)
        tokens = batch.extra["tokens"]
        pairs = Pairs(sides[::2], sides[1::2], known[::2], known[1::2], tokens[::2], tokens[1::2])
        losses = self._loss(pairs, self.spec.beta, self.spec.label_smoothing)
        self._note(pairs, entropy)
        return losses.sum()

    def _note(self, pairs: Pairs, entropy: Tensor) -> None:
        up, down = self.spec.beta * pairs.up.detach(), self.spec.beta * pairs.down.detach()
        count = len(up)
        for name, values in (
            ("rewards/chosen", up),
            ("rewards/rejected", down),
            ("rewards/accuracies", (up > down).float()),
            ("rewards/margins", up - down),
            ("logps/chosen", pairs.chosen),
            ("logps/rejected", pairs.rejected),
        ):
            self.meter.add(name, values.sum(), count)
        self.meter.add("entropy", entropy.sum(), len(entropy))

    # --- the reference ----------------------------------------------------------------------------------------------

    def _known(self, batch: Batch) -> Tensor:
        if self.spec.reference == "none":
            return torch.zeros(len(batch.members))
        if self.reference.missing(row for row, _ in batch.members):
            self._ask(batch)
        return self.reference.get(batch.members)

    def _ask(self, batch: Batch) -> None:
        with evaluating(self.net), self.net.untuned() if self.net.adapted else nullcontext(), torch.no_grad():
            logps, _ = self.net.token_logps(batch)
        self.reference.put(batch.members, _summed(logps, batch))

    def foresee(self, picked: Sequence[int], turn: Turn) -> None:
        """Ask the reference about rows before training begins, those that are known already left out."""
        unknown = self.reference.missing(picked)
        for batch in self.batches(unknown, turn) if unknown and self.spec.reference == "base" else ():
            self._ask(batch.to(self.net.device))

    def save(self, folder: Path, step: int) -> None:
        """The checkpoint needs nothing of this; it is a good moment to write the table where it is kept."""
        self.reference.flush()


def _summed(logps: Tensor, batch: Batch) -> Tensor:
    """Log-probabilities summed over each answer, float32 [answers]."""
    assert batch.owners is not None
    return logps.new_zeros(len(batch.members)).index_add(0, batch.owners, logps)
