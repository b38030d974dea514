"""What a plan says of rewards: what `auto` becomes, the files that will run with their hashes, and what cannot work.

Reads files as bytes and imports no package: a user's code never runs where a job is planned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.executors.kernel.rewards import asking, files
from tunesmith.executors.kernel.rewards.entry import Entry, parse
from tunesmith.executors.kernel.rewards.guarded import missing
from tunesmith.executors.kernel.rewards.make import entries, installed
from tunesmith.executors.kernel.rewards.number import MARK, boxed, final_number, number_in
from tunesmith.executors.kernel.rewards.texts import answer_column, no_column
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import Finding, JobSpec

SHORT = 64  # characters of an answer that a completion can be expected to equal
LOOKED_AT = 100  # rows
CHOICES = ("number", "boxed", "exact", "json", "think")
_COMPARE = ("number", "boxed", "exact")


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` becomes, and why."""

    rewards: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Checked:
    """The hashes of the files that rewards come from, and what is to be said of the rewards."""

    hashes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def auto(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Choice | None:
    """The rewards that sample rows call for, judged by their column of answers; None where a person must say it."""
    rows = rows[:LOOKED_AT]
    if rows and all(_of_gym(row.get("metadata")) for row in rows):
        return Choice(("reasoning-gym",), "the rows name their Reasoning Gym task, which scores them itself")
    name = answer_column(columns)
    answers = [row[name] for row in rows if row.get(name) not in (None, "", [])] if name else []
    if not answers:
        return None
    texts = [answer for answer in answers if isinstance(answer, str)]
    all_text = len(texts) == len(answers)
    if all_text and all(MARK in text and final_number(text) is not None for text in texts):
        return Choice(("number",), f"the answers end in {MARK} and a number (column {name})")
    if all(_is_number(answer) for answer in answers):
        return Choice(("number",), f"the answers are numbers (column {name})")
    if all_text and all(boxed(text) is not None for text in texts):
        return Choice(("boxed",), f"the answers stand in \\boxed{{}} (column {name})")
    if all(isinstance(answer, dict) or _is_json(answer) for answer in answers):
        return Choice((f"json:{name}",), f"the answers are JSON (column {name})")
    short = [item for answer in answers for item in (answer if isinstance(answer, list) else [answer])]
    if any(isinstance(item, bool) or not isinstance(item, (str, int, float)) for item in short):
        return None
    if not all(_is_short(str(item)) for item in short):
        return None
    if any("\\" in str(item) for item in short):
        return Choice(("boxed",), f"the answers are short and hold LaTeX (column {name})")
    return Choice(("exact",), f"the answers are short texts (column {name})")


def check(spec: JobSpec, columns: Sequence[str] | None = None) -> Checked:
    """Hashes and findings of a spec's rewards. `columns` are those that rows keep, None where that is not known.

    Every file that will run, or be read, is an info finding with function and SHA-256: what is approved.
    """
    hashes: list[str] = []
    findings: list[Finding] = []
    for place, text in enumerate(spec.grpo.rewards):
        try:
            entry = parse(text)
            if entry.path:
                data = files.content(entry.path)
                hashes.append(files.sha256(data))
                findings.append(_file(entry, data, hashes[-1], place))
            if spec.backend in ("local", "auto") and not installed(entry):
                raise missing(entry.kind)
            if columns is not None:
                _check_columns(entry, columns)
        except InputError as error:
            findings.append(_finding(error, place))
    if all(item.level != "error" for item in findings):
        try:
            entries(spec.grpo)
        except InputError as error:
            findings.append(_finding(error))
    return Checked(tuple(hashes), tuple(findings))


def _file(entry: Entry, data: bytes, hash: str, place: int) -> Finding:
    if entry.kind == "file":
        said = f"{entry.path}: function {files.named(entry, data)}"
        ends = "It runs in the job's process, with your rights."
    else:
        asking.document(data, entry.path)
        said, ends = f"{entry.path}: JSON schema", "It is only read."
    message = f"{said}, {len(data):,} bytes, SHA-256 {hash}. {ends}"
    return Finding(level="info", code="reward.file", message=message, where=f"grpo.rewards.{place}")


def _check_columns(entry: Entry, columns: Sequence[str]) -> None:
    compares = entry.kind in _COMPARE or (entry.kind == "json" and entry.argument and not entry.path)
    if compares and answer_column(columns, entry.argument) is None:
        raise no_column(columns, entry.argument, entry.kind)
    if entry.kind == "reasoning-gym" and "metadata" not in columns:
        raise no_column(columns, "metadata", entry.kind)


def _finding(error: InputError, place: int | None = None) -> Finding:
    message = " ".join(part for part in (error.message, error.why) if part)
    where = error.where if place is None or error.where != "grpo.rewards" else f"grpo.rewards.{place}"
    return Finding(level="error", code=error.code, message=message, where=where, fix=error.fix)


def _of_gym(metadata: Any) -> bool:
    return isinstance(metadata, Mapping) and isinstance(metadata.get("source_dataset"), str)


def _is_number(answer: Any) -> bool:
    """Whether an answer is a number and nothing else: 72, "72", "$1,234.50", "-3/4"."""
    if not isinstance(answer, str):
        return number_in(answer) is not None
    rest = answer.strip().strip("$.%").strip()
    return bool(rest) and not any(one.isalpha() or one in "\\{}()[]=" for one in rest) and number_in(rest) is not None


def _is_json(answer: Any) -> bool:
    if not isinstance(answer, str) or not answer.lstrip().startswith(("{", "[")):
        return False
    try:
        return isinstance(json.loads(answer), (dict, list))
    except (ValueError, RecursionError):
        return False


def _is_short(text: str) -> bool:
    return len(text) <= SHORT and "\n" not in text.strip()
