"""The built-in rewards that need nothing but a look at the text: number, exact, json, length, think.

Each is made from its entry and called as TRL calls a function; None for a row is "does not apply".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tunesmith.executors.kernel.rewards.entry import Entry
from tunesmith.executors.kernel.rewards.number import number_in
from tunesmith.executors.kernel.rewards.texts import answer_in, normal, references, tagged, text_of, written

Values = list[float | None]
Call = Callable[..., Any]

_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)```", re.DOTALL)


def number(entry: Entry) -> Call:
    """1 where the final number of the completion is exactly that of the answer column, else 0."""

    def call(completions: Sequence[Any], **columns: Any) -> Values:
        answers = references(columns, entry.argument, entry.kind)
        return [_number(text_of(done), answer) for done, answer in zip(completions, answers, strict=True)]

    return call


def exact(entry: Entry) -> Call:
    """1 where the answer (what follows the thinking) is the text of the answer column, white space set aside."""

    def call(completions: Sequence[Any], **columns: Any) -> Values:
        answers = references(columns, entry.argument, entry.kind)
        return [_exact(text_of(done), answer) for done, answer in zip(completions, answers, strict=True)]

    return call


def json_text(entry: Entry) -> Call:
    """1 where the answer is one JSON value; with a column, where it equals the JSON that stands there."""

    def call(completions: Sequence[Any], **columns: Any) -> Values:
        if not entry.argument:
            return [0.0 if json_in(text_of(done)) is BROKEN else 1.0 for done in completions]
        answers = references(columns, entry.argument, entry.kind)
        return [_same_json(text_of(done), answer) for done, answer in zip(completions, answers, strict=True)]

    return call


def length(entry: Entry) -> Call:
    """How near a length is to its target n: the smaller of both by the larger, so 1 at n and 1/2 at n/2 and 2n.

    With <= everything up to n scores 1, with >= everything from n on.
    """
    target, characters = entry.length()
    bound = entry.at_most()

    def call(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any) -> Values:
        sizes = [len(text_of(done)) for done in completions] if characters else [len(ids) for ids in completion_ids]
        return [_near(size, target, bound) for size in sizes]

    return call


def think(entry: Entry) -> Call:
    """1 for one thought in tags and then an answer (in tags of its own where a second one is named), else 0.

    A prompt that ends with the opening tag has begun the thought already.
    """
    tag, _, answer = (entry.argument or "think").partition(",")

    def call(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Values:
        return [
            float(_thinks(text_of(done), tag, answer, begun=_begun(prompt, tag)))
            for prompt, done in zip(prompts, completions, strict=True)
        ]

    return call


# --- one completion each --------------------------------------------------------------------------------------------

BROKEN = object()  # what `json_in` gives for a text that is no JSON


def json_in(text: str) -> Any:
    """The JSON value that an answer is, bare, in a code fence, or in answer tags; BROKEN where it is none."""
    answer = answer_in(text)
    inner = tagged(answer)
    answer = (answer if inner is None else inner).strip()
    fenced = _FENCE.fullmatch(answer) if answer.startswith("```") else None
    try:
        return json.loads(fenced[1] if fenced else answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return BROKEN


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _number(text: str, answer: Any) -> float | None:
    wanted = [found for item in _each(answer) if (found := number_in(item)) is not None]
    return float(number_in(text) in wanted) if wanted else None


def _exact(text: str, answer: Any) -> float | None:
    wanted = [found for item in _each(answer) if item is not None and (found := normal(written(item)))]
    if not wanted:
        return None
    said = answer_in(text)
    options = {normal(said), normal(inner)} if (inner := tagged(said)) is not None else {normal(said)}
    return float(any(item in options for item in wanted))


def _same_json(text: str, answer: Any) -> float | None:
    wanted = json_in(answer) if isinstance(answer, str) else answer
    if answer is None or wanted is BROKEN:
        return None
    found = json_in(text)
    try:
        return float(found is not BROKEN and found == wanted and canonical(found) == canonical(wanted))
    except (RecursionError, TypeError, ValueError):
        return 0.0


def canonical(value: Any) -> str:
    """JSON with sorted keys, so that true and 1 differ and the order of keys does not count."""
    return json.dumps(_floats(value), sort_keys=True)


def _floats(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return {key: _floats(item) for key, item in value.items()} if isinstance(value, dict) else value


def _near(size: int, target: int, bound: str) -> float:
    if (bound == "<=" and size <= target) or (bound == ">=" and size >= target):
        return 1.0
    return min(size, target) / max(size, target)


def _thinks(text: str, tag: str, answer: str, *, begun: bool) -> bool:
    start, end = f"<{tag}>", f"</{tag}>"
    text = text.strip()
    if begun and not text.startswith(start):
        text = start + text
    if not text.startswith(start) or text.count(start) != 1 or text.count(end) != 1:
        return False
    thought, _, after = text[len(start) :].partition(end)
    if not thought.strip() or not after.strip():
        return False
    if not answer:
        return True
    opens, closes, after = f"<{answer}>", f"</{answer}>", after.strip()
    inside = after[len(opens) : -len(closes)]
    fits = after.startswith(opens) and after.endswith(closes) and after.count(opens) == after.count(closes) == 1
    return fits and bool(inside.strip())


def _begun(prompt: Any, tag: str) -> bool:
    return isinstance(prompt, str) and prompt.rstrip().endswith(f"<{tag}>")


def _each(answer: Any) -> list[Any]:
    """The answers that a cell holds: a list of texts or numbers is several, any of which will do."""
    if isinstance(answer, list) and all(isinstance(item, (str, int, float)) for item in answer):
        return answer
    return [answer]
