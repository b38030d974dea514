"""One real step before the first: what the run will need at most, measured, and nothing of it left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tunesmith.executors.kernel.loops.batches import Batch
from tunesmith.executors.kernel.loops.engine import Engine
from tunesmith.executors.kernel.loops.gauge import Gauge, Measured
from tunesmith.executors.kernel.shortage import Shortage


@dataclass(frozen=True, slots=True)
class Tried:
    """What a step over `batch` took; or the memory that was missing."""

    batch: Batch | None
    measured: Measured | None
    shortage: Shortage | None = None

    @property
    def tokens(self) -> int:
        """Tokens that went through the model, padding among them."""
        return 0 if self.batch is None else self.batch.ids.numel()


def step(engine: Engine) -> Tried:
    """Forward and backward over the largest micro-batch that the run can meet, beside the optimizer's state.

    Weights, optimizer, gradients, generators and what the method has gathered are afterwards as they were, bit for
    bit. An error that is no shortage of memory is raised.
    """
    batch = None
    try:
        with _undone(engine):
            method, batch = engine.method.rehearsal(int(engine.train.effective_batch))
            gauge = Gauge(engine.net.device)
            _fill(engine)
            gauge.restart()
            loss = method.loss(batch.to(engine.net.device)) / max(1, batch.weight)
            engine.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            del loss
            return Tried(batch, gauge.read())
    except Exception as error:
        shortage = Shortage.of(error)
        if shortage is None:
            raise
        return Tried(batch, None, shortage)


@contextmanager
def _undone(engine: Engine) -> Iterator[None]:
    """Give back whatever is computed inside."""
    optimizer, fresh = engine.optimizer, not engine.optimizer.state
    device = engine.net.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        optimizer.zero_grad(set_to_none=True)
        if fresh:
            optimizer.state.clear()


def _fill(engine: Engine) -> None:
    """Let the optimizer make the state it has from the first step on: a step at rate 0 with gradients of 0.

    Adam then takes 0 from weights that it has multiplied with 1: they stay as they are.
    """
    optimizer = engine.optimizer
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in engine.names:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
