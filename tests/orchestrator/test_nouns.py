"""Nouns as plain data: there and back, hashed by value, indifferent to the order of keys."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tunesmith.orchestrator.errors import InputError, TunesmithError, from_doc
from tunesmith.orchestrator.nouns import Attempt, DataSource, JobSpec, Mapping, ModelRef, Plan, plan_hash, spec_hash
from tunesmith.orchestrator.plain import build, canonical, plain

SPEC = JobSpec(
    model=ModelRef(id="m"),
    data=(DataSource(source="a", mapping=Mapping(kind="text", columns={"text": "t"})), DataSource(source="b")),
)


def hashed(spec: JobSpec = SPEC, **changes) -> str:
    given = {"fingerprints": ["sha256:1"], "model_commits": [None], "hardware": ["cpu"], **changes}
    return plan_hash([spec], **given)


def test_a_spec_survives_json() -> None:
    assert build(JobSpec, json.loads(json.dumps(plain(SPEC)))) == SPEC


def test_unknown_keys_of_newer_documents_are_passed_over() -> None:
    assert build(ModelRef, {"id": "m", "novel": 1}) == ModelRef(id="m")


def test_a_noun_is_not_built_from_a_list() -> None:
    with pytest.raises(InputError):
        build(ModelRef, ["m"])


def test_hashes_see_values_and_not_their_writing() -> None:
    one = replace(SPEC, train=replace(SPEC.train, epochs=1))
    assert spec_hash(one) == spec_hash(SPEC)
    assert canonical({"b": 1.0, "a": [2]}) == '{"a":[2],"b":1}'
    assert spec_hash(replace(SPEC, priority=1)) != spec_hash(SPEC)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprints": ["sha256:2"]},
        {"model_commits": ["abc"]},
        {"hardware": ["H100"]},
        {"reward_hashes": {"r.py:f": "1"}},
        {"spec": replace(SPEC, limits=replace(SPEC.limits, usd=5.0))},
        {"spec": replace(SPEC, backend="ray")},
        {"spec": replace(SPEC, train=replace(SPEC.train, seed=1))},
    ],
)
def test_an_approval_is_void_when_anything_it_binds_changes(change) -> None:
    assert hashed(**change) != hashed()


def test_errors_of_a_plan_are_those_of_all_its_parts() -> None:
    assert Plan(plan_hash="h", intent="train", command=("tunesmith",)).errors == ()


def test_the_key_of_an_attempt_names_job_number_and_spec() -> None:
    attempt = Attempt(job="j-aaaaaa", number=2, spec=SPEC, plan_hash="h")
    assert attempt.key == f"j-aaaaaa:2:{spec_hash(SPEC)[:16]}"


def test_an_error_travels_as_a_document_and_comes_back() -> None:
    error = InputError("what", why="why", fix="fix", where="row 3", code="data.row")
    back = from_doc(error.to_doc())
    assert type(back) is InputError
    assert (back.message, back.code, back.where, back.exit_code) == ("what", "data.row", "row 3", 2)
    assert type(from_doc({"type": "Novel", "message": "m"})) is TunesmithError
