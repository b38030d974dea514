"""What a completion says: its text, its answer after the thinking, and the answer that a row holds for it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.orchestrator.errors import InputError

# Columns of reference answers, the most telling first. What stands in them may be long (a solution) or short.
ANSWERS = (
    *("answer", "final_answer", "expected_answer", "ground_truth", "gold", "gold_answer", "reference_answer"),
    *("reference", "expected", "target", "answers", "solution", "completion", "response", "output"),
)
_PLAIN = re.compile(r"[\s\-]+")
_SPACE = re.compile(r"\s+")


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or what the last message says."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def answer_in(text: str) -> str:
    """What follows the thinking: all after the last </think>; nothing where a thought was begun and never ended."""
    before, end, after = text.rpartition("</think>")
    if end:
        return after
    return "" if "<think>" in before or "<think>" in after else text


def tagged(text: str) -> str | None:
    """What stands in the last <answer> tags, or None."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def normal(text: str) -> str:
    """A text with every run of white space as one space, none around it, and letters composed (NFC)."""
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text)).strip()


def written(value: Any) -> str:
    """A value of a column as text: itself, or its JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def answer_column(columns: Sequence[str], wanted: str = "") -> str | None:
    """The column of reference answers: the one wanted, else the first that is named like one; None for none."""
    if wanted:
        return wanted if wanted in columns else None
    plain = {_PLAIN.sub("_", name.strip().lower()): name for name in reversed(list(columns))}
    return next((plain[name] for name in ANSWERS if name in plain), None)


def references(columns: Mapping[str, Sequence[Any]], wanted: str, reward: str) -> Sequence[Any]:
    """The reference answer of each completion. Raises InputError reward.no_column."""
    name = answer_column(list(columns), wanted)
    if name is None:
        raise no_column(list(columns), wanted, reward)
    return columns[name]


def no_column(columns: Sequence[str], wanted: str, reward: str) -> InputError:
    """The error for rows without the column that a reward compares with."""
    there = ", ".join([name for name in columns if name not in ("prompts", "completion_ids")][:20]) or "none"
    what = f"the column {wanted!r}" if wanted else "a column of answers"
    return InputError(
        f"The reward {reward} needs {what}, and the rows have none.",
        why=f"Beside the prompt they have: {there}.",
        fix=f"Name the column: {reward}:COLUMN, and keep it in the mapping (mapping: {{keep: [COLUMN]}}).",
        code="reward.no_column",
        where="grpo.rewards",
    )
