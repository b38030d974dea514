"""What shape a data set has: told from the names and the values of its columns, never from a registry.

A Shape is what the columns are; a Mapping is what a method makes of them. One data set may have several shapes (a
preference set that also carries `messages`), and each method takes the first that it can use.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.executors.kernel.data.turns import TURNS_COLUMNS, as_turn, as_turns, role_of
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import SAMPLED, Format, Mapping

SAMPLE = 100  # rows looked at

Values = Dict[str, Any]

ROLES_OF_KIND: dict[Format, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # kind: (needed, optional); "a|b" is one of them
    "messages": (("messages",), ("system",)),
    "prompt-completion": (("prompt", "completion"), ("context", "system", "history")),
    "text": (("text",), ()),
    "preference": (("chosen", "rejected"), ("prompt", "context", "system")),
    "unpaired": (("messages|completion", "label"), ("prompt", "context", "system", "history")),
    "prompt-only": (("messages|prompt",), ("context", "system", "history")),
}

KINDS_FOR: dict[str, tuple[Format, ...]] = {  # what a method trains on, the usual kind first
    "sft": ("prompt-completion", "messages", "text"),
    "dpo": ("preference",),
    "reward": ("preference",),
    "kto": ("unpaired",),
    **dict.fromkeys(SAMPLED, ("prompt-only",)),
}
_NEEDS = {
    "sft": "messages, a prompt with its completion, or text",
    "dpo": "a chosen and a rejected answer",
    "reward": "a chosen and a rejected answer",
    "kto": "an answer and a label that says whether it is good",
    "grpo": "a prompt, and a column to reward answers with",
    "rloo": "a prompt, and a column to reward answers with",
    "distill": "a prompt",
}

_SFT_PAIRS = (
    ("prompt-completion", "prompt", "completion"),
    ("prompt-completion", "prompt", "response"),
    ("alpaca", "instruction", "output"),
    ("alpaca", "instruction", "response"),
    ("question-answer", "question", "answer"),
    ("question-answer", "question", "response"),
    ("problem-solution", "problem", "solution"),
    ("problem-solution", "problem", "generated_solution"),
    ("prompt-completion", "query", "response"),
    ("prompt-completion", "input", "output"),
)
_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "request", "user", "human", "input", "inputs")
_COMPLETIONS = (
    *("completion", "response", "output", "answer", "solution", "generation", "reply", "assistant", "gpt", "bot"),
    *("target", "targets", "outputs", "model_response", "assistant_response", "generated_solution"),
)
_CONTEXTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt", "system_message")
_TEXTS = ("text", "content", "document", "raw_content", "raw_text", "body")
_PREFERENCES = (
    ("chosen", "rejected"),
    ("good_response", "bad_response"),
    ("chosen_response", "rejected_response"),
    ("preferred", "dispreferred"),
    ("preferred_response", "dispreferred_response"),
    ("preferred_output", "non_preferred_output"),
    ("better", "worse"),
    ("better_response", "worse_response"),
    ("response_j", "response_k"),
    ("accepted", "rejected"),
    ("winner", "loser"),
    ("winning_response", "losing_response"),
    ("win", "lose"),
    ("good", "bad"),
    ("good_answer", "bad_answer"),
    ("positive", "negative"),
    ("pos", "neg"),
)
_LABELS = ("label", "labels", "thumbs_up", "thumbs", "is_good", "good", "desirable", "liked", "feedback", "rating")
_ANSWERS = (
    *("answer", "answers", "solution", "final_answer", "expected_answer", "ground_truth", "reference"),
    *("reference_answer", "target", "gold", "gold_answer", "expected", "tests", "test_cases"),
)
_TEXTUAL = frozenset({"text", "number", "turns", "turn"})
TRUTH = {
    **dict.fromkeys(
        ("true", "1", "yes", "good", "thumbs_up", "thumbs up", "+1", "desirable", "\N{THUMBS UP SIGN}"), True
    ),
    **dict.fromkeys(("false", "0", "no", "bad", "thumbs_down", "thumbs down", "-1", "undesirable"), False),
    "\N{THUMBS DOWN SIGN}": False,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One thing that columns can be: `kind` as in a mapping, `name` for people, `columns` by role."""

    name: str
    kind: Format
    columns: Dict[str, str]
    roles: Dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of some rows: kind of value (text, number, boolean, turns, turn, list, other, empty) by name."""

    kinds: Dict[str, str]
    rows: Sequence[Values]

    def find(self, names: Sequence[str], kinds: frozenset[str] = _TEXTUAL) -> str | None:
        """The first column of one of these names (case, spaces and hyphens forgiven) with a fitting kind of value."""
        plain = {_plain(name): name for name in reversed(list(self.kinds))}
        for name in names:
            if name in plain and self.kinds[plain[name]] in kinds:
                return plain[name]
        return None


def detect(rows: Sequence[Values], *, method: str = "sft") -> tuple[str, Mapping]:
    """The format of sample rows, and the mapping that a method needs. Raises InputError data.wrong_columns."""
    seen = columns_of(rows)
    found = shapes(seen)
    for shape in found:
        mapping = mapping_for(shape, method, seen)
        if mapping is not None and not _shadowed(shape, found):
            return found[0].name, mapping
    raise _wrong_columns(seen, found, method)


def understand(rows: Sequence[Values], mapping: Mapping | str, *, method: str = "sft") -> tuple[str, Mapping]:
    """The format and mapping of sample rows where the spec may have said it. What it says is checked and completed.

    Raises InputError: data.wrong_columns, data.mapping.
    """
    if not isinstance(mapping, Mapping):
        return detect(rows, method=method)
    if mapping.kind not in KINDS_FOR[method]:
        raise InputError(
            f"A mapping of kind {mapping.kind} does not serve {method}.",
            why=f"{method} needs {_NEEDS[method]}.",
            fix=f"Set data.mapping.kind to {' or '.join(KINDS_FOR[method])}, or leave data.mapping to auto.",
            code="data.mapping",
            where="mapping.kind",
        )
    seen = columns_of(rows)
    if not mapping.columns and mapping.template is None:
        for shape in shapes(seen):
            found = mapping_for(shape, method, seen)
            if found is not None and found.kind == mapping.kind:
                keep = mapping.keep or found.keep
                return shape.name, Mapping(
                    kind=found.kind, columns=found.columns, roles={**found.roles, **mapping.roles}, keep=keep
                )
        raise _wrong_columns(seen, shapes(seen), method, kind=mapping.kind)
    _check_mapping(mapping, seen)
    named = next((shape.name for shape in shapes(seen) if dict(shape.columns) == dict(mapping.columns)), mapping.kind)
    return named, mapping


def columns_of(rows: Sequence[Values]) -> Columns:
    """What the columns of sample rows hold, in order of appearance."""
    kinds: dict[str, Counter[str]] = {}
    for row in rows[:SAMPLE]:
        for name, value in row.items():
            kinds.setdefault(name, Counter())
            if value is not None:
                kinds[name][_kind(name, value)] += 1
    return Columns({name: tally.most_common(1)[0][0] if tally else "empty" for name, tally in kinds.items()}, rows)


def shapes(seen: Columns) -> list[Shape]:
    """All that the columns can be, the most telling first."""
    found = [_preference(seen), _unpaired(seen), _messages(seen), _pair(seen), _text(seen), _prompt_only(seen)]
    return [shape for shape in found if shape is not None]


def mapping_for(shape: Shape, method: str, seen: Columns) -> Mapping | None:
    """What a method makes of a shape, or None where it cannot use it."""
    columns, roles = dict(shape.columns), shape.roles
    if method in ("dpo", "reward"):
        return Mapping(kind="preference", columns=columns, roles=roles) if shape.kind == "preference" else None
    if method == "kto":
        return Mapping(kind="unpaired", columns=columns, roles=roles) if shape.kind == "unpaired" else None
    if shape.kind == "unpaired":
        columns.pop("label")
    conversation = "messages" in columns
    if method in SAMPLED:
        if shape.kind in ("preference", "text"):
            return None
        answer = columns.pop("completion", None)
        others = [name for name in seen.kinds if name not in columns.values() and _is_plain(seen, name)]
        named = [name for name in others if _plain(name) in _ANSWERS]
        keep = dict.fromkeys([*([answer] if answer else []), *named, *(() if method == "distill" else others)])
        return Mapping(kind="prompt-only", columns=columns, roles=roles, keep=tuple(keep))
    if shape.kind in ("preference", "prompt-only"):
        return None
    if shape.kind == "text":
        return Mapping(kind="text", columns=columns)
    return Mapping(kind="messages" if conversation else "prompt-completion", columns=columns, roles=roles)


def holds_answers(names: Sequence[str]) -> bool:
    """Whether one of these columns is named like one of answers."""
    return any(_plain(name) in (*_ANSWERS, *_COMPLETIONS) for name in names)


def truth(value: Any) -> bool | None:
    """A label as a boolean: true/false, 1/0, yes/no, thumbs; None for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    return TRUTH.get(value.strip().lower()) if isinstance(value, str) else None


