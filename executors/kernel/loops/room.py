"""How much a micro-batch may hold, how that is halved, and the most that rows can make of it.

A micro-batch changes neither the rows of an optimizer step nor their weights; it only says how many of them go through
the model at once. So it may be made smaller at any time: the result stays the same, up to the order of additions.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.executors.kernel.loops.batches import Batch


@dataclass(frozen=True, slots=True)
class Room:
    """`rows` of a padded micro-batch, `tokens` of a packed one. A row of more tokens than that goes by itself."""

    rows: int
    tokens: int

    def within(self, other: Room | None) -> Room:
        """No more than either."""
        return self if other is None else Room(min(self.rows, other.rows), min(self.tokens, other.tokens))

    def below(self, batch: Batch | None) -> Room | None:
        """Halved, as often as it takes to part the rows of a batch; None where it holds a single one already.

        Without a batch, halved once, as long as it has several rows.
        """
        if batch is None:
            return self._halved() if self.rows > 1 else None
        if len(batch.rows) < 2:
            return None
        found = self._halved()
        while (found.rows >= len(batch.rows)) if batch.documents is None else (found.tokens >= batch.ids.numel()):
            found = found._halved()
        return found

    def _halved(self) -> Room:
        return Room(max(1, self.rows // 2), max(1, self.tokens // 2))


LEAST = Room(1, 1)  # each row by itself, packed or not


def fullest(lengths: Sequence[int], room: Room, most: int, *, packed: bool) -> list[int]:
    """Which rows, by their lengths, make the largest micro-batch that any step may meet; a step has `most` rows.

    Padded, those are the longest. Packed, it is whatever fills `room.tokens` best: beginning with each length there is,
    the longest that still fits is added again and again, so a long document stands before several short ones of the
    same sum. O(n log n + lengths * rows * log n).
    """
    order = sorted(range(len(lengths)), key=lambda at: (lengths[at], -at))
    if not packed:
        return order[::-1][: min(room.rows, most)]
    ascending = [lengths[at] for at in order]
    best: list[int] = []
    held = 0
    start = len(order)
    while start and held < room.tokens:
        start -= 1
        chosen, total = _filled(ascending, start, room.tokens, most)
        if total > held:
            best, held = chosen, total
        start = bisect_left(ascending, ascending[start])  # behind the next shorter length
    return [order[at] for at in best]


def _filled(ascending: Sequence[int], first: int, budget: int, most: int) -> tuple[list[int], int]:
    """Places of rows, `first` among them and none longer, that fill a budget by taking the longest that still fits."""
    chosen, total, end = [first], ascending[first], first
    while end and len(chosen) < most:
        end = min(end, bisect_right(ascending, budget - total))
        if not end:
            break
        end -= 1
        chosen.append(end)
        total += ascending[end]
    return chosen, total
