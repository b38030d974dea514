"""One step of writing: the model's own forward over all rows' latest tokens, and a token drawn for each.

All that changes from step to step lies on the device and is changed in place; the host looks only when it wants to
know which rows have ended.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunesmith.executors.kernel.loops import attention
from tunesmith.executors.kernel.loops.draw import pick
from tunesmith.executors.kernel.loops.merged import Merged
from tunesmith.executors.kernel.loops.paged import Graphs

NAME = "tunesmith_rollout"


class Store(Protocol):
    """Where keys and values are held, and the attention over them: `cells.Cells`, `paged.Pages`."""

    documents: tuple[int, ...]
    bounds: Tensor | None

    def room(self, lengths: Sequence[int]) -> int: ...
    def fits(self, prompt: Any) -> bool: ...
    def open(self, lengths: Sequence[int]) -> Sequence[Any]: ...
    def keep(self, key: Tensor, value: Tensor) -> None: ...
    def seat(self, prompt: Any) -> None: ...
    def drop(self, row: int) -> None: ...
    def close(self, prompt: Any) -> None: ...
    def settle(self, longest: int) -> None: ...
    def plan(self, counts: Tensor, places: Tensor) -> None: ...
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor: ...


def register() -> None:
    """Make NAME known to transformers. It has no mask function on purpose: masks are made where they are needed."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, rollout_attention)


def rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    store: Store | None = None,
    writing: bool = False,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over packed prompts, whose keys the store keeps, or of rows' latest tokens over all that it holds.

    Raises NotImplementedError where a model asks for what is not exact here: soft caps, sinks, dropout, a bias.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if store is None or query.shape[0] != 1 or attention_mask is not None or unsupported or dropout:
        raise NotImplementedError(f"rollout attention without {', '.join(unsupported) or 'a store'}")
    query, key, value = attention.lowered(query, key, value)
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings raise them under a CPU's autocast
    if writing:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return store.attend(query, key, value, scale, sliding_window), None
    store.keep(key, value)
    more: dict[str, Any] = {"documents": store.documents, "bounds": store.bounds, "sliding_window": sliding_window}
    return attention.packed_attention(module, query, key, value, None, scaling=scaling, **more)


class Decoder:
    """The rows being written, at most `slots` of at most `limit` tokens each; packed to the front, as in the store.

    token, place   int64 [slots], what each row is fed next, and its position in the text
    count, alive   int64 [slots], tokens of its own so far; 1 until one of `stops` or the limit
    ids, logps     [slots, limit + 1], what was written, and the numbers in `chances` that decide it
    With `graphs` a step is replayed as a CUDA graph. Nothing that a decoder holds refers back to it, so that the memory
    of its store goes with it at once.
    """

    def __init__(
        self,
        merged: Merged,
        store: Store,
        *,
        slots: int,
        limit: int,
        stops: Collection[int],
        temperature: float,
        graphs: bool = False,
    ) -> None:
        self.merged = merged
        self.store = store
        self.limit = limit
        self.temperature = temperature
        self.greedy = False
        self.rows = 0
        device = merged.net.device
        self.stops = torch.tensor(sorted(stops), dtype=torch.int64, device=device)
        self.token, self.place, self.count, self.alive = torch.zeros(4, slots, dtype=torch.int64, device=device)
        self.ids = torch.zeros(slots, limit + 1, dtype=torch.int64, device=device)
        self.logps = torch.zeros(slots, limit + 1, device=device)
        self.chances = torch.zeros(slots, limit + 1, dtype=torch.float64, device=device)
        self._ages: list[int] = []
        state = (self.token, self.place, self.count, self.alive)
        self._graphs = Graphs(slots, state) if graphs else None
        register()
        merged.model.set_attn_implementation(NAME)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Sequence[Any], Tensor]:
        """The store's places for prompts, and the logits [prompts, V] that follow each. One packed pass."""
        lengths = [len(ids) for ids in prompts]
        opened = self.store.open(lengths)
        device = self.token.device
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        places = torch.cat([torch.arange(length) for length in lengths]).to(device)
        ends = torch.tensor(lengths).cumsum(0).to(device) - 1

        def gather(_: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (states[0].index_select(1, ends), *states[1:])

        hook = self.merged.head.register_forward_pre_hook(gather)
        try:
            return opened, self._forward(ids, places, writing=False)
        finally:
            hook.remove()

    def begin(self, lengths: Sequence[int], logits: Tensor, chances: Tensor | None) -> None:
        """Begin the rows seated last: their prompts' lengths, logits [rows, V] that follow, chances [rows, n].

        Their first tokens are drawn here. Without chances the likeliest are taken, now and in each step to come.
        """
        rows = slice(self.rows, self.rows + len(lengths))
        self.rows += len(lengths)
        self._ages += [1] * len(lengths)
        self.count[rows] = 0
        self.alive[rows] = 1
        self.place[rows] = torch.tensor(lengths, device=self.place.device) - 1
        self.greedy = chances is None
        if chances is not None:
            self.chances[rows, : chances.shape[1]] = chances
        self._write(rows, logits)

    def step(self) -> None:
        """One more token for every row."""
        self.store.settle(min(max(self._ages), self.limit))
        if self._graphs is None:
            self._advance(self.rows)
        else:
            self._graphs(self.rows, self._advance, self.greedy)
        self._ages = [age + 1 for age in self._ages]

    @property
    def written(self) -> int:
        """Tokens of the rows being written; a few more where the device is ahead of the host."""
        return sum(self._ages)

    def ended(self) -> list[int]:
        """The rows that have ended, in order. Waits for the device."""
        return [row for row, alive in enumerate(self.alive[: self.rows].tolist()) if not alive]

    def take(self, rows: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Ids and log-probabilities of these rows. Waits for the device."""
        index = torch.tensor(rows, device=self.ids.device)
        counts = self.count[index].tolist()
        lines = zip(self.ids[index].tolist(), self.logps[index].tolist(), counts, strict=True)
        return [(ids[:count], logps[:count]) for ids, logps, count in lines]

    def drop(self, row: int) -> None:
        """End a row; the last one takes its number."""
        self.store.drop(row)
        self.rows -= 1
        last = self._ages.pop()
        if row < self.rows:
            self._ages[row] = last
            for held in (self.token, self.place, self.count, self.alive, self.ids, self.logps, self.chances):
                held[row] = held[self.rows]
        self.alive[self.rows] = 0

    def _advance(self, rows: int) -> None:
        part = slice(0, rows)
        self.store.plan(self.count[part], self.place[part])
        self._write(part, self._forward(self.token[part], self.place[part], writing=True))

    def _forward(self, ids: Tensor, places: Tensor, *, writing: bool) -> Tensor:
        more: dict[str, Any] = {"use_cache": False, "store": self.store, "writing": writing}
        with self.merged.net.amp():
            logits: Tensor = self.merged.model(input_ids=ids[None], position_ids=places[None], **more).logits
        return logits[0]

    def _write(self, rows: slice, logits: Tensor) -> None:
        """Draw a token for each of these rows and take it down; for rows that have ended, in vain."""
        count, alive = self.count[rows], self.alive[rows]
        at = count[:, None]
        chance = None if self.greedy else self.chances[rows].gather(1, at).squeeze(1)
        token, logp = pick(logits, chance, self.temperature)
        self.ids[rows].scatter_(1, at, token[:, None])
        self.logps[rows].scatter_(1, at, logp[:, None])
        self.token[rows] = token
        count += alive
        self.place[rows] += alive
        alive *= ~((token[:, None] == self.stops).any(1) | (count >= self.limit))
