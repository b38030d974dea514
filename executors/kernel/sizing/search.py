"""The search: of the knobs left on `auto`, those that keep most quality, and of these the fastest that fit.

Some knobs leave the result as it is: micro-batch with accumulation, packing, activation checkpointing. Others cost a
little of it: a 16-bit float with scaled losses, Adam's moments in 8 bits, a base in 4 bits. Every combination of the
first kind is tried with each of the second, best quality first; what fits is ranked by the speed that time.py
foretells. Length, rank, targets, method and model are not turned here at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from tunesmith.executors.kernel.sizing import defaults, size
from tunesmith.executors.kernel.sizing.job import Job, Knobs
from tunesmith.executors.kernel.sizing.rows import THROUGH_TRL, shares
from tunesmith.executors.kernel.sizing.size import Kind, Layout
from tunesmith.orchestrator.nouns import Device

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768, "mps": 8192}  # a micro-batch of more tokens is no faster
AS_FAST = 0.99  # of the best rate: what is foretold is not known better than that
_UNKNOWN = (30e12, 300e9)  # FLOP/s and bytes/s to compare knobs by on a device of which nothing is known

Quality = tuple[Kind, str, str]  # what costs some of it: adapter kind, dtype, optimizer


@dataclass(frozen=True, slots=True)
class Tried:
    """One combination. `rate`: optimizer steps a second, as foretold for what fits."""

    knobs: Knobs
    layout: Layout
    rate: float = 0.0

    @property
    def need(self) -> int:
        """Bytes that it may need at most, by the high estimate."""
        return int(size.peak(self.layout).high)


@dataclass(frozen=True, slots=True)
class Found:
    """The best combination, or where none fits the one that needs least; and what the choice was between.

    fitted    all that fit with the quality of the best
    refused   of each series of growing micro-batches, the first that did not fit, and the whole step if it did not
    """

    best: Tried
    fits: bool
    fitted: tuple[Tried, ...]
    refused: tuple[Tried, ...]


def search(job: Job) -> Found:
    """The best knobs for a job. Cost: some hundred evaluations of closed forms, a few milliseconds."""
    refused: list[Tried] = []
    device, whole = _of_known_speed(job.device), job.counted
    sizes = {packing: [*_rows_at_once(job, packing)] for packing in packings(job)}
    for kind, dtype, optimizer in qualities(job):
        fitted: list[Tried] = []
        for packing, checkpointing in product(sizes, _checkpointing(job)):
            over = False
            for rows in sizes[packing]:
                if over and rows < whole:  # a whole step at once finds no gradients from before: it may need less
                    continue
                knobs = Knobs(
                    kind=kind,
                    dtype=dtype,
                    optimizer=optimizer,
                    checkpointing=checkpointing,
                    packing=packing,
                    rows=rows,
                )
                layout = job.layout(knobs)
                if not size.fits(layout, job.budget):
                    refused.append(Tried(knobs, layout))
                    over = True
                    continue
                fitted.append(Tried(knobs, layout, job.rate(knobs, device)))
        if fitted:
            return Found(_fastest(fitted), True, tuple(fitted), tuple(refused))
    return Found(min(refused, key=lambda one: one.need), False, (), tuple(refused))


def _fastest(fitted: list[Tried]) -> Tried:
    """The fastest; of those as fast, packed before padded, without recomputing before with it, many rows before few."""
    best = max(one.rate for one in fitted)
    alike = [one for one in fitted if one.rate >= AS_FAST * best]
    return max(alike, key=lambda one: (one.knobs.packing, not one.knobs.checkpointing, one.knobs.rows))


def _of_known_speed(device: Device) -> Device:
    return device if device.peak_flops else replace(device, peak_flops=_UNKNOWN[0], bandwidth=_UNKNOWN[1])


# --- what there is to choose from -----------------------------------------------------------------------------------


def qualities(job: Job) -> Iterator[Quality]:
    """(adapter kind, dtype, optimizer) that the user allows and the device can do, the best quality first."""
    train, adapter = job.spec.train, job.spec.adapter
    kinds: list[Kind] = ["lora"] if adapter.kind == "auto" else [adapter.kind]
    if adapter.kind == "auto" and defaults.no_4bit(job.device) is None:
        kinds.append("qlora")
    for kind in kinds:
        optimizers: list[str] = ["adamw"] if train.optimizer == "auto" else [train.optimizer]
        if train.optimizer == "auto" and kind == "none" and defaults.no_8bit(job.device) is None:
            optimizers.append("adamw-8bit")
        for dtype, optimizer in product(_dtypes(job), optimizers):
            yield kind, dtype, optimizer


def _dtypes(job: Job) -> list[str]:
    """The usual type; where that is float32 for want of bfloat16, float16 too, which losses are scaled for."""
    if job.spec.train.dtype != "auto":
        return [job.spec.train.dtype]
    usual = defaults.dtype(job.device, job.spec.adapter.kind == "none")[0]
    overflows = job.facts.model_type.startswith("gemma")
    scaled = job.device.kind == "cuda" and usual == "float32" and not overflows
    return [usual, "float16"] if scaled else [usual]


def packings(job: Job) -> list[bool]:
    """Whether rows may share a sequence: the usual first; padded too where a packed micro-batch might be too large."""
    if job.spec.train.packing != "auto":
        return [job.spec.train.packing]
    usual, _ = defaults.packing(job.spec.method, job.length, job.report.tokens)
    return [True, False] if usual else [False]


def _checkpointing(job: Job) -> list[bool]:
    given = job.spec.train.activation_checkpointing
    return [False, True] if given == "auto" else [given]


def _rows_at_once(job: Job, packing: bool) -> Iterator[int]:
    """Micro-batches to try, the smallest first: those that split the effective batch most evenly."""
    given, counted, ranks = job.spec.train.micro_batch, job.counted, job.ranks
    if job.spec.method in THROUGH_TRL:
        sizes = shares(job.spec.method, counted)
        if given != "auto":
            sizes = [max((rows for rows in sizes if rows <= given), default=sizes[0])]
    elif given != "auto":
        sizes = [given]
    else:
        sizes = sorted({math.ceil(counted / count) for count in range(1, counted + 1)})
    for rows in sizes:
        knobs = Knobs(kind="lora", dtype="", optimizer="", checkpointing=False, packing=packing, rows=rows)
        many = job.tokens(knobs)[0] > TOKENS_AT_ONCE[job.device.kind]
        if rows > sizes[0] and (many or (ranks > 1 and job.batches(knobs) < ranks)):
            return
        yield rows
