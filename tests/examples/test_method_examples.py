"""The examples of methods beyond SFT: what is committed is what their script writes, and all of it plans."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from tunesmith.graph.planning import plan
from tunesmith.orchestrator.nouns import Device, Request

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = Device(backend="local", hardware="cpu", kind="cpu", memory_bytes=24 << 30, peak_flops=3e11, bandwidth=2e10)


def load_script():
    spec = importlib.util.spec_from_file_location("make_methods", EXAMPLES / "make_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(name):
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["preferences.jsonl", "ratings.jsonl", "sums.jsonl"])
def test_committed_files_are_what_the_script_writes(name):
    assert (EXAMPLES / name).read_text(encoding="utf-8") == load_script().text(name)
    rows = rows_of(name)
    assert len({json.dumps(row) for row in rows}) == len(rows) >= 150


def test_sides_differ_and_sums_are_right():
    assert all(row["chosen"] != row["rejected"] for row in rows_of("preferences.jsonl"))
    labels = [row["label"] for row in rows_of("ratings.jsonl")]
    assert labels.count(True) == labels.count(False)
    for row in rows_of("sums.jsonl"):
        numbers = [int(word) for word in row["question"].replace("?", "").split() if word.isdecimal()]
        assert sum(numbers) == int(row["answer"])


def planned(tmp_path, monkeypatch, **request):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = plan(Request(cwd=str(EXAMPLES.parent), **request), devices=lambda backend: (CPU,), cache=tmp_path)
    assert (found.errors, found.questions, found.unread) == ((), (), ())
    (stage,) = found.stages
    assert [item for item in (*stage.findings, *stage.data.problems) if item.level != "info"] == []
    return stage


@pytest.mark.parametrize(
    ("name", "method"), [("tickets.yaml", "sft"), ("preferences.yaml", "dpo"), ("sums.yaml", "grpo")]
)
def test_every_spec_plans_without_a_warning(tmp_path, monkeypatch, name, method):
    spec = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    spec["data"] = [{"source": str(EXAMPLES / spec["data"][0]["source"])}]
    stage = planned(tmp_path, monkeypatch, spec=spec)
    assert stage.spec.method == method
    assert stage.size.fits


def test_every_sentence_of_the_readme_plans_without_a_warning(tmp_path, monkeypatch):
    lines = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8").split("## Methods")[1].split("\n## ")[0]
    sentences = [line.split('"')[1] for line in lines.splitlines() if line.startswith("    tunesmith run ")]
    methods = [planned(tmp_path, monkeypatch, text=sentence).spec.method for sentence in sentences]
    assert methods == ["sft", "dpo", "grpo", "kto", "rloo", "reward", "distill"]
