"""How a job would do on another card: the smallest that would do, the next smaller and the next larger one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tunesmith.executors.kernel.sizing.cards import CARDS, Card
from tunesmith.executors.kernel.sizing.job import Job
from tunesmith.executors.kernel.sizing.search import Found
from tunesmith.executors.kernel.sizing.settle import again
from tunesmith.orchestrator.nouns import Elsewhere

_NEAR = 0.1  # cards whose memory differs by less are of one size


def smallest(job: Job) -> tuple[Card, Found] | None:
    """The smallest card on which a job fits, the fastest of that size; None where none is large enough."""
    for size in sorted({card.gb for card in CARDS}):
        for card in reversed([one for one in CARDS if one.gb == size]):
            found = on(job, card)
            if found.fits:
                return card, found
    return None


def on(job: Job, card: Card) -> Found:
    """The job on a card, without a cap on its memory: that was for the device which the job is on."""
    spec = replace(job.spec, limits=replace(job.spec.limits, memory_gb=None))
    return again(job, spec=spec, device=card.device("elsewhere"))[1]


def around(job: Job, found: Found) -> tuple[Elsewhere, ...]:
    """The next smaller and the next larger card than what there is; for a CPU, the smallest card that would do."""
    if job.device.kind != "cuda":
        will = smallest(job) if job.ranks == 1 else None
        return (_elsewhere(job, found, will[0]),) if will is not None else ()
    return tuple(_elsewhere(job, found, card) for card in _next_to(job.budget))


def _next_to(memory: int) -> Iterator[Card]:
    smaller = [card for card in CARDS if card.bytes < (1 - _NEAR) * memory]
    larger = [card for card in CARDS if card.bytes > (1 + _NEAR) * memory]
    if smaller:
        yield max(smaller, key=lambda card: (card.gb, card.flops))
    if larger:
        yield min(larger, key=lambda card: (card.gb, -card.flops))


def _elsewhere(job: Job, found: Found, card: Card) -> Elsewhere:
    there = on(job, card)
    known = found.fits and there.fits and job.device.peak_flops
    return Elsewhere(
        hardware=card.name,
        memory_bytes=card.bytes,
        fits=there.fits,
        speed=round(there.best.rate / found.best.rate, 3) if known else None,
    )
