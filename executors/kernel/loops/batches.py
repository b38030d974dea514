"""Which rows an optimizer step trains, and how those rows are laid out in tensors.

The sampler comes first: it picks the rows of a step from (seed, epoch, row) alone. A layout, padded or packed, then
only distributes the rows it is given, so that the row ledger is the same whatever the layout or the micro-batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tunesmith.executors.kernel.loops.forks import Forks

IGNORED = -100


class Row(Protocol):
    """A tokenised row: `labels` holds the id where a token is trained and -100 elsewhere, as long as `ids`."""

    @property
    def row(self) -> int: ...
    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def labels(self) -> Sequence[int]: ...


class Sampler:
    """The rows of each optimizer step: a permutation per epoch, cut into `effective_batch` rows.

    The last step of an epoch keeps whatever rows are left. A row's place in an epoch depends on (seed, epoch, row) and
    on nothing else: no library's generator, no order of calls. Costs one hash per row and epoch.
    """

    def __init__(self, rows: int, effective_batch: int, seed: int) -> None:
        self.rows = rows
        self.effective_batch = effective_batch
        self.seed = seed
        self.steps_per_epoch = math.ceil(rows / effective_batch)
        self._known: tuple[int, list[int]] = (-1, [])  # one object: batches are made ahead in another thread

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of a run; `max_steps` outranks `epochs` and may go over several."""
        return max_steps if max_steps is not None else max(1, math.ceil(epochs * self.steps_per_epoch))

    def order(self, epoch: int) -> list[int]:
        """Every row index once, in the order of this epoch."""
        known, found = self._known
        if epoch != known:
            key = f"{self.seed}:{epoch}".encode()
            place = hashlib.blake2b(key, digest_size=16)

            def where(row: int) -> bytes:
                mine = place.copy()
                mine.update(b":%d" % row)
                return mine.digest()

            found = sorted(range(self.rows), key=where)
            self._known = (epoch, found)
        return found

    def step(self, index: int) -> list[int]:
        """The row indices of optimizer step `index`, which counts from 0 over the whole run."""
        epoch, within = divmod(index, self.steps_per_epoch)
        start = within * self.effective_batch
        return self.order(epoch)[start : start + self.effective_batch]

    def epochs_done(self, steps: int) -> float:
        """How many epochs lie behind after `steps` optimizer steps."""
        epoch, within = divmod(steps, self.steps_per_epoch)
        return epoch + min(within * self.effective_batch, self.rows) / self.rows


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    ids, positions  int64 [B, T]; a packed batch has B = 1 and restarts its positions with every document
    picks           int64 [n], flat positions in B*T of the hidden states that predict a supervised token
    targets         int64 [n], the tokens they shall predict
    documents       lengths of the documents of a packed batch, None where padded
    bounds          int32 [documents + 1], their cumulative lengths, on the batch's device
    rows            numbers of the source rows
    tokens, weight  real tokens, padding left out; units that the summed loss is divided by (here supervised tokens)
    forks           how prompts are shared, in a forked batch (`forks.py`)
    owners          int64 [n], the answer that a pick belongs to, by its place in `members`
    members         (tree, answer) of each answer, where trees are laid out
    extra           what a method needs beside: advantages, reference log-probabilities...
    """

    ids: Tensor
    positions: Tensor
    picks: Tensor
    targets: Tensor
    rows: tuple[int, ...]
    tokens: int
    documents: tuple[int, ...] | None = None
    bounds: Tensor | None = None
    weight: int = 0
    forks: Forks | None = None
    owners: Tensor | None = None
    members: tuple[tuple[int, int], ...] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory and without waiting where that is a GPU."""
        if device.type == self.ids.device.type:
            return self

        def moved(tensor: Tensor) -> Tensor:
            if tensor.device.type == device.type:  # what a method kept from an earlier pass
                return tensor
            pinned = device.type == "cuda" and not tensor.is_pinned()
            return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)

        return self._each(moved, None if self.forks is None else self.forks.to(device))

    def pinned(self) -> Batch:
        """The batch in pinned memory, so that a GPU fetches it without anybody waiting."""
        return self._each(Tensor.pin_memory, self.forks)

    def _each(self, change: Callable[[Tensor], Tensor], forks: Forks | None) -> Batch:
        return replace(
            self,
            ids=change(self.ids),
            positions=change(self.positions),
            picks=change(self.picks),
            targets=change(self.targets),
            bounds=None if self.bounds is None else change(self.bounds),
            owners=None if self.owners is None else change(self.owners),
            extra={name: change(item) for name, item in self.extra.items()},
            forks=forks,
        )