def as_yaml(mapping: Mapping) -> str:
    """A mapping as it is written in a spec, on one line."""
    columns = ", ".join(f"{role}: {json.dumps(name, ensure_ascii=False)}" for role, name in mapping.columns.items())
    keep = (
        f", keep: [{', '.join(json.dumps(name, ensure_ascii=False) for name in mapping.keep)}]" if mapping.keep else ""
    )
    return f"mapping: {{kind: {mapping.kind}, columns: {{{columns}}}{keep}}}"


# --- one shape each ------------------------------------------------------------------------------------------------


def _preference(seen: Columns) -> Shape | None:
    for good, bad in _PREFERENCES:
        chosen, rejected = seen.find([good]), seen.find([bad])
        if chosen and rejected and seen.kinds[chosen] == seen.kinds[rejected] != "number":
            columns = {"chosen": chosen, "rejected": rejected}
            prompt = seen.find(_PROMPTS) or seen.find(TURNS_COLUMNS, frozenset({"turns"}))
            if prompt:
                columns = {"prompt": prompt} | _beside(seen, prompt, context=True) | columns
            return Shape("preference", "preference", columns, _roles(seen, columns.values()))
    return None


def _unpaired(seen: Columns) -> Shape | None:
    label = seen.find(_LABELS, frozenset({"boolean", "number", "text"}))
    if label is None or not _is_truth(seen, label):
        return None
    inner = _messages(seen) or _pair(seen)
    return inner and Shape("unpaired", "unpaired", {**inner.columns, "label": label}, inner.roles)


