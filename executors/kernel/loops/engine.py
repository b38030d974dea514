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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.control import Control
from tunesmith.executors.kernel.loops import cursor as cursors
from tunesmith.executors.kernel.loops import optimizer as optimizers
from tunesmith.executors.kernel.loops.ahead import Ahead
from tunesmith.executors.kernel.loops.batches import Batch, Sampler
from tunesmith.executors.kernel.loops.ladder import Ladder
from tunesmith.executors.kernel.loops.method import Interrupted, Method, Turn
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.pace import Pace
from tunesmith.executors.kernel.loops.ranks import ALONE, Ranks
from tunesmith.executors.kernel.loops.schedule import factor
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.shortage import Shortage
from tunesmith.orchestrator.errors import InputError, JobFailed, StorageError
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import TrainSpec

SKIPS = 50  # steps in a row that float16's loss scaling may pass over while it looks for its scale


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
    """Trains a net by a method, alone or as one of several ranks, of which the first speaks and saves.

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
        ranks: Ranks = ALONE,
    ) -> None:
        self.net = net
        self.method = method
        self.train = train
        self.reporter = reporter
        self.control = control
        self.checkpoints = checkpoints
        self.ranks = ranks
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
        self.total = train.max_steps or self.sampler.total_steps(train.epochs, None) * method.repeats
        self.warmup = min(int(train.warmup_steps), self.total)
        self.names: dict[Tensor, str] = {item: name for name, item in net.trainable()}
        self.optimizer = optimizers.make(self.names, train, net.device)
        half = net.device.type == "cuda" and train.dtype == "float16"
        self.scaler = torch.amp.GradScaler(net.device.type, enabled=half)
        self.scaler.scale(torch.zeros((), device=net.device))  # made here, since a rank may find nothing to do at first
        self.cursor = cursors.Cursor()
        self.ladder = Ladder(net, method, train, reporter, evaluation=self.evaluation, world=ranks.world)
        self.task = {
            "rows": len(method.rows),
            "effective_batch": int(train.effective_batch),
            "seed": train.seed,
            "max_length": train.max_length,
            "trainable": hashlib.sha256(
                repr([(n, tuple(p.shape)) for p, n in self.names.items()]).encode()
            ).hexdigest(),
            **({"repeats": method.repeats} if method.repeats > 1 else {}),
            **(task or {}),
        }
        foreseen = method.foreseen and net.device.type == "cuda"
        self._ahead = Ahead(self._batches, pin=True) if foreseen else None
        self._passing: Batch | None = None
        self._waiting: deque[_Taken] = deque()
        self._skipped = 0
        self._pace = Pace()
        self._saved_step = -1
        self._clock = 0.0

    # --- resume -----------------------------------------------------------------------------------------------------

    def resume(self, folder: Path) -> None:
        """Go on from a verified checkpoint folder. Raises InputError where it belongs to another run."""
        self.cursor, scaler = cursors.load(folder, self.task, self.optimizer, self.names)
        expected = [self._numbers(self._picked(step)) for step in range(self.cursor.step)]
        if expected != self.cursor.ledger:
            raise cursors.other_task(folder, "row order")
        self.net.load(folder)
        self.method.load(folder, self.cursor.step)
        self.method.updated()
        self.ladder.resume(self.cursor.eased)
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

        if self.ranks.rank == 0:
            checkpoint.write(self.checkpoints / best.name, fill, step=self.cursor.best_step, **self.facts)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end, or until told to stop; a stop is answered with a checkpoint first.

        Raises JobFailed (nan) where the loss is not a number, StorageError where a checkpoint cannot be written.
        """
        self._clock = time.perf_counter()
        self.net.outer.train()
        try:
            return self._run()
        except Interrupted:
            return self._stop()
        finally:
            if self._ahead is not None:
                self._ahead.close()

    def _run(self) -> Outcome:
        if self._due(self.train.eval_steps):
            self._evaluate()
        while self.cursor.step < self.total:
            if self.ranks.agree(self.control.stop()):
                return self._stop()
            if self.ranks.agree(self.control.checkpoint()):
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
        best = (self.cursor.best_step or None) if self.train.early_stopping is not None else None
        return Outcome("early" if early else "finished", self.cursor.step, best, self.cursor.ledger)

    def restore_best(self) -> int:
        """With early stopping, take back the weights of the best evaluation; returns the step of those in place."""
        best = self.cursor.best_step
        if self.train.early_stopping is None or best in (0, self.cursor.step):
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
        self._saved_step = step
        if self.ranks.rank:
            return
        self.reporter.progress("saving", 0, 1, unit="checkpoints", step=step)

        self.cursor.eased = self.ladder.doc()

        def fill(folder: Path) -> None:
            self.net.save(folder)
            self.method.save(folder, step)
            cursors.save(folder, self.cursor, self.task, self.optimizer, self.names, self.scaler.state_dict())

        folder = checkpoint.step_folder(self.checkpoints, step)
        written = checkpoint.write(folder, fill, step=step, **self.facts)
        best = {self.cursor.best_step} if self.train.early_stopping is not None else set()
        self.reporter.emit(
            Kind.CHECKPOINT,
            {"path": f"checkpoints/{folder.name}", "bytes": written.bytes, "sha256": written.sha256},
            step,
        )
        checkpoint.keep(self.checkpoints, self.train.keep_checkpoints, best, newest=step)
        self.reporter.progress("saving", 1, 1, unit="checkpoints", step=step)
        self._clock = time.perf_counter()

    def _picked(self, step: int) -> list[int]:
        return list(self.sampler.step(step // self.method.repeats))

    def rows_ahead(self) -> set[int]:
        """Indices of the rows that the run will take up, over all of its steps."""
        epoch = self.sampler.steps_per_epoch * self.method.repeats
        return {row for step in range(min(self.total, epoch)) for row in self._picked(step)}

    def _turn(self, step: int, *, training: bool = True) -> Turn:
        return Turn(step, step // (self.sampler.steps_per_epoch * self.method.repeats), training)

    def _batches(self, step: int) -> list[Batch]:
        return self.method.batches(self._picked(step), self._turn(step))

    def _numbers(self, picked: Sequence[int]) -> list[int]:
        return [self.method.rows[at].row for at in picked]

    def _step(self) -> None:
        index = self.cursor.step
        while (passed := self._attempted(index)) is None:
            self._pause()
        total, meter, tokens = passed
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
        self.cursor.ledger.append(self._numbers(self._picked(index)))
        self.method.updated()
        figures, arrived = torch.cat([torch.stack([total, norm.to(total)]).double(), meter.flatten()]), None
        if figures.is_cuda:
            figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True).copy_(figures, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._waiting.append(_Taken(self.cursor.step, figures, arrived, rate, tokens, self.cursor.tokens))
        self._settle(0 if arrived is None else 1)

    def _attempted(self, step: int) -> tuple[Tensor, Tensor, int] | None:
        """Gradients of a step with its loss, meter and tokens; None where memory ran out, and less was taken up."""
        mark, making = self.method.meter.mark(), True
        try:
            batches = self._batches(step) if self._ahead is None else self._ahead.take(step)
            mark, making = self.method.meter.mark(), False
            return self._passed(step, batches)
        except Exception as error:
            shortage = Shortage.of(error)
            if shortage is None:
                raise
        # from here on nothing holds what was computed: the error is gone, and with it the frames it came through
        batch, self._passing = self._passing, None
        self.optimizer.zero_grad(set_to_none=True)
        self.method.meter.back(mark)
        if making and self.method.slots:
            self.ladder.write_less(shortage, step + 1)
        else:
            self.ladder.climb(shortage, batch, step + 1)
        self._saved_step = -1  # a checkpoint of this step knows nothing of it
        return None

    def _passed(self, step: int, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, int]:
        device = self.net.device
        units = max(1, sum(batch.weight for batch in batches))
        total = torch.zeros((), device=device)
        for batch in self.ranks.share(batches):
            if batch.weight:
                self._passing = batch
                self._seed(step, batch)
                loss = self.method.loss(batch.to(device)) / units
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
                del loss  # or what its graph still holds would stand beside the next micro-batch
        self._passing = None
        meter = self.method.meter.drain(device)
        self._sum_gradients(total, meter)
        return total, meter, sum(batch.tokens for batch in batches)

    def _pause(self) -> None:
        if self.control.stop():
            raise Interrupted

    def _sum_gradients(self, total: Tensor, meter: Tensor) -> None:
        """Add up what the ranks found. A weight that no row of the step touched has the gradient zero."""
        gradients = []
        for parameter in self.names:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.ranks.sum_([*gradients, total, meter])

    def _seed(self, step: int, batch: Batch) -> None:
        """Dropout masks depend on (seed, epoch, rows) and not on what ran before."""
        epoch = self._turn(step).epoch
        key = f"{self.train.seed}:{epoch}:{batch.rows}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1)

    def _settle(self, leave: int) -> None:
        """Report steps whose figures have arrived, all but the newest `leave`."""
        while len(self._waiting) > leave:
            taken = self._waiting.popleft()
            if taken.arrived is not None:
                taken.arrived.synchronize()
            loss, norm, *means = taken.figures.tolist()
            self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
            if not math.isfinite(loss) or self._skipped > (SKIPS if self.scaler.is_enabled() else 0):
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
                    "train/epoch": self.sampler.epochs_done(taken.step // self.method.repeats),
                    **{f"train/{name}": value for name, value in self.method.meter.means(means).items()},
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
        """The measure over the held-out rows; given up without a trace where a stop comes. Raises Interrupted then."""
        evaluation, step = self.evaluation, self.cursor.step
        if evaluation is None or self.cursor.evaluated_step == step:
            return
        self._settle(0)
        began = time.perf_counter()
        while (total := self._summed(evaluation, step)) is None:
            self._pause()
        meter = evaluation.meter.drain(self.net.device)
        self.ranks.sum_([total, meter])
        evaluation.assessed(step)
        self._clock = time.perf_counter()
        self._pace.eval_seconds = self._clock - began
        if not total[1]:
            self.reporter.log(f"No held-out row has a {evaluation.measure} at step {step}.", "warning")
            self.cursor.evaluated_step = step
            return
        value = float(total[0] / total[1])
        means = {f"eval/{name}": mean for name, mean in evaluation.meter.means(meter.flatten().tolist()).items()}
        self.reporter.metric({f"eval/{evaluation.measure}": value, **means}, step)
        rows = len(evaluation.rows)
        self.reporter.progress("evaluating", rows, rows, unit="rows", step=step)
        if not math.isfinite(value):
            raise _not_a_number(f"evaluation's {evaluation.measure}", step)
        self.cursor.evaluated_step = step
        if step > 0:
            self._judge(-value if evaluation.higher else value)

    def _summed(self, evaluation: Method, step: int) -> Tensor | None:
        """The measure's sum and units; None where memory ran out, and fewer rows will be evaluated at a time."""
        total, units = torch.zeros(2, dtype=torch.float64, device=self.net.device), 0
        size = self.ladder.together or max(int(self.train.effective_batch), evaluation.at_once)
        self.net.outer.eval()
        try:
            with torch.no_grad():
                for sums, count in self._assessed(evaluation, step, size):
                    self._pause()
                    total[0] += sums
                    units += count
            total[1] = units
            return total
        except Exception as error:
            shortage = Shortage.of(error)
            if shortage is None:
                raise
        finally:
            self.net.outer.train()
        evaluation.forget()
        self.ladder.assess_less(shortage, min(size, len(evaluation.rows)), step)
        self._saved_step = -1
        return None

    def _assessed(self, evaluation: Method, step: int, size: int) -> Iterator[tuple[Tensor | float, int]]:
        rows = len(evaluation.rows)
        for start in range(0, rows, size):
            self.reporter.progress("evaluating", start, rows, unit="rows", step=step)
            chosen = range(start, min(start + size, rows))
            yield from evaluation.assess(chosen, self._turn(step, training=False))

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


def _not_a_number(what: str, step: int) -> JobFailed:
    return JobFailed(
        f"The {what} stopped being a number at step {step}.",
        code="nan",
        why="Weights, activations or gradients overflowed.",
        fix="Lower train.learning_rate, or set train.dtype to bfloat16 or float32.",
        where=f"step {step}",
    )
