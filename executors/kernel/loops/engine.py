"""The training loop: optimizer steps, evaluation, checkpoints. It knows no method; a method is batches and a loss.

Between two log lines nothing waits for the device: losses and norms stay there as tensors and are read one step late
on a GPU. All that a step does follows from (seed, step): a resumed run is the run that was interrupted.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.control import Control
from tunesmith.executors.kernel.loops import cursor as cursors
from tunesmith.executors.kernel.loops.batches import Batch, Sampler
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.schedule import factor
from tunesmith.executors.kernel.loops.sft import Method
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.errors import InputError, JobFailed, StorageError
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import TrainSpec

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Outcome:
    """How training ended: at its last step, early because evaluation got no better, or because it was told to."""

    ended: Literal["finished", "early", "stopped"]
    step: int
    best_step: int | None
    ledger: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class _Taken:
    """One optimizer step as it was queued; loss and norm may still be on their way from the device."""

    step: int
    figures: Tensor
    arrived: torch.cuda.Event | None
    rate: float
    tokens: int
    total_tokens: int


class Engine:
    """Trains a net by a method.

    `facts` go into every manifest (attempt, spec_hash). `task` is what a checkpoint must agree with to be resumed from;
    micro-batch, packing and dtype are left out of it, since they may change without changing the task.
    """

    def __init__(
        self,
        net: Net,
        method: Method,
        train: TrainSpec,
        *,
        reporter: Reporter,
        control: Control,
        checkpoints: Path,
        facts: Mapping[str, Any],
        evaluation: Method | None = None,
        task: Mapping[str, Any] | None = None,
    ) -> None:
        self.net = net
        self.method = method
        self.train = train
        self.reporter = reporter
        self.control = control
        self.checkpoints = checkpoints
        self.facts = dict(facts)
        self.evaluation = evaluation if evaluation is not None and evaluation.rows else None
        if train.early_stopping is not None and self.evaluation is None:
            raise InputError(
                "Early stopping needs rows to evaluate on.",
                code="train.early_stopping",
                where="train.early_stopping",
                fix="Set eval.fraction above 0, name an eval.source, or leave early_stopping out.",
            )
        self.sampler = Sampler(len(method.rows), int(train.effective_batch), train.seed)
        self.total = self.sampler.total_steps(train.epochs, train.max_steps)
        self.warmup = min(int(train.warmup_steps), self.total)
        self.names: dict[Tensor, str] = {item: name for name, item in net.trainable()}
        self.optimizer = _optimizer(self.names, train, net.device)
        half = net.device.type == "cuda" and train.dtype == "float16"
        self.scaler = torch.amp.GradScaler(net.device.type, enabled=half)
        self.cursor = cursors.Cursor()
        self.task = {
            "rows": len(method.rows),
            "effective_batch": int(train.effective_batch),
            "seed": train.seed,
            "max_length": train.max_length,
            "trainable": hashlib.sha256(
                repr([(n, tuple(p.shape)) for p, n in self.names.items()]).encode()
            ).hexdigest(),
            **(task or {}),
        }
        self._waiting: deque[_Taken] = deque()
        self._pace = _Pace()
        self._saved_step = -1
        self._clock = 0.0

    # --- resume -----------------------------------------------------------------------------------------------------

    def resume(self, folder: Path) -> None:
        """Go on from a verified checkpoint folder. Raises InputError where it belongs to another run."""
        self.cursor, scaler = cursors.load(folder, self.task, self.optimizer, self.names)
        expected = [self._numbers(self.sampler.step(step)) for step in range(self.cursor.step)]
        if expected != self.cursor.ledger:
            raise cursors.other_task(folder, "row order")
        self.net.load(folder)
        if scaler:
            self.scaler.load_state_dict(scaler)
        if folder.parent == self.checkpoints:
            self._saved_step = self.cursor.step
        elif self.train.early_stopping is not None and self.cursor.best_loss is not None:
            self._bring_best(folder.parent)

    def _bring_best(self, origin: Path) -> None:
        """Copy the best checkpoint of an earlier attempt beside our own; without it, the search for it starts anew."""
        best = checkpoint.step_folder(origin, self.cursor.best_step)
        try:
            files = checkpoint.verify(best)["files"]
        except StorageError as error:
            self.reporter.log(f"The best weights so far are lost: {error}", "warning")
            self.cursor.best_loss = None
            return

        def fill(folder: Path) -> None:
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(best / name, folder / name)

        checkpoint.write(self.checkpoints / best.name, fill, step=self.cursor.best_step, **self.facts)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end, or until told to stop; a stop is answered with a checkpoint first.

        Raises JobFailed (nan) where the loss is not a number, StorageError where a checkpoint cannot be written.
        """
        self._clock = time.perf_counter()
        self.net.outer.train()
        if self._due(self.train.eval_steps):
            self._evaluate()
        while self.cursor.step < self.total:
            if self.control.stop():
                return self._stop()
            if self.control.checkpoint():
                self.save()
            if self._given_up():
                break
            self._step()
            if self._due(self.train.eval_steps):
                self._evaluate()
            if self._due(self.train.save_steps):
                self.save()
        self._settle(0)
        self._evaluate()
        early = self.cursor.step < self.total
        best = self.cursor.best_step if self.train.early_stopping is not None else None
        return Outcome("early" if early else "finished", self.cursor.step, best, self.cursor.ledger)

    def restore_best(self) -> int:
        """With early stopping, take back the weights of the best evaluation; returns the step of those in place."""
        best = self.cursor.best_step
        if self.train.early_stopping is None or best == self.cursor.step:
            return self.cursor.step
        folder = checkpoint.step_folder(self.checkpoints, best)
        try:
            checkpoint.verify(folder)
        except StorageError as error:
            self.reporter.alert(error.code, f"The best weights are lost; the last ones are delivered. {error}")
            return self.cursor.step
        self.net.load(folder)
        return best

    def save(self) -> None:
        """Write a checkpoint of the present step, prune older ones, and say so. Broken weights are never saved."""
        self._settle(0)
        step = self.cursor.step
        if self._saved_step == step:
            return
        if not self.net.finite():
            raise _not_a_number("weights", step)
        self.reporter.progress("saving", 0, 1, unit="checkpoints", step=step)

        def fill(folder: Path) -> None:
            self.net.save(folder)
            cursors.save(folder, self.cursor, self.task, self.optimizer, self.names, self.scaler.state_dict())

        folder = checkpoint.step_folder(self.checkpoints, step)
        written = checkpoint.write(folder, fill, step=step, **self.facts)
        best = {self.cursor.best_step} if self.train.early_stopping is not None else set()
        checkpoint.keep(self.checkpoints, self.train.keep_checkpoints, best)
        self._saved_step = step
        self.reporter.emit(
            Kind.CHECKPOINT,
            {"path": f"checkpoints/{folder.name}", "bytes": written.bytes, "sha256": written.sha256},
            step,
        )
        self.reporter.progress("saving", 1, 1, unit="checkpoints", step=step)
        self._clock = time.perf_counter()

    def _numbers(self, picked: Sequence[int]) -> list[int]:
        return [self.method.rows[at].row for at in picked]

    def _step(self) -> None:
        index = self.cursor.step
        picked = self.sampler.step(index)
        batches = self.method.batches(picked)
        units = max(1, sum(batch.weight for batch in batches))
        tokens = sum(batch.tokens for batch in batches)
        total = torch.zeros((), device=self.net.device)
        for batch in batches:
            if batch.weight:
                self._seed(index, batch)
                loss = self.method.loss(batch.to(self.net.device)) / units
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        rate = float(self.train.learning_rate) * factor(self.train.scheduler, index, self.total, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        limit = self.train.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self.names), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.cursor.step += 1
        self.cursor.tokens += tokens
        self.cursor.ledger.append(self._numbers(picked))
        figures, arrived = torch.stack([total, norm.to(total)]), None
        if figures.is_cuda:
            figures = torch.empty(2, dtype=figures.dtype, pin_memory=True).copy_(figures, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._waiting.append(_Taken(self.cursor.step, figures, arrived, rate, tokens, self.cursor.tokens))
        self._settle(0 if arrived is None else 1)

    def _seed(self, step: int, batch: Batch) -> None:
        """Dropout masks depend on (seed, epoch, rows) and not on what ran before."""
        epoch = step // self.sampler.steps_per_epoch
        key = f"{self.train.seed}:{epoch}:{batch.rows}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1)

    def _settle(self, leave: int) -> None:
        """Report steps whose figures have arrived, all but the newest `leave`."""
        while len(self._waiting) > leave:
            taken = self._waiting.popleft()
            if taken.arrived is not None:
                taken.arrived.synchronize()
            loss, norm = taken.figures.tolist()
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
                raise _not_a_number("loss" if not math.isfinite(loss) else "gradient", taken.step)
            before, self._clock = self._clock, time.perf_counter()
            seconds = max(self._clock - before, 1e-9)
            self._pace.add(seconds, taken.tokens)
            self.reporter.metric(
                {
                    "train/loss": loss,
                    "train/learning_rate": taken.rate,
                    "train/grad_norm": norm,
                    "train/num_tokens": taken.total_tokens,
                    "train/tokens_per_second": taken.tokens / seconds,
                    "train/epoch": self.sampler.epochs_done(taken.step),
                },
                taken.step,
            )
            self.reporter.progress(
                "training",
                taken.step,
                self.total,
                unit="steps",
                eta_seconds=self._eta(taken.step),
                tokens_per_second=self._pace.tokens_per_second,
                step=taken.step,
            )

    def _due(self, every: int | str) -> bool:
        return isinstance(every, int) and self.cursor.step % every == 0

    def _eta(self, step: int) -> float:
        every = int(self.train.eval_steps) if self.evaluation is not None else 0
        evals = math.ceil(self.total / every) - step // every if every else 0
        return self._pace.step_seconds * (self.total - step) + self._pace.eval_seconds * evals

    def _stop(self) -> Outcome:
        self._settle(0)
        if self.cursor.step:
            self.save()
        return Outcome("stopped", self.cursor.step, None, self.cursor.ledger)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Mean loss per supervised token over the held-out rows; given up without a trace where a stop comes."""
        evaluation, step = self.evaluation, self.cursor.step
        if evaluation is None or self.cursor.evaluated_step == step:
            return
        self._settle(0)
        began = time.perf_counter()
        batches = [
            batch
            for start in range(0, len(evaluation.rows), int(self.train.effective_batch))
            for batch in evaluation.batches(
                range(start, min(start + int(self.train.effective_batch), len(evaluation.rows)))
            )
        ]
        total = torch.zeros((), dtype=torch.float64, device=self.net.device)
        self.net.outer.eval()
        try:
            with torch.no_grad():
                for done, batch in enumerate(batches):
                    if self.control.stop():
                        return
                    self.reporter.progress("evaluating", done, len(batches), unit="batches", step=step)
                    if batch.weight:
                        total += evaluation.loss(batch.to(self.net.device)).double()
        finally:
            self.net.outer.train()
        loss = float(total) / max(1, sum(batch.weight for batch in batches))
        self._clock = time.perf_counter()
        self._pace.eval_seconds = self._clock - began
        self.reporter.metric({"eval/loss": loss}, step)
        self.reporter.progress("evaluating", len(batches), len(batches), unit="batches", step=step)
        if not math.isfinite(loss):
            raise _not_a_number("evaluation's loss", step)
        self.cursor.evaluated_step = step
        if step > 0:
            self._judge(loss)

    def _judge(self, loss: float) -> None:
        if self.cursor.best_loss is None or loss < self.cursor.best_loss:
            self.cursor.best_loss, self.cursor.best_step, self.cursor.stale_evals = loss, self.cursor.step, 0
            if self.train.early_stopping is not None:
                self.save()
        else:
            self.cursor.stale_evals += 1

    def _given_up(self) -> bool:
        patience = self.train.early_stopping
        return patience is not None and self.cursor.stale_evals >= patience


class _Pace:
    """How fast it goes: a moving average in which old steps fade, the slow first one soonest."""

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.tokens_per_second = 0.0
        self.eval_seconds = 0.0
        self._steps = 0

    def add(self, seconds: float, tokens: int) -> None:
        """Take one step in."""
        self._steps += 1
        fresh = max(0.1, 1 / self._steps) if self._steps != 2 else 1.0
        speed = tokens / seconds
        self.step_seconds += fresh * (seconds - self.step_seconds)
        self.tokens_per_second += fresh * (speed - self.tokens_per_second)


def _optimizer(names: Mapping[Tensor, str], train: TrainSpec, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over what is trained, fused; weight decay on matrices only, as transformers does."""
    matrices = [item for item in names if item.dim() > 1]
    others = [item for item in names if item.dim() <= 1]
    groups = [
        {"params": chosen, "weight_decay": decay}
        for chosen, decay in ((matrices, train.weight_decay), (others, 0.0))
        if chosen
    ]
    rate = float(train.learning_rate)
    if train.optimizer == "adamw-8bit":
        return _eight_bit(groups, rate, device)
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPSILON, fused=True)


def _eight_bit(groups: list[dict[str, Any]], rate: float, device: torch.device) -> torch.optim.Optimizer:
    try:
        if device.type != "cuda":
            raise ImportError("it runs on CUDA devices only")
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "The 8-bit optimizer is not available here.",
            code="train.optimizer",
            why=f"bitsandbytes: {error}.",
            where="train.optimizer",
            fix="Set train.optimizer to adamw.",
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=rate, betas=BETAS, eps=EPSILON)
    return optimizer


def _not_a_number(what: str, step: int) -> JobFailed:
    return JobFailed(
        f"The {what} stopped being a number at step {step}.",
        code="nan",
        why="Weights, activations or gradients overflowed.",
        fix="Lower train.learning_rate, or set train.dtype to bfloat16 or float32.",
        where=f"step {step}",
    )
