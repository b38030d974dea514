"""Rollouts: samples of what the model writes with its weights of the moment, without another library.

Prompts go through the model once, whatever the number of their samples, and the model that writes has its adapter
merged in. How that is done is chosen when a rollout is made: the fastest way that a self-test finds to be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from tunesmith.executors.kernel.loops.batches import padded
from tunesmith.executors.kernel.loops.cells import Cells
from tunesmith.executors.kernel.loops.decode import Decoder
from tunesmith.executors.kernel.loops.merged import Merged
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.paged import Pages, affordable
from tunesmith.executors.kernel.loops.plain import Plain
from tunesmith.executors.kernel.loops.refill import Ask, Refill, Sample, Told
from tunesmith.executors.kernel.loops.selftest import Cut
from tunesmith.executors.kernel.loops.vllm import Vllm

__all__ = ["Ask", "Rollout", "Sample"]

Way = Literal["vllm", "graphs", "pages", "cells", "plain"]

HALVES = (torch.bfloat16, torch.float16)
TESTED = ((0, 3), (1, 41), (2, 12))  # rows and lengths of the prompts that the self-test makes up
WRITTEN = 5  # tokens that it has written to each
# How far log-probabilities may lie from those of the model in training, in nats on average, by how exact it computes.
APART = {True: 1e-3, False: 0.15}


class Rollout:
    """Writes up to `slots` samples at a time, each until one of `stops` or `max_completion` tokens.

    `way` is how: "vllm" where an `engine` is given that makes one; "graphs" and "pages" on CUDA in half precision
    (paged keys, with and without graphs of the steps); "cells" on any device; "plain" (the model's own attention and
    cache, prompt by prompt) where nothing else is right.
    `problems` says in words why a faster way was not taken.
    """

    def __init__(
        self,
        net: Net,
        *,
        stops: frozenset[int],
        max_completion: int,
        temperature: float,
        slots: int,
        engine: Callable[[], Vllm] | None = None,
    ) -> None:
        self.net = net
        self.stops = stops
        self.max_completion = max_completion
        self.temperature = temperature
        self.slots = slots
        self.engine = engine
        self.vllm: Vllm | None = None
        self.merged: Merged | None = None
        self._paged: tuple[Pages, Decoder] | None = None
        self.way: Way = "plain"
        self.problems: tuple[str, ...] = ()
        self._choose()

    def refresh(self) -> None:
        """Merge the weights as they are now. To be called after every optimizer step, and after weights were loaded."""
        held = self.vllm or self.merged
        if held is not None:
            held.refresh()

    def generate(
        self,
        asks: Sequence[Ask],
        *,
        key: str,
        greedy: bool = False,
        told: Told | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> list[Sample] | None:
        """The samples by ask, then by sample, as asked; None where `stopped` said so, looked at between tokens.

        Every random number follows from (key, row, sample, position). `told` hears of tokens and samples written.
        """
        if not all(ask.ids for ask in asks):
            raise ValueError("a prompt needs at least one token")
        held = self.vllm or self.merged
        if held is not None and held.stale:
            held.refresh()
        return self._write(asks, None if greedy else key, self.stops, self.max_completion, told, stopped)

    def narrow(self, slots: int) -> None:
        """Write only so many samples at a time from now on."""
        self.slots = slots
        self._paged = None

    def hold(self, longest: int) -> None:
        """Take the memory that is kept between calls, pages if any, for prompts of up to so many tokens."""
        if self.way in ("graphs", "pages"):
            self._decoder(longest, self.stops, self.max_completion)

    @torch.inference_mode()
    def _write(
        self,
        asks: Sequence[Ask],
        key: str | None,
        stops: frozenset[int],
        limit: int,
        told: Told | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> list[Sample] | None:
        if self.vllm is not None:
            return self.vllm.write(asks, key, stops, limit, told, stopped)
        if self.way == "plain":
            return self._plainly(asks, key, stops, limit, told, stopped)
        decoder = self._decoder(max((len(ask.ids) for ask in asks), default=1), stops, limit)
        made = Refill(decoder, asks, key=key, slots=self.slots, stops=stops).run(told, stopped)
        if made is None:
            self._paged = None  # rows are still in it
        return made

    def _decoder(self, longest: int, stops: frozenset[int], limit: int) -> Decoder:
        """A decoder with an empty store. Pages are kept from call to call, for graphs know where they lie."""
        assert self.merged is not None
        more: dict[str, Any] = {"slots": self.slots, "limit": limit, "stops": stops, "temperature": self.temperature}
        if self.way == "cells":
            return Decoder(self.merged, Cells(self.slots, self.net.device), **more)
        kept = self._paged
        if kept is None or kept[0].longest < longest or kept[0].limit != limit or kept[1].stops.numel() != len(stops):
            self._paged = kept = None  # its pages are free memory before new ones are made
            store = self._pages(longest, limit)
            self._paged = kept = (store, Decoder(self.merged, store, **more, graphs=self.way == "graphs"))
        return kept[1]

    def _pages(self, longest: int, limit: int) -> Pages:
        device = self.net.device
        torch.cuda.empty_cache()
        count = affordable(self.slots, limit, longest, self.token_bytes, torch.cuda.mem_get_info(device)[0])
        return Pages(self.slots, limit, longest, device, count=count)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        config = self.net.causal.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = self.net.head.weight.dtype.itemsize if self.net.autocast is None else self.net.autocast.itemsize
        return int(2 * config.num_hidden_layers * heads * dim * size)

    def _plainly(
        self,
        asks: Sequence[Ask],
        key: str | None,
        stops: frozenset[int],
        limit: int,
        told: Told | None,
        stopped: Callable[[], bool] | None,
    ) -> list[Sample] | None:
        writer = Plain(self.net, slots=self.slots, limit=limit, stops=stops, temperature=self.temperature)
        samples: list[Sample] = []
        training = self.net.outer.training
        self.net.outer.eval()
        try:
            for ask in asks:
                made = writer.write(ask.row, ask.ids, list(ask.samples), key=key, stopped=stopped)
                if made is None:
                    return None
                for number, (ids, logps) in zip(ask.samples, made, strict=True):
                    samples.append(Sample(ask.row, number, ids, logps, ids[-1] in stops))
                if told is not None:
                    told(sum(len(sample.ids) for sample in samples), len(samples))
        finally:
            self.net.outer.train(training)
        return samples

    # --- which way is exact -----------------------------------------------------------------------------------------

    def _ways(self) -> Iterator[Way]:
        if self.engine is not None:
            yield "vllm"
        half = self.net.autocast in HALVES or self.net.head.weight.dtype in HALVES
        if self.net.device.type == "cuda" and half:
            yield from ("graphs", "pages")
        yield "cells"

    def _choose(self) -> None:
        """Take the fastest way whose samples have the log-probabilities that the model in training gives them."""
        for way in self._ways():
            self.way = way
            try:
                if way == "vllm" and self.engine is not None:
                    self.vllm = self.engine()
                elif self.merged is None:
                    self.merged = Merged(self.net)
                gap = self._gap()
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # any model's own code
                said = (str(error).splitlines() or [""])[0][:120]
                found = f"fails on this model ({type(error).__name__}: {said})"
            else:
                if gap <= APART[self._exact()]:
                    return
                found = f"differs from the model in training by {gap:.1e} nats a token"
            self._paged = None
            if self.vllm is not None:
                self.vllm.close()
                self.vllm = None
            self.problems += (f"Writing samples by {way} {found}.",)
        self.way, self.merged = "plain", None
        self.problems += ("Samples are written prompt by prompt with the model's own attention, which takes longer.",)

    def _exact(self) -> bool:
        return self.net.autocast is None and all(item.dtype == torch.float32 for item in self.net.outer.parameters())

    def _gap(self) -> float:
        """Mean distance of a few samples' log-probabilities from those of a plain pass of the model in training."""
        draw = torch.Generator().manual_seed(0)
        words = self.net.causal.get_input_embeddings().num_embeddings
        asks = [Ask(row, torch.randint(words, (length,), generator=draw).tolist(), (0, 1)) for row, length in TESTED]
        samples = self._write(asks, "self-test", frozenset(), WRITTEN)
        assert samples is not None
        prompts = {ask.row: list(ask.ids) for ask in asks}
        lines = [
            Cut(at, prompts[sample.row] + sample.ids, [-100] * len(prompts[sample.row]) + sample.ids)
            for at, sample in enumerate(samples)
        ]
        training = self.net.outer.training
        self.net.outer.eval()
        try:
            with torch.no_grad(), self.net.amp():
                logits = torch.cat([self.net.logits(padded([line], 1, 0)[0].to(self.net.device)) for line in lines])
        finally:
            self.net.outer.train(training)
        wanted = (logits.float() / self.temperature).log_softmax(-1)
        ids = torch.tensor([token for sample in samples for token in sample.ids], device=wanted.device)
        told = torch.tensor([logp for sample in samples for logp in sample.logps], device=wanted.device)
        return float((wanted.gather(1, ids[:, None]).squeeze(1) - told).abs().mean())
