"""Keys and values in pages, read by torch's varlen attention: the way of CUDA in half precision.

A prompt's full pages are shared by all rows that continue it; its last, partly filled one is copied for each row, whose
own tokens go on in it. Rows hold all the pages that they may come to need, so no row ever waits for memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

PAGE = 256  # tokens: flash attention 2 reads pages of no other size
SCRATCH = 0  # the page of rows that are not there
NEEDED = frozenset({"block_table", "seqused_k", "window_size", "enable_gqa", "num_splits"})
SPARE = 0.6  # of the free memory that pages may take


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt that rows continue: its tokens, its pages, how many rows read them, whether more may come."""

    length: int
    pages: list[int]
    rows: int = 0
    open: bool = True


def varlen() -> Callable[..., Any]:
    """torch's varlen attention. Raises NotImplementedError where this version of torch cannot read pages."""
    from torch.nn.attention import varlen as module

    missing = NEEDED - set(inspect.signature(module.varlen_attn).parameters)
    if missing:
        raise NotImplementedError(f"paged attention on torch {torch.__version__}, which lacks {min(missing)}")
    function: Callable[..., Any] = module.varlen_attn
    return function


class Pages:
    """The keys and values of up to `slots` rows of `limit` tokens each, after prompts of up to `longest`.

    Pool 0 is made when the first layer brings its keys, and so on: [pages, PAGE, heads, dim] for keys and for values.
    `count` pages are enough for every row and as many prompts, or what `device` has room for. What changes from step
    to step is derived from positions on the device, so that a step can be captured as a graph; `settle` uploads what
    changes when rows come and go.
    """

    def __init__(
        self,
        slots: int,
        limit: int,
        longest: int,
        device: torch.device,
        *,
        count: int | None = None,
        attention: Callable[..., Any] | None = None,
    ) -> None:
        self.limit = limit
        self.longest = longest
        self.device = device
        self.width = _pages(longest + limit)
        self.count = 1 + slots * (self.width + _pages(longest)) if count is None else count
        if self.count < 1 + self.width + _pages(longest):
            raise ValueError(f"{self.count} pages are too few for one row of {self.width}")
        self.documents: tuple[int, ...] = ()
        self.bounds: Tensor | None = None
        self.rows: list[Prompt] = []
        self.table = torch.full((slots, self.width), SCRATCH, dtype=torch.int32, device=device)
        self._attention = varlen() if attention is None else attention
        self._queries = torch.arange(slots + 1, dtype=torch.int32, device=device)
        self._room = self._queries * (self.width * PAGE)
        self._lines = torch.full((slots, self.width), SCRATCH, dtype=torch.int32)
        self._own: list[list[int]] = []
        self._free = list(range(self.count - 1, SCRATCH, -1))
        self._copies: dict[int, int] = {}
        self._changed = False
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._cells = self._used = torch.zeros(0, dtype=torch.int64)
        self._layer = 0

    # --- who holds which page ---------------------------------------------------------------------------------------

    def room(self, lengths: Sequence[int]) -> int:
        """How many of these prompts, from the first on, may be opened and still leave the pages of one row."""
        ends = accumulate(map(_pages, lengths))
        return sum(end + self.width <= len(self._free) for end in ends)

    def fits(self, prompt: Prompt) -> bool:
        """Whether one more row may begin that continues this prompt."""
        return len(self._free) >= self._needed(prompt)

    def open(self, lengths: Sequence[int]) -> list[Prompt]:
        """Pages for prompts of these lengths; the next pass computes them, packed in this order."""
        self._copy()
        opened = [Prompt(length, [self._free.pop() for _ in range(_pages(length))]) for length in lengths]
        self.documents = tuple(lengths)
        self.bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)
        cells = [
            torch.tensor(prompt.pages).repeat_interleave(PAGE)[: prompt.length] * PAGE
            + torch.arange(prompt.length) % PAGE
            for prompt in opened
        ]
        self._cells = torch.cat(cells).to(self.device)
        self._layer = 0
        return opened

    def seat(self, prompt: Prompt) -> None:
        """Begin one more row, the last, that continues a prompt."""
        own = [self._free.pop() for _ in range(self._needed(prompt))]
        shared = prompt.pages[: prompt.length // PAGE]
        if prompt.length % PAGE:
            self._copies[own[0]] = prompt.pages[-1]
        prompt.rows += 1
        line = self._lines[len(self.rows)]
        line.fill_(SCRATCH)
        line[: len(shared) + len(own)] = torch.tensor(shared + own)
        self.rows.append(prompt)
        self._own.append(own)
        self._changed = True

    def drop(self, row: int) -> None:
        """End a row; the last one takes its number."""
        prompt, own, end = self.rows[row], self._own[row], len(self.rows) - 1
        self.rows[row], self._own[row] = self.rows[end], self._own[end]
        self.rows.pop()
        self._own.pop()
        self._lines[row] = self._lines[end]
        self._lines[end] = SCRATCH
        self._changed = True
        for page in own:
            self._copies.pop(page, None)
        self._free += reversed(own)
        prompt.rows -= 1
        self._release(prompt)

    def close(self, prompt: Prompt) -> None:
        """No more rows will continue this prompt."""
        prompt.open = False
        self._release(prompt)

    def _release(self, prompt: Prompt) -> None:
        if not prompt.open and not prompt.rows:
            self._free += reversed(prompt.pages)
            prompt.pages = []

    def _needed(self, prompt: Prompt) -> int:
        return _pages(prompt.length + self.limit) - prompt.length // PAGE

    # --- what the device sees ---------------------------------------------------------------------------------------

    def settle(self, longest: int) -> None:
        """Upload what has changed since the last step."""
        self._copy()
        if self._changed:
            self.table.copy_(self._lines)
            self._changed = False

    def _copy(self) -> None:
        """Give new rows their copies of prompts' last pages."""
        if self._copies:
            both = zip(*self._copies.items(), strict=True)
            to, source = (torch.tensor(list(side), device=self.device) for side in both)
            for pool in (*self._keys, *self._values):
                pool.index_copy_(0, to, pool.index_select(0, source))
            self._copies = {}

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Store the next layer's keys and values of the opened prompts, [1, heads, T, dim]."""
        layer, self._layer = self._layer, self._layer + 1
        if layer == len(self._keys):
            for pools, like in ((self._keys, key), (self._values, value)):
                pools.append(like.new_zeros(self.count, PAGE, like.shape[1], like.shape[3]))
        self._store(layer, key, value)

    def plan(self, counts: Tensor, places: Tensor) -> None:
        """Prepare for a pass over the latest tokens of the first rows, which stand at these positions, int64 [rows].

        There may be more of them than rows: those write to the scratch page.
        """
        pages = self.table[: len(places)].gather(1, (places // PAGE)[:, None]).squeeze(1)
        self._cells = pages.long() * PAGE + places % PAGE
        self._used = (places + 1).int()
        self._layer = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """The next layer's attention: query [1, heads, rows, dim] in, [1, rows, heads, dim] out. Keeps the others."""
        layer, self._layer = self._layer, self._layer + 1
        self._store(layer, key, value)
        rows, room = query.shape[2], self.width * PAGE
        out: Tensor = self._attention(
            query[0].transpose(0, 1).contiguous(),
            self._keys[layer],
            self._values[layer],
            self._queries[: rows + 1],
            self._room[: rows + 1],  # flash attention 2 asks for it, and then goes by `seqused_k`
            1,
            room,
            scale=scale,
            window_size=(-1, -1) if window is None or window >= room else (window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=self._used,
            block_table=self.table[:rows],
            num_splits=1,  # a row's result is the same whatever else is in the batch
        )
        return out[None]

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        for pool, fresh in ((self._keys[layer], key), (self._values[layer], value)):
            pool.flatten(0, 1).index_copy_(0, self._cells, fresh[0].transpose(0, 1))


def affordable(rows: int, limit: int, longest: int, per_token: int, free: int) -> int:
    """How many pages to make: enough for all rows and their prompts, but no more than `free` bytes have room for.

    `per_token` is what a token's keys and values take in all layers. At least one row and its prompt are provided for.
    """
    width, prompt = _pages(longest + limit), _pages(longest)
    wanted = 1 + rows * (width + prompt)
    return max(1 + width + prompt, min(wanted, int(free * SPARE) // (PAGE * per_token)))


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


class Graphs:
    """A step for any number of rows, replayed as a CUDA graph: one for each kind and bucket of rows, made when needed.

    `state` is what a step changes and cannot be done twice: it is put back after a capture's warm-up.
    """

    def __init__(
        self,
        slots: int,
        state: Sequence[Tensor],
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self.buckets = [*(bucket for bucket in (1, 2, 4, 8, *range(16, slots, 16)) if bucket < slots), slots]
        self._state = state
        self._capture = capture
        self._graphs: dict[tuple[Hashable, int], Callable[[], None]] = {}
        self._pool: Any = None

    def __call__(self, rows: int, advance: Callable[[int], None], kind: Hashable) -> None:
        """Do the step `advance(rows)`.

        It must only read and write tensors that stay where they are, and bear with rows that are not there. A graph
        holds the branches that Python took when it was captured: `kind` names what they follow from.
        """
        bucket = next(bucket for bucket in self.buckets if bucket >= rows)
        if (kind, bucket) not in self._graphs:
            kept = [item.clone() for item in self._state]
            self._graphs[kind, bucket] = (self._capture or self._captured)(lambda: advance(bucket))
            for item, before in zip(self._state, kept, strict=True):
                item.copy_(before)
        self._graphs[kind, bucket]()

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        self._pool = self._pool or graph.pool()
        replay: Callable[[], None] = graph.replay
        return replay
