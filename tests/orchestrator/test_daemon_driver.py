"""The daemon with its real driver (LangGraph): a sentence becomes a result, whoever of the two is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.states import JOB_ENDS

pytestmark = pytest.mark.slow
pytest.importorskip("langgraph")
TICKETS = Path(__file__).parents[2] / "examples" / "tickets.jsonl"


@pytest.fixture
def whole(home: Home, tmp_path: Path, serving):
    with serving(home, tmp_path / "site") as made:
        yield made


def submit(daemon, name: str, *, yes: bool = True) -> str:
    spec = {
        "model": {"id": "smollm2-135m"},
        "data": [{"source": str(TICKETS), "limit": 16}],
        "backend": "toy",
        "name": name,
    }
    approve = {"by": "test"} if yes else None
    return str(daemon.post("/jobs", {"request": {"spec": spec, "cwd": "/"}, "approve": approve})["id"])


def until(daemon, job: str, *states: str) -> dict[str, Any]:
    def there() -> Any:
        doc = daemon.get(f"/jobs/{job}")
        assert doc["state"] not in JOB_ENDS or doc["state"] in states, doc["error"]
        return doc if doc["state"] in states else None

    return daemon.poll(there, 120.0)


def starts(daemon, job: str) -> int:
    return sum(len(path.read_text().split()) for path in daemon.home.job(job).glob("attempts/*/starts"))


def test_plan_approve_run_and_deliver(whole) -> None:
    job = submit(whole, "ok 3", yes=False)
    doc = until(whole, job, "awaiting_approval")
    assert (doc["spec"]["backend"], doc["name"]) == ("toy", "ok 3")
    assert whole.get(f"/jobs/{job}/plan")["plan"]["plan_hash"] == doc["plan_hash"]
    for path in whole.home.path.glob("graph.db*"):
        path.unlink()
    whole.post(f"/jobs/{job}/approve", {"by": "ann", "plan": doc["plan_hash"]})
    doc = until(whole, job, "succeeded")
    assert doc["artifacts"]
    assert starts(whole, job) == 1


def test_cancel_and_retry(whole) -> None:
    job = submit(whole, "wait 60")
    until(whole, job, "running")
    whole.poll(lambda: whole.get(f"/jobs/{job}")["attempts"][0]["state"] == "running")
    whole.post(f"/jobs/{job}/cancel")
    until(whole, job, "cancelled")
    whole.post(f"/jobs/{job}/retry")
    whole.poll(lambda: len(whole.get(f"/jobs/{job}")["attempts"]) == 2, 60.0)
    whole.post(f"/jobs/{job}/cancel")
    until(whole, job, "cancelled")


def test_killed_at_any_moment(whole) -> None:
    """Daemon and driver are killed by turns, at seeded moments, while two jobs go from request to result."""
    random.seed(5)
    jobs = [submit(whole, "nap 0.5"), submit(whole, "fail")]
    for turn in range(6):
        time.sleep(random.uniform(0.1, 1.5))
        if turn % 2:
            pid = whole.get("/health")["driver"]
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            whole.end(signal.SIGKILL)
            whole.start()
    assert until(whole, jobs[0], "succeeded")["attempts"][0]["exit_code"] == 0
    assert until(whole, jobs[1], "failed")["error"]["code"] == "data.row"
    assert [starts(whole, job) for job in jobs] == [1, 1]
