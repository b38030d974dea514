"""Lanes on a clock of their own, over an executor that does what it is told: what the real one cannot be made to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.orchestrator import wishes
from tunesmith.orchestrator.attempts import Attempts, attempt_of
from tunesmith.orchestrator.backends import Backends
from tunesmith.orchestrator.errors import BackendUnavailable, InputError, StorageError
from tunesmith.orchestrator.events import Event, Kind
from tunesmith.orchestrator.ports import Handle, Observation
from tunesmith.orchestrator.queue import Lane
from tunesmith.orchestrator.states import AttemptState, JobState


class Puppet:
    """An executor in memory that keeps the port's promises and notes every call; `trouble` is what the next raise."""

    name = "local"

    def __init__(self, home: Path | None = None) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.trouble: dict[str, list[Exception]] = {}
        self.dead = "yes"

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.trouble.get(name):
            raise self.trouble[name].pop(0)

    def devices(self):
        return ()

    def submit(self, attempt):
        run = self.runs.get(attempt.key)
        if run is None and not (self.trouble.get("submit") and "refuses" in str(self.trouble["submit"][0])):
            run = self.runs[attempt.key] = {"state": AttemptState.RUNNING, "events": [], "starts": 1, "code": None}
        self._call("submit")
        return Handle(backend="local", key=attempt.key, job=attempt.job, number=attempt.number, data={"n": 1})

    def observe(self, handle, cursor):
        self._call("observe")
        run = self.runs[handle.key]
        start = int(cursor or 0)
        part = run["events"][start : start + 2]
        done = start + len(part)
        return Observation(state=run["state"], events=tuple(part), cursor=str(done), exit_code=run["code"])

    def signal(self, handle, what):
        self._call(f"signal {what}")

    def collect(self, handle):
        return ()

    def cancel(self, handle):
        self._call("cancel")

    def prove_dead(self, handle):
        self._call("prove_dead")
        return self.dead

    def only(self) -> dict[str, Any]:
        (run,) = self.runs.values()
        return run

    def end(self, state: AttemptState = AttemptState.SUCCEEDED, code: int | None = 0) -> None:
        self.only().update(state=state, code=code)


class Yard:
    def __init__(self, core) -> None:
        self.core = core
        self.puppet = Puppet()
        self.now = 0.0
        self.again()

    def again(self, slots: int = 1) -> None:
        """A new lane, as after a restart of the daemon."""
        backends = Backends(self.core.home.path, {"local": lambda home: self.puppet})
        self.lane = Lane(
            "local", self.core.store, self.core.metrics, backends, slots=slots, clock=lambda: self.now, grace_seconds=10
        )

    def tick(self, times: int = 1, seconds: float = 1.0) -> None:
        for _ in range(times):
            self.lane.tick()
            self.now += seconds

    def attempt(self, job: str, number: int = 1):
        return Attempts(self.core.store).get(job, number)

    def state(self, job: str) -> tuple[str, str]:
        return self.core.store.job(job)["state"], self.attempt(job)["state"]


@pytest.fixture
def yard(core) -> Yard:
    return Yard(core)


def metric(line: int) -> Event:
    return Event(1, line, "2026-01-01T00:00:00.000Z", Kind.METRIC, {"train/loss": 1.0 / line}, line)


# --- the usual -----------------------------------------------------------------------------------------------------


def test_from_queued_to_ended(yard) -> None:
    job = yard.core.queued()
    yard.tick()
    assert yard.state(job) == ("running", "starting")
    yard.tick()
    assert yard.state(job) == ("running", "running")
    yard.puppet.only()["events"] += [metric(n) for n in range(1, 8)]
    yard.puppet.end()
    wake = yard.core.store.job(job)["wake"]
    yard.tick()
    assert yard.state(job) == ("running", "succeeded")
    assert len(yard.core.metrics.lines(job)) == 7
    assert yard.core.store.job(job)["wake"] == wake + 1
    yard.tick(3)
    assert yard.puppet.calls.count("submit") == 1


def test_one_slot_and_the_order_of_turns(yard) -> None:
    first, second = yard.core.queued(), yard.core.queued()
    urgent = yard.core.queued(yard.core.make_plan(priority=5))
    yard.tick(3)
    assert [yard.core.store.job(job)["state"] for job in (first, second, urgent)] == ["queued", "queued", "running"]
    yard.puppet.end()
    yard.tick(2)
    assert yard.core.store.job(first)["state"] == "running"
    assert yard.core.store.job(second)["state"] == "queued"


def test_more_slots_run_more(yard) -> None:
    yard.again(slots=2)
    for _ in range(3):
        yard.core.queued()
    yard.tick(2)
    assert len(yard.puppet.runs) == 2


def test_checkpoints_are_remembered_relative_to_the_job(yard) -> None:
    job = yard.core.queued()
    yard.tick(2)
    path = "checkpoints/step-00000010"
    yard.puppet.only()["events"].append(Event(1, 1, "t", Kind.CHECKPOINT, {"path": path}, 10))
    yard.tick()
    assert yard.attempt(job)["checkpoint"] == f"attempts/1/{path}"


