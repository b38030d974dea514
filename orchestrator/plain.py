"""Nouns as JSON-ready values, and back, without pydantic, so that the kernel can read them on any machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping as Dict
from typing import Annotated, Any, TypeVar, Union

from tunesmith.orchestrator.errors import InputError

T = TypeVar("T")


def plain(value: Any) -> Any:
    """A noun as JSON-ready values: dataclasses and mappings as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def build(kind: type[T], doc: Any) -> T:
    """The noun that `plain` wrote. Shapes are trusted: untrusted bytes go through orchestrator/wire.py.

    Keys this version does not know are passed over, so that an older reader can read a newer document.
    """
    return typing.cast(T, _build(kind, doc))


def _build(kind: Any, doc: Any) -> Any:
    if typing.get_origin(kind) is Annotated:
        return _build(typing.get_args(kind)[0], doc)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(doc, Dict):
            raise InputError(f"A {kind.__name__} must be a mapping, not {type(doc).__name__}.", code="spec.shape")
        hints = typing.get_type_hints(kind, include_extras=True)
        known = {item.name for item in dataclasses.fields(kind)}
        return kind(**{key: _build(hints[key], item) for key, item in doc.items() if key in known})
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        options = typing.get_args(kind)
        if isinstance(doc, Dict):
            nested = [option for option in options if dataclasses.is_dataclass(option)]
            if nested:
                return _build(nested[0], doc)
        if isinstance(doc, (list, tuple)):
            return tuple(doc)
        return doc
    if origin is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in doc)
    if kind is float and isinstance(doc, int) and not isinstance(doc, bool):
        return float(doc)
    return doc


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, no NaN; whole floats as integers, so that 1 and 1.0 are one value."""
    return json.dumps(_whole(plain(value)), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value


def digest(value: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of a noun or of plain values."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
