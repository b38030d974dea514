"""Every method that we have no loop for, by TRL's trainers: KTO, RLOO, reward modelling, on-policy distillation.

To whoever runs it, a `TrlEngine` is an `Engine`: the same events and figures, checkpoints in the same form with the
same manifest, stop and checkpoint on request, early stopping. Rows come in our sampler's order, so a resumed run takes
up exactly where it ended. What stays TRL's is the loss, how a batch is padded, and the means it logs.
"""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.control import Control
from tunesmith.executors.kernel.loops import cursor as cursors
from tunesmith.executors.kernel.loops import optimizer as optimizers
from tunesmith.executors.kernel.loops.batches import Sampler
from tunesmith.executors.kernel.loops.engine import Outcome
from tunesmith.executors.kernel.loops.method import Interrupted
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.pace import Pace
from tunesmith.executors.kernel.loops.trl_plan import Plan, Wish, balance, filled, micro_batch
from tunesmith.executors.kernel.loops.trl_rows import Tables, tables
from tunesmith.executors.kernel.loops.trl_teacher import load_teacher, no_teacher
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.rewards import Rewards, Scores, columns_of
from tunesmith.orchestrator.errors import InputError, JobFailed, StorageError
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import JobSpec

METHODS = ("kto", "rloo", "reward", "distill")

# what transformers adds to the figures of a step or an evaluation, and we say in our own way or not at all
_OURS = {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "step_time"}
_CLOCKS = {"runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time"}


