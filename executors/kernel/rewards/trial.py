"""The trial of every reward before a device works for it: sample rows with an empty, a wrong and the right completion.

It costs milliseconds, but for what a user's functions take. What breaks here would have broken after the first rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tunesmith.executors.kernel.rewards.asking import reference
from tunesmith.executors.kernel.rewards.call import Batch, Reward
from tunesmith.executors.kernel.rewards.entry import Entry, parse
from tunesmith.executors.kernel.rewards.score import Rewards, columns_of
from tunesmith.executors.kernel.rewards.texts import answer_column, written
from tunesmith.orchestrator.errors import InputError, TunesmithError
from tunesmith.orchestrator.nouns import Finding

ROWS = 4
WRONG = "I do not know."
BACKTRACKS = 4000  # characters of a text that shows a pattern to take exponential or cubic time
PROBES = 12
ALARM = 3.0  # seconds for one of them


class Prompt(Protocol):
    """What is needed of a row, as `data.prompts` gives it."""

    @property
    def row(self) -> int:
        """The number of its source row."""
        ...

    @property
    def ids(self) -> Sequence[int]:
        """The prompt's tokens."""
        ...

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """What reward functions see of it."""
        ...

    @property
    def columns(self) -> Mapping[str, Any]:
        """The row's other columns."""
        ...


