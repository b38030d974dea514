"""One reward function called as TRL 1.16 calls it, and what it gives checked: one number or None per completion.

What a user's function raises or gives in error becomes a JobFailed that names the function, its line and the sample.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.executors.kernel.rewards.files import line_in
from tunesmith.executors.kernel.rewards.guard import Guard
from tunesmith.executors.kernel.rewards.texts import text_of
from tunesmith.orchestrator.errors import JobFailed, TunesmithError

Values = list[float | None]

LARGEST = 3.4e38  # of float32, in which advantages are worked out
SEARCH = 5.0  # seconds to find out which completion a function fails on
_TOOLS = ("trainer_state", "log_extra", "log_metric")
_TAKEN = frozenset(("prompts", "completions", *_TOOLS))
_NOT_PASSED = frozenset(("prompt", "completion", "completion_ids"))  # TRL keeps these from functions


@dataclass(frozen=True, slots=True)
class Reward:
    """One function with its weight. `entry` is what the spec says; `file` the user's file it is from, else ""."""

    name: str
    weight: float
    call: Callable[..., Any]
    entry: str
    file: str = ""
    guard: Guard | None = None

    @property
    def is_async(self) -> bool:
        """Whether a call gives a coroutine, told as TRL tells it."""
        call = self.call
        while isinstance(call, functools.partial):
            call = call.func
        return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


@dataclass(frozen=True, slots=True)
class Batch:
    """What is scored: one prompt, completion, list of ids and value of each column per sample. `rows` name them."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    tools: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[int] = ()

    def keywords(self, reward: Reward) -> dict[str, Any]:
        """The arguments of a call. What is built in only sees the data.

        A user's function gets what TRL gives it, in lists of its own: it may change them.
        """
        left_out = _TAKEN | _NOT_PASSED if reward.file else _TAKEN
        columns = {name: list(cells) for name, cells in self.columns.items() if name not in left_out}
        texts = {**columns, "prompts": self.prompts, "completions": self.completions}
        if not reward.file:
            return {**texts, "completion_ids": self.completion_ids}
        return {**_own(texts), "completion_ids": [list(ids) for ids in self.completion_ids], **self.tools}

    def only(self, at: int) -> Batch:
        """The sample at one place, by itself."""
        return replace(
            self,
            prompts=[self.prompts[at]],
            completions=[self.completions[at]],
            completion_ids=[self.completion_ids[at]],
            columns={name: [cells[at]] for name, cells in self.columns.items()},
            tools={**self.tools, **{name: _ignore for name in ("log_extra", "log_metric") if name in self.tools}},
            rows=[self.rows[at]] if self.rows else (),
        )

    def place(self, at: int) -> str:
        """Which sample that is, for people."""
        row = f" (row {self.rows[at]:,})" if self.rows else ""
        return f"completion {at + 1:,} of {len(self.completions):,}{row}"


def _own(value: Any) -> Any:
    """A value with lists and mappings of its own, as deep as JSON goes."""
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return [_own(item) for item in value] if isinstance(value, list) else value


def ask(reward: Reward, batch: Batch) -> Values:
    """What a function gives for a batch. Raises JobFailed reward.failed and reward.value."""
    try:
        found = reward.call(**batch.keywords(reward))
    except (Exception, SystemExit) as error:
        if isinstance(error, TunesmithError) and not reward.file:
            raise
        raise failed(reward, batch, error, _culprit(reward, batch, error)) from error
    return checked(reward, batch, found)


async def ask_async(reward: Reward, batch: Batch) -> Values:
    """The same of an async function. The sample is named only where the batch has one: calls may cost money."""
    try:
        found = await reward.call(**batch.keywords(reward))
    except (Exception, SystemExit) as error:
        raise failed(reward, batch, error, 0 if len(batch.completions) == 1 else None) from error
    return checked(reward, batch, found)


def checked(reward: Reward, batch: Batch, found: Any) -> Values:
    """What a function gave, as floats and None. Raises JobFailed reward.value."""
    count = len(batch.completions)
    if isinstance(found, (str, bytes, Mapping)) or not isinstance(found, Iterable):
        raise _wrong(reward, f"gave {_named(found)}", f"A list of {count:,} numbers was expected.")
    try:
        values = list(found)
    except (Exception, SystemExit) as error:  # a generator, or what only looks like a list
        raise failed(reward, batch, error, None) from error
    if len(values) != count:
        raise _wrong(
            reward, f"gave {len(values):,} rewards for {count:,} completions", "One is needed for each completion."
        )
    return [None if value is None else _number(reward, batch, at, value) for at, value in enumerate(values)]


def _number(reward: Reward, batch: Batch, at: int, value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise _wrong(reward, f"gave {_named(value)} for {batch.place(at)}", "A number or None was expected.")
    try:
        number = float(value)
    except (Exception, SystemExit) as error:  # whatever __float__ of an odd thing does
        why = "A number or None was expected."
        raise _wrong(reward, f"gave {_named(value)} for {batch.place(at)}", why) from error
    if not math.isfinite(number) or abs(number) > LARGEST:
        why = "It must be finite; None says that a reward does not apply."
        raise _wrong(reward, f"gave {number} for {batch.place(at)}", why)
    return number


def failed(reward: Reward, batch: Batch, error: BaseException, at: int | None) -> JobFailed:
    """The error for a function that raised, with the line of the user's file and the sample where it is known."""
    line = line_in(reward.file, error) if reward.file else None
    where = f"{reward.file}:{line}" if line else reward.file or reward.entry[:100]
    on = f"a batch of {len(batch.completions):,} completions"
    if at is not None:
        on = f"{batch.place(at)}, {shown(batch.completions[at])}"
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    return JobFailed(
        f"The reward function {reward.name} failed on {on}.",
        code="reward.failed",
        why=f"{type(error).__name__}: {reason}".rstrip(": "),
        where=where,
        fix="Mend the function and plan the job again: a changed file needs a new approval." if reward.file else "",
    )


def shown(completion: Any) -> str:
    """The beginning of a completion's text, as a message may show it."""
    text = text_of(completion)
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")


def _culprit(reward: Reward, batch: Batch, error: BaseException) -> int | None:
    """The sample that a function fails on, found by asking for each alone; None where none is found in time."""
    if len(batch.completions) == 1:
        return 0
    give_up = time.monotonic() + SEARCH
    for at in range(len(batch.completions)):
        if time.monotonic() > give_up:
            return None
        try:
            reward.call(**batch.only(at).keywords(reward))
        except (Exception, SystemExit) as again:
            if type(again) is type(error):
                return at
    return None


def _wrong(reward: Reward, what: str, why: str) -> JobFailed:
    return JobFailed(
        f"The reward function {reward.name} {what}.",
        code="reward.value",
        why=why,
        where=reward.file or reward.entry[:100],
        fix="Mend the function and plan the job again: a changed file needs a new approval." if reward.file else "",
    )


def _named(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:40]!a}"
    return f"a value of type {type(value).__name__}"


def _ignore(*values: Any) -> None:
    """What log_extra and log_metric do while a culprit is looked for."""
