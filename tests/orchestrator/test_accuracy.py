"""What was foretold against what came: rows from the two databases, also from those that cannot be read."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.orchestrator.accuracy import accuracy, recalled, records
from tunesmith.orchestrator.attempts import Attempts
from tunesmith.orchestrator.errors import StorageError
from tunesmith.orchestrator.events import Event, Kind
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.nouns import Device, Estimate, Past, Plan, Size, TimeEstimate
from tunesmith.orchestrator.ports import Handle
from tunesmith.orchestrator.states import AttemptState

GB = 10**9
STACK = {"kind": "cpu", "device": "A CPU, 2 cores", "driver": "", "torch": "2.13.0", "transformers": "5.23.0"}
DEVICE = Device(backend="local", hardware="cpu", kind="cpu", memory_bytes=8 * GB, stack=STACK)
FIGURES = {
    "memory/peak_bytes": 0.8 * GB,
    "time/train_seconds": 30.0,
    "time/total_seconds": 50.0,
    "time/tokens": 3000,
    "time/tokens_per_second": 110.0,
}


def foretold(plan: Plan, **spec: Any) -> Plan:
    """The plan with 1 GB and 60 s foretold, at 100 tokens/s; the memory corrected from 1.25 GB."""
    (stage,) = plan.stages
    size = Size(
        params=1,
        trainable=1,
        peak_bytes=Estimate(
            low=0.7 * GB, expected=GB, high=1.2 * GB, unit="bytes", source="calibrated", formula=1.25 * GB
        ),
        parts={},
        device_bytes=8 * GB,
        fits=True,
        micro_batch=1,
        grad_accum=1,
        max_length=8,
        activation_checkpointing=False,
        quantization=None,
        rank=None,
    )
    time = TimeEstimate(
        seconds=Estimate(low=55, expected=60, high=90, unit="seconds"),
        tokens_per_second=Estimate(low=50, expected=100, high=200, unit="tokens/s"),
    )
    return replace(plan, stages=(replace(stage, size=size, time=time, spec=replace(stage.spec, **spec)),))


Run = Callable[..., str]


@pytest.fixture
def run(core) -> Run:
    """A job whose one attempt ended; what it measured, and what it ran on, are in its last lines."""

    def make(
        figures: dict[str, Any] | None = None,
        *,
        stack: dict[str, str] | None = None,
        state: AttemptState = AttemptState.SUCCEEDED,
        error: str | None = None,
        lines: int = 3,
        alert: str | None = None,
        **spec: Any,
    ) -> str:
        job = core.queued(foretold(core.make_plan(), **spec))
        attempts = Attempts(core.store)
        about = {"level": "info", "message": "", "stack": STACK if stack is None else stack, "family": "llama"}
        said: list[tuple[Kind, dict[str, Any], int | None]] = [(Kind.LOG, about, None)]
        said += [(Kind.METRIC, {"train/loss": 1.0}, step + 1) for step in range(lines)]
        if alert is not None:
            said.insert(2, (Kind.ALERT, {"level": "warning", "code": alert, "message": ""}, 1))
        if error is None:
            said += [(Kind.METRIC, FIGURES if figures is None else figures, lines), (Kind.LOG, about, None)]
        said += [(Kind.STATE, {"state": str(state), "error": None}, None)]
        core.metrics.ingest(
            job,
            1,
            [
                Event(1, line, "2026-11-22T13:05:01.123Z", kind, values, step)
                for line, (kind, values, step) in enumerate(said, 1)
            ],
        )
        attempts.begin(job, 1)
        attempts.started(Handle(backend="local", key="k", job=job, number=1, data={}))
        attempts.move(job, 1, AttemptState.RUNNING)
        attempts.end(job, 1, state, 0, None if error is None else {"code": error, "message": "no memory"})
        with core.store.transaction():
            core.store.settle(job)
        return job

    return make


def test_an_empty_home_has_no_rows(tmp_path: Path) -> None:
    home = Home(tmp_path / "none")
    assert records(home) == []
    document = accuracy(home)
    assert document["runs"] == []
    assert document["memory"] == {"runs": 0, "mean_abs_error_percent": None, "inside_percent": None}
    assert recalled(home.path, [DEVICE]) == [DEVICE]
    assert not home.path.exists()


def test_a_run_stands_against_its_plan(core, run: Run) -> None:
    job = run()
    document = accuracy(core.home)
    (row,) = document["runs"]
    assert (row["job"], row["attempt"], row["model"], row["method"], row["family"]) == (job, 1, "tiny", "sft", "llama")
    assert row["device"] == "A CPU, 2 cores"
    assert row["memory"]["actual"] == 0.8 * GB
    assert row["memory"]["error_percent"] == pytest.approx(25)
    assert row["memory"]["inside"] is True
    assert row["seconds"]["actual"] == 50
    assert row["seconds"]["error_percent"] == pytest.approx(20)
    assert row["seconds"]["inside"] is False
    assert row["tokens_per_second"]["actual"] == 110
    assert document["memory"] == {"runs": 1, "mean_abs_error_percent": pytest.approx(25), "inside_percent": 100}
    assert document["seconds"] == {"runs": 1, "mean_abs_error_percent": pytest.approx(20), "inside_percent": 0}


def test_what_is_learnt_compares_with_the_formulas_alone(core, run: Run) -> None:
    run()
    (device,) = recalled(core.home.path, [DEVICE])
    past = Past(
        method="sft", family="llama", bytes=(1.25 * GB, 0.8 * GB), rate=(100, 110), rest=(60 - 3000 / 100, 50 - 30)
    )
    assert device.past == (past,)
    assert replace(device, past=()) == DEVICE


@pytest.mark.parametrize("key", STACK)
def test_a_run_on_another_stack_is_shown_and_does_not_count(core, run: Run, key: str) -> None:
    run(stack={**STACK, key: "another"})
    assert len(accuracy(core.home)["runs"]) == 1
    assert recalled(core.home.path, [DEVICE]) == [DEVICE]


def test_a_device_without_a_stack_has_no_past(core, run: Run) -> None:
    run(stack={})
    bare = replace(DEVICE, stack={})
    assert recalled(core.home.path, [bare]) == [bare]


def test_a_gpu_held_more_than_its_tensors(core, run: Run) -> None:
    run({**FIGURES, "memory/reserved_bytes": 0.9 * GB, "memory/device_bytes": 1.1 * GB})
    assert accuracy(core.home)["runs"][0]["memory"]["actual"] == 1.1 * GB


@pytest.mark.parametrize("code", ["oom.cuda", "oom.host", "memory.host"])
def test_a_run_that_wanted_more_memory_says_so_much(core, run: Run, code: str) -> None:
    """Killed, it says nothing at its end; what it ran on stands at its beginning, hundreds of lines before."""
    run(state=AttemptState.FAILED, error=code, lines=300)
    document = accuracy(core.home)
    memory = document["runs"][0]["memory"]
    assert (memory["exceeded"], memory["actual"], memory["error_percent"]) == (True, 8 * GB, None)
    assert document["memory"]["runs"] == 0
    (past,) = recalled(core.home.path, [DEVICE])[0].past
    assert (past.exceeded, past.bytes, past.rate, past.rest) == (True, (1.25 * GB, 8 * GB), None, None)


def test_a_run_that_went_on_with_less_needed_more_than_there_was(core, run: Run) -> None:
    run(alert="data.truncated")
    run(alert="oom.rung")
    eased, usual = accuracy(core.home)["runs"]
    assert (eased["memory"]["exceeded"], eased["memory"]["actual"]) == (True, 8 * GB)
    assert usual["memory"]["exceeded"] is False
    past = recalled(core.home.path, [DEVICE])[0].past[0]
    assert (past.exceeded, past.rate, past.rest) == (True, None, None)


def test_a_run_that_ended_early_says_nothing_of_the_whole(core, run: Run) -> None:
    run(state=AttemptState.CANCELLED)
    (row,) = accuracy(core.home)["runs"]
    assert row["seconds"]["actual"] is None
    assert row["memory"]["actual"] == 0.8 * GB
    (past,) = recalled(core.home.path, [DEVICE])[0].past
    assert past.rate is not None
    assert past.rest is None


def test_early_stopping_says_nothing_of_the_whole(core, run: Run) -> None:
    plan = core.make_plan()
    run(train=replace(plan.stages[0].spec.train, early_stopping=2))
    assert accuracy(core.home)["runs"][0]["seconds"]["actual"] is None


def test_a_job_that_never_ran_is_no_run(core) -> None:
    core.queued(foretold(core.make_plan()))
    assert accuracy(core.home)["runs"] == []


def test_the_latest_come_first_and_no_more_than_asked(core, run: Run) -> None:
    jobs = [run() for _ in range(4)]
    assert [record.job for record in records(core.home, limit=2)] == jobs[:1:-1]


def test_it_reads_beside_a_writer(core, run: Run) -> None:
    run()
    with core.store.transaction():
        core.store.write("UPDATE jobs SET name = 'x'")
        assert len(records(core.home)) == 1
        assert len(recalled(core.home.path, [DEVICE])[0].past) == 1


def break_version(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()


def break_bytes(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


@pytest.mark.parametrize("broken", [break_version, break_bytes])
def test_a_store_that_cannot_be_read_is_said_and_stops_no_plan(core, run: Run, broken) -> None:
    run()
    core.close()
    broken(core.home.state_db)
    with pytest.raises(StorageError):
        accuracy(core.home)
    assert recalled(core.home.path, [DEVICE]) == [DEVICE]


def test_a_locked_store_stops_no_plan(core, run: Run) -> None:
    run()
    core.close()
    db = sqlite3.connect(core.home.state_db, isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    db.execute("UPDATE jobs SET name = 'x'")
    assert recalled(core.home.path, [DEVICE]) == [DEVICE]
    with pytest.raises(StorageError, match="held by another process"):
        records(core.home)
    db.execute("COMMIT")
    db.close()


def test_without_metrics_the_rows_have_no_actual_numbers(core, run: Run) -> None:
    run()
    core.metrics.close()
    core.home.metrics_db.unlink()
    (row,) = accuracy(core.home)["runs"]
    assert row["memory"]["actual"] is None
    assert row["memory"]["predicted"]["expected"] == GB


def test_the_document_is_plain(core, run: Run) -> None:
    run()
    assert json.loads(json.dumps(accuracy(core.home))) == accuracy(core.home)
