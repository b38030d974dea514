"""The types of the nouns in words, and what is wrong with a document in words: never a library's raw message."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union

import annotated_types

from tunesmith.orchestrator import nouns
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.inert import inert
from tunesmith.orchestrator.nouns import JobSpec

# What people write for our keys, from other tools.
_KNOWN_AS = {
    "lr": "train.learning_rate",
    "batch_size": "train.effective_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "steps": "train.max_steps",
    "max_seq_length": "train.max_length",
    "lr_scheduler_type": "train.scheduler",
    "gradient_checkpointing": "train.activation_checkpointing",
    "dataset": "data",
    "datasets": "data",
    "lora": "adapter",
    "peft": "adapter",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.targets",
    "base_model": "model",
    "model_name_or_path": "model.id",
    "budget": "limits.usd",
    "path": "data.source",
    "type": "method",
}


def unknown_keys(kind: Any, doc: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Every key that the nouns do not know: (path of its owner, key, owner's type), the outermost first."""
    kind = unwrapped(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(doc, Mapping):
        known = hints(kind)
        for key in doc:
            if key not in known:
                yield where, key, kind
        for key, value in doc.items():
            if key in known:
                yield from unknown_keys(known[key], value, (*where, key))
    elif typing.get_origin(kind) is tuple and isinstance(doc, list):
        for index, value in enumerate(doc):
            yield from unknown_keys(typing.get_args(kind)[0], value, (*where, str(index)))
    elif typing.get_origin(kind) in (Union, types.UnionType):
        for option in typing.get_args(kind):
            yield from unknown_keys(option, doc, where)


def unknown_key(where: tuple[str, ...], key: str, owner: type) -> InputError:
    """The error for a key that no spec has, naming the one that was most likely meant."""
    path = ".".join((*where, inert(key, limit=60)))
    near = _nearest(where, key, owner)
    known = ", ".join(sorted(hints(owner)))
    return InputError(
        f"{path} is not a key of a spec" + (f": did you mean {near}?" if near else "."),
        why="" if near else f"Known here: {known}.",
        fix=f"Write {near}, or take it out." if near else "Take it out, or see: tunesmith schema spec",
        code="spec.unknown_key",
        where=path,
    )


def _nearest(where: tuple[str, ...], key: str, owner: type) -> str | None:
    """The known key a person most likely meant: beside it, then by its name in other tools, then anywhere."""
    beside = difflib.get_close_matches(key, list(hints(owner)), n=1, cutoff=0.72)
    if beside:
        return ".".join((*where, beside[0]))
    lowered = key.lower().replace("-", "_")
    if lowered in _KNOWN_AS:
        return _KNOWN_AS[lowered]
    leaves = {path.rpartition(".")[2]: path for path in reversed(_paths())}
    anywhere = difflib.get_close_matches(lowered, list(leaves), n=1, cutoff=0.72)
    return leaves[anywhere[0]] if anywhere else None


@cache
def _paths() -> tuple[str, ...]:
    """Every dotted key of a spec, without list positions."""

    def walk(kind: Any, where: str) -> Iterator[str]:
        for key, hint in hints(kind).items():
            path = f"{where}.{key}" if where else key
            yield path
            for option in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(option):
                    yield from walk(option, path)

    return tuple(walk(JobSpec, ""))


def in_words(kind: type, doc: Mapping[str, Any], errors: Sequence[Mapping[str, Any]], name: str) -> InputError:
    """Errors (`type` and `loc`, as pydantic names them) as one sentence for each place, at most three of them."""
    said: dict[str, str] = {}
    for item in errors:
        absent = item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument")
        where, value = _place(doc, item["loc"], absent=absent)
        path = ".".join(where)
        if path in said:
            continue
        if absent:
            if name == "spec" and path in ("model", "data"):
                return missing(path)
            said[path] = f"{path} is missing."
        elif item["type"] == "unexpected_keyword_argument":
            said[path] = f"{path} is not a key of a {name}."
        else:
            said[path] = (
                f"{path} must be {wanted(hint_at(where, kind))}, not {shown(value)}.{_guess(where, value, kind)}"
            )
    paths = sorted(said, key=lambda path: -path.count("."))
    kept = [path for path in paths if not any(other.startswith(path + ".") for other in paths)]
    kept.sort(key=list(said).index)
    more = f" There are {len(kept) - 3} more." if len(kept) > 3 else ""
    return InputError(
        " ".join(said[path] for path in kept[:3]) + more,
        fix="See: tunesmith schema spec" if name == "spec" else "",
        code=f"{name}.value",
        where=kept[0],
    )


def missing(key: str) -> InputError:
    """A spec without its model or its data."""
    fix = {
        "model": "Add, for example: model: {id: Qwen/Qwen3-0.6B}",
        "data": "Add, for example: data: [{source: data.jsonl}]",
    }[key]
    return InputError(f"The spec names no {key}.", fix=fix, code="spec.missing", where=key)


def _place(doc: Any, loc: Sequence[int | str], *, absent: bool) -> tuple[tuple[str, ...], Any]:
    """The path of an error in the document, without the names that pydantic adds for the options of a union."""
    where: list[str] = []
    value = doc
    for index, step in enumerate(loc):
        inside: Any = value
        if isinstance(value, Mapping):
            known = step in value
        else:
            known = isinstance(value, (list, tuple)) and isinstance(step, int) and step < len(value)
        if known:
            value = inside[step]
        elif index == len(loc) - 1 and isinstance(value, Mapping) and isinstance(step, str) and absent:
            value = None
        else:
            continue
        where.append(inert(step, limit=60))
    return tuple(where), value


def hint_at(steps: Sequence[str], kind: Any = JobSpec) -> Any:
    """The type that a dotted key wants, or None where there is none. `data.limit` is taken as `data.0.limit`."""
    for step in steps:
        found: Any = None
        for option in options(kind):
            origin = typing.get_origin(option)
            if origin is tuple:
                item = typing.get_args(option)[0]
                found = item if step.isdecimal() else hint_at((step,), item)
            elif dataclasses.is_dataclass(option) and isinstance(option, type):
                found = hints(option).get(step)
            elif origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
                found = typing.get_args(option)[1]
            if found is not None:
                break
        if found is None:
            return None
        kind = found
    return kind


@cache
def hints(kind: type) -> dict[str, Any]:
    """The fields of a noun and their types, limits included."""
    found = typing.get_type_hints(kind, include_extras=True)
    return {item.name: found[item.name] for item in dataclasses.fields(kind)}


def unwrapped(hint: Any) -> Any:
    """A type without its limits."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def wanted(hint: Any) -> str:
    """A type in words: "a whole number of at least 1, or auto"."""
    words: list[str] = []
    literals: list[str] = []
    for option in options(hint):
        if typing.get_origin(option) is Literal:
            literals += [str(item) for item in typing.get_args(option)]
        else:
            words.append(_one(option))
    if literals:
        words.insert(len(words) if literals == ["auto"] else 0, _either(literals))
    return ", or ".join(words) if words else "something else"


def _one(hint: Any) -> str:
    limits = [part for part in getattr(hint, "__metadata__", ()) if not isinstance(part, str)]
    base = unwrapped(hint)
    origin = typing.get_origin(base)
    if base is type(None):
        return "null"
    if base in (int, float):
        return " ".join(["a whole number" if base is int else "a number", _limits(limits)]).strip()
    if base is str:
        return "text"
    if base is bool:
        return "true or false"
    if origin is tuple:
        inner = unwrapped(typing.get_args(base)[0])
        return "a list of data sources" if inner is nouns.DataSource else "a list of texts"
    if dataclasses.is_dataclass(base) and isinstance(base, type):
        return f"a mapping with keys such as {', '.join(list(hints(base))[:3])}"
    return "a mapping" if origin is not None else "a value"


def _limits(limits: Sequence[Any]) -> str:
    said = []
    for limit in limits:
        if isinstance(limit, annotated_types.Gt):
            said.append(f"above {limit.gt}")
        elif isinstance(limit, annotated_types.Ge):
            said.append(f"of at least {limit.ge}")
        elif isinstance(limit, annotated_types.Lt):
            said.append(f"below {limit.lt}")
        elif isinstance(limit, annotated_types.Le):
            said.append(f"at most {limit.le}")
    return " and ".join(said)


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def _guess(where: Sequence[str], value: Any, kind: type) -> str:
    """A near choice for a word that is none of them."""
    if not isinstance(value, str):
        return ""
    hint = hint_at(where, kind)
    choices = [str(c) for o in options(hint) if typing.get_origin(o) is Literal for c in typing.get_args(o)]
    near = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
    """A value found, short and inert."""
    if isinstance(value, str):
        return f"the text {inert(json.dumps(value, ensure_ascii=False), limit=60)}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return repr(value)
    return "a list" if isinstance(value, (list, tuple)) else "a mapping"