def _messages(seen: Columns) -> Shape | None:
    column = seen.find(TURNS_COLUMNS, frozenset({"turns"}))
    if column is None or not _answers_in(seen, column):
        return None
    columns = {"messages": column} | _beside(seen, column, context=False)
    return Shape("sharegpt" if _is_sharegpt(seen, column) else "messages", "messages", columns, _roles(seen, [column]))


def _pair(seen: Columns) -> Shape | None:
    named = ((name, seen.find([left]), seen.find([right])) for name, left, right in _SFT_PAIRS)
    name, prompt, completion = next((pair for pair in named if pair[1] and pair[2]), ("", None, None))
    if not name:
        name = "prompt-completion"
        prompt = seen.find(_PROMPTS)
        completion = seen.find([item for item in _COMPLETIONS if prompt is None or item != _plain(prompt)])
    if prompt is None or completion is None or seen.kinds[prompt] in ("number", "turn"):
        return None
    columns = {"prompt": prompt} | _beside(seen, prompt, context=True, taken=completion) | {"completion": completion}
    return Shape(name, "prompt-completion", columns, _roles(seen, columns.values()))


def _text(seen: Columns) -> Shape | None:
    column = seen.find(_TEXTS, frozenset({"text"}))
    if column is None or _is_classification(seen):
        return None
    return Shape("text", "text", {"text": column})


