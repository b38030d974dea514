"""What TRL's trainers give up, and how they tell and ask: order, random numbers, checkpoints, rewards, telemetry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState, set_seed
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from tunesmith.executors.kernel.loops.batches import Sampler
from tunesmith.executors.kernel.loops.trl_plan import Wish, filled
from tunesmith.executors.kernel.rewards import Scores

ROUND = "round.safetensors"
STATE = "trainer_state.json"  # transformers' name: its trainer reads its step and its epoch from there


class Course(Protocol):
    """Who is told what happens, and says what shall happen. Each may raise to end the training."""

    def stepping(self, step: int) -> None:
        """An optimizer step begins, counted from 0."""
        ...

    def within(self) -> None:
        """Part of a step, or of an evaluation, is done."""
        ...

    def stepped(self, step: int) -> Wish:
        """An optimizer step is done; steps now count from 1."""
        ...

    def logged(self, step: int, figures: Mapping[str, Any]) -> None:
        """The figures of a step."""
        ...

    def assessing(self, step: int, done: int, total: int) -> None:
        """An evaluation goes on; in batches."""
        ...

    def assessed(self, step: int, figures: Mapping[str, Any]) -> Wish:
        """An evaluation is done."""
        ...

    def scored(self, places: Sequence[int], prompts: Sequence[Any], completions: Sequence[Any], ids: Any) -> Scores:
        """Score completions of the rows at these places, counted over training and held-out rows."""
        ...

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        ...

    def load(self, folder: Path) -> None:
        """Take weights back from a checkpoint."""
        ...


class Order(torch.utils.data.Sampler[int]):
    """Row indices in our sampler's order, epoch by epoch.

    What generates wants a step's rows `times` over, each of them `each` times in a row, and every step whole: the last
    one of an epoch is filled up from the epoch's beginning.
    """

    def __init__(self, sampler: Sampler, *, each: int = 1, times: int = 0) -> None:
        self.sampler = sampler
        self.each = each
        self.times = times
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers before an epoch is walked through."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = self.sampler.order(self.epoch)
        if not self.times:
            yield from order
            return
        for start in range(0, len(order), self.sampler.effective_batch):
            chosen = filled(order, start, self.sampler.effective_batch)
            for _ in range(self.times):
                for row in chosen:
                    yield from [row] * self.each

    def __len__(self) -> int:
        if not self.times:
            return self.sampler.rows
        return self.sampler.steps_per_epoch * self.sampler.effective_batch * self.each * self.times


class Held:
    """What every trainer of TRL's gives up: its order of rows, its checkpoints, its random numbers, its telemetry."""

    course: Course
    order: Order
    scaler_state: Mapping[str, Any]
    accelerator: Any
    args: Any

    def _send_telemetry(self) -> None:
        """Nothing is sent to anybody."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Order:
        return self.order

    def _save_checkpoint(self, *_: Any, **__: Any) -> None:
        self.course.save()

    def _load_from_checkpoint(self, folder: str, *_: Any, **__: Any) -> None:
        self.course.load(Path(folder))

    def _load_optimizer_and_scheduler(self, *_: Any, **__: Any) -> None:
        """The optimizer comes filled, and the schedule knows no state."""

    def _load_rng_state(self, *_: Any, **__: Any) -> None:
        """Every step seeds itself."""

    def _load_scaler(self, *_: Any, **__: Any) -> None:
        if self.accelerator.scaler is not None and self.scaler_state:
            self.accelerator.scaler.load_state_dict(dict(self.scaler_state))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Drawn from the same random numbers every time, so that evaluations can be compared; steps seed themselves."""
        set_seed(self.args.seed)
        return super().evaluate(*args, **kwargs)  # type: ignore[misc]


class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Passes the trainer's moments on to the course, and the course's wishes back."""

    def __init__(self, course: Course, seed: int) -> None:
        self.course = course
        self.seed = seed
        self._assessed = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.course.stepping(state.global_step)
        key = f"{self.seed}:{state.global_step}".encode()
        set_seed(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big"))

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.course.within()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._obey(self.course.stepped(state.global_step), control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        state.log_history.clear()  # it grows without bounds, and our events hold the same
        if "loss" in (logs or {}):
            self.course.logged(state.global_step, logs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        self._assessed += 1
        self.course.assessing(state.global_step, self._assessed, len(eval_dataloader))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self._assessed = 0
        self._obey(self.course.assessed(state.global_step, metrics or {}), control)

    @staticmethod
    def _obey(wish: Wish, control: Any) -> None:
        control.should_evaluate = control.should_evaluate or wish.evaluate
        control.should_save = control.should_save or wish.save
        control.should_training_stop = control.should_training_stop or wish.end


@dataclass
class Mismatched(DataCollatorForUnpairedPreference):  # type: ignore[misc, unused-ignore]
    """Pairs each prompt of a batch with its neighbour's answer, for KTO's estimate of the divergence.

    TRL pairs them once, before training, and must never shuffle for that; here a batch is paired when it is made.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, with the answers turned by one place."""
        answers = [example["completion_ids"] for example in examples]
        turned = [{**example, "KL_completion_ids": answers[at - 1]} for at, example in enumerate(examples)]
        return dict(super().torch_call(turned))


def reward_functions(names: Sequence[str], course: Course) -> list[Callable[..., list[float | None]]]:
    """The rewards as TRL calls them, one function each; all of them are computed when the first is asked."""
    latest: dict[str, Any] = {}

    def function(index: int, name: str) -> Callable[..., list[float | None]]:
        def reward(
            *, prompts: Any, completions: Any, completion_ids: Any, at: Any, log_metric: Any, **_: Any
        ) -> list[float | None]:
            if latest.get("of") is not completions:
                scores = course.scored(at, prompts, completions, completion_ids)
                latest.update(of=completions, scores=scores)
                for key, value in scores.told.items():
                    log_metric(key, value)
            return [values[index] for values in latest["scores"].values]

        reward.__name__ = name
        return reward

    return [function(index, name) for index, name in enumerate(names)]


def save_round(folder: Path, trainer: Any) -> None:
    """Write the answers of a round that is not over, which weights of an earlier step gave; none may be there yet."""
    batches = trainer._buffered_inputs
    if batches:
        save_file({name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}, folder / ROUND)


def load_round(folder: Path, count: int, device: torch.device) -> list[dict[str, torch.Tensor]] | None:
    """The answers of a round as `count` batches; None where none were saved: then the round writes them anew."""
    if not (folder / ROUND).exists():
        return None
    parts = {name: item.to(device).chunk(count) for name, item in load_file(folder / ROUND).items()}
    return [{name: items[at] for name, items in parts.items()} for at in range(count)]


def state(folder: Path, *, step: int, epoch: float, total: int, micro: int, tokens: int) -> None:
    """Write what transformers reads where it goes on."""
    TrainerState(
        epoch=epoch,
        global_step=step,
        max_steps=total,
        logging_steps=1,
        train_batch_size=micro,
        num_input_tokens_seen=tokens,
    ).save_to_json(str(folder / STATE))