def dry_run(rewards: Rewards, prompts: Sequence[Prompt]) -> tuple[Finding, ...]:
    """Try every reward on up to four rows, and give warnings (a reward that is the same for all, or never applies).

    Raises InputError reward.dry_run naming reward and row where one fails, gives no numbers, or scores the reference
    no better than a wrong completion; reward.slow_pattern for a pattern that some text makes endless.
    """
    if not prompts:
        return ()
    count = min(ROWS, len(prompts))
    sample = [prompts[at * len(prompts) // count] for at in range(count)]  # from every part of the data
    tried = [_tried(reward, sample) for reward in rewards.rewards]
    texts = list(dict.fromkeys(["", WRONG, *(right for rights in tried for right in rights if right is not None)]))
    texts = [texts[at % len(texts)] for at in range(-(-len(texts) // rewards.group) * rewards.group)]  # whole groups
    asked = [prompt for prompt in sample for _ in texts]
    batch = Batch(
        prompts=[prompt.prompt for prompt in asked],
        completions=[_completion(prompt, text) for prompt in sample for text in texts],
        # No rollout gives a completion without a token: an empty one is its stop token.
        completion_ids=[list(prompt.ids[: max(1, len(text.split()))]) for prompt in sample for text in texts],
        columns=columns_of([prompt.columns for prompt in asked]),
        tools=rewards.tools({}, {}),
        rows=[prompt.row for prompt in asked],
    )
    try:
        found = rewards.values(batch)
    except TunesmithError as error:
        raise InputError(
            f"A reward does not work on sample rows. {error.message}",
            why=error.why,
            fix=error.fix,
            where=error.where,
            code="reward.dry_run" if error.code in ("reward.failed", "reward.value") else error.code,
        ) from error
    if all(value is None for row in found for value in row):
        raise InputError(
            "No reward applies to any of the rows tried.",
            why=f"Rows {', '.join(f'{prompt.row:,}' for prompt in sample)} earned nothing, with right answers too.",
            fix="Check that the answers are where the rewards look for them: NAME:COLUMN names the column.",
            code="reward.dry_run",
            where=f"row {sample[0].row}",
        )
    findings: list[Finding] = []
    for place, (reward, rights) in enumerate(zip(rewards.rewards, tried, strict=True)):
        values = [row[place] for row in found]
        _check_order(reward, rights, sample, texts, values)
        findings += _warnings(reward, sample, texts, values)
        _check_pattern(reward)
    return tuple(findings)


def _tried(reward: Reward, sample: Sequence[Prompt]) -> list[str | None]:
    """The right completion of each row for a reward, as far as its columns say it."""
    if reward.file:
        return [_reference(prompt, "") for prompt in sample]
    return [_right(parse(reward.entry), prompt) for prompt in sample]


def _right(entry: Entry, prompt: Prompt) -> str | None:
    if entry.kind == "think":
        tag, _, answer = (entry.argument or "think").partition(",")
        said = f"<{answer}>It is so.</{answer}>" if answer else "It is so."
        return f"<{tag}>\nBecause.\n</{tag}>\n{said}"
    if entry.kind == "json" and (entry.path or not entry.argument):
        return None if entry.path else "{}"
    if entry.kind == "boxed":
        name = answer_column(list(prompt.columns), entry.argument)
        wanted = reference(_first(prompt.columns[name])) if name else None
        return None if wanted is None else f"It is \\boxed{{{wanted}}}."
    if entry.kind == "reasoning-gym":
        known = prompt.columns.get("answer")
        return f"<answer>{known}</answer>" if isinstance(known, str) else None
    return _reference(prompt, entry.argument) if entry.kind in ("number", "exact", "json") else None


def _reference(prompt: Prompt, wanted: str) -> str | None:
    name = answer_column(list(prompt.columns), wanted)
    value = _first(prompt.columns[name]) if name is not None else None
    return None if value is None else written(value)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _completion(prompt: Prompt, text: str) -> Any:
    return text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]


def _check_order(
    reward: Reward,
    rights: Sequence[str | None],
    sample: Sequence[Prompt],
    texts: Sequence[str],
    values: Sequence[float | None],
) -> None:
    """A built-in reward must score the right completion above the wrong one."""
    if reward.file:
        return
    for at, (prompt, right) in enumerate(zip(sample, rights, strict=True)):
        if right is None:
            continue
        good, bad = (values[at * len(texts) + texts.index(text)] for text in (right, WRONG))
        if good is None or bad is None:
            continue
        if good <= bad:
            raise InputError(
                f"The reward {reward.name} scores the reference of row {prompt.row:,} no better than a wrong answer.",
                why=f"It gives {good:g} for {right[:80]!a} and {bad:g} for {WRONG!a}.",
                fix="Choose a reward that fits the answers, or name their column: NAME:COLUMN.",
                code="reward.dry_run",
                where=f"row {prompt.row}",
            )


def _warnings(
    reward: Reward, sample: Sequence[Prompt], texts: Sequence[str], values: Sequence[float | None]
) -> list[Finding]:
    def warning(code: str, message: str, where: str = "") -> Finding:
        return Finding(level="warning", code=code, message=message, where=where or reward.entry[:100])

    scored = [value for value in values if value is not None]
    if not scored:
        return [warning("reward.never", f"The reward {reward.name} applies to none of the rows tried.")]
    found = []
    groups = [values[at * len(texts) : (at + 1) * len(texts)] for at in range(len(sample))]
    empty = [prompt.row for prompt, group in zip(sample, groups, strict=True) if set(group) == {None}]
    if empty and not reward.file:
        message = f"The reward {reward.name} does not apply to row {empty[0]:,}: it finds no answer there."
        found.append(warning("reward.unreadable", message, f"row {empty[0]}"))
    if len(set(scored)) == 1:
        message = (
            f"The reward {reward.name} gave {scored[0]:g} for every completion tried, an empty and a wrong one among"
            " them. From a reward that is always the same nothing is learnt."
        )
        found.append(warning("reward.constant", message))
    return found


def _check_pattern(reward: Reward) -> None:
    """Refuse a pattern that a plain text makes endless: a long run of one of its own characters, and then none."""
    if reward.file or reward.guard is None or reward.guard.kind != "regex":
        return
    pattern = parse(reward.entry).argument
    letters = list(dict.fromkeys(["a", "0", " ", "-", *(one for one in pattern if one.isprintable())]))[:PROBES]
    outcomes = reward.guard.map([{"text": letter * BACKTRACKS + "\0", "alarm": ALARM} for letter in letters])
    reward.guard.slow = 0
    slow = [letter for letter, outcome in zip(letters, outcomes, strict=True) if outcome.slow]
    if slow:
        raise InputError(
            f"The pattern of the reward {reward.name} may take for ever.",
            why=f"On {BACKTRACKS:,} times {slow[0]!r} it was given up after seconds: repeats inside or beside each"
            " other can share one text in too many ways.",
            fix="Write no repeat of a repeat, like (a+)+ or .*.*; possessive repeats (a++) and (?>...) help.",
            code="reward.slow_pattern",
            where=reward.entry[:100],
        )
