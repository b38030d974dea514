"""Rewards of a batch of completions, added up as TRL 1.16 does: weights times numbers, None left out.

Functions that are async run together on one event loop, after the others. The total of a completion to which no
function applies is NaN: it has no advantage and no part in any mean.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tunesmith.executors.kernel.rewards.call import Batch, Reward, Values, ask, ask_async, shown
from tunesmith.orchestrator.events import Event, Kind
from tunesmith.orchestrator.nouns import Finding

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop


@dataclass(frozen=True, slots=True)
class Scores:
    """What a batch earned: one list of values per completion, one value per function; totals, NaN where all are None.

    `log` holds rewards/NAME/mean and rewards/NAME/std over what was scored; `told` the means of what functions logged,
    `extra` the columns they logged. Each alert is given once in a job.
    """

    values: list[list[float | None]]
    totals: list[float]
    log: dict[str, float]
    told: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    alerts: tuple[Finding, ...] = ()


@dataclass(slots=True)
class State:
    """What functions see as `trainer_state`: the part of transformers' TrainerState that tells how far training is."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: float = 0.0
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    log_history: list[dict[str, float]] = field(default_factory=list)

    def note(self, event: Event) -> None:
        """Keep what was logged of a step, under transformers' names: those of ours without their first part."""
        if event.kind is Kind.METRIC and event.step is not None:
            values = {name.removeprefix("train/").replace("eval/", "eval_"): x for name, x in event.values.items()}
            self.epoch = values.get("epoch", self.epoch)
            self.log_history.append({**values, "step": event.step})


class Rewards:
    """The rewards of a job. Whoever trains keeps `state` up to date; `score` sets its global_step.

    `group` is how many completions each prompt gets.
    """

    def __init__(self, rewards: Iterable[Reward], *, group: int = 1) -> None:
        self.rewards = _told_apart(rewards)
        self.names = tuple(reward.name for reward in self.rewards)
        self.weights = tuple(reward.weight for reward in self.rewards)
        self.group = group
        self.state = State()
        self._loop = _Loop()
        self._told: set[tuple[str, str]] = set()

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        step: int,
        *,
        rows: Sequence[int] = (),
    ) -> Scores:
        """What each completion earned. `columns` holds one value per completion; `rows` name them in errors.

        Raises JobFailed reward.failed (a function raised) and reward.value (it gave no list of that many numbers),
        and InputError reward.no_column from what is built in.
        """
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        self.state.global_step = step
        batch = Batch(prompts, completions, completion_ids, columns, self.tools(metrics, extra), rows)
        values = self.values(batch)
        totals = [total(row, self.weights) for row in values]
        return Scores(values, totals, self._log(values), _told(metrics), extra, self._alerts(batch, values))

    def tools(self, metrics: dict[str, list[float]], extra: dict[str, list[Any]]) -> dict[str, Any]:
        """What users' functions get beside the data: trainer_state, log_extra and log_metric, writing into these."""
        return {
            "trainer_state": self.state,
            "log_extra": lambda column, values: extra.setdefault(str(column)[:100], []).extend(values),
            "log_metric": lambda name, value: metrics.setdefault(str(name)[:100], []).append(float(value)),
        }

    def values(self, batch: Batch) -> list[Values]:
        """One list per completion, one value per function. Raises as `score` does."""
        results: dict[int, Values] = {}
        later = [place for place, reward in enumerate(self.rewards) if reward.is_async]
        for place, reward in enumerate(self.rewards):
            if place not in later:
                results[place] = ask(reward, batch)
        if later:
            results |= zip(later, self._loop.together([self.rewards[place] for place in later], batch), strict=True)
        return [[results[place][at] for place in range(len(self.rewards))] for at in range(len(batch.completions))]

    def close(self) -> None:
        """End the children that score, and the event loop."""
        self._loop.close()
        for reward in self.rewards:
            if reward.guard is not None:
                reward.guard.close()

    def _log(self, values: Sequence[Sequence[float | None]]) -> dict[str, float]:
        log: dict[str, float] = {}
        for place, name in enumerate(self.names):
            scored = [value for row in values if (value := row[place]) is not None]
            if scored:
                mean = math.fsum(scored) / len(scored)
                log[f"rewards/{name}/mean"] = mean
                if len(scored) > 1:
                    squares = math.fsum((value - mean) ** 2 for value in scored)
                    log[f"rewards/{name}/std"] = math.sqrt(squares / (len(scored) - 1))
        return log

    def _alerts(self, batch: Batch, values: Sequence[Sequence[float | None]]) -> tuple[Finding, ...]:
        found: list[tuple[str, str, str]] = []
        empty = [at for at, row in enumerate(values) if all(value is None for value in row)]
        if empty:
            message = (
                f"No reward applied to {len(empty):,} of {len(values):,} completions, so nothing is learnt from them."
                f" The first: {batch.place(empty[0])}, {shown(batch.completions[empty[0]])}."
            )
            found.append(("reward.none", message, "grpo.rewards"))
        for reward in self.rewards:
            if reward.guard is not None and reward.guard.slow:
                message = f"{reward.name} ran out of time on {reward.guard.slow:,} completions, which score 0."
                found.append(("reward.slow", message, reward.name))
        fresh = [item for item in found if (item[0], item[2]) not in self._told]
        self._told |= {(code, where) for code, _, where in fresh}
        return tuple(
            Finding(level="warning", code=code, message=message, where=where) for code, message, where in fresh
        )


def _told(metrics: Mapping[str, list[float]]) -> dict[str, float]:
    finite = {name: numbers for name, numbers in metrics.items() if numbers and all(map(math.isfinite, numbers))}
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in finite.items()}


def total(values: Sequence[float | None], weights: Sequence[float]) -> float:
    """The weighted sum of what is not None; NaN where all is."""
    parts = [weight * value for value, weight in zip(values, weights, strict=True) if value is not None]
    return math.fsum(parts) if parts else math.nan


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of some rows, as functions get them: a list for each, None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


class _Loop:
    """The event loop of async functions, made when first needed and kept: clients they hold are bound to it."""

    def __init__(self) -> None:
        self._loop: AbstractEventLoop | None = None

    def together(self, rewards: Sequence[Reward], batch: Batch) -> list[Values]:
        """What several async functions give, all at once. Raises the first error after all have ended."""

        import asyncio  # 50 ms that a plan can do without

        async def run() -> list[Values | BaseException]:
            return await asyncio.gather(*(ask_async(reward, batch) for reward in rewards), return_exceptions=True)

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._end = weakref.finalize(self, self._loop.close)
        values: list[Values] = []
        for found in self._loop.run_until_complete(run()):
            if isinstance(found, BaseException):
                raise found
            values.append(found)
        return values

    def close(self) -> None:
        """End the loop; it is made anew if it is needed again."""
        if self._loop is not None:
            self._loop = None
            self._end()


def _told_apart(rewards: Iterable[Reward]) -> tuple[Reward, ...]:
    """Rewards with names of their own: a second `regex` is called regex-2."""
    seen: Counter[str] = Counter()
    made = []
    for reward in rewards:
        seen[reward.name] += 1
        again = seen[reward.name]
        made.append(reward if again == 1 else replace(reward, name=f"{reward.name}-{again}"))
    return tuple(made)