def _prompt_only(seen: Columns) -> Shape | None:
    prompt = seen.find(_PROMPTS, frozenset({"text", "turns"}))
    if prompt is None:
        column = seen.find(TURNS_COLUMNS, frozenset({"turns"}))
        if column is None:
            return None
        return Shape("prompt-only", "prompt-only", {"messages": column}, _roles(seen, [column]))
    columns = {"prompt": prompt} | _beside(seen, prompt, context=True)
    return Shape("prompt-only", "prompt-only", columns, _roles(seen, [prompt]))


def _beside(seen: Columns, column: str, *, context: bool, taken: str | None = None) -> dict[str, str]:
    """The columns that belong to a prompt: more of it, a system text, earlier turns."""
    columns = {}
    if context and seen.kinds[column] == "text":
        more = seen.find([name for name in _CONTEXTS if name != _plain(column)], frozenset({"text"}))
        if more and more != taken:
            columns["context"] = more
    system = seen.find(_SYSTEMS, frozenset({"text"}))
    if system:
        columns["system"] = system
    history = seen.find(("history",), frozenset({"list"}))
    if context and history:
        columns["history"] = history
    return columns


# --- values --------------------------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def _kind(name: str, value: Any) -> str:
    if isinstance(value, str):
        return "turns" if _plain(name) in TURNS_COLUMNS and as_turns(value) else "text"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, list):
        return "turns" if as_turns(value) else "list"
    return "turn" if as_turn(value) else "other"


def _is_plain(seen: Columns, column: str) -> bool:
    """Whether a column holds what JSON can: no pictures, no sound, nothing of a table's own types."""
    try:
        json.dumps([row.get(column) for row in seen.rows[:SAMPLE]])
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _turns_in(seen: Columns, column: str) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for row in seen.rows[:SAMPLE]:
        value = row.get(column)
        turn = as_turn(value)
        found += [turn] if turn else as_turns(value) or []
    return found


def _roles(seen: Columns, columns: Any) -> dict[str, str]:
    names = [str(role) for column in columns for role, _ in _turns_in(seen, column)]
    known = {name: role_of(name, {}) for name in dict.fromkeys(names)}
    return {name: role for name, role in known.items() if role is not None and role != name}


def _answers_in(seen: Columns, column: str) -> bool:
    """Whether conversations hold answers; with roles of unknown names they may, so that the rows say what is wrong."""
    roles = [role_of(str(role), {}) for role, _ in _turns_in(seen, column)]
    return any(role in ("assistant", None) for role in roles)


def _is_sharegpt(seen: Columns, column: str) -> bool:
    rows = (row.get(column) for row in seen.rows[:SAMPLE])
    return any(isinstance(row, list) and row and isinstance(row[0], dict) and "from" in row[0] for row in rows)


def _is_truth(seen: Columns, column: str) -> bool:
    values = [row.get(column) for row in seen.rows[:SAMPLE]]
    return all(value is None or truth(value) is not None for value in values)


def _is_classification(seen: Columns) -> bool:
    label = seen.find(("label", "labels", "class", "category"), frozenset({"number", "boolean"}))
    return label is not None


def _shadowed(shape: Shape, found: Sequence[Shape]) -> bool:
    """Whether a shape is only the prompt of a preference set, whose answers would be thrown away."""
    pair = next((other for other in found if other.kind == "preference"), None)
    if pair is None or shape is pair:
        return False
    return shape.kind == "prompt-only" or pair.columns.get("prompt") in shape.columns.values()


# --- what is said when nothing fits --------------------------------------------------------------------------------


