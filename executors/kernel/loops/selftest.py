"""What the real model must show before step one: that packing and the chunked head change nothing.

A model that computes something else (a soft cap behind the head, attention that ignores `documents`) falls back to
padded batches or to its own head, and the run says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops import loss
from tunesmith.executors.kernel.loops.batches import Row, packed, padded
from tunesmith.executors.kernel.loops.model import Net

ROWS = 4
TOKENS = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True, slots=True)
class Cut:
    """A row cut short for the test, numbered by its place in it; all of it is scored."""

    row: int
    ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Relative root-mean-square differences, None where not tested, and what went wrong in words."""

    packing: float | None
    head: float | None
    problems: tuple[str, ...]


def check(net: Net, rows: Sequence[Row], *, pad_id: int) -> Verdict:
    """Compare packed with per-row logits, and the chunked with the model's own head; switch off what differs.

    Sets `net.packed` and `net.chunked`. Costs a few short forward passes.
    """
    limit = TOKENS.get(net.device.type, 256)
    long_enough = [row for row in rows[: 4 * ROWS] if len(row.ids) > 1][:ROWS]
    cut = [Cut(at, row.ids[:limit], row.ids[:limit]) for at, row in enumerate(long_enough)]
    if not cut:
        return Verdict(None, None, ())
    exact = all(item.dtype == torch.float32 for item in net.causal.parameters()) and net.autocast is None
    tolerance = 1e-4 if exact else 3e-2
    problems = []
    training = net.outer.training
    net.outer.eval()
    try:
        with torch.no_grad(), net.amp():
            single = torch.cat([net.logits(padded([row], 1, pad_id)[0].to(net.device)) for row in cut]).float()
            head = _head(net, cut, pad_id, single)
            if head is not None and not head <= tolerance:
                net.chunked = False
                problems.append(f"the model's head does more than multiply (difference {head:.1e}); its own is used")
            packing = None
            if net.packed:
                try:
                    packing = _apart(_packed(net, cut), single)
                except (NotImplementedError, TypeError, ValueError, RuntimeError, KeyError) as error:
                    net.packed = False
                    problems.append(
                        f"packed attention does not run on this model ({type(error).__name__}); rows are padded"
                    )
                if packing is not None and not packing <= tolerance:
                    net.packed = False
                    problems.append(f"packed rows differ from single ones by {packing:.1e}; rows are padded")
    finally:
        net.outer.train(training)
    return Verdict(packing, head, tuple(problems))


def _packed(net: Net, rows: Sequence[Cut]) -> Tensor:
    # packed() orders rows by length: lay the logits back into the order given
    batch = packed(rows, sum(len(row.ids) for row in rows))[0]
    pieces = torch.split(net.logits(batch.to(net.device)).float(), [len(rows[at].ids) - 1 for at in batch.rows])
    return torch.cat([piece for _, piece in sorted(zip(batch.rows, pieces, strict=True), key=lambda pair: pair[0])])


def _head(net: Net, rows: Sequence[Cut], pad_id: int, single: Tensor) -> float | None:
    if not net.chunked:
        return None
    targets = torch.tensor([label for row in rows for label in row.labels[1:]], device=net.device)
    own = loss.plain_loss(single, targets)
    states = torch.cat([net.hidden(padded([row], 1, pad_id)[0].to(net.device)) for row in rows])
    ours = loss.chunked_loss(states, net.head.weight, targets)
    return float((ours - own).abs() / own.abs().clamp(min=1e-6))


def _apart(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference over that of the centred reference."""
    spread = (other - other.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((one - other).square().mean().sqrt() / spread.clamp(min=1e-12))
