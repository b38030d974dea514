"""Rows as TRL's trainers read them, each checked by our own encoding first: what it refuses is said, never lost.

kto      prompt, completion, label      the last answer of a row and all that comes before it
reward   chosen, rejected               each with its prompt
rloo     prompt                         kept columns stay here, for the rewards; TRL would squeeze them into Arrow
distill  prompt                         the student writes the answers
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.executors.kernel.data import Encoded, Example, Message, Prepared, encode_many
from tunesmith.executors.kernel.data.load import no_usable_rows
from tunesmith.executors.kernel.data.prompts import encode_prompts
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import JobSpec

Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows by column; `numbers` are those of the source rows. `kept` holds a row's other columns, for rewards."""

    numbers: tuple[int, ...]
    columns: dict[str, list[Any]]
    kept: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True)
class Tables:
    """All rows of a run: those left out with their errors, and how many lost their end."""

    train: Table
    eval: Table
    lost: list[InputError]
    cut: int
    total: int


@dataclass(slots=True)
class _Found:
    """One row on its way: what our encoding shall look at, and what TRL gets."""

    row: int
    checks: list[Example]
    columns: dict[str, Any]
    kept: dict[str, Any] = field(default_factory=dict)
    cut: bool = False


def tables(spec: JobSpec, prepared: Prepared, tokenizer: Any, told: Told | None = None) -> Tables:
    """The rows of a spec whose method is one of TRL's. `told(done, total)` may raise to end it.

    Raises InputError (data.no_usable_rows) where nothing is left to train on.
    """
    total = len(prepared.train) + len(prepared.eval)
    lost: list[InputError] = []
    parts: list[list[_Found]] = []
    done = 0
    for examples in (prepared.train, prepared.eval):
        kept: list[_Found] = []
        for result in _rows(spec, examples, tokenizer):
            done += 1
            if told is not None:
                told(done, total)
            if isinstance(result, InputError):
                lost.append(result)
            else:
                kept.append(result)
        parts.append(kept)
    kind = _kind(parts[0][0]) if parts[0] else str
    train, held = (_of_kind(part, kind, lost) for part in parts)
    if not train:
        raise no_usable_rows(lost)
    return Tables(_table(train), _table(held), lost, sum(found.cut for found in (*train, *held)), total)


def _table(found: Sequence[_Found]) -> Table:
    names = list(found[0].columns) if found else []
    columns = {name: [each.columns[name] for each in found] for name in names}
    return Table(tuple(each.row for each in found), columns, tuple(each.kept for each in found))


def _kind(found: _Found) -> type:
    return type(next(iter(found.columns.values())))


def _of_kind(part: Sequence[_Found], kind: type, lost: list[InputError]) -> list[_Found]:
    """Rows that are conversations, or those that are texts: a column cannot hold both."""
    kept = []
    for found in part:
        if _kind(found) is kind:
            kept.append(found)
        else:
            mine, others = ("a text", "conversations") if kind is list else ("a conversation", "texts")
            lost.append(_error(found.row, "mixed_rows", f"is {mine}, and the rows before it are {others}"))
    return kept


def _rows(spec: JobSpec, examples: Sequence[Example], tokenizer: Any) -> Iterator[_Found | InputError]:
    limit = int(spec.train.max_length)
    if spec.method in ("rloo", "distill"):
        answer = spec.grpo.max_completion if spec.method == "rloo" else spec.distill.max_completion
        return _prompts(examples, tokenizer, limit - answer)
    make = _unpaired if spec.method == "kto" else _pair
    found = [make(example, bool(tokenizer.chat_template)) for example in examples]
    return _checked(found, tokenizer, limit, whole=spec.method == "reward")


def _checked(
    found: Sequence[_Found | InputError], tokenizer: Any, limit: int, *, whole: bool
) -> Iterator[_Found | InputError]:
    """Rows that our encoding can make sense of; `whole` rows are left out where they are too long, others are cut."""
    checks = (each for one in found if isinstance(one, _Found) for each in one.checks)
    results = encode_many(checks, tokenizer, None if whole else limit)
    for one in found:
        if isinstance(one, InputError):
            yield one
            continue
        sides: list[Encoded | InputError] = [next(results) for _ in one.checks]
        wrong = next((side for side in sides if isinstance(side, InputError)), None)
        if wrong is not None:
            yield wrong
            continue
        encoded = [side for side in sides if isinstance(side, Encoded)]
        length = max(len(side.ids) for side in encoded)
        one.cut = any(side.truncated for side in encoded)
        if length > limit:
            why = f"It has {length:,} tokens. The end of an answer decides its score, so nothing is cut off."
            yield _error(one.row, "too_long", f"is longer than {limit:,} tokens", why, "Raise train.max_length.")
        else:
            yield one


# --- one method each -----------------------------------------------------------------------------------------------


def _unpaired(example: Example, template: bool) -> _Found | InputError:
    columns: dict[str, Any]
    if example.messages is None and not template:
        columns = {"prompt": example.prompt, "completion": example.completion}
        check = replace(example, extra={})
    else:
        messages = example.messages or _turns(str(example.prompt), str(example.completion))
        last = max((at for at, turn in enumerate(messages) if turn.role == "assistant"), default=0)
        if not last:
            return _error(example.row, "nothing_to_train", "holds no answer")
        columns = {"prompt": _plain(messages[:last]), "completion": _plain(messages[last : last + 1])}
        check = Example(example.row, messages=messages[: last + 1], context=last)
    return _Found(example.row, [check], {**columns, "label": bool(example.extra["label"])})


def _pair(example: Example, template: bool) -> _Found | InputError:
    sides = [example.extra["chosen"], example.extra["rejected"]]
    checks = []
    if isinstance(sides[0], str) and (not template or not example.prompt):
        texts: list[Any] = [f"{example.prompt or ''}{side}" for side in sides]
        checks = [Example(example.row, text=text) for text in texts]
        return _Found(example.row, checks, dict(zip(("chosen", "rejected"), texts, strict=True)))
    whole = []
    for side in sides:
        messages = _turns(str(example.prompt), side) if isinstance(side, str) else (*(example.messages or ()), *side)
        checks.append(Example(example.row, messages=messages, context=1 if isinstance(side, str) else example.context))
        whole.append(_plain(messages))
    return _Found(example.row, checks, dict(zip(("chosen", "rejected"), whole, strict=True)))


def _prompts(examples: Sequence[Example], tokenizer: Any, limit: int) -> Iterator[_Found | InputError]:
    for result in encode_prompts(examples, tokenizer, limit):
        if isinstance(result, InputError):
            yield result
        else:
            yield _Found(result.row, [], {"prompt": result.prompt}, kept=result.columns)


def _turns(prompt: str, answer: str) -> tuple[Message, ...]:
    return (Message("user", prompt), Message("assistant", answer))


def _plain(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _error(row: int, code: str, what: str, why: str = "", fix: str = "") -> InputError:
    return InputError(f"Row {row} {what}.", why=why, fix=fix, code=f"data.{code}", where=f"row {row}")
