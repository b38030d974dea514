"""Where untrusted bytes become nouns: specs, requests and settings, checked strictly and refused in plain words.

pydantic decides whether a document fits the nouns (it is imported when first needed: 0.1 s); the words come from the
nouns' own types, so that a message says what is wanted ("train.epochs must be a number above 0, not -1") and never
repeats a secret.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunesmith.orchestrator import documents
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.events import Event
from tunesmith.orchestrator.inert import inert
from tunesmith.orchestrator.nouns import JobSpec, Plan, Request
from tunesmith.orchestrator.wording import (
    hint_at,
    hints,
    in_words,
    missing,
    options,
    shown,
    unknown_key,
    unknown_keys,
    unwrapped,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# Plug-ins of pydantic have no say here, and looking for them reads the metadata of every package: 50 ms.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

SPEC_VERSION = 1
MAX_TEXT = 20_000
MAX_SOURCES = 64

# A text where a section is wanted fills the section's first key.
_SHORT = {"model": "id", "adapter": "kind"}
_LISTS = {("eval", "tasks"), ("adapter", "targets"), ("grpo", "rewards"), ("after",), ("notify",)}
_NAME = re.compile(r"[^\W_][\w.+ -]{0,79}")


# --- specs -----------------------------------------------------------------------------------------------------------


def read_spec(source: Path | str | Mapping[str, Any], sets: Sequence[str] | Mapping[str, Any] = ()) -> JobSpec:
    """The spec in a file (a Path), in YAML or JSON text, or in a document, with `sets` applied.

    Raises InputError with a stable code (spec.unknown_key, spec.value, spec.missing, spec.version, spec.secret ...).
    """
    return _typed(spec_doc(source, sets))


def spec_doc(source: Path | str | Mapping[str, Any], sets: Sequence[str] | Mapping[str, Any] = ()) -> dict[str, Any]:
    """The same as a checked document: short forms written out, defaults left out, so that what was set shows."""
    if isinstance(source, Path):
        source = documents.parse(documents.read_file(source), name=source.name)
    elif isinstance(source, str):
        source = documents.parse(source)
    doc = _spelled_out(source)
    if sets:
        doc = apply_sets(doc, sets)
    _typed(doc)
    return doc


def apply_sets(doc: Mapping[str, Any], sets: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """`doc` with settings applied: "train.epochs=3" strings, or dotted keys with plain values. `doc` stays as it was.

    `data.KEY` reaches every data source, `data.0.KEY` one of them. Raises InputError: set.shape, spec.unknown_key ...
    """
    pairs = sets if isinstance(sets, Mapping) else parse_sets(sets)
    result = _spelled_out(doc) if doc else {}
    for key, value in pairs.items():
        _set(result, key, copy.deepcopy(value))
    return _spelled_out(result)


def parse_sets(sets: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` strings as dotted keys and plain values. Text stays text where the key wants text ("name=007")."""
    found: dict[str, Any] = {}
    for item in sets:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(
                f"{inert(item, limit=80)} is not KEY=VALUE.", fix="Write it like train.epochs=3.", code="set.shape"
            )
        documents.check_plain({"value": item}, name="--set")
        value = documents.parse_value(text)
        hint = hint_at(_steps(key))
        if hint is not None and isinstance(value, (int, float, bool)) and _wants_text(hint):
            value = text.strip()
        found[key] = value
    return found