def _check_mapping(mapping: Mapping, seen: Columns) -> None:
    needed, optional = ROLES_OF_KIND[mapping.kind]
    known = {name for role in needed for name in role.split("|")} | set(optional)
    for role in mapping.columns:
        if role not in known:
            near = difflib.get_close_matches(role, sorted(known), n=1)
            raise InputError(
                f"A mapping of kind {mapping.kind} has no role {role!r}.",
                why=f"Its roles are {', '.join(sorted(known))}.",
                fix=f"Did you mean {near[0]!r}?" if near else "",
                code="data.mapping",
                where=f"mapping.columns.{role}",
            )
    missing = [role for role in needed if not any(name in mapping.columns for name in role.split("|"))]
    if mapping.template is not None:
        missing = [role for role in missing if role not in ("prompt", "text", "messages|prompt")]
    if missing:
        raise InputError(
            f"The mapping of kind {mapping.kind} names no column for {', '.join(missing)}.",
            fix=f"Add it under mapping.columns. The columns are: {_list(seen)}.",
            code="data.mapping",
            where="mapping.columns",
        )
    wanted = [*mapping.columns.values(), *mapping.keep, *placeholders(mapping.template or "")]
    for column in wanted:
        if column not in seen.kinds:
            near = difflib.get_close_matches(column, list(seen.kinds), n=1)
            raise InputError(
                f"The mapping names the column {column!r}, which the data does not have.",
                why=f"The columns are: {_list(seen)}.",
                fix=f"Did you mean {near[0]!r}?" if near else "Name one of these columns.",
                code="data.wrong_columns",
                where="mapping",
            )


def placeholders(template: str) -> list[str]:
    """The columns that a template names: {column}; {{ and }} stand for braces."""
    return [match.group(1) for match in TEMPLATE.finditer(template) if match.group(1)]


TEMPLATE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def _list(seen: Columns) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in list(seen.kinds.items())[:20]) or "none"


def _wrong_columns(seen: Columns, found: Sequence[Shape], method: str, kind: Format | None = None) -> InputError:
    needs = _NEEDS[method]
    if kind is not None:
        why = f"A mapping of kind {kind} was asked for, and no columns were found for it."
    elif found:
        why = f"The data looks like {found[0].name}; {method} needs {needs}."
    elif _is_classification(seen):
        why = f"It looks like a table for classification; {method} trains a language model and needs {needs}."
    else:
        why = f"{method} needs {needs}."
    return InputError(
        f"The columns fit no format for {method}: {_list(seen)}.",
        why=why,
        fix=f"If this is what you mean, set data.{as_yaml(_nearest(seen, found, method, kind))}",
        code="data.wrong_columns",
        where="columns",
    )


def _nearest(seen: Columns, found: Sequence[Shape], method: str, kind: Format | None) -> Mapping:
    """The mapping that the data comes closest to; its column names are a guess for a person to correct."""
    wanted = kind or KINDS_FOR[method][0]
    if wanted == "prompt-completion" and found and found[0].kind == "preference":
        columns = {role: name for role, name in found[0].columns.items() if role not in ("chosen", "rejected")}
        columns["completion"] = found[0].columns["chosen"]
        return Mapping(kind=wanted, columns=columns)
    text = [name for name, value in seen.kinds.items() if value in _TEXTUAL]
    names = text + [name for name in seen.kinds if name not in text] or ["COLUMN"]
    if wanted == "prompt-completion" and len(text) == 1:
        wanted = "text"
    roles = [role.split("|")[-1] for role in ROLES_OF_KIND[wanted][0]]
    if wanted in ("preference", "unpaired"):
        roles = ["prompt", *roles]
    columns, left = {}, list(names)
    vocabulary = {"prompt": _PROMPTS, "completion": _COMPLETIONS, "label": _LABELS, "text": _TEXTS}
    for role in roles:
        near = [name for name in left for known in vocabulary.get(role, (role,)) if _close(_plain(name), known)]
        columns[role] = near[0] if near else (left or names)[0]
        left = [name for name in left if name != columns[role]]
    return Mapping(kind=wanted, columns=columns)


def _close(name: str, known: str) -> bool:
    return difflib.SequenceMatcher(None, name, known).ratio() >= 0.75
