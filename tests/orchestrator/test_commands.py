"""What commands decide without a daemon: what is a spec, and which exit code a document calls for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.orchestrator import commands
from tunesmith.orchestrator.errors import InputError, TunesmithError
from tunesmith.orchestrator.nouns import Plan, Request

ERROR = {"level": "error", "code": "data.empty", "message": "No rows.", "where": "x.jsonl", "fix": "Add some."}
WARNING = {"level": "warning", "code": "w", "message": "Careful."}


@pytest.mark.parametrize(
    ("target", "spec"),
    [
        ("spec.yaml", True),
        ("dir/spec.YML", True),
        ("spec.json", True),
        ("my spec.yaml", True),
        ("no such spec.yaml", False),
        ("Fine-tune Qwen3-0.6B on data.jsonl", False),
        ("train on rows.json", False),
        ("data.jsonl", False),
        ("a\nb.yaml", False),
        ("nul\0.yaml", False),
        ("", False),
    ],
)
def test_a_spec_is_told_from_a_sentence(tmp_path: Path, target: str, spec: bool) -> None:
    (tmp_path / "my spec.yaml").write_text("model: x")
    assert commands.is_spec(target, str(tmp_path)) is spec


def test_a_request_keeps_what_was_set_and_where_it_was_made(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("model: m\ndata: d.jsonl\n")
    made = commands.request("spec.yaml", backend="local", sets=["train.epochs=2"], quick=True, cwd=str(tmp_path))
    spec = {"model": {"id": "m"}, "data": [{"source": "d.jsonl"}], "train": {"epochs": 2}}
    assert made == Request(spec=spec, backend="local", quick=True, cwd=str(tmp_path))
    made = commands.request("train it", sets=["train.epochs=2"], cwd=str(tmp_path))
    assert made == Request(text="train it", sets={"train.epochs": 2}, cwd=str(tmp_path))
    with pytest.raises(InputError) as caught:
        commands.request("none.yaml", cwd=str(tmp_path))
    assert caught.value.code == "spec.missing_file"


@pytest.mark.parametrize(
    ("doc", "code"),
    [
        ({}, 0),
        ({"findings": [WARNING]}, 0),
        ({"questions": [{"field": "model.id"}]}, 3),
        ({"findings": [ERROR]}, 2),
        ({"questions": [{"field": "model.id"}], "stages": [{"findings": [ERROR]}]}, 2),
        ({"stages": [{"data": {"problems": [WARNING, ERROR]}}]}, 2),
        ({"stages": [{"data": None, "findings": None}]}, 0),
    ],
)
def test_errors_come_before_questions(doc: dict[str, Any], code: int) -> None:
    assert commands.plan_exit_code(doc) == code


@pytest.mark.parametrize(
    ("shown", "code"),
    [
        ({"state": "succeeded"}, 0),
        ({"state": "running"}, 0),
        ({"state": "queued"}, 0),
        ({"state": "awaiting_input"}, 3),
        ({"state": "awaiting_approval", "approval": None}, 3),
        ({"state": "awaiting_approval", "approval": {"by": "me"}}, 0),
        ({"state": "cancelled"}, 1),
        ({"state": "rejected"}, 1),
        ({"state": "lost"}, 1),
        ({"state": "failed"}, 1),
        ({"state": "failed", "attempts": [{"number": 1}], "findings": [ERROR]}, 1),
        ({"state": "failed", "attempts": [], "findings": [WARNING, ERROR]}, 2),
    ],
)
def test_a_job_calls_for_an_exit_code(shown: dict[str, Any], code: int) -> None:
    assert commands.outcome(shown) == code


def test_the_reason_of_a_failure_is_found_where_it_is_recorded() -> None:
    def reason(shown: dict[str, Any]) -> str:
        error = commands.failure(shown)
        return error.code if error is not None else ""

    own = TunesmithError("x", code="own").to_doc()
    attempts = [{"error": None}, {"error": TunesmithError("x", code="attempt").to_doc()}]
    assert reason({"error": own, "findings": [ERROR], "attempts": attempts}) == "own"
    assert reason({"error": None, "findings": [WARNING, ERROR], "attempts": attempts}) == "data.empty"
    assert reason({"error": None, "findings": [WARNING], "attempts": attempts}) == "attempt"
    assert reason({"state": "failed"}) == ""


def test_a_plan_becomes_one_document() -> None:
    made = commands.plan(
        Request(text="x"),
        lambda request: Plan(plan_hash="h", intent="train", command=("tunesmith", "run", request.text or "")),
    )
    assert made["schema_version"] == 1
    assert made["command"] == ["tunesmith", "run", "x"]
    assert commands.resolved_specs(made) == []


def test_data_beside_a_spec_is_found_from_anywhere_and_the_callers_folder_wins(tmp_path, monkeypatch) -> None:
    there, here = tmp_path / "specs", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (there / "job.yaml").write_text("model: {id: smollm2-135m}\ndata: [{source: rows.jsonl}, {source: org/name}]\n")
    (there / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(here)
    found = commands.request("../specs/job.yaml")
    assert [item["source"] for item in found.spec["data"]] == [str(there / "rows.jsonl"), "org/name"]
    (here / "rows.jsonl").write_text("{}\n")
    assert commands.request("../specs/job.yaml").spec["data"][0]["source"] == "rows.jsonl"
