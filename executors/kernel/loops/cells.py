"""Keys and values of what is being written, on any device: each prompt's once, each sample's own beside it.

Rows are the samples being written, packed to the front: where one ends, the last takes its place. Prompts of about the
same length share a grid, so that all queries of a prompt's samples are one product with its keys, and all prompts of a
grid are one batch of products. A row's scores over its prompt and over its own tokens meet in one softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from tunesmith.executors.kernel.sizing.rows import filled

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
    """The rows of an arena's prompts, as [prompts, width]: `cells` names a row for each, `real` those that are."""

    arena: Arena
    width: int
    cells: Tensor
    rows: Tensor
    real: Tensor | None


@dataclass(slots=True)
class _Plan:
    """What all layers need to know of a step: how far rows have come, in tokens of their own."""

    counts: Tensor
    longest: int
    flat: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int | None, Tensor] = field(default_factory=dict)


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
        self._before = 0
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
        lengths = [prompt.length for prompt in self.rows]
        self._lengths = torch.tensor(lengths, device=self.device)
        self._grids, self._before = [], 0
        for arena in {id(prompt.arena): prompt.arena for prompt in self.rows}.values():
            members: list[list[int]] = [[] for _ in range(arena.used)]
            for row, prompt in enumerate(self.rows):
                if prompt.arena is arena:
                    members[prompt.place].append(row)
            width = max(map(len, members))
            cells = [(rows + (rows[:1] or [0]) * width)[:width] for rows in members]
            real = [at * width + n for at, rows in enumerate(members) for n in range(len(rows))]
            flat = [row for rows in members for row in rows]
            self._grids.append(
                _Grid(
                    arena,
                    width,
                    torch.tensor([row for line in cells for row in line], device=self.device),
                    torch.tensor(flat, device=self.device),
                    None if len(real) == width * len(members) else torch.tensor(real, device=self.device),
                )
            )
            self._before = max(self._before, arena.room)

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
        group, longest, before = query.shape[1] // heads, plan.longest, self._before
        held = self._own.layer(layer, key, value)
        flat = self._flat(plan, heads)
        for cells, fresh in zip(held, (key, value), strict=True):
            cells.view(-1, cells.shape[3]).index_copy_(0, flat, fresh[0].transpose(0, 1).flatten(0, 1))
        own_keys, own_values = (cells[:rows].flatten(0, 1)[:, :longest] for cells in held)
        asked = (query[0].transpose(0, 1) * scale).reshape(rows, heads, group, dim)

        scores = torch.empty(rows, heads, group, before + longest, device=self.device)
        own = torch.bmm(asked.view(rows * heads, group, dim), own_keys.transpose(1, 2))
        scores[..., before:] = own.view(rows, heads, group, longest)
        for grid in self._grids:
            keys = grid.arena.keys[layer][: grid.arena.used].flatten(0, 1)
            part = torch.bmm(_spread(grid, asked), keys.transpose(1, 2))
            scores[..., : grid.arena.room].index_copy_(0, grid.rows, _gathered(grid, part, group).float())
        shares = scores.masked_fill_(self._mask(plan, window), -torch.inf).softmax(-1).to(value.dtype)

        out = torch.bmm(shares.flatten(0, 1)[..., before:], own_values).view(rows, heads, group, -1)
        for grid in self._grids:
            values = grid.arena.values[layer][: grid.arena.used].flatten(0, 1)
            part = torch.bmm(_spread(grid, shares[..., : grid.arena.room]), values)
            out.index_add_(0, grid.rows, _gathered(grid, part, group))
        return out.view(1, rows, heads * group, -1)

    def _flat(self, plan: _Plan, heads: int) -> Tensor:
        """Where the rows' latest tokens go in a layer's cells, laid flat."""
        found = plan.flat.get(heads)
        if found is None:
            first = torch.arange(len(self.rows) * heads, device=self.device).view(-1, heads) * self._own.room
            found = plan.flat[heads] = (first + (plan.counts - 1)[:, None]).flatten()
        return found

    def _mask(self, plan: _Plan, window: int | None) -> Tensor:
        """True where a row may not look, [rows, 1, 1, prompt + own]."""
        found = plan.masks.get(window)
        if found is None:
            lengths, counts = self._lengths[:, None], plan.counts[:, None]
            prompt = torch.arange(self._before, device=self.device)[None]
            own = torch.arange(plan.longest, device=self.device)[None]
            hidden = [prompt >= lengths, own >= counts]
            if window is not None:
                hidden[0] |= prompt <= lengths + counts - 1 - window
                hidden[1] |= own <= counts - 1 - window
            found = plan.masks[window] = torch.cat(hidden, 1)[:, None, None]
        return found


def _spread(grid: _Grid, items: Tensor) -> Tensor:
    """[rows, heads, group, width] as the grid's products take them, [prompts * heads, rows each * group, width]."""
    laid = items.index_select(0, grid.cells)
    laid = laid.view(-1, grid.width, *laid.shape[1:]).transpose(1, 2)
    return laid.flatten(0, 1).flatten(1, 2)


def _gathered(grid: _Grid, part: Tensor, group: int) -> Tensor:
    """The other way, to [rows, heads, group, width] in the order of `grid.rows`."""
    prompts = len(grid.cells) // grid.width
    laid = part.view(prompts, -1, grid.width, group, part.shape[-1]).transpose(1, 2).flatten(0, 1)
    return laid if grid.real is None else laid.index_select(0, grid.real)