def read_sets(sets: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Checked settings or answers, without a spec to apply them to: every key is known and every value fits it."""
    pairs = dict(sets) if isinstance(sets, Mapping) else parse_sets(sets)
    if not pairs:
        return {}
    documents.check_plain(pairs, name="The settings")
    positions = [
        int(steps[1]) for steps in map(_steps, pairs) if steps[0] == "data" and steps[1:2] and steps[1].isdecimal()
    ]
    count = min(max([0, *positions]) + 1, MAX_SOURCES)
    spec_doc({"model": "model", "data": ["data"] * count}, pairs)
    return pairs


def read_answers(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Checked answers. A question may ask for what is no spec key: that value need only be plain and bounded."""
    documents.check_plain(pairs, name="The answers")
    read_sets({key: value for key, value in pairs.items() if hint_at(_steps(key)) is not None})
    return dict(pairs)


# --- requests --------------------------------------------------------------------------------------------------------


def read_request(doc: Mapping[str, Any]) -> Request:
    """A checked Request: one of a sentence or a spec document, and settings that fit. Raises InputError."""
    if not isinstance(doc, Mapping):
        raise InputError("A request must be a mapping.", code="request.shape")
    documents.check_plain({key: value for key, value in doc.items() if key != "text"}, name="The request")
    text, spec = doc.get("text"), doc.get("spec")
    if (text is None) == (spec is None):
        raise InputError("A request holds either a sentence or a spec.", code="request.shape")
    if spec is not None and not isinstance(spec, Mapping):
        raise InputError("A spec must be a mapping of keys to values.", code="spec.shape")
    request = cast(Request, _validate(Request, {**doc}, "request"))
    if text is not None:
        text = read_text(str(text))
    if not request.cwd.startswith("/"):
        raise InputError("cwd must be an absolute path.", code="request.cwd", where="cwd")
    sets = read_sets(request.sets) if text is not None else dict(request.sets)
    if spec is not None:
        spec = spec_doc(spec)
        if sets:
            spec_doc(spec, sets)
    if request.backend is not None:
        spec_doc({"model": "model", "data": "data", "backend": request.backend})
    return dataclasses.replace(request, text=text, spec=spec, sets=sets)


def read_text(text: str) -> str:
    """A sentence that may be stored: bounded, not empty, without control characters or secrets. Raises InputError."""
    if len(text) > MAX_TEXT:
        raise InputError(f"The request is longer than {MAX_TEXT} characters.", code="request.too_large")
    if not text.strip():
        raise InputError(
            "The request is empty.",
            fix='Say what to train, for example: tunesmith run "Fine-tune Qwen3-0.6B on data.jsonl".',
            code="request.empty",
        )
    documents.check_plain({"request": text}, name="The request")
    return text.strip()


# --- schemas ---------------------------------------------------------------------------------------------------------


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a spec, a plan, or an event line. Raises InputError for another name."""
    from pydantic import TypeAdapter

    kinds: dict[str, Any] = {"spec": JobSpec, "plan": Plan, "event": Event}
    if name not in kinds:
        raise InputError(
            f"There is no schema {inert(name, limit=40)}.", fix="Ask for spec, plan or event.", code="schema.unknown"
        )
    if name == "spec":
        made = _adapter(JobSpec).json_schema()
        made = {**made["prefixItems"][0], "$defs": made["$defs"]}
        top = made["$defs"].pop(made.pop("$ref").rpartition("/")[2])
        top["properties"]["tunesmith"] = {"const": SPEC_VERSION, "default": SPEC_VERSION}
        top["properties"]["data"]["minItems"] = 1
        made = {**top, "$defs": made["$defs"]}
    else:
        made = TypeAdapter(kinds[name]).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"Tunesmith {name}", **_untitled(made)}


def _untitled(made: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in made.items() if key != "title"}


# --- from what people write to what is checked -----------------------------------------------------------------------


def _spelled_out(source: Any) -> dict[str, Any]:
    """`source` with short forms written out and empty sections dropped; unknown keys and other versions refused."""
    documents.check_plain(source)
    if not isinstance(source, Mapping):
        raise InputError(
            "A spec must be a mapping of keys to values.",
            fix="Start with: model: {id: Qwen/Qwen3-0.6B}",
            code="spec.shape",
        )
    doc: dict[str, Any] = copy.deepcopy(dict(source))
    _check_version(doc)
    sections = [
        item.name for item in dataclasses.fields(JobSpec) if dataclasses.is_dataclass(hints(JobSpec)[item.name])
    ]
    for key in sections:
        if key in doc and doc[key] is None:
            del doc[key]
    for key, first in _SHORT.items():
        if isinstance(doc.get(key), str):
            doc[key] = {first: doc[key]}
    if isinstance(doc.get("data"), (str, Mapping)):
        doc["data"] = [doc["data"]]
    if isinstance(doc.get("data"), list):
        doc["data"] = [_source(item) for item in doc["data"]]
    for path in _LISTS:
        holder = doc if len(path) == 1 else doc.get(path[0])
        if isinstance(holder, dict) and isinstance(holder.get(path[-1]), str) and holder[path[-1]] != "auto":
            holder[path[-1]] = [holder[path[-1]]]
    if isinstance(doc.get("grpo"), dict) and doc["grpo"].get("rewards") == "auto":
        doc["grpo"]["rewards"] = ["auto"]
    for where, key, owner in unknown_keys(JobSpec, doc, ()):
        raise unknown_key(where, key, owner)
    return doc


def _source(item: Any) -> Any:
    if isinstance(item, str):
        return {"source": item}
    if isinstance(item, dict) and isinstance(item.get("mapping"), dict):
        mapping = item["mapping"]
        if isinstance(mapping.get("keep"), str):
            mapping["keep"] = [mapping["keep"]]
        if "kind" not in mapping and isinstance(mapping.get("columns"), dict):
            kind = _kind_of(set(mapping["columns"]))
            if kind:
                mapping["kind"] = kind
    return item


def _kind_of(columns: set[Any]) -> str | None:
    """The kind that the mapped columns leave no doubt of."""
    if {"chosen", "rejected"} <= columns:
        return "preference"
    if "label" in columns:
        return "unpaired"
    if {"prompt", "completion"} <= columns:
        return "prompt-completion"
    if "messages" in columns:
        return "messages"
    if "text" in columns:
        return "text"
    return "prompt-only" if columns == {"prompt"} else None


def _check_version(doc: dict[str, Any]) -> None:
    version = doc.get("tunesmith", SPEC_VERSION)
    if isinstance(version, int) and not isinstance(version, bool) and version != SPEC_VERSION:
        later = "a later version of " if version > SPEC_VERSION else "no version of "
        raise InputError(
            f"This spec is of version {version}; only version {SPEC_VERSION} is known here.",
            why=f"It was written for {later}Tunesmith.",
            fix="Upgrade Tunesmith." if version > SPEC_VERSION else f"Write tunesmith: {SPEC_VERSION}.",
            code="spec.version",
            where="tunesmith",
        )
    if "stages" in doc:
        raise InputError(
            "This spec is a pipeline of stages, which this version cannot run.",
            fix="Run its stages one after the other, each from its own spec.",
            code="spec.stages",
            where="stages",
        )


# --- settings --------------------------------------------------------------------------------------------------------


def _steps(key: str) -> tuple[str, ...]:
    """The steps of a dotted key. Below mapping.columns and mapping.roles a step may hold dots: names of columns do."""
    parts = key.split(".")
    for index, part in enumerate(parts):
        if part in ("columns", "roles") and index + 2 < len(parts):
            return (*parts[: index + 1], ".".join(parts[index + 1 :]))
    return tuple(parts)


def _set(doc: dict[str, Any], key: str, value: Any) -> None:
    steps = _steps(key)
    if not all(steps):
        raise InputError(f"{inert(key, limit=80)} is not a key.", fix="Write it like train.epochs=3.", code="set.shape")
    if steps[0] == "data" and len(steps) > 1:
        _set_data(doc, steps[1:], key, value)
        return
    _descend(doc, steps, key, value)


def _set_data(doc: dict[str, Any], steps: tuple[str, ...], key: str, value: Any) -> None:
    sources = doc.setdefault("data", [])
    if not isinstance(sources, list):
        raise InputError("data must be a list of data sources.", code="spec.value", where="data")
    if steps[0].isdecimal():
        index = int(steps[0])
        if index > len(sources) or index >= MAX_SOURCES:
            raise InputError(
                f"{inert(key, limit=80)}: there is no data source {index}.",
                why=f"The spec has {len(sources)}, counted from 0.",
                code="set.index",
                where=inert(key, limit=80),
            )
        if index == len(sources):
            sources.append({})
        if len(steps) == 1:
            sources[index] = value
            return
        sources, steps = [sources[index]], steps[1:]
    elif not sources:
        sources.append({})
    for source in sources:
        if not isinstance(source, dict):
            raise InputError("A data source must be a mapping.", code="spec.value", where="data")
        _descend(source, steps, key, copy.deepcopy(value))


def _descend(holder: dict[str, Any], steps: tuple[str, ...], key: str, value: Any) -> None:
    for step in steps[:-1]:
        inner = holder.get(step)
        if inner is None or inner == "auto" or (step == "hardware" and isinstance(inner, str)):
            inner = holder[step] = {}
        if not isinstance(inner, dict):
            raise InputError(
                f"{inert(key, limit=80)}: {inert(step, limit=60)} has no keys of its own.",
                code="set.shape",
                where=inert(key, limit=80),
            )
        holder = inner
    holder[steps[-1]] = value


def _wants_text(hint: Any) -> bool:
    found = options(hint)
    return str in found and not any(unwrapped(option) in (int, float, bool) for option in found)


# --- validation ------------------------------------------------------------------------------------------------------


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """The validator of a one-item list of `kind`: a bare dataclass would take no configuration."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(tuple[kind], config=ConfigDict(extra="forbid", allow_inf_nan=False))  # type: ignore[valid-type]


def _typed(doc: Mapping[str, Any]) -> JobSpec:
    spec = cast(JobSpec, _validate(JobSpec, doc, "spec"))
    if not spec.data:
        raise missing("data")
    if len(spec.data) > MAX_SOURCES:
        raise InputError(f"A spec holds at most {MAX_SOURCES} data sources.", code="spec.value", where="data")
    for where, text in (
        ("model.id", spec.model.id),
        *((f"data.{n}.source", item.source) for n, item in enumerate(spec.data)),
    ):
        if not text.strip():
            raise InputError(f"{where} is empty.", code="spec.value", where=where)
    if spec.name is not None and (not _NAME.fullmatch(spec.name) or spec.name == "last"):
        raise InputError(
            f"name cannot be {shown(spec.name)}.",
            why="A name is 1 to 80 letters, digits, spaces and . _ + -, begins with a letter or digit, is not `last`.",
            code="spec.value",
            where="name",
        )
    return spec


def _validate(kind: type, doc: Mapping[str, Any], name: str) -> Any:
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps([doc]), strict=True)[0]
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise in_words(kind, doc, [{**item, "loc": item["loc"][1:]} for item in found], name) from None
