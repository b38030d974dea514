"""Untrusted YAML and JSON text: what it means, and what is refused."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from tunesmith.orchestrator import documents
from tunesmith.orchestrator.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-3", -3),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("yes", "yes"),
        ("off", "off"),
        ("True", True),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("'3'", "3"),
        ("foo: bar", "foo: bar"),
        ("# no comment", "# no comment"),
        ("[a, 1, true]", ["a", 1, True]),
        ("{p: q}", {"p": "q"}),
        ("", None),
    ],
)
def test_a_value_means_what_json_would_mean(text: str, value: Any) -> None:
    assert documents.parse_value(text) == value
    assert type(documents.parse_value(text)) is type(value)


def test_yaml_follows_the_core_schema() -> None:
    doc = documents.parse("a: 1e-4\nb: no\nc: 2024-01-01\nd: |\n  two\n  lines\ne: .inf\n'f g': ~\n")
    assert math.isinf(doc.pop("e"))
    assert doc == {"a": 1e-4, "b": "no", "c": "2024-01-01", "d": "two\nlines\n", "f g": None}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "spec.empty"),
        ("# only a comment\n", "spec.empty"),
        ("a: &x 1\nb: *x\n", "spec.alias"),
        ("a: &a [x]\nb: &b [*a, *a]\n", "spec.alias"),
        ("a: 1\na: 2\n", "spec.duplicate_key"),
        ("[" * 100, "spec.too_deep"),
        ("a: " + "[" * 5000 + "]" * 5000, "spec.too_deep"),
        ("!!python/object/apply:os.system ['true']", "spec.tag"),
        ("a: !!binary aGk=", "spec.tag"),
        ("a: !mine 3", "spec.tag"),
        ("a: [1", "spec.syntax"),
        ("a: 1\n---\nb: 2\n", "spec.syntax"),
        ("a:\n\t- b\n", "spec.syntax"),
        ("a: b: c", "spec.syntax"),
        ("a: \x00", "spec.syntax"),
        ("? [1]\n: 2\n", "spec.shape"),
        ("a: " + "9" * 10_000, "spec.syntax"),
        ("a: " + "x" * 300_000, "spec.too_large"),
    ],
)
def test_hostile_text_is_refused(text: str, code: str) -> None:
    with pytest.raises(InputError) as caught:
        documents.parse(text)
    assert caught.value.code == code
    assert len(str(caught.value)) < 500


def test_the_line_of_a_mistake_is_named_and_its_text_is_not() -> None:
    with pytest.raises(InputError) as caught:
        documents.parse("model: x\ndata: y\ntrain: {epochs: 3\nkey: hf_secret")
    assert caught.value.where == "line 4"
    assert "hf_secret" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        documents.parse('{"a": 1,\n "b": hf_secret}', name="spec.json")
    assert caught.value.where == "line 2"
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"a": 1, "a": 2}', "spec.duplicate_key"),
        ('{"a": NaN}', "spec.number"),
        ("[" * 200_000, "spec.too_deep"),
        ('{"a": ' + "9" * 10_000 + "}", "spec.number"),
        ("{", "spec.syntax"),
    ],
)
def test_hostile_json_is_refused(text: str, code: str) -> None:
    with pytest.raises(InputError) as caught:
        documents.parse(text, name="spec.json")
    assert caught.value.code == code


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: x\nname: caf\xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"x" * (documents.MAX_BYTES + 1))
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, code in (
        ("missing.yaml", "spec.missing_file"),
        ("latin.yaml", "spec.encoding"),
        ("large.yaml", "spec.too_large"),
        ("pipe.yaml", "spec.unreadable"),
        (".", "spec.unreadable"),
        ("latin.yaml/x", "spec.unreadable"),
        ("n" * 5000, "spec.unreadable"),
        ("nul\0byte", "spec.unreadable"),
    ):
        with pytest.raises(InputError) as caught:
            documents.read_file(tmp_path / name)
        assert caught.value.code == code, name


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_bytes(b"\xef\xbb\xbfmodel: x\n")
    assert documents.parse(documents.read_file(tmp_path / "spec.yaml")) == {"model": "x"}
