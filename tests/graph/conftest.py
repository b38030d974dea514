"""The store of the graph's tests, and requests over real files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tunesmith.orchestrator.nouns import Request


def _load(name):
    """A module beside this file, importable by the same name from a child process started in this folder."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


jobstore = _load("jobstore")
driving = _load("driving")


@pytest.fixture
def store():
    made = jobstore.JobStore()
    yield made
    made.db.close()


@pytest.fixture
def rows(tmp_path):
    """A small data file that any plan can read."""
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def good(rows):
    """A request that plans without a question."""
    spec = {"model": {"id": "smollm2-135m"}, "data": [{"source": str(rows)}], "train": {"max_steps": 3}}
    return Request(spec=spec, cwd=str(rows.parent))


@pytest.fixture
def vague(rows):
    """A request that names no model, so that there is a question."""
    return Request(text=f"fine-tune on {rows}", cwd=str(rows.parent))


@pytest.fixture
def drive(store, tmp_path):
    return driving.Drive(store, tmp_path)
