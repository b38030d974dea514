"""Untrusted YAML and JSON text as plain values: bounded in size and depth, no aliases, no duplicate keys, no secrets.

YAML follows the 1.2 core schema (what JSON means, YAML means): only true and false are booleans, 1e-4 is a number, and
dates, `yes` and 1:30 are text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.inert import has_secret, inert

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_INTEGER = 2**53


def read_file(path: Path) -> str:
    """The text of a small file.

    Raises InputError: spec.missing_file, spec.unreadable, spec.too_large, spec.encoding.
    """
    shown = inert(path, limit=200)
    try:
        if path.is_dir():
            raise InputError(f"{shown} is a folder, not a file.", code="spec.unreadable", where=shown)
        if path.exists() and not path.is_file():
            raise InputError(f"{shown} is not a regular file.", code="spec.unreadable", where=shown)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(
            f"There is no file {shown}.",
            fix="Check the path, or list the folder.",
            code="spec.missing_file",
            where=shown,
        ) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "the path is not valid"
        raise InputError(f"{shown} cannot be read: {why}.", code="spec.unreadable", where=shown) from None
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{shown} is larger than {MAX_BYTES // 1024} KiB, which no spec needs.", code="spec.too_large", where=shown
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{shown} is not UTF-8 text.", fix="Save it as UTF-8.", code="spec.encoding", where=f"line {line}"
        ) from None


def parse(text: str, *, name: str = "The spec") -> Any:
    """The plain value that YAML or JSON text holds.

    Raises InputError: spec.empty, spec.too_large, spec.syntax (with line and column), spec.alias, spec.duplicate_key,
    spec.too_deep. No message repeats the text around an error: it may hold a secret.
    """
    name = inert(name, limit=200)
    if len(text) > MAX_BYTES:
        raise InputError(f"{name} is larger than {MAX_BYTES // 1024} KiB, which no spec needs.", code="spec.too_large")
    if not text.strip():
        raise InputError(f"{name} is empty.", fix="Write at least `model` and `data`.", code="spec.empty")
    if name.endswith(".json"):
        return _parse_json(text, name)
    loader = _Loader(text) if _readable(text) else None
    if loader is None:
        raise InputError(f"{name} holds control characters.", code="spec.syntax")
    try:
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        raise _syntax(name, error) from None
    except (ValueError, OverflowError, RecursionError):
        raise InputError(f"{name} holds a value that cannot be read.", code="spec.syntax") from None
    finally:
        loader.dispose()
    if value is None:
        raise InputError(f"{name} is empty.", fix="Write at least `model` and `data`.", code="spec.empty")
    return value


def parse_value(text: str) -> Any:
    """The value after KEY= in `--set KEY=VALUE`: a YAML scalar, or a list, mapping or quoted text in flow style."""
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse(text, name="The value")
    try:
        tag = _Loader.plain_tag(text)
        return _CONSTRUCT[tag](text)
    except (ValueError, OverflowError):
        raise InputError("The value is a number that cannot be read.", code="set.value") from None


def check_plain(value: Any, *, name: str = "The spec", secrets: bool = True) -> None:
    """Raises InputError where `value` is not plain bounded data, or holds a secret or a control character.

    The codes are spec.secret, spec.characters, spec.number, spec.too_deep, spec.shape. The value found is not repeated.
    """
    stack: list[tuple[str, Any, int]] = [("", value, 0)]
    while stack:
        where, item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise InputError(f"{name} is nested deeper than {MAX_DEPTH} levels.", code="spec.too_deep")
        if isinstance(item, str):
            _check_text(item, where, name, secrets)
        elif isinstance(item, Mapping):
            for key, child in item.items():
                if not isinstance(key, str):
                    shown = inert(repr(key), limit=40)
                    raise InputError(f"Keys must be text, not {shown}.", code="spec.shape", where=where)
                _check_text(key, where, name, secrets)
                stack.append((f"{where}.{inert(key, limit=60)}" if where else inert(key, limit=60), child, depth + 1))
        elif isinstance(item, (list, tuple)):
            stack += [
                (f"{where}.{index}" if where else str(index), child, depth + 1) for index, child in enumerate(item)
            ]
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise InputError(f"{where or name} must be a finite number.", code="spec.number", where=where)
        elif isinstance(item, int) and not isinstance(item, bool):
            if abs(item) > MAX_INTEGER:
                raise InputError(f"{where or name} is too large a number.", code="spec.number", where=where)
        elif item is not None and not isinstance(item, bool):
            kind = type(item).__name__
            raise InputError(
                f"{where or name} holds a {kind}, which JSON has no word for.", code="spec.shape", where=where
            )


def _check_text(text: str, where: str, name: str, secrets: bool) -> None:
    if secrets and has_secret(text):
        raise InputError(
            f"{where or name} holds what looks like a token or a password.",
            why="Specs are stored, hashed and shown.",
            fix="Take it out; log in with the backend's own tool, or set its environment variable (HF_TOKEN).",
            code="spec.secret",
            where=where,
        )
    if _UNPRINTABLE.search(text):
        raise InputError(f"{where or name} holds control characters.", code="spec.characters", where=where)


_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def _readable(text: str) -> bool:
    return yaml.reader.Reader.NON_PRINTABLE.search(text) is None


def _parse_json(text: str, name: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _duplicate(twice, "")
        return found

    def constant(word: str) -> Any:
        raise InputError(f"{name} holds {word}, which is not a finite number.", code="spec.number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
            fix="Correct that line.",
            code="spec.syntax",
            where=f"line {error.lineno}",
        ) from None
    except RecursionError:
        raise InputError(f"{name} is nested deeper than {MAX_DEPTH} levels.", code="spec.too_deep") from None
    except ValueError:
        raise InputError(f"{name} holds a number that cannot be read.", code="spec.number") from None


def _syntax(name: str, error: yaml.YAMLError) -> InputError:
    mark = getattr(error, "problem_mark", None)
    problem = inert(getattr(error, "problem", None) or "it cannot be read", limit=120)
    line = f"line {mark.line + 1}" if mark is not None else ""
    place = f" at {line}, column {mark.column + 1}" if mark is not None else ""
    return InputError(
        f"{name} is not valid YAML{place}: {problem}.",
        fix="Correct that line; check its indentation and quotes.",
        code="spec.syntax",
        where=line,
    )


def _duplicate(key: str, where: str) -> InputError:
    return InputError(
        f"The key {inert(key, limit=60)} is given twice in one mapping.",
        fix="Keep one of them.",
        code="spec.duplicate_key",
        where=where,
    )


def _bool(text: str) -> bool:
    return text.lower() == "true"


def _int(text: str) -> int:
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _null(text: str) -> None:
    return None


_CONSTRUCT: dict[str, Any] = {
    "tag:yaml.org,2002:null": _null,
    "tag:yaml.org,2002:bool": _bool,
    "tag:yaml.org,2002:int": _int,
    "tag:yaml.org,2002:float": _float,
    "tag:yaml.org,2002:str": str,
}

_PLAIN: list[tuple[str, re.Pattern[str]]] = [
    ("tag:yaml.org,2002:null", re.compile(r"~|null|Null|NULL|")),
    ("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")),
    (
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ),
]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, held to the core schema, to a depth, and to one value per key."""

    depth = 0

    @staticmethod
    def plain_tag(text: str) -> str:
        """The tag that an unquoted scalar gets."""
        return next((tag for tag, pattern in _PLAIN if pattern.fullmatch(text)), "tag:yaml.org,2002:str")

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return self.plain_tag(value)
        quoted = (False, implicit[1]) if kind is yaml.ScalarNode else implicit
        return cast(str, super().resolve(kind, value, quoted))  # type: ignore[no-untyped-call]

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise InputError(
                "Aliases (*name) are not read in specs.",
                fix="Write the value out.",
                code="spec.alias",
                where=f"line {mark.line + 1}",
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise InputError(f"The text is nested deeper than {MAX_DEPTH} levels.", code="spec.too_deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            line = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise InputError("Keys must be text, not a list or a mapping.", code="spec.shape", where=line)
            if key_node.value in keys:
                raise _duplicate(key_node.value, line)
            keys.add(key_node.value)
        # Not SafeLoader's: that one would expand `<<` keys, which need aliases to be of any use.
        return cast("dict[Any, Any]", yaml.constructor.BaseConstructor.construct_mapping(self, node, deep=True))

    def construct_core(self, node: Any) -> Any:
        """A scalar of the core schema."""
        return _CONSTRUCT[node.tag](node.value)

    def construct_list(self, node: Any) -> list[Any]:
        """A sequence, built at once."""
        return self.construct_sequence(node, deep=True)

    def construct_dict(self, node: Any) -> dict[Any, Any]:
        """A mapping, built at once."""
        return self.construct_mapping(node, deep=True)

    def construct_foreign(self, node: Any) -> Any:
        """Any other tag (!!python/..., !!binary, !!set) is refused."""
        raise InputError(
            f"The tag {inert(node.tag, limit=60)} is not read in specs.",
            fix="Write plain values.",
            code="spec.tag",
            where=f"line {node.start_mark.line + 1}",
        )


_Loader.yaml_constructors = {
    **dict.fromkeys(_CONSTRUCT, _Loader.construct_core),
    "tag:yaml.org,2002:seq": _Loader.construct_list,
    "tag:yaml.org,2002:map": _Loader.construct_dict,
}
_Loader.add_constructor(None, _Loader.construct_foreign)  # None: any other tag
