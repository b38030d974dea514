"""A row becomes an example, by its mapping alone. What cannot be trained on is a typed error, never a silent loss."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.executors.kernel.data.formats import TEMPLATE, truth
from tunesmith.executors.kernel.data.sources import Row
from tunesmith.executors.kernel.data.turns import as_turn, as_turns, role_of
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import Mapping


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: role is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready to be rendered. Which fields are set depends on the mapping's kind.

    - messages: `messages`. prompt-completion: `prompt` and `completion`, or `messages` where there is a system text,
      a history or a prompt of several turns. text: `text`.
    - preference: `prompt` (text) or `messages` (turns), with `extra["chosen"]` and `extra["rejected"]`: texts or
      tuples of Message. unpaired: as for messages or prompt-completion, with `extra["label"]`: bool.
    - prompt-only: `prompt` or `messages`. The kept columns are in `extra` under their own names.

    The first `context` messages are never trained on, whoever speaks: they are a prompt.
    """

    row: int
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    extra: Dict[str, Any] = field(default_factory=dict)
    context: int = 0


def convert(row: Row, mapping: Mapping) -> Example:
    """The example of a row. Raises InputError only.

    Codes: data.row.missing_column, wrong_type, empty_answer, empty_turn, unknown_role, roles_order, no_answer,
    tool_calls, not_text, bad_label, encoding.
    """
    kept = {name: row.values.get(name) for name in mapping.keep}
    return _KINDS[mapping.kind](row, mapping, kept)


def _messages(row: Row, mapping: Mapping, extra: dict[str, Any]) -> Example:
    messages = _conversation(row, mapping)
    _need_answer(row, messages)
    return Example(row.number, messages=tuple(messages), extra=extra)


def _prompt_completion(row: Row, mapping: Mapping, extra: dict[str, Any]) -> Example:
    column = mapping.columns["completion"]
    raw = _cell(row, column)
    before = _prompt(row, mapping)
    answer = _turns(row, column, raw, mapping) if isinstance(raw, (list, dict)) else None
    if answer is None:
        completion = _text(row, column, raw, code="data.row.empty_answer")
        if isinstance(before, str):
            return Example(row.number, prompt=before, completion=completion, extra=extra)
        answer = [Message("assistant", completion)]
    if isinstance(before, str):
        before = [Message("user", before)]
    messages = [*before, *answer]
    _check_order(row, messages)
    _need_answer(row, answer)
    # A prompt's own answers are not trained on; those of a history column are: they are earlier rounds of the row.
    context = 0 if "history" in mapping.columns else len(before)
    return Example(row.number, messages=tuple(messages), extra=extra, context=context)


def _raw_text(row: Row, mapping: Mapping, extra: dict[str, Any]) -> Example:
    if mapping.template is not None:
        text = fill(row, mapping.template)
    else:
        column = mapping.columns["text"]
        text = _text(row, column, _cell(row, column))
    return Example(row.number, text=text, extra=extra)


def _preference(row: Row, mapping: Mapping, extra: dict[str, Any]) -> Example:
    sides: dict[str, str | list[Message]] = {}
    for side in ("chosen", "rejected"):
        column = mapping.columns[side]
        raw = _cell(row, column)
        if isinstance(raw, str) and "\n\nAssistant:" in raw and raw.lstrip().startswith("Human:"):
            sides[side] = _transcript(row, raw)
        elif isinstance(raw, (list, dict)):
            sides[side] = _turns(row, column, raw, mapping)
        else:
            sides[side] = _text(row, column, raw, code="data.row.empty_answer")
    chosen, rejected = sides["chosen"], sides["rejected"]
    if type(chosen) is not type(rejected):
        raise _error(row, "wrong_type", f"{mapping.columns['chosen']} is a conversation and its counterpart is a text")
    has_prompt = "prompt" in mapping.columns or mapping.template is not None
    if isinstance(chosen, str) or isinstance(rejected, str):
        before = _prompt(row, mapping) if has_prompt else ""
        if isinstance(before, str):
            return Example(row.number, prompt=before, extra={**extra, "chosen": chosen, "rejected": rejected})
        chosen, rejected = [Message("assistant", str(chosen))], [Message("assistant", str(rejected))]
    elif chosen and rejected and chosen[0].role != "assistant":
        shared = 0  # the prompt is inside both, as their common beginning
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        before = _prompt(row, mapping) if has_prompt else []
        before = [Message("user", before)] if isinstance(before, str) else before
    for answer in (chosen, rejected):
        _check_order(row, [*before, *answer])
        _need_answer(row, answer)
    pair = {"chosen": tuple(chosen), "rejected": tuple(rejected)}
    return Example(row.number, messages=tuple(before), extra={**extra, **pair}, context=len(before))