class TrlEngine:
    """Trains a net by one of TRL's trainers. Arguments and methods are those of `Engine`.

    `rewards` are needed for rloo; `teacher`, a model that `load_teacher` gave, for distill.
    """

    def __init__(
        self,
        net: Net,
        rows: Tables,
        spec: JobSpec,
        tokenizer: Any,
        *,
        reporter: Reporter,
        control: Control,
        checkpoints: Path,
        facts: Mapping[str, Any],
        task: Mapping[str, Any] | None = None,
        rewards: Rewards | None = None,
        teacher: Any = None,
    ) -> None:
        self.net = net
        self.rows = rows
        self.spec = spec
        self.train = spec.train
        self.tokenizer = tokenizer
        self.reporter = reporter
        self.control = control
        self.checkpoints = checkpoints
        self.facts = dict(facts)
        self.rewards = rewards
        self.teacher = teacher
        if self.train.early_stopping is not None and not len(rows.eval):
            raise InputError(
                "Early stopping needs rows to evaluate on.",
                code="train.early_stopping",
                where="train.early_stopping",
                fix="Set eval.fraction above 0, name an eval.source, or leave early_stopping out.",
            )
        self.repeats = spec.grpo.num_iterations if spec.method == "rloo" else 1
        self.each = spec.grpo.num_generations if spec.method == "rloo" else 1
        self.micro = micro_batch(spec)
        self.sampler = Sampler(len(rows.train), int(self.train.effective_batch), self.train.seed)
        self.total = self.train.max_steps or self.sampler.total_steps(self.train.epochs, None) * self.repeats
        self.names: dict[Tensor, str] = {item: name for name, item in net.trainable()}
        self.optimizer = optimizers.make(self.names, self.train, net.device)
        self.cursor = cursors.Cursor()
        self.task = {
            "rows": len(rows.train),
            "effective_batch": int(self.train.effective_batch),
            "seed": self.train.seed,
            "max_length": self.train.max_length,
            "trainable": hashlib.sha256(
                repr([(name, tuple(item.shape)) for item, name in self.names.items()]).encode()
            ).hexdigest(),
            "trainer": f"trl/{spec.method}",
            **({"repeats": self.repeats} if self.repeats > 1 else {}),
            **(task or {}),
        }
        self._trainer: Any = None
        self._from: Path | None = None
        self._scaler: dict[str, Any] = {}
        self._pace = Pace()
        self._clock = 0.0
        self._eval_began = 0.0
        self._saved_step = -1

    # --- resume -----------------------------------------------------------------------------------------------------

    def resume(self, folder: Path) -> None:
        """Go on from a verified checkpoint folder. Raises InputError where it belongs to another run."""
        self.cursor, self._scaler = cursors.load(folder, self.task, self.optimizer, self.names)
        if [self._numbers(step) for step in range(self.cursor.step)] != self.cursor.ledger:
            raise cursors.other_task(folder, "row order")
        self.net.load(folder)
        self._from = folder
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

    # --- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end, or until told to stop; a stop is answered with a checkpoint first.

        Raises JobFailed (nan) where the loss is not a number, StorageError where a checkpoint cannot be written.
        """
        if self._assess_due() or self._more():
            try:
                with _as_it_was(self.net.causal, pad=self.spec.method != "reward"):
                    self._trainer = self._make()
                    self.within()
                    with self._heard():
                        self._train()
            except Interrupted:
                if self.cursor.step:
                    self.save()
                return Outcome("stopped", self.cursor.step, None, self.cursor.ledger)
        early = self.cursor.step < self.total
        best = (self.cursor.best_step or None) if self.train.early_stopping is not None else None
        return Outcome("early" if early else "finished", self.cursor.step, best, self.cursor.ledger)

    def _train(self) -> None:
        trainer = self._trainer
        if hasattr(trainer, "_total_train_tokens"):
            trainer._total_train_tokens = self.cursor.tokens
        if self._assess_due():
            trainer.state.global_step = self.cursor.step
            trainer.evaluate()
        if self._more():
            self._clock = time.perf_counter()
            trainer.train(resume_from_checkpoint=None if self._from is None else str(self._from))

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """While inside, a stop is heard before every forward pass: TRL writes all answers of a step in one call."""
        hook = self.net.causal.register_forward_pre_hook(lambda *_: self.within())
        try:
            yield
        finally:
            hook.remove()

    def _more(self) -> bool:
        """Whether there are steps to take."""
        return self.cursor.step < self.total and not self._given_up()

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
        from tunesmith.executors.kernel.loops import trl_held

        step = self.cursor.step
        if self._saved_step == step:
            return
        if not self.net.finite():
            raise _not_a_number("weights", step)
        self.reporter.progress("saving", 0, 1, unit="checkpoints", step=step)
        scaler = self._trainer.accelerator.scaler

        def fill(folder: Path) -> None:
            self.net.save(folder)
            if step % self.repeats:
                trl_held.save_round(folder, self._trainer)
            scaling = {} if scaler is None else scaler.state_dict()
            cursors.save(folder, self.cursor, self.task, self.optimizer, self.names, scaling)
            epoch = self.sampler.epochs_done(step // self.repeats)
            trl_held.state(
                folder, step=step, epoch=epoch, total=self.total, micro=self.micro, tokens=self.cursor.tokens
            )

        folder = checkpoint.step_folder(self.checkpoints, step)
        written = checkpoint.write(folder, fill, step=step, **self.facts)
        best = {self.cursor.best_step} if self.train.early_stopping is not None else set()
        self._saved_step = step
        self.reporter.emit(
            Kind.CHECKPOINT,
            {"path": f"checkpoints/{folder.name}", "bytes": written.bytes, "sha256": written.sha256},
            step,
        )
        checkpoint.keep(self.checkpoints, self.train.keep_checkpoints, best, newest=step)
        self.reporter.progress("saving", 1, 1, unit="checkpoints", step=step)
        self._clock = time.perf_counter()

    def _make(self) -> Any:
        from tunesmith.executors.kernel.loops import trl_trainers

        made = int(self.train.effective_batch) * self.each
        plan = Plan(
            sampler=self.sampler,
            total=self.total,
            start=self.cursor.step,
            micro=self.micro,
            accumulate=made // self.micro,
            each=self.each,
            repeats=self.repeats,
        )
        labels = self.rows.train.columns["label"] if self.spec.method == "kto" else []
        advice = balance(labels, self.spec.kto) if labels else None
        if advice:
            text = (
                f"{sum(labels):,} of {len(labels):,} answers are good, and the two kinds do not weigh alike. {advice}"
            )
            self.reporter.alert("kto.unbalanced", text, fix=advice)
        if self.micro != int(self.train.micro_batch):
            self.reporter.log(f"The {made:,} sequences of a step go through the model {self.micro:,} at a time.")
        return trl_trainers.make(
            self.spec,
            self.net,
            self.rows,
            self.tokenizer,
            plan,
            self.optimizer,
            self,
            folder=self.checkpoints,
            scaler_state=self._scaler,
            origin=self._from,
            rewards=self.rewards,
            teacher=self.teacher,
        )

    # --- what a trainer tells and asks ------------------------------------------------------------------------------

    def stepping(self, step: int) -> None:
        """A step begins, unless the run shall end."""
        if self.control.stop():
            raise Interrupted
        if self.control.checkpoint() and step:
            self.save()

    def within(self) -> None:
        """Where the run shall end, nothing of the step counts: it is taken anew, with the same random numbers."""
        if self.control.stop():
            raise Interrupted

    def stepped(self, step: int) -> Wish:
        """A step is done."""
        self.cursor.ledger.append(self._numbers(step - 1))
        self.cursor.step = step
        return Wish(evaluate=self._assess_due(), save=self._due())

    def logged(self, step: int, figures: Mapping[str, Any]) -> None:
        """The figures of a step, in our names."""
        loss, norm = float(figures["loss"]), float(figures["grad_norm"])
        scaled = self._trainer.accelerator.scaler is not None
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaled):
            raise _not_a_number("loss" if not math.isfinite(loss) else "gradient", step)
        before, self._clock = self._clock, time.perf_counter()
        seconds = max(self._clock - before, 1e-9)
        tokens = int(figures.get("num_tokens", self.cursor.tokens)) - self.cursor.tokens  # answers may be used again
        self.cursor.tokens += tokens
        self._pace.add(seconds, tokens)
        self.reporter.metric(
            {
                "train/loss": loss,
                "train/learning_rate": float(figures["learning_rate"]),
                "train/grad_norm": norm,
                "train/num_tokens": self.cursor.tokens,
                "train/tokens_per_second": tokens / seconds,
                "train/epoch": self.sampler.epochs_done(step // self.repeats),
                **{f"train/{name}": value for name, value in _numbers(figures) if name not in _OURS},
            },
            step,
        )
        self.reporter.progress(
            "training",
            step,
            self.total,
            unit="steps",
            eta_seconds=self._eta(step),
            tokens_per_second=self._pace.tokens_per_second,
            step=step,
        )

    def assessing(self, step: int, done: int, total: int) -> None:
        """An evaluation goes on; given up without a trace where the run shall end."""
        if self.control.stop():
            raise Interrupted
        if done == 1:
            self._eval_began = time.perf_counter()
        self.reporter.progress("evaluating", done, total, unit="batches", step=step)

    def assessed(self, step: int, figures: Mapping[str, Any]) -> Wish:
        """An evaluation is done: is it the best so far, and were there enough that were not?"""
        self._clock = time.perf_counter()
        self._pace.eval_seconds = self._clock - self._eval_began
        found = {name.removeprefix("eval_"): value for name, value in _numbers(figures) if name.startswith("eval_")}
        self.reporter.metric({f"eval/{name}": value for name, value in found.items() if name not in _CLOCKS}, step)
        measure = "reward" if self.spec.method == "rloo" else "loss"
        if measure == "reward" and figures.get("eval_reward") is None:
            self.reporter.log(f"No held-out row has a reward at step {step}.", "warning")
            self.cursor.evaluated_step = step
            return Wish()
        value = found.get(measure, math.nan)
        if not math.isfinite(value):
            raise _not_a_number(f"evaluation's {measure}", step)
        self.cursor.evaluated_step = step
        if step == 0:
            return Wish()
        self._judge(-value if measure == "reward" else value)
        return Wish(end=self._given_up())

    def scored(self, places: Sequence[int], prompts: Sequence[Any], completions: Sequence[Any], ids: Any) -> Scores:
        """Rewards of completions; the best and the worst answer of the first prompt are sent as samples."""
        self.within()
        assert self.rewards is not None
        train, held = self.rows.train, self.rows.eval
        numbers, kept = (*train.numbers, *held.numbers), (*train.kept, *held.kept)
        rows = [numbers[place] for place in places]
        columns = columns_of([kept[place] for place in places])
        state = self.rewards.state
        state.max_steps, state.epoch = self.total, self.sampler.epochs_done(self.cursor.step // self.repeats)
        scores = self.rewards.score(prompts, completions, ids, columns, self.cursor.step, rows=rows)
        for finding in scores.alerts:
            self.reporter.alert(finding.code, finding.message, where=finding.where)
        if places[0] < len(train):
            self._show(rows[0], prompts[0], completions, scores)
        return scores

    def _show(self, row: int, prompt: Any, completions: Sequence[Any], scores: Scores) -> None:
        assert self.rewards is not None
        ranked = sorted(range(min(self.each, len(completions))), key=lambda at: -scores.totals[at])
        for at in dict.fromkeys((ranked[0], ranked[-1])):
            answer = completions[at] if isinstance(completions[at], str) else completions[at][0]["content"]
            rewards = dict(zip(self.rewards.names, scores.values[at], strict=True))
            values = {"row": row, "prompt": prompt, "completion": answer, "rewards": rewards}
            self.reporter.emit(Kind.SAMPLE, {**values, "reward": scores.totals[at]}, self.cursor.step)

    def load(self, folder: Path) -> None:
        """Take weights back from a checkpoint."""
        self.net.load(folder)

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

    def _due(self) -> bool:
        return isinstance(self.train.save_steps, int) and self.cursor.step % self.train.save_steps == 0

    def _assess_due(self) -> bool:
        """Whether an evaluation is due at this step and has not been: every eval_steps, and at the end."""
        step, every = self.cursor.step, self.train.eval_steps
        due = step == self.total or (isinstance(every, int) and step % every == 0)
        return due and bool(len(self.rows.eval)) and self.cursor.evaluated_step != step

    def _eta(self, step: int) -> float:
        every = int(self.train.eval_steps) if len(self.rows.eval) else 0
        evals = math.ceil(self.total / every) - step // every if every else 0
        return self._pace.step_seconds * (self.total - step) + self._pace.eval_seconds * evals

    def _numbers(self, step: int) -> list[int]:
        """The source rows of an optimizer step; what generates fills an epoch's last step up from its beginning."""
        epoch, within = divmod(step // self.repeats, self.sampler.steps_per_epoch)
        if self.spec.method in ("rloo", "distill"):
            size = self.sampler.effective_batch
            picked = filled(self.sampler.order(epoch), within * size, size)
        else:
            picked = self.sampler.step(step // self.repeats)
        return [self.rows.train.numbers[at] for at in picked]


@contextmanager
def _as_it_was(model: Any, *, pad: bool) -> Iterator[None]:
    """Give the model its settings back: trainers leave their tokens in it, and no cache for whoever generates next.

    With `pad` the padding token too; a model that scores must keep it, to find the end of a text.
    """
    names = ("use_cache", "bos_token_id", "eos_token_id", *(("pad_token_id",) if pad else ()))
    before = {name: getattr(model.config, name, None) for name in names}
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
        if generation is not None:
            model.generation_config = generation


def _numbers(figures: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The figures that are numbers; TRL says None where there is none."""
    return [
        (str(name), float(value))
        for name, value in figures.items()
        if isinstance(value, (int, float)) and (math.isfinite(value) or str(name).endswith("loss"))
    ]


def _not_a_number(what: str, step: int) -> JobFailed:
    return JobFailed(
        f"The {what} stopped being a number at step {step}.",
        code="nan",
        why="Weights, activations or gradients overflowed.",
        fix="Lower train.learning_rate, or set train.dtype to bfloat16 or float32.",
        where=f"step {step}",
    )


__all__ = ["METHODS", "TrlEngine", "balance", "load_teacher", "micro_batch", "no_teacher", "tables"]
