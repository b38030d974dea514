"""What the real model must show before step one: that packing, shared prompts and the chunked head change nothing.

A model that computes something else (a soft cap behind the head, attention that ignores `documents`) falls back to
padded batches or to its own head, and the run says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops import loss
from tunesmith.executors.kernel.loops.batches import Batch, Row, packed, padded
from tunesmith.executors.kernel.loops.forks import Tree, forked
from tunesmith.executors.kernel.loops.model import Net

ROWS = 4
TOKENS = {"cpu": 128, "cuda": 2048}

# Differences allowed, relative, by how exact the model computes. Measured on SmolLM2-135M: rows that see each other
# differ by 1.25, attention in float32 instead of bfloat16 by 0.05. Packed rows differ from the same ones alone by
# nothing where products of any size round alike, and by 0.05 where they do not (AMX): as much as the model's own padded
# batch differs from its single rows, which is what they are measured by.
APART = {True: 1e-4, False: 3e-2}
ATTENTION = {True: 1e-4, False: 0.2}
NOISES = 2.0


@dataclass(frozen=True, slots=True)
class Cut:
    """A row cut short for the test, numbered by its place in it; all of it is scored."""

    row: int
    ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Relative differences, None where not tested, and what went wrong in words.

    noise      the model's own padded batch against its own single rows: what rounding alone amounts to
    packing    rows packed together against the same rows one at a time
    attention  packed attention on one row against the model's own
    sharing    answers to a prompt computed once against the same answers packed, each with its own prompt
    head       the chunked loss against that of the model's own logits
    """

    noise: float | None
    packing: float | None
    attention: float | None
    sharing: float | None
    head: float | None
    problems: tuple[str, ...]


def check(net: Net, rows: Sequence[Row], *, pad_id: int) -> Verdict:
    """Compare packed with per-row logits, and the chunked with the model's own head; switch off what differs.

    Sets `net.packed`, `net.forked` and `net.chunked`. Costs some twenty forward passes over short rows.
    """
    limit = TOKENS.get(net.device.type, 256)
    long_enough = [row for row in rows[: 4 * ROWS] if len(row.ids) > 1][:ROWS]
    cut = [Cut(at, row.ids[:limit], row.ids[:limit]) for at, row in enumerate(long_enough)]
    if not cut:
        return Verdict(None, None, None, None, None, ())
    training = net.outer.training
    net.outer.eval()
    try:
        with torch.no_grad(), net.amp():
            return _check(net, cut, pad_id)
    finally:
        net.outer.train(training)


def _check(net: Net, cut: Sequence[Cut], pad_id: int) -> Verdict:
    exact = net.exact
    problems = []
    single = torch.cat([net.logits(padded([row], 1, pad_id)[0].to(net.device)) for row in cut]).float()
    noise = head = together = own = shared = None
    if net.chunked:
        head = _head(net, cut, pad_id, single)
        if not head <= APART[exact]:
            net.chunked = False
            problems.append(f"the model's head does more than multiply (difference {head:.1e}); its own is used")
    if net.packed:
        noise = 0.0 if exact else _apart(_padded(net, cut, pad_id), single)
        try:
            alone = torch.cat([_packed(net, [row]) for row in cut])
            own, together = _apart(alone, single), _apart(_packed(net, cut), alone)
        except (NotImplementedError, TypeError, ValueError, RuntimeError, KeyError) as error:
            problems.append(f"packed attention does not run on this model ({type(error).__name__}); rows are padded")
            net.packed = False
    apart = min(max(APART[exact], NOISES * (noise or 0.0)), ATTENTION[exact])
    for difference, allowed, what in (
        (together, apart, "packed rows differ from single ones"),
        (own, ATTENTION[exact], "packed attention differs from the model's own"),
    ):
        if difference is not None and not difference <= allowed:
            problems.append(f"{what} by {difference:.1e}; rows are padded")
            net.packed = False
    net.forked = net.forked and net.packed
    if net.forked:
        try:
            shared = _sharing(net, cut)
        except (NotImplementedError, TypeError, ValueError, RuntimeError, KeyError) as error:
            problems.append(f"prompts cannot be shared on this model ({type(error).__name__}); rows are padded")
            net.forked = False
        if shared is not None and not shared <= apart:
            problems.append(f"answers to a shared prompt differ by {shared:.1e}; rows are padded")
            net.forked = False
    return Verdict(noise, together, own, shared, head, tuple(problems))


def _sharing(net: Net, rows: Sequence[Cut]) -> float:
    """Two halves of other rows as answers to the first half of each row, the prompt computed once and twice."""
    halves = [list(row.ids[: max(1, len(row.ids) // 2)]) for row in rows]
    trees = [
        Tree(at, half, (rows[at].ids[len(half) :], halves[(at + 1) % len(halves)])) for at, half in enumerate(halves)
    ]
    wholes = [Cut(0, [*tree.prompt, *answer], [*tree.prompt, *answer]) for tree in trees for answer in tree.answers]
    prompts = [len(tree.prompt) for tree in trees for _ in tree.answers]
    alone = [
        _packed(net, [whole])[prompt - 1 :]
        for whole, prompt in zip(wholes, prompts, strict=True)
        if len(whole.ids) > prompt
    ]
    (batch,) = forked(trees, sum(tree.fed for tree in trees))
    return _apart(net.logits(batch.to(net.device)).float(), torch.cat(alone))


def _packed(net: Net, rows: Sequence[Cut]) -> Tensor:
    """Logits of rows packed together, in the order given: packing itself orders them by length."""
    return _in_order(net, rows, packed(rows, sum(len(row.ids) for row in rows))[0])


def _padded(net: Net, rows: Sequence[Cut], pad_id: int) -> Tensor:
    """Logits of rows in one padded batch, in the order given."""
    return _in_order(net, rows, padded(rows, len(rows), pad_id)[0])


def _in_order(net: Net, rows: Sequence[Cut], batch: Batch) -> Tensor:
    lengths = {row.row: len(row.ids) - 1 for row in rows}
    pieces = torch.split(net.logits(batch.to(net.device)).float(), [lengths[number] for number in batch.rows])
    by_number = dict(zip(batch.rows, pieces, strict=True))
    return torch.cat([by_number[row.row] for row in rows])


def _head(net: Net, rows: Sequence[Cut], pad_id: int, single: Tensor) -> float:
    targets = torch.tensor([label for row in rows for label in row.labels[1:]], device=net.device)
    own = loss.plain_loss(single, targets)
    states = torch.cat([net.hidden(padded([row], 1, pad_id)[0].to(net.device)) for row in rows])
    ours = loss.chunked_loss(states, net.head.weight, targets)
    return float((ours - own).abs() / own.abs().clamp(min=1e-6))


def _apart(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference over that of the centred reference."""
    spread = (other - other.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((one - other).square().mean().sqrt() / spread.clamp(min=1e-12))
