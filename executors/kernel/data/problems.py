"""What is wrong with rows, counted: one finding per code, with how many rows, where the first stand, and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tunesmith.executors.kernel.data.convert import Example, Message
from tunesmith.executors.kernel.data.formats import holds_answers
from tunesmith.executors.kernel.data.sources import Row
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import Finding, Level, Mapping

SHOWN = 3  # rows named in a finding

# code: (level, what the rows do, what follows from it and what to do)
_TEXTS: dict[str, tuple[Level, str, str]] = {
    "data.row.missing_column": ("warning", "lack a column", "They are left out. Add the column or remove the rows."),
    "data.row.wrong_type": ("warning", "hold something other than text", "They are left out. Write a text there."),
    "data.row.empty_answer": ("warning", "have an empty or null answer", "They are left out. Fill in the answers."),
    "data.row.empty_turn": ("warning", "have an empty or null prompt or turn", "They are left out. Fill in the texts."),
    "data.row.unknown_role": (
        "warning",
        "have a role that nobody here knows",
        "They are left out. Name it under mapping.roles, for example {visitor: user}.",
    ),
    "data.row.roles_order": (
        "warning",
        "have turns out of order",
        "They are left out. After an optional system turn, user and assistant speak in turn, the user first.",
    ),
    "data.row.no_answer": ("warning", "have no turn of the assistant", "They are left out. Add the answers."),
    "data.row.tool_calls": (
        "warning",
        "call tools in a field of their own",
        "They are left out: only the text of a turn is read. Write the call as the turn's text.",
    ),
    "data.row.not_text": (
        "warning",
        "hold images, sound or other parts",
        "They are left out: only text is trained on.",
    ),
    "data.row.bad_label": ("warning", "have a label that is neither true nor false", "They are left out."),
    "data.row.encoding": ("warning", "hold broken characters (lone surrogates)", "They are left out."),
    "data.duplicates": (
        "warning",
        "repeat an earlier row exactly",
        "They weigh double, and copies of held-out rows are trained on. Remove the copies.",
    ),
    "data.placeholders": (
        "warning",
        "hold placeholders such as {example}",
        "The model would learn to write the placeholder itself. Replace them by what they stand for.",
    ),
    "data.template_tokens": (
        "warning",
        "hold what looks like a model's control token, such as {example}",
        "A tokenizer reads it as the token and not as text. Remove it, or check that it is meant.",
    ),
    "data.control_characters": (
        "warning",
        "hold control or replacement characters",
        "They come from a broken conversion and would be learnt. Clean the texts.",
    ),
    "data.bidi": (
        "warning",
        "hold characters that turn the direction of writing",
        "What is shown is not what is trained on. Remove them, or check that they are meant.",
    ),
    "data.identical_pair": (
        "warning",
        "have the same chosen and rejected answer",
        "There is nothing to prefer in them. Remove them.",
    ),
    "data.answer_missing": (
        "warning",
        "have no answer to compare with",
        "A reward that needs one cannot score them. Fill it in or remove them.",
    ),
}

_PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][\w .-]{0,40}\}\}")
_TOKEN = re.compile(r"<\|[A-Za-z][\w ]{0,30}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<<SYS>>")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
_BIDI = re.compile(r"[\u202a-\u202e\u2066-\u2069]")


@dataclass(slots=True)
class _Tally:
    count: int = 0
    first: list[str] = field(default_factory=list)
    last: str = ""
    example: str = ""


class Problems:
    """Counts problems row by row. Memory: 8 bytes a row for duplicates, the rest is bounded."""

    def __init__(self) -> None:
        self.rows = 0
        self._tallies: dict[str, _Tally] = {}
        self._seen: set[int] = set()

    def see(self, row: Row, result: Example | InputError, mapping: Mapping) -> None:
        """Look at one row and what became of it. Costs about 4 us for a row of 500 characters."""
        self.rows += 1
        if isinstance(result, InputError):
            self._add(result.code, row.where)
            return
        found = tuple(texts(result))
        key = hash(found)
        if key in self._seen:
            self._add("data.duplicates", row.where)
        self._seen.add(key)
        for text in found:
            self._read(text, row.where)
        if "chosen" in result.extra and result.extra["chosen"] == result.extra.get("rejected"):
            self._add("data.identical_pair", row.where)
        if mapping.keep and all(result.extra.get(name) in (None, "", [], {}) for name in mapping.keep):
            self._add("data.answer_missing", row.where)

    def findings(self) -> list[Finding]:
        """One finding per code, the most frequent first."""
        order = sorted(self._tallies.items(), key=lambda item: (-item[1].count, item[0]))
        return [self._finding(code, tally) for code, tally in order]

    def dropped(self) -> int:
        """How many rows could not be used."""
        return sum(tally.count for code, tally in self._tallies.items() if code.startswith("data.row."))

    def _finding(self, code: str, tally: _Tally) -> Finding:
        level, what, fix = _TEXTS.get(code, ("warning", "cannot be used", "They are left out."))
        rest = tally.count - len(tally.first)
        return Finding(
            level=level,
            code=code,
            message=f"{tally.count:,} of {self.rows:,} rows {what.replace('{example}', tally.example)}.",
            where=", ".join(tally.first) + (f" and {rest:,} more" if rest else ""),
            fix=fix,
        )

    def _read(self, text: str, where: str) -> None:
        if "{{" in text and (match := _PLACEHOLDER.search(text)):
            self._add("data.placeholders", where, match.group())
        if ("<" in text or "[" in text) and (match := _TOKEN.search(text)):
            self._add("data.template_tokens", where, match.group())
        plain = text.isascii()
        if not text.replace("\n", " ").isprintable() or (not plain and "\ufffd" in text):
            if _CONTROL.search(text):
                self._add("data.control_characters", where)
            if not plain and _BIDI.search(text):
                self._add("data.bidi", where)

    def _add(self, code: str, where: str, example: str = "") -> None:
        tally = self._tallies.setdefault(code, _Tally())
        if tally.last == where:
            return  # another text of the same row
        tally.count += 1
        tally.last = where
        tally.example = tally.example or example
        if len(tally.first) < SHOWN:
            tally.first.append(where)


def texts(example: Example) -> Iterator[str]:
    """All that a model would read of an example, in order."""
    for text in (example.text, example.prompt, example.completion):
        if text is not None:
            yield text
    for message in example.messages or ():
        yield message.content
    for side in ("chosen", "rejected"):
        yield from _side(example.extra.get(side))


def _side(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        yield from (message.content for message in value if isinstance(message, Message))


def finding_of(error: InputError, level: Level = "error") -> Finding:
    """An error of a whole source as a finding."""
    message = " ".join(part for part in (error.message, error.why) if part)
    return Finding(level=level, code=error.code, message=message, where=error.where, fix=error.fix)


def of_mapping(format_name: str, mapping: Mapping, columns: list[str], method: str) -> list[Finding]:
    """What a mapping passes over: labels, tools, answers that a reward would need."""
    found = []
    if format_name == "unpaired" and method == "sft" and "label" not in mapping.columns:
        found.append(
            Finding(
                level="warning",
                code="data.label_ignored",
                message="The rows say whether an answer is good, and SFT trains on all of them alike.",
                where="columns",
                fix="Use method kto, or keep only the rows with a good answer.",
            )
        )
    if "tools" in columns and mapping.kind in ("messages", "unpaired"):
        found.append(
            Finding(
                level="warning",
                code="data.tools_ignored",
                message="The column tools is not shown to the model: it would learn calls of tools it never saw.",
                where="column tools",
                fix="Write the tools into the system turn.",
            )
        )
    if method in ("grpo", "rloo") and not holds_answers(mapping.keep):
        found.append(
            Finding(
                level="warning",
                code="data.no_answers",
                message="No column holds answers, so only rewards that need none can score completions.",
                where="columns",
                fix="Name the column of answers: mapping: {keep: [answer]}.",
            )
        )
    return found
