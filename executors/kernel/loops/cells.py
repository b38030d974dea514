"""Keys and values of what is being written, on any device: each prompt's once, each sample's own beside it.

Rows are the samples being written, packed to the front: where one ends, the last takes its place. Prompts of about the
same length share a grid, so that all queries of a prompt's samples are one product with its keys, and all prompts of a
grid are one batch of products. What a row sees in its prompt and in its own tokens is joined by the log-sum-exps of
both (as in FlashAttention's split keys, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tunesmith.executors.kernel.sizing.rows import filled

LEAST = -1e30
ROOM = 64  # cells: a row's own ones are doubled from here
STRIDE = 16  # a row's own cells are looked at by so many more at a time: oneDNN plans each shape of product anew
PLACES = 8


class Arena:
    """Keys and values of stretches of `room` tokens: in each layer [places, heads, room, dim], zero where never used.

    The first `used` places are taken. A layer's tensors are made when it first brings its keys.
    """

    def __init__(self, places: int, room: int) -> None:
        self.places = places
        self.room = room
        self.used = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors of a layer whose keys and values look like [1, heads, T, dim]."""
        if number == len(self.keys):
            for held, like in ((self.keys, key), (self.values, value)):
                held.append(like.new_zeros(self.places, like.shape[1], self.room, like.shape[3]))
        return self.keys[number], self.values[number]

    def take(self) -> int:
        """The next free place; twice as many are made where there is none."""
        if self.used == self.places:
            self.places *= 2
            self._rebuild()
        self.used += 1
        return self.used - 1

    def drop(self, place: int) -> None:
        """Free a place; what the last one holds moves there."""
        self.used -= 1
        if place != self.used:
            for held in (*self.keys, *self.values):
                held[place] = held[self.used]

    def widen(self, room: int) -> None:
        """See that each place has room for so many tokens."""
        if room > self.room:
            while self.room < room:
                self.room *= 2
            self._rebuild()

    def _rebuild(self) -> None:
        for held in (self.keys, self.values):
            for number, old in enumerate(held):
                held[number] = old.new_zeros(self.places, old.shape[1], self.room, old.shape[3])
                held[number][: old.shape[0], :, : old.shape[2]] = old


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt that rows continue: its tokens, its place in an arena, how many rows read it, whether more may come."""

    length: int
    arena: Arena
    place: int
    rows: int = 0
    open: bool = True


@dataclass(slots=True)
class _Grid:
    """The rows of an arena's prompts, as [prompts, width]: `cells` names one for each, again where a prompt has fewer.

    `straight` says that these are all rows in their order.
    """

    arena: Arena
    width: int
    cells: Tensor
    straight: bool


@dataclass(slots=True)
class _Plan:
    """What all layers need to know of a step: how far rows have come, in tokens of their own."""

    counts: Tensor
    longest: int
    flat: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int | None, list[Tensor]] = field(default_factory=dict)


class Cells:
    """The keys and values of up to `slots` rows, and the attention over them.

    `open` comes before a pass over packed prompts, whose layers `keep` their keys; `settle` and `plan` before a pass
    over all rows' latest tokens, whose layers `attend`. Layers are told apart by the order in which they call.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.device = device
        self.rows: list[Prompt] = []
        self.documents: tuple[int, ...] = ()
        self.bounds: Tensor | None = None
        self._own = Arena(slots, ROOM)
        self._opened: list[Prompt] = []
        self._arenas: dict[int, Arena] = {}
        self._prompts: list[Prompt] = []
        self._grids: list[_Grid] | None = None
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._order: Tensor | None = None
        self._longest = 0
        self._plan: _Plan | None = None
        self._layer = 0

    def room(self, lengths: Sequence[int]) -> int:
        """How many prompts out of these may be opened now: all, for memory is taken as it is needed."""
        return len(lengths)

    def open(self, lengths: Sequence[int]) -> list[Prompt]:
        """Places for prompts of these lengths; the next pass computes them, packed in this order."""
        opened = []
        for length in lengths:
            room = filled(length)
            arena = self._arenas.setdefault(room, Arena(PLACES, room))
            opened.append(Prompt(length, arena, arena.take()))
        self._prompts += opened
        self._opened = opened
        self.documents = tuple(lengths)
        self.bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)
        self._layer = 0
        return opened

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Store the next layer's keys and values of the opened prompts, [1, heads, T, dim]."""
        layer, self._layer = self._layer, self._layer + 1
        pieces = (torch.split(item[0], list(self.documents), 1) for item in (key, value))
        for prompt, *fresh in zip(self._opened, *pieces, strict=True):
            for held, piece in zip(prompt.arena.layer(layer, key, value), fresh, strict=True):
                held[prompt.place, :, : prompt.length] = piece

    def fits(self, prompt: Prompt) -> bool:
        """Whether one more row may begin that continues this prompt."""
        return True

    def seat(self, prompt: Prompt) -> None:
        """Begin one more row, the last, that continues a prompt."""
        prompt.rows += 1
        self.rows.append(prompt)
        self._own.take()
        self._grids = None

    def drop(self, row: int) -> None:
        """End a row; the last one takes its number."""
        prompt, last = self.rows[row], self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last
        self._own.drop(row)
        self._grids = None
        prompt.rows -= 1
        self._free(prompt)

    def close(self, prompt: Prompt) -> None:
        """No more rows will continue this prompt."""
        prompt.open = False
        self._free(prompt)

    def _free(self, prompt: Prompt) -> None:
        if not prompt.open and not prompt.rows:
            self._prompts.remove(prompt)
            prompt.arena.drop(prompt.place)
            for other in self._prompts:
                if other.arena is prompt.arena and other.place == prompt.arena.used:
                    other.place = prompt.place
            self._grids = None

    def _arrange(self) -> None:
        """Lay the rows out in grids, one for each arena with rows."""
        self._lengths = torch.tensor([prompt.length for prompt in self.rows], device=self.device)
        self._grids = []
        order, laid = [0] * len(self.rows), 0
        for arena in {id(prompt.arena): prompt.arena for prompt in self.rows}.values():
            members: list[list[int]] = [[] for _ in range(arena.used)]
            for row, prompt in enumerate(self.rows):
                if prompt.arena is arena:
                    members[prompt.place].append(row)
            width = max(map(len, members))
            for at, rows in enumerate(members):
                for number, row in enumerate(rows):
                    order[row] = laid + at * width + number
            laid += len(members) * width
            cells = [row for rows in members for row in (rows + (rows[:1] or [0]) * width)[:width]]
            straight = cells == list(range(len(self.rows)))
            self._grids.append(_Grid(arena, width, torch.tensor(cells, device=self.device), straight))
        plain = order == list(range(laid))
        self._order = None if plain else torch.tensor(order, device=self.device)

    def settle(self, longest: int) -> None:
        """Bring up to date what changes when rows come and go; none has more than `longest` tokens of its own."""
        if self._grids is None:
            self._arrange()
        self._own.widen(longest)
        self._longest = min(-(-longest // STRIDE) * STRIDE, self._own.room)

    def plan(self, counts: Tensor, places: Tensor) -> None:
        """Prepare for a pass over all rows' latest tokens: int64 [rows], how many of its own each row has with it."""
        self._plan, self._layer = _Plan(counts, self._longest), 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """The next layer's attention: query [1, heads, rows, dim] in, [1, rows, heads, dim] out. Keeps the others."""
        assert self._plan is not None
        assert self._grids is not None
        plan, layer, self._layer = self._plan, self._layer, self._layer + 1
        rows, heads, dim = len(self.rows), key.shape[1], key.shape[3]
        group, longest = query.shape[1] // heads, plan.longest
        held = self._own.layer(layer, key, value)
        flat = self._flat(plan, heads)
        for cells, fresh in zip(held, (key, value), strict=True):
            cells.view(-1, cells.shape[3]).index_copy_(0, flat, fresh[0].transpose(0, 1).flatten(0, 1))
        asked = query[0].transpose(0, 1).view(rows, heads, group, dim)
        own_keys, own_values = (cells[:rows, :, :longest] for cells in held)
        masks = self._masks(plan, window, group, query.dtype)
        out, total = softmax_over(asked, own_keys, own_values, masks[0].expand(-1, -1, group, -1), scale)
        parts, totals = [], []
        for grid, mask in zip(self._grids, masks[1:], strict=True):
            keys, values = (kept[layer][: grid.arena.used] for kept in (grid.arena.keys, grid.arena.values))
            part, part_total = softmax_over(_spread(grid, asked), keys, values, mask, scale)
            parts.append(_gathered(grid, part, group))
            totals.append(_gathered(grid, part_total[..., None], group))
        part, part_total = (pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in (parts, totals))
        if self._order is not None:
            part, part_total = part.index_select(0, self._order), part_total.index_select(0, self._order)
        weight = torch.sigmoid(part_total - total[..., None]).to(out.dtype)
        return torch.lerp(out, part, weight).view(1, rows, heads * group, -1)

    def _flat(self, plan: _Plan, heads: int) -> Tensor:
        """Where the rows' latest tokens go in a layer's cells, laid flat."""
        found = plan.flat.get(heads)
        if found is None:
            first = torch.arange(len(self.rows) * heads, device=self.device).view(-1, heads) * self._own.room
            found = plan.flat[heads] = (first + (plan.counts - 1)[:, None]).flatten()
        return found

    def _masks(self, plan: _Plan, window: int | None, group: int, dtype: torch.dtype) -> list[Tensor]:
        """Numbers to add to scores: for own tokens [rows, 1, 1, own], by grid [prompts, 1, width * group, room]."""
        found = plan.masks.get(window)
        if found is None:
            assert self._grids is not None
            own = torch.arange(plan.longest, device=self.device)[None]
            ends = plan.counts[:, None]
            hidden = own >= ends
            if window is not None:
                hidden |= own <= ends - 1 - window
            found = [_added(hidden, dtype)[:, None, None]]
            for grid in self._grids:
                before = torch.arange(grid.arena.room, device=self.device)[None]
                lengths = self._lengths[grid.cells][:, None]
                hidden = before >= lengths
                if window is not None:
                    hidden |= before <= lengths + ends[grid.cells] - 1 - window
                laid = _added(hidden, dtype).view(-1, 1, grid.width, 1, grid.arena.room)
                found.append(laid.expand(-1, -1, -1, group, -1).flatten(2, 3))
            plan.masks[window] = found
        return found


def softmax_over(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [b, heads, n, dim] with `mask` added to its scores, and their log-sum-exp [b, heads, n] in float32.

    On CPUs torch has both in one kernel, which saves a dozen small operations around the products of a few rows.
    """
    fused = _fused() if query.device.type == "cpu" else None
    if fused is not None:
        out, total = fused(query, keys, values, attn_mask=mask, scale=scale)
        return out, total
    scores = (query @ keys.mT).float() * scale + mask
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp().to(values.dtype) @ values, total


@cache
def _fused() -> Any:
    """torch's attention for CPUs that also returns the log-sum-exp; None where this torch has none."""
    return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _added(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """As numbers to add to scores. They are finite, so that a row which may see nothing weighs nothing, not NaN."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, LEAST)


def _spread(grid: _Grid, items: Tensor) -> Tensor:
    """[rows, heads, group, dim] as the grid's products take them, [prompts, heads, width * group, dim]."""
    laid = items if grid.straight else items.index_select(0, grid.cells)
    return laid.view(-1, grid.width, *laid.shape[1:]).transpose(1, 2).flatten(2, 3)


def _gathered(grid: _Grid, part: Tensor, group: int) -> Tensor:
    """The other way, to [prompts * width, heads, group, dim]."""
    prompts, heads = part.shape[:2]
    return part.view(prompts, heads, grid.width, group, -1).transpose(1, 2).flatten(0, 1)