def supervised(row: Row) -> list[int]:
    """Positions of the supervised tokens. The first token has nothing before it to be predicted from."""
    return [place for place, label in enumerate(row.labels) if label != IGNORED and place > 0]


def fed(row: Row) -> int:
    """How many tokens of a row go through the model: those behind its last prediction change nothing."""
    return next((place for place in range(len(row.labels) - 1, 1, -1) if row.labels[place] != IGNORED), 1)


def padded(rows: Sequence[Row], micro_batch: int, pad_id: int) -> list[Batch]:
    """Rows in right-padded micro-batches of up to `micro_batch` rows; rows of like length go together.

    Padding stands on the right and attention is causal, so no real token ever sees it and no mask is needed.
    """
    by_length = sorted(rows, key=lambda row: -len(row.ids))
    batches = []
    for start in range(0, len(by_length), micro_batch):
        chosen = by_length[start : start + micro_batch]
        width = max(fed(row) for row in chosen)
        ids = torch.full((len(chosen), width), pad_id, dtype=torch.int64)
        picks: list[int] = []
        targets: list[int] = []
        for at, row in enumerate(chosen):
            ids[at, : fed(row)] = torch.tensor(row.ids[: fed(row)], dtype=torch.int64)
            places = supervised(row)
            picks += [at * width + place - 1 for place in places]
            targets += [row.labels[place] for place in places]
        batches.append(
            Batch(
                ids=ids,
                positions=torch.arange(width).expand(len(chosen), width),
                picks=torch.tensor(picks, dtype=torch.int64),
                targets=torch.tensor(targets, dtype=torch.int64),
                rows=tuple(row.row for row in chosen),
                tokens=sum(len(row.ids) for row in chosen),
                weight=len(targets),
            )
        )
    return batches


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that each group's lengths add up to at most `budget`: best-fit decreasing.

    A length over the budget gets a group of its own. O(n * groups), over the rows of one step.
    """
    groups: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        need = lengths[index]
        fitting = [(room, at) for at, room in enumerate(free) if room >= need]
        if fitting:
            at = min(fitting)[1]
            groups[at].append(index)
            free[at] -= need
        else:
            groups.append([index])
            free.append(budget - need)
    return groups


def packed(rows: Sequence[Row], budget: int) -> list[Batch]:
    """Rows laid end to end in micro-batches of up to `budget` tokens, without padding; attention keeps them apart."""
    batches = []
    for group in best_fit([fed(row) for row in rows], budget):
        chosen = [rows[index] for index in group]
        lengths = tuple(fed(row) for row in chosen)
        ids: list[int] = []
        positions: list[int] = []
        picks: list[int] = []
        targets: list[int] = []
        for row in chosen:
            start = len(ids)
            ids += row.ids[: fed(row)]
            positions += range(fed(row))
            places = supervised(row)
            picks += [start + place - 1 for place in places]
            targets += [row.labels[place] for place in places]
        batches.append(
            Batch(
                ids=torch.tensor([ids], dtype=torch.int64),
                positions=torch.tensor([positions], dtype=torch.int64),
                picks=torch.tensor(picks, dtype=torch.int64),
                targets=torch.tensor(targets, dtype=torch.int64),
                rows=tuple(row.row for row in chosen),
                tokens=sum(len(row.ids) for row in chosen),
                documents=lengths,
                bounds=torch.tensor([0, *_running(lengths)], dtype=torch.int32),
                weight=len(targets),
            )
        )
    return batches


def _running(lengths: Iterable[int]) -> list[int]:
    total, sums = 0, []
    for length in lengths:
        total += length
        sums.append(total)
    return sums