@pytest.mark.parametrize(
    "path", ["../../../etc", "/etc", "checkpoints/../..", "checkpoints/.", "checkpoints/a/b", 7, None]
)
def test_a_checkpoint_lies_where_checkpoints_lie(yard, path: Any) -> None:
    job = yard.core.queued()
    yard.tick(2)
    yard.puppet.only()["events"].append(Event(1, 1, "t", Kind.CHECKPOINT, {"path": path}, 10))
    yard.tick()
    assert yard.attempt(job)["checkpoint"] is None


# --- restarts ------------------------------------------------------------------------------------------------------


def test_a_restart_adopts_and_starts_nothing_twice(yard) -> None:
    job = yard.core.queued()
    yard.tick(2)
    yard.puppet.only()["events"] += [metric(1), metric(2), metric(3)]
    yard.tick()
    yard.again()
    yard.puppet.only()["events"] += [metric(4)]
    yard.puppet.end()
    yard.tick(2)
    assert yard.state(job) == ("running", "succeeded")
    assert [row["line"] for row in yard.core.metrics.lines(job)] == [1, 2, 3, 4]
    assert len(yard.puppet.runs) == 1


def test_killed_between_intent_and_handle(yard) -> None:
    """The daemon died after the executor was asked: the same question again gives the same attempt."""
    job = yard.core.queued()
    Attempts(yard.core.store).begin(job, 1)
    yard.puppet.submit(attempt_of(yard.attempt(job)))
    yard.again()
    yard.tick(2)
    assert yard.state(job) == ("running", "running")
    assert len(yard.puppet.runs) == 1


def test_killed_between_intent_and_the_question(yard) -> None:
    job = yard.core.queued()
    Attempts(yard.core.store).begin(job, 1)
    yard.again()
    yard.tick(2)
    assert yard.state(job) == ("running", "running")


# --- trouble -------------------------------------------------------------------------------------------------------


def test_a_doubtful_start_is_asked_again_until_it_is_known(yard) -> None:
    yard.puppet.trouble["submit"] = [BackendUnavailable("slow"), TimeoutError("slow"), OSError("slow")]
    job = yard.core.queued()
    yard.puppet.dead = "no"
    yard.tick(40)
    assert yard.state(job) == ("running", "running")
    assert len(yard.puppet.runs) == 1


def test_a_refused_start_fails_the_attempt(yard) -> None:
    yard.puppet.trouble["submit"] = [InputError("it refuses this", code="spec.x")]
    job = yard.core.queued()
    yard.tick()
    assert yard.state(job) == ("queued", "failed")
    assert "spec.x" in yard.attempt(job)["error"]
    yard.tick(5)
    assert yard.puppet.calls.count("submit") == 1


def test_a_start_that_never_works_fails_once_it_is_proven_dead(yard) -> None:
    yard.puppet.trouble["submit"] = [RuntimeError("a bug")] * 100
    job = yard.core.queued()
    yard.puppet.dead = "unknown"
    yard.tick(400)
    assert yard.attempt(job)["state"] == "submitted", "without proof it may have started"
    yard.puppet.dead = "yes"
    yard.tick(100)
    assert yard.attempt(job)["state"] == "failed"
    assert "a bug" in yard.attempt(job)["error"]


def test_an_unreachable_backend_is_unknown_and_comes_back(yard) -> None:
    job = yard.core.queued()
    yard.tick(2)
    yard.puppet.dead = "unknown"
    yard.puppet.trouble["observe"] = [BackendUnavailable("no route")] * 6
    yard.tick(8)
    assert yard.state(job) == ("running", "unknown")
    assert yard.lane.reasons[job, 1] == "no route"
    yard.tick(60)
    assert yard.state(job) == ("running", "running")
    assert yard.lane.reasons == {}
    assert len(yard.puppet.runs) == 1


def test_unknown_is_lost_only_by_proof(yard) -> None:
    job = yard.core.queued()
    yard.tick(2)
    yard.puppet.dead = "no"
    yard.puppet.trouble["observe"] = [BackendUnavailable("gone")] * 1000
    yard.tick(100)
    assert yard.state(job) == ("running", "unknown")
    yard.puppet.dead = "yes"
    yard.tick(60)
    assert yard.state(job) == ("running", "lost")


def test_one_attempt_in_trouble_does_not_stop_the_others(yard) -> None:
    yard.again(slots=2)
    first, second = yard.core.queued(), yard.core.queued()
    yard.puppet.trouble["submit"] = [RuntimeError("a bug")]
    yard.tick(3)
    assert yard.attempt(second)["state"] == "running"
    yard.tick(5)
    assert yard.attempt(first)["state"] == "running"


