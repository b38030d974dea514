"""What must start fast loads nothing heavy: checked in a fresh process, on sys.modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "trl", "ray", "langgraph", "peft", "accelerate", "trackio", "pyarrow")
SCORERS = ("sympy", "math_verify", "jsonschema", "reasoning_gym", "matplotlib", "numpy")
CLIENT = (*HEAVY, "httpx", "pydantic", "rich", "starlette", "uvicorn")


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("tunesmith.orchestrator.cli", CLIENT),
        ("tunesmith.orchestrator.nouns", CLIENT),
        ("tunesmith.orchestrator.daemon", HEAVY),
        ("tunesmith.orchestrator.api", HEAVY),
        ("tunesmith.orchestrator.client", HEAVY),
        ("tunesmith.orchestrator.commands", HEAVY),
        ("tunesmith.graph.planning", HEAVY),
        ("tunesmith.graph.intake", HEAVY),
        ("tunesmith.graph.route", HEAVY),
        ("tunesmith.executors.local.executor", HEAVY),
        ("tunesmith.executors.kernel.catalogue", HEAVY),
        ("tunesmith.executors.kernel.data", HEAVY),
        ("tunesmith.executors.kernel.rewards", (*HEAVY, *SCORERS)),
        ("tunesmith.executors.kernel.sizing", HEAVY),
    ],
)
def test_module_loads_nothing_heavy(module: str, banned: tuple[str, ...]) -> None:
    program = (
        f"import sys, {module}; "
        "loaded = {name.split('.')[0] for name in sys.modules}; "
        f"print(','.join(name for name in {banned!r} if name in loaded))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