def _unpaired(row: Row, mapping: Mapping, extra: dict[str, Any]) -> Example:
    column = mapping.columns["label"]
    label = truth(_cell(row, column))
    if label is None:
        raise _error(row, "bad_label", f"{column} is neither true nor false")
    inner = _messages if "messages" in mapping.columns else _prompt_completion
    return inner(row, mapping, {**extra, "label": label})


def _prompt_only(row: Row, mapping: Mapping, extra: dict[str, Any]) -> Example:
    if "messages" not in mapping.columns:
        before = _prompt(row, mapping)
        if isinstance(before, str):
            return Example(row.number, prompt=before, extra=extra)
    else:
        before = _conversation(row, mapping)
    while before and before[-1].role == "assistant":
        before = before[:-1]
    if not before or before[-1].role == "system":
        raise _error(row, "empty_turn", "there is no prompt")
    _check_order(row, before)
    return Example(row.number, messages=tuple(before), extra=extra, context=len(before))


_KINDS = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "text": _raw_text,
    "preference": _preference,
    "unpaired": _unpaired,
    "prompt-only": _prompt_only,
}


def fill(row: Row, template: str) -> str:
    """A template with {column} replaced by the row's texts; {{ and }} stand for braces. Values are never templates."""

    def one(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            return match.group(0)[0]
        value = _cell(row, name)
        return "" if value is None or value == "" else _text(row, name, value, empty=True)

    return TEMPLATE.sub(one, template)


# --- prompts and conversations -------------------------------------------------------------------------------------


def _prompt(row: Row, mapping: Mapping) -> str | list[Message]:
    """What comes before the answer: one text, or messages where there are a system text, a history or turns."""
    columns = mapping.columns
    before: list[Message] = []
    system = row.values.get(columns["system"]) if "system" in columns else None
    if system is not None and system != "":
        before.append(Message("system", _text(row, columns["system"], system)))
    if "history" in columns:
        before += _history(row, columns["history"])
    if mapping.template is not None:
        text = fill(row, mapping.template)
    else:
        column = columns.get("prompt")
        if column is None:
            raise _error(row, "missing_column", "the mapping names no column for the prompt")
        raw = _cell(row, column)
        if isinstance(raw, (list, dict)):
            turns = [*before, *_turns(row, column, raw, mapping)]
            _check_order(row, turns)
            return turns
        more = row.values.get(columns["context"]) if "context" in columns else None
        parts = [part for part in (raw, more) if part is not None and part != ""]
        if not parts:
            raise _error(row, "empty_turn", f"{column} is empty")
        text = "\n".join(_text(row, column, part) for part in parts)
    if not text.strip():
        raise _error(row, "empty_turn", "the prompt is empty")
    return [*before, Message("user", text)] if before else text


def _history(row: Row, column: str) -> list[Message]:
    rounds = row.values.get(column)
    if rounds is None:
        return []
    if not isinstance(rounds, list):
        raise _error(row, "wrong_type", f"{column} is not a list of rounds")
    messages: list[Message] = []
    for item in rounds:
        if not isinstance(item, list) or len(item) != 2:
            raise _error(row, "wrong_type", f"{column} holds a round that is not a question and an answer")
        messages.append(Message("user", _text(row, column, item[0])))
        messages.append(Message("assistant", _text(row, column, item[1], code="data.row.empty_answer")))
    return messages


def _conversation(row: Row, mapping: Mapping) -> list[Message]:
    column = mapping.columns["messages"]
    messages = _turns(row, column, _cell(row, column), mapping)
    if "system" in mapping.columns and (not messages or messages[0].role != "system"):
        system = row.values.get(mapping.columns["system"])
        if system is not None and system != "":
            messages.insert(0, Message("system", _text(row, mapping.columns["system"], system)))
    _check_order(row, messages)
    return messages


def _turns(row: Row, column: str, raw: Any, mapping: Mapping) -> list[Message]:
    single = as_turn(raw)
    turns = [single] if single else as_turns(raw)
    if turns is None:
        if raw is None or raw == []:
            raise _error(row, "no_answer", f"{column} holds no turns")
        raise _error(row, "wrong_type", f"{column} is not a list of turns with a role and a content")
    messages = []
    for number, (name, content) in enumerate(turns, 1):
        role = role_of(name, mapping.roles) if isinstance(name, str) else None
        if role is None:
            raise InputError(
                f"Turn {number} in {row.where} has the role {str(name)[:40]!r}, which nobody here knows.",
                why="Known are system, user, assistant and tool, and their usual other names.",
                fix=f"Set mapping.roles, for example {{{str(name)[:40]}: user}}.",
                code="data.row.unknown_role",
                where=row.where,
            )
        if content is None and role == "assistant":
            raise _error(row, "tool_calls" if single is None else "empty_answer", f"turn {number} has no text")
        code = "data.row.empty_answer" if role == "assistant" else "data.row.empty_turn"
        text = _text(row, f"turn {number}", _joined(row, number, content), code=code, empty=role == "system")
        if text or role != "system":
            messages.append(Message(role, text))
    return messages


def _joined(row: Row, number: int, content: Any) -> Any:
    """Typed content parts as one text; images and sound are refused."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _error(row, "not_text", f"turn {number} holds a part of type {str(kind)[:40]!r}")
    return "".join(texts)


def _transcript(row: Row, raw: str) -> list[Message]:
    """A text of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." as messages."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", raw.strip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        Message(roles[name], _text(row, "transcript", text.strip(), code="data.row.empty_answer"))
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _check_order(row: Row, messages: Sequence[Message]) -> None:
    """A system text first if at all, then user and assistant in turn; tool results between calls and answers."""
    before = ""
    for number, message in enumerate(messages, 1):
        role = message.role
        fits = {
            "system": before == "",
            "user": before in ("", "system", "assistant"),
            "assistant": before in ("user", "tool"),
            "tool": before in ("assistant", "tool"),
        }.get(role, False)
        if not fits:
            after = f"follows {before}" if before else "comes first"
            raise _error(row, "roles_order", f"turn {number}, {role}, {after}")
        before = role


def _need_answer(row: Row, messages: Sequence[Message]) -> None:
    if not any(message.role == "assistant" for message in messages):
        raise _error(row, "no_answer", "there is no turn of the assistant")


# --- cells ---------------------------------------------------------------------------------------------------------


def _cell(row: Row, column: str) -> Any:
    try:
        return row.values[column]
    except KeyError:
        raise _error(row, "missing_column", f"the column {column!r} is missing") from None


def _text(row: Row, what: str, value: Any, *, code: str = "data.row.empty_turn", empty: bool = False) -> str:
    """A cell as text. Numbers are written as JSON writes them; an empty or blank text is an error unless allowed."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        text = json.dumps(value)
    elif value is None and not empty:
        raise _error(row, code.rpartition(".")[2], f"{what} is null")
    elif value is None:
        text = ""
    else:
        raise _error(row, "wrong_type", f"{what} is {_named(value)}, not a text")
    if not empty and (not text or text.isspace()):
        raise _error(row, code.rpartition(".")[2], f"{what} is empty")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _error(row, "encoding", f"{what} holds half of a character pair (a lone surrogate)") from None
    return text


def _named(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", bool: "a boolean", float: "not a number"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


_FIXES = {
    "missing_column": "Add the column, or name another in mapping.columns.",
    "wrong_type": "Write a text there.",
    "empty_answer": "Fill in the answer or remove the row.",
    "empty_turn": "Fill in the text or remove the row.",
    "roles_order": "After an optional system turn, user and assistant speak in turn, the user first.",
    "no_answer": "Add the assistant's answer or remove the row.",
    "tool_calls": "Write the call as the turn's text; calls in a field of their own are not read.",
    "not_text": "Only text can be trained on here.",
    "bad_label": "Write true or false.",
    "encoding": "Write the file again with a tool that keeps UTF-8 whole.",
}


def _error(row: Row, code: str, reason: str) -> InputError:
    message = f"{row.where} cannot be used: {reason}."
    return InputError(message, fix=_FIXES.get(code, ""), code=f"data.row.{code}", where=row.where)