def test_what_may_not_start_yet_holds_up_nobody_behind_it(yard) -> None:
    first = yard.core.queued()
    yard.puppet.dead = "unknown"
    with yard.core.store.transaction():
        values = (first, 0, "old", "local", "lost", "{}", "{}", "t")
        columns = "job, number, key, backend, state, doc, handle, submitted_at"
        yard.core.store.write(f"INSERT INTO attempts ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *values)
    second = yard.core.queued()
    yard.tick(5)
    assert yard.attempt(first)["state"] == "submitted"
    assert yard.attempt(second)["state"] == "running"


def test_a_full_disk_stops_nothing_for_good(yard, monkeypatch) -> None:
    job = yard.core.queued()
    yard.tick(2)
    whole = yard.core.metrics.ingest

    def full(*args: Any) -> None:
        raise StorageError("The disk is full.", code="storage.full")

    monkeypatch.setattr(yard.core.metrics, "ingest", full)
    yard.puppet.only()["events"] += [metric(1), metric(2)]
    yard.puppet.end()
    yard.tick(20)
    assert yard.state(job) == ("running", "running"), "no end is told before its events are stored"
    monkeypatch.setattr(yard.core.metrics, "ingest", whole)
    yard.tick(60)
    assert yard.state(job) == ("running", "succeeded")
    assert len(yard.core.metrics.lines(job)) == 2


def test_a_broken_plug_in_is_a_reason_not_a_crash(yard) -> None:
    def broken(home: Path) -> Any:
        raise ImportError("No module named 'ray'")

    running = yard.core.queued()
    yard.tick(2)
    waiting = yard.core.queued()
    yard.lane.backends = Backends(yard.core.home.path, {"local": broken})
    yard.tick(30)
    assert yard.state(running) == ("running", "unknown")
    assert yard.attempt(waiting)["state"] == "submitted"
    assert "ray" in yard.lane.reasons[waiting, 1]
    (listed,) = yard.lane.backends.listing()
    assert (listed["ready"], "ray" in listed["why_not"]) == (False, True)


def test_a_backend_that_is_not_installed_fails_what_waits(yard) -> None:
    job = yard.core.queued()
    yard.lane.backends = Backends(yard.core.home.path, {})
    yard.tick()
    assert yard.state(job) == ("queued", "failed")
    assert "backend.unknown" in yard.attempt(job)["error"]


# --- endings -------------------------------------------------------------------------------------------------------


def test_cancel_asks_then_ends(yard) -> None:
    job = yard.core.queued()
    yard.tick(2)
    assert wishes.cancel(yard.core.store, job) == "running"
    yard.tick()
    assert yard.puppet.calls[-2:] == ["signal stop", "cancel"]
    yard.tick(5)
    assert yard.puppet.calls.count("cancel") == 1
    yard.tick(10)
    assert yard.puppet.calls.count("cancel") == 2, "said again where it had no effect"
    yard.puppet.end(AttemptState.FAILED, 137)
    yard.tick()
    assert yard.state(job) == ("running", "cancelled")


def test_cancel_reaches_what_was_never_known_to_have_started(yard) -> None:
    yard.puppet.trouble["submit"] = [BackendUnavailable("slow")] * 3
    job = yard.core.queued()
    yard.tick()
    assert wishes.cancel(yard.core.store, job) == "queued"
    yard.puppet.dead = "unknown"
    yard.tick(40)
    assert "cancel" in yard.puppet.calls
    yard.puppet.end(AttemptState.CANCELLED, 75)
    yard.tick(2)
    assert yard.attempt(job)["state"] == "cancelled"


def test_success_beats_a_late_cancel(yard) -> None:
    job = yard.core.queued()
    yard.tick(2)
    wishes.cancel(yard.core.store, job)
    yard.puppet.end()
    yard.tick()
    assert yard.attempt(job)["state"] == "succeeded"


def test_the_deadline_stops_at_a_checkpoint_then_cancels(yard) -> None:
    job = yard.core.queued(yard.core.make_plan(hours=0.01))
    yard.tick(30)
    assert "signal stop" not in yard.puppet.calls
    yard.tick(10)
    assert yard.puppet.calls.count("signal stop") == 1
    assert "cancel" not in yard.puppet.calls
    yard.tick(10)
    assert yard.puppet.calls.count("cancel") == 1
    yard.puppet.end(AttemptState.CANCELLED, 75)
    yard.tick()
    assert yard.state(job) == ("running", "failed")
    assert "attempt.deadline" in yard.attempt(job)["error"]


def test_a_lost_attempt_must_be_proven_dead_before_the_next(yard) -> None:
    job = yard.core.queued()
    yard.tick(2)
    yard.puppet.end(AttemptState.LOST, None)
    yard.tick()
    leases, plan = yard.core.leases, yard.core.store.plan(job)
    leased, fence = yard.core.lease()
    leases.diagnose(leased, fence, 1, "lost", (), ())
    leases.finish(leased, fence, JobState.LOST)
    leases.release(leased, fence)
    wishes.retry(yard.core.store, job)
    leased, fence = yard.core.lease()
    resumed = yard.core.make_attempt(job, plan, 2, resume_from="attempts/1/checkpoints/step-00000010")
    leases.submit(leased, fence, resumed)
    leases.release(leased, fence)
    yard.puppet.dead = "unknown"
    yard.tick(60)
    assert len(yard.puppet.runs) == 1
    assert "not proven" in yard.lane.reasons[job, 2]
    yard.puppet.dead = "yes"
    yard.tick(60)
    assert len(yard.puppet.runs) == 2
