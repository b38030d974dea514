"""One entry of `grpo.rewards`, as a person writes it, taken apart. Reads no file and loads nothing.

[WEIGHT*]NAME[:ARGUMENT]         a reward built in: number, 0.2*think, regex:^\\d+$, length:200, json:schema.json
[WEIGHT*]FILE.py[:FUNCTION]      a function of the user's: rewards.py:score, -0.5*~/rl/penalties.py:too_long
"""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.orchestrator.errors import InputError

Kind = Literal["number", "boxed", "exact", "regex", "json", "length", "think", "reasoning-gym", "file", "auto"]

BUILT_IN: dict[Kind, str] = {
    "number": "[:COLUMN]  the last number of the completion is that of the answer column",
    "boxed": "[:COLUMN]  what stands in \\boxed{} equals the answer column, as mathematics",
    "exact": "[:COLUMN]  the completion is the text of the answer column",
    "regex": ":PATTERN  the pattern is found in the completion",
    "json": "[:COLUMN | :SCHEMA.json]  the completion is JSON, that of a column, or fits a schema",
    "length": ":[<=|>=]N[ characters]  how near the length is to N tokens or characters",
    "think": "[:TAG[,ANSWER_TAG]]  <think>...</think> first, then an answer",
    "reasoning-gym": "  the scorer of the Reasoning Gym task that a row comes from",
}
MOST_TEXT = 4000  # characters of an entry

_WEIGHT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*\*\s*")
_FILE = re.compile(r"(.+\.py)(?::([^\W\d]\w*))?", re.DOTALL)
_LENGTH = re.compile(r"(<=|>=)?\s*(\d{1,9})\s*(tokens?|characters?|chars?)?")
_TAGS = re.compile(r"[A-Za-z][\w-]{0,40}(,[A-Za-z][\w-]{0,40})?")


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry taken apart: `argument` is what follows the name, or the function of a file ("" where none is named).

    `path` is the file it comes from: Python for kind file, a JSON schema for kind json, else "". `weighted` says
    whether a weight was written.
    """

    text: str
    kind: Kind
    argument: str = ""
    path: str = ""
    weight: float = 1.0
    weighted: bool = False

    @property
    def name(self) -> str:
        """What it is called in metrics: the built-in's name, or the function's, as TRL does."""
        if self.kind != "file":
            return self.kind
        return self.argument or Path(self.path).stem

    def at_most(self) -> str:
        """The bound of a length: "<=", ">=" or "" for a target."""
        match = _LENGTH.fullmatch(self.argument)
        return (match[1] or "") if match else ""

    def length(self) -> tuple[int, bool]:
        """(target length, whether it counts characters instead of tokens)."""
        match = _LENGTH.fullmatch(self.argument)
        return (int(match[2]), (match[3] or "").startswith("char")) if match else (0, False)


def parse(text: str) -> Entry:
    """The entry in a text. Raises InputError: reward.syntax, reward.unknown, reward.argument, reward.pattern."""
    if not text.strip() or len(text) > MOST_TEXT or "\0" in text:
        raise _wrong(text, "is empty, too long, or holds a NUL byte", "reward.syntax")
    match = _WEIGHT.match(text.strip())
    rest = text.strip()[match.end() :] if match else text.strip()
    weight = float(match[1]) if match else 1.0
    if not math.isfinite(weight):
        raise _wrong(text, "has a weight that is no number", "reward.syntax")
    name, colon, argument = rest.partition(":")
    weighted = match is not None
    if name in BUILT_IN:
        argument = argument if name == "regex" else argument.strip()
        _check(text, name, argument, colon)
        path = argument if name == "json" and argument.lower().endswith(".json") else ""
        return Entry(text, name, argument, path, weight, weighted)
    if rest == "auto":
        if weighted:
            raise _wrong(text, "has a weight, and what auto becomes has its own", "reward.syntax")
        return Entry(text, "auto")
    file = _FILE.fullmatch(rest)
    if file is None:
        raise _unknown(text, name)
    return Entry(text, "file", file[2] or "", file[1], weight, weighted)


def absolute(text: str, cwd: str) -> str:
    """An entry with its file's path made absolute against `cwd`; any other text as it stands."""
    try:
        entry = parse(text)
    except InputError:
        return text
    if not entry.path:
        return text
    start = text.index(entry.path, text.index("json:") + 5 if entry.kind == "json" else 0)
    found = os.path.normpath(Path(cwd, Path(entry.path).expanduser()))
    return f"{text[:start]}{found}{text[start + len(entry.path) :]}"


def _check(text: str, name: str, argument: str, colon: str) -> None:
    """Refuse an argument that a built-in reward cannot use."""
    if colon and not argument.strip():
        raise _wrong(text, "has nothing after its colon", "reward.argument", name)
    if name == "regex":
        if not argument:
            raise _wrong(text, "needs a pattern", "reward.argument", name)
        try:
            re.compile(argument)
        except (re.error, RecursionError, OverflowError) as error:
            raise _wrong(text, f"holds a pattern that cannot be read: {error}", "reward.pattern") from error
    elif name == "length":
        match = _LENGTH.fullmatch(argument)
        if match is None or int(match[2]) == 0:
            raise _wrong(text, "needs a length above 0", "reward.argument", name)
    elif name == "think" and argument and not _TAGS.fullmatch(argument):
        raise _wrong(text, "needs the names of one or two tags", "reward.argument", name)
    elif name == "reasoning-gym" and colon:
        raise _wrong(text, "takes no argument; the task stands in data.source", "reward.argument", name)


def _wrong(text: str, reason: str, code: str, name: str = "") -> InputError:
    form = BUILT_IN.get(name)  # type: ignore[call-overload]
    fix = f"Write {name}{form}." if form else "Write it as [WEIGHT*]NAME[:ARGUMENT] or [WEIGHT*]FILE.py:FUNCTION."
    return InputError(f"The reward {text[:100]!r} {reason}.", code=code, where="grpo.rewards", fix=fix)


def _unknown(text: str, name: str) -> InputError:
    near = difflib.get_close_matches(name.lower(), BUILT_IN, n=1)
    built_in = f"Built in are {', '.join(BUILT_IN)}; a function of your own is FILE.py:FUNCTION."
    return InputError(
        f"There is no reward {text[:100]!r}.",
        why="Reward models are not scored here." if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else "",
        fix=f"Did you mean {near[0]!r}? {built_in}" if near else built_in,
        code="reward.unknown",
        where="grpo.rewards",
    )
