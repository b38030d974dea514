"""Specs, settings and requests: what is read, and in which words the rest is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.orchestrator import nouns, wire
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.plain import plain

BASE: dict[str, Any] = {"model": {"id": "Qwen/Qwen3-0.6B"}, "data": [{"source": "rows.jsonl"}]}


def refused(call: Any, *args: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        call(*args)
    return caught.value


def test_a_spec_is_read_the_same_from_a_document_text_json_and_a_file(tmp_path: Path) -> None:
    doc = {**BASE, "train": {"epochs": 3, "learning_rate": 1e-4}, "hardware": {"gpus": 1}}
    spec = wire.read_spec(doc)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(doc))
    (tmp_path / "spec.json").write_text(json.dumps(doc))
    assert spec == wire.read_spec(yaml.safe_dump(doc)) == wire.read_spec(json.dumps(doc))
    assert spec == wire.read_spec(tmp_path / "spec.yaml") == wire.read_spec(tmp_path / "spec.json")
    assert spec.train.epochs == 3.0
    assert spec.train.learning_rate == 1e-4
    assert spec.adapter.rank == "auto"


def test_what_plain_writes_is_read_back_unchanged() -> None:
    spec = wire.read_spec({**BASE, "adapter": {"kind": "lora", "rank": 8, "targets": ["q_proj"]}})
    assert wire.read_spec(plain(spec)) == spec
    assert nouns.spec_hash(wire.read_spec(json.dumps(plain(spec)))) == nouns.spec_hash(spec)


def test_short_forms_are_written_out_and_defaults_stay_out() -> None:
    doc = wire.spec_doc(
        {"model": "smollm2-135m", "data": "rows.jsonl", "adapter": "lora", "after": "j-abcdef", "train": None}
    )
    assert doc == {
        "model": {"id": "smollm2-135m"},
        "data": [{"source": "rows.jsonl"}],
        "adapter": {"kind": "lora"},
        "after": ["j-abcdef"],
    }
    assert wire.read_spec({**BASE, "data": {"source": "one.jsonl"}}).data[0].source == "one.jsonl"
    assert [item.source for item in wire.read_spec({**BASE, "data": ["a.jsonl", {"source": "b.jsonl"}]}).data] == [
        "a.jsonl",
        "b.jsonl",
    ]


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt-completion"),
        ({"chosen": "good_response", "rejected": "bad_response"}, "preference"),
        ({"messages": "turns"}, "messages"),
        ({"prompt": "q"}, "prompt-only"),
        ({"prompt": "q", "completion": "a", "label": "ok"}, "unpaired"),
        ({"text": "body"}, "text"),
    ],
)
def test_the_kind_of_a_mapping_follows_from_its_columns(columns: dict[str, str], kind: str) -> None:
    spec = wire.read_spec({**BASE, "data": [{"source": "x", "mapping": {"columns": columns}}]})
    mapping = spec.data[0].mapping
    assert isinstance(mapping, nouns.Mapping)
    assert mapping.kind == kind


@pytest.mark.parametrize(
    ("change", "code", "where", "said"),
    [
        ({"train": {"epoch": 3}}, "spec.unknown_key", "train.epoch", "did you mean train.epochs?"),
        ({"epochs": 3}, "spec.unknown_key", "epochs", "did you mean train.epochs?"),
        ({"lr": 1e-4}, "spec.unknown_key", "lr", "did you mean train.learning_rate?"),
        ({"lora": {}}, "spec.unknown_key", "lora", "did you mean adapter?"),
        ({"data": [{"source": "a", "splitt": "x"}]}, "spec.unknown_key", "data.0.splitt", "did you mean data.0.split?"),
        ({"zzz": 1}, "spec.unknown_key", "zzz", "is not a key of a spec."),
        ({"train": {"epochs": -1}}, "spec.value", "train.epochs", "must be a number above 0, not -1"),
        ({"train": {"epochs": "3"}}, "spec.value", "train.epochs", 'not the text "3"'),
        ({"train": {"seed": 1.5}}, "spec.value", "train.seed", "a whole number of at least 0 and below 4294967296"),
        ({"train": {"packing": "yes"}}, "spec.value", "train.packing", "must be true or false, or auto"),
        ({"train": {"max_steps": 0}}, "spec.value", "train.max_steps", "a whole number of at least 1, or null, not 0"),
        ({"train": 3}, "spec.value", "train", "must be a mapping with keys such as epochs"),
        ({"method": "dop"}, "spec.value", "method", "Did you mean dpo?"),
        ({"adapter": {"rank": 9999}}, "spec.value", "adapter.rank", "at most 1024"),
        ({"data": [{"source": "a", "fraction": 1.5}]}, "spec.value", "data.0.fraction", "above 0 and at most 1"),
        ({"data": [{"limit": 3}]}, "spec.value", "data.0.source", "is missing"),
        ({"data": []}, "spec.missing", "data", "names no data"),
        ({"model": None}, "spec.missing", "model", "names no model"),
        ({"tunesmith": 2}, "spec.version", "tunesmith", "version 2"),
        ({"tunesmith": 0}, "spec.version", "tunesmith", "version 0"),
        ({"stages": []}, "spec.stages", "stages", "pipeline"),
        ({"name": "../../etc"}, "spec.value", "name", "name cannot be"),
        ({"name": "last"}, "spec.value", "name", "name cannot be"),
        ({"name": "x" * 300}, "spec.value", "name", "name cannot be"),
        ({"train": {"epochs": float("nan")}}, "spec.number", "train.epochs", "finite"),
        ({"train": {"max_steps": 10**30}}, "spec.number", "train.max_steps", "too large"),
        ({"model": {"id": "a\x1b[31m"}}, "spec.characters", "model.id", "control characters"),
    ],
)
def test_what_is_wrong_is_said_in_words(change: dict[str, Any], code: str, where: str, said: str) -> None:
    error = refused(wire.read_spec, {**BASE, **change})
    assert (error.code, error.where) == (code, where)
    assert said in error.message
    assert "pydantic" not in str(error)


def test_a_missing_model_shows_what_to_write() -> None:
    error = refused(wire.read_spec, {"data": "x.jsonl"})
    assert error.code == "spec.missing"
    assert "model: {id:" in error.fix


def test_several_mistakes_are_told_together() -> None:
    error = refused(wire.read_spec, {**BASE, "train": {"epochs": 0, "seed": -1}, "priority": "high"})
    assert all(key in error.message for key in ("train.epochs", "train.seed", "priority"))


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz12345678"[:34],
        "sk-proj-abc123def456ghi789jkl012",
        "https://me:hunter2@example.com/data.jsonl",
        "https://hunter2@example.com/data.jsonl",
        "s3://key:hunter2@bucket/x",
        "https://example.com/d?token=hunter2hunter2",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    ],
)
@pytest.mark.parametrize("place", ["source", "key", "set", "text", "yaml"])
def test_secrets_are_refused_and_never_repeated(secret: str, place: str) -> None:
    calls = {
        "source": lambda: wire.read_spec({**BASE, "data": secret}),
        "key": lambda: wire.read_spec({**BASE, secret: 1}),
        "set": lambda: wire.apply_sets(BASE, [f"storage={secret}"]),
        "text": lambda: wire.read_request({"text": f"train with {secret}"}),
        "yaml": lambda: wire.read_spec(f"model: x\ndata: ['{secret}']\n"),
    }
    error = refused(calls[place])
    assert error.code == "spec.secret"
    assert "hunter2" not in str(error.to_doc())
    assert secret not in str(error.to_doc())


@pytest.mark.parametrize(
    "name", ["my-org/sk-learn-examples-for-everyone", "hf_internal_testing/tiny", "https://example.com/a@b"]
)
def test_ordinary_names_are_no_secrets(name: str) -> None:
    assert wire.read_spec({**BASE, "data": name}).data[0].source == name


def test_settings_are_applied_and_the_document_stays_as_it_was() -> None:
    doc = {"model": "m", "data": ["a.jsonl", "b.jsonl"], "train": {"seed": 7}}
    before = json.dumps(doc)
    made = wire.apply_sets(
        doc,
        ["train.epochs=3", "data.mapping.columns.prompt=q", "data.mapping.columns.completion=a.b", "data.1.limit=5"],
    )
    assert json.dumps(doc) == before
    assert made["train"] == {"seed": 7, "epochs": 3}
    mapping = {"columns": {"prompt": "q", "completion": "a.b"}, "kind": "prompt-completion"}
    assert made["data"] == [
        {"source": "a.jsonl", "mapping": mapping},
        {"source": "b.jsonl", "mapping": mapping, "limit": 5},
    ]
    assert wire.read_spec(made).data[1].limit == 5


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=auto", "auto"),
        ("train.packing=true", True),
        ("train.max_steps=null", None),
        ("adapter.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("name=007", "007"),
        ("model.revision=12345", "12345"),
        ("data.split=train[:10]", "train[:10]"),
        ("data.0.mapping.columns.prompt=1", "1"),
        ("model.id=a=b", "a=b"),
        ("hardware.gpus=2", 2),
    ],
)
def test_values_are_typed_by_what_the_key_wants(item: str, value: Any) -> None:
    assert list(wire.parse_sets([item]).values()) == [value]


@pytest.mark.parametrize(
    ("item", "code"),
    [
        ("train.epochs", "set.shape"),
        ("=3", "set.shape"),
        ("train..epochs=3", "set.shape"),
        ("model.id.deep=3", "set.shape"),
        ("train.epoch=3", "spec.unknown_key"),
        ("train.epochs=-1", "spec.value"),
        ("data.7.limit=3", "set.index"),
        ("adapter.targets=[q", "spec.syntax"),
        ("tunesmith=2", "spec.version"),
    ],
)
def test_bad_settings_are_refused(item: str, code: str) -> None:
    assert refused(wire.spec_doc, BASE, [item]).code == code


def test_settings_beside_a_sentence_are_checked_without_a_spec() -> None:
    assert wire.read_sets(["train.epochs=3", "data.2.limit=5"]) == {"train.epochs": 3, "data.2.limit": 5}
    assert refused(wire.read_sets, ["train.epochs=no"]).code == "spec.value"
    assert refused(wire.read_sets, {"data.9999999.limit": 1}).code == "set.index"


def test_an_answer_may_be_to_a_question_that_is_no_key() -> None:
    assert wire.read_answers({"which_job": "j-abcdef", "method": "dpo"}) == {"which_job": "j-abcdef", "method": "dpo"}
    assert refused(wire.read_answers, {"method": "magic"}).code == "spec.value"


def test_a_request_is_a_sentence_or_a_spec() -> None:
    request = wire.read_request({"text": "  train it  ", "sets": {"train.epochs": 2}, "cwd": "/data"})
    assert request == nouns.Request(text="train it", sets={"train.epochs": 2}, cwd="/data")
    spec = wire.read_request({"spec": {"model": "m", "data": "d"}, "cwd": "/"}).spec
    assert spec == {"model": {"id": "m"}, "data": [{"source": "d"}]}


@pytest.mark.parametrize(
    ("doc", "code"),
    [
        ({}, "request.shape"),
        ({"text": "a", "spec": BASE}, "request.shape"),
        ({"text": " "}, "request.empty"),
        ({"text": "x" * 30_000}, "request.too_large"),
        ({"text": "a\x00b"}, "spec.characters"),
        ({"text": "a", "cwd": "here"}, "request.cwd"),
        ({"text": "a", "bogus": 1}, "request.value"),
        ({"text": "a", "quick": "yes"}, "request.value"),
        ({"spec": [1]}, "spec.shape"),
        ({"text": "a", "sets": {"train.epochs": -1}}, "spec.value"),
        ({"spec": BASE, "sets": {"train.nope": 1}}, "spec.unknown_key"),
    ],
)
def test_bad_requests_are_refused(doc: dict[str, Any], code: str) -> None:
    assert refused(wire.read_request, doc).code == code


def test_the_schema_of_a_spec_says_what_the_reader_says() -> None:
    schema = wire.schema("spec")
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model", "data"]
    assert schema["properties"]["tunesmith"]["const"] == 1
    known = set(schema["properties"])
    assert known == set(plain(wire.read_spec(BASE)))
    train = schema["$defs"]["TrainSpec"]["properties"]
    assert set(train) == set(plain(nouns.TrainSpec()))
    assert all(wire.schema(name)["$schema"].endswith("2020-12/schema") for name in ("plan", "event"))
    assert refused(wire.schema, "job").code == "schema.unknown"


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.binary(max_size=4)
)
KEYS = st.one_of(
    st.sampled_from(
        ["model", "data", "train", "adapter", "method", "tunesmith", "eval", "id", "source", "mapping", "columns"]
    ),
    st.text(max_size=8),
    st.integers(),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=20
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_any_document_is_a_spec_or_an_input_error(value: Any) -> None:
    for doc in (value, {**BASE, "train": value}, {**BASE, "data": value}, {**BASE, "adapter": value}):
        with contextlib.suppress(InputError):
            assert isinstance(wire.read_spec(doc if isinstance(doc, dict) else {"model": doc}), nouns.JobSpec)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=200), st.text(alphabet="abt:[]{}&*!?|>-'\"#%@, \n\t=<0123.", max_size=80)))
def test_any_text_is_a_spec_or_an_input_error(text: str) -> None:
    for call in (
        wire.read_spec,
        lambda item: wire.apply_sets(BASE, [item]),
        lambda item: wire.read_request({"text": item}),
    ):
        with contextlib.suppress(InputError):
            call(text)


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.floats(min_value=1e-3, max_value=1e3),
    steps=st.none() | st.integers(1, 10**6),
    rank=st.just("auto") | st.integers(1, 1024),
    method=st.sampled_from(nouns.METHODS),
    targets=st.just("auto") | st.lists(st.from_regex(r"[a-z_]{1,10}", fullmatch=True), max_size=3),
)
def test_a_valid_spec_survives_yaml_and_json(epochs: float, steps: Any, rank: Any, method: str, targets: Any) -> None:
    doc = {
        **BASE,
        "method": method,
        "train": {"epochs": epochs, "max_steps": steps},
        "adapter": {"rank": rank, "targets": targets},
    }
    spec = wire.read_spec(doc)
    assert wire.read_spec(yaml.safe_dump(plain(spec))) == spec == wire.read_spec(json.dumps(plain(spec)))
