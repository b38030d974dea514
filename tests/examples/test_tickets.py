"""The demo's data: what is committed is what its script writes, and it is balanced and strict."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_script():
    spec = importlib.util.spec_from_file_location("make_tickets", EXAMPLES / "make_tickets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_file_is_what_the_script_writes() -> None:
    assert (EXAMPLES / "tickets.jsonl").read_text(encoding="utf-8") == load_script().text()


def test_rows_are_different_balanced_and_strict_json() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "tickets.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [json.loads(row["messages"][-1]["content"]) for row in rows]
    assert len({row["messages"][1]["content"] for row in rows}) == len(rows) >= 300
    areas = Counter(answer["area"] for answer in answers)
    assert min(areas.values()) > 0.9 * max(areas.values())
    assert all(set(answer) == {"area", "urgent"} for answer in answers)
