"""What is wrong with a spec document, as findings: unknown keys, wrong types, values out of range.

The limits are those written on the nouns (annotated_types), the codes those of orchestrator/wire.py. It checks what a
sentence, a setting or an answer made; files are checked where their bytes enter. No pydantic, and no imports beyond
the nouns, so that a plan starts fast.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt

from tunesmith.orchestrator.nouns import SCHEMA_VERSION, Finding, JobSpec

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
_LIMITS = ((Gt, "gt", "above"), (Ge, "ge", "at least"), (Lt, "lt", "below"), (Le, "le", "at most"))


def problems(doc: Mapping[str, Any], kind: type = JobSpec) -> list[Finding]:
    """Every problem of a spec document, in the order of its keys; an empty list where it can be built."""
    version = doc.get("tunesmith", SCHEMA_VERSION) if kind is JobSpec else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        said = "made by a newer version of Tunesmith" if newer else "of no version of Tunesmith"
        fix = "Upgrade Tunesmith." if newer else f"Write tunesmith: {SCHEMA_VERSION}."
        return [_error("spec.version", f"This spec is {said}: tunesmith: {str(version)[:40]}.", "tunesmith", fix)]
    return list(_section(kind, doc, ""))


def _error(code: str, message: str, where: str, fix: str = "") -> Finding:
    return Finding(level="error", code=code, message=message, where=where, fix=fix)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _section(kind: type, doc: Any, where: str) -> Iterator[Finding]:
    if not isinstance(doc, Mapping):
        yield _error("spec.value", f"{where or 'A spec'} must be a mapping, not {_shown(doc)}.", where)
        return
    hints = _hints(kind)
    for key, value in doc.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            yield _unknown(str(key), path, list(hints))
        else:
            yield from _value(hints[key], value, path)
    for item in dataclasses.fields(kind):
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and item.name not in doc:
            path = f"{where}.{item.name}" if where else item.name
            yield _error("spec.missing", f"{path} is missing.", path)


def _unknown(key: str, path: str, known: list[str]) -> Finding:
    import difflib

    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    fix = f"Did you mean {path[: len(path) - len(key)]}{near[0]}?" if near else f"The keys are {', '.join(known)}."
    return _error("spec.unknown_key", f"There is no key {path[:200]}.", path[:200], fix)


def _value(hint: Any, value: Any, where: str) -> Iterator[Finding]:
    options = _options(hint)
    found: list[Finding] | None = None
    for option in options:
        ours = _against(option, value, where)
        if not ours:
            return
        if _same_shape(option, value):
            found = ours
    yield from found or [_error("spec.value", f"{where} must be {_wanted(options)}, not {_shown(value)}.", where)]


def _options(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [part for option in typing.get_args(hint) for part in _options(option)]
    return [hint]


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _same_shape(hint: Any, value: Any) -> bool:
    """Whether a value was meant for this option, so that its problems are the ones to tell."""
    bare = _bare(hint)
    if dataclasses.is_dataclass(bare):
        return isinstance(value, Mapping)
    if typing.get_origin(bare) is tuple:
        return isinstance(value, (list, tuple))
    return False


def _against(hint: Any, value: Any, where: str) -> list[Finding]:
    """The problems of a value with one option of its type; an empty list where it fits."""
    bare, origin = _bare(hint), typing.get_origin(_bare(hint))
    if dataclasses.is_dataclass(bare) and isinstance(bare, type):
        return list(_section(bare, value, where))
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return [_misfit([hint], value, where)]
        inner = typing.get_args(bare)[0]
        return [found for index, item in enumerate(value) for found in _value(inner, item, f"{where}.{index}")]
    if origin is Literal:
        fits = value in typing.get_args(bare) and not isinstance(value, bool)
    elif origin is not None and issubclass(origin, Mapping):
        fits = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    elif bare is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_odd(value)
    elif bare is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif bare is Any:
        fits = True
    else:
        fits = isinstance(value, bare)
    if not fits:
        return [_misfit([hint], value, where)]
    return [_misfit([hint], value, where)] if not _within(hint, value) else []


def _is_odd(value: int | float) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _within(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) is not Annotated:
        return True
    for limit in typing.get_args(hint)[1:]:
        if (isinstance(limit, Gt) and not value > limit.gt) or (isinstance(limit, Ge) and not value >= limit.ge):
            return False
        if (isinstance(limit, Lt) and not value < limit.lt) or (isinstance(limit, Le) and not value <= limit.le):
            return False
    return True


def _misfit(options: list[Any], value: Any, where: str) -> Finding:
    return _error("spec.value", f"{where} must be {_wanted(options)}, not {_shown(value)}.", where)


def _wanted(options: list[Any]) -> str:
    """What fits, in words: "a number above 0", "auto or a whole number of at least 1"."""
    said = []
    for option in options:
        bare, origin = _bare(option), typing.get_origin(_bare(option))
        if origin is Literal:
            said += [str(name) for name in typing.get_args(bare)]
        elif dataclasses.is_dataclass(bare) or (origin is not None and origin is not tuple):
            said.append("a mapping")
        elif origin is tuple:
            said.append("a list")
        else:
            limits = [
                f"{word} {getattr(limit, name):g}"
                for limit in (typing.get_args(option)[1:] if bare is not option else ())
                for kind, name, word in _LIMITS
                if isinstance(limit, kind)
            ]
            said.append(" ".join([_WORDS.get(bare, str(bare)), " and ".join(limits)]).strip())
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} or {said[-1]}"


def _shown(value: Any) -> str:
    """A value as a message may show it: short, printable, no secret-sized text."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
