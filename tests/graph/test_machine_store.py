"""The job graph over the daemon's own store: the two agree on every road, and on when a job needs the graph."""

import contextlib

import jobstore
import pytest

from tunesmith.graph.driver import run
from tunesmith.graph.route import route
from tunesmith.orchestrator import wishes
from tunesmith.orchestrator.attempts import Attempts
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.leases import Leases
from tunesmith.orchestrator.nouns import Approval
from tunesmith.orchestrator.ports import Artifact, Handle
from tunesmith.orchestrator.states import JOB_ENDS
from tunesmith.orchestrator.states import AttemptState as A
from tunesmith.orchestrator.states import JobState as S
from tunesmith.orchestrator.store import Store


class Bound:
    """JobPort over the store, as the daemon's HTTP serves it."""

    def __init__(self, leases, fence):
        self.leases, self.fence = leases, fence

    def view(self, job):
        return self.leases.view(job, self.fence)

    def devices(self, backend):
        return [jobstore.CPU]

    def save_plan(self, job, plan):
        self.leases.save_plan(job, self.fence, plan)

    def submit(self, job, attempt):
        self.leases.submit(job, self.fence, attempt)

    def diagnose(self, job, attempt, cause, evidence, remedies):
        self.leases.diagnose(job, self.fence, attempt, cause, evidence, remedies)

    def collect(self, job):
        row = self.leases.collectable(job, self.fence)
        found = [Artifact(kind="adapter", path=f"/{job}/adapter", bytes=1, sha256="0" * 64)]
        self.leases.collected(job, self.fence, row["number"], found)
        return found

    def finish(self, job, state, error=None):
        self.leases.finish(job, self.fence, state, error)


class Daemon:
    """The store, and turns of a driver over it until nothing is marked."""

    def __init__(self, home):
        self.home, self.store = home, Store(home.state_db)
        self.leases = Leases(self.store, home, alive=lambda holder: True)
        self.attempts = Attempts(self.store)

    def next(self, wait):
        leased = self.leases.lease("driver")
        if leased is None:
            return None
        job, self.fence = leased
        return job, Bound(self.leases, self.fence)

    def release(self, job):
        self.leases.release(job, self.fence)

    def drive(self, job):
        """Let the driver work; then the store and the router must agree that nothing is left to do."""
        run(self, self.home.path, idle_seconds=0.02)
        view = self.leases.view(job)
        assert not self.leases.restless(job)
        assert not self.leases.wanted()
        assert route(view) in ("end", "review", "await")
        return view

    def start(self, job, number=1):
        assert self.attempts.begin(job, number)
        key = self.attempts.get(job, number)["key"]
        self.attempts.started(Handle(backend="local", key=key, job=job, number=number, data={"x": 1}))

    def end(self, job, state, number=1, exit_code=0, error=None):
        self.attempts.end(job, number, state, exit_code, error)


@pytest.fixture
def daemon(tmp_path):
    made = Daemon(Home(tmp_path / "home").make())
    with contextlib.closing(made.store):
        yield made


def test_the_main_road(daemon, good):
    job = daemon.store.create(good)
    view = daemon.drive(job)
    assert view.state is S.AWAITING_APPROVAL
    wishes.approve(daemon.store, job, by="me", plan=view.plan.plan_hash, hours=1)
    assert view.approval is None
    view = daemon.drive(job)
    assert (view.state, view.attempts[0].state) == (S.QUEUED, A.SUBMITTED)
    assert view.approval == Approval(plan_hash=view.plan.plan_hash, by="me", hours=1)
    daemon.start(job)
    daemon.end(job, A.SUCCEEDED)
    view = daemon.drive(job)
    assert (view.state, view.attempts[0].cause) == (S.SUCCEEDED, "succeeded")


def test_answers_and_yes(daemon, vague):
    job = daemon.store.create(vague, yes={"by": "me"})
    view = daemon.drive(job)
    assert view.state is S.AWAITING_INPUT
    wishes.answer(daemon.store, job, {view.plan.questions[0].field: "smollm2-135m"})
    assert daemon.drive(job).state is S.QUEUED


@pytest.mark.parametrize(
    ("ended", "code", "state"), [(A.FAILED, 137, S.FAILED), (A.LOST, None, S.LOST), (A.CANCELLED, 75, S.CANCELLED)]
)
def test_an_attempt_that_ends_badly_and_its_retry(daemon, good, ended, code, state):
    job = daemon.store.create(good, yes={"by": "me"})
    daemon.drive(job)
    daemon.start(job)
    daemon.attempts.checkpoint(job, 1, "attempts/1/checkpoints/step-00000002")
    daemon.end(job, ended, exit_code=code)
    view = daemon.drive(job)
    assert view.state is state
    assert daemon.store.job(job)["error"]
    wishes.retry(daemon.store, job)
    view = daemon.drive(job)
    assert (view.state, len(view.attempts)) == (S.QUEUED, 2)
    assert view.attempts[1].resumed_from == "attempts/1/checkpoints/step-00000002"
    daemon.start(job, 2)
    daemon.end(job, A.SUCCEEDED, 2)
    assert daemon.drive(job).state is S.SUCCEEDED


def test_cancel_of_a_running_job(daemon, good):
    job = daemon.store.create(good, yes={"by": "me"})
    daemon.drive(job)
    daemon.start(job)
    wishes.cancel(daemon.store, job)
    assert daemon.drive(job).state is S.RUNNING
    daemon.end(job, A.CANCELLED, exit_code=75)
    view = daemon.drive(job)
    assert (view.state, view.attempts[0].cause) == (S.CANCELLED, "cancelled")


def test_a_deadline_is_told_apart(daemon, good):
    job = daemon.store.create(good, yes={"by": "me"})
    daemon.drive(job)
    daemon.start(job)
    daemon.attempts.ending(job, 1, "deadline")
    daemon.end(job, A.FAILED, exit_code=75)
    view = daemon.drive(job)
    assert (view.state, view.attempts[0].cause) == (S.FAILED, "timeout")


def test_an_edit_of_a_failed_job_begins_anew_under_a_new_approval(daemon, good):
    job = daemon.store.create(good, yes={"by": "me"})
    daemon.drive(job)
    daemon.start(job)
    daemon.attempts.checkpoint(job, 1, "attempts/1/checkpoints/step-00000002")
    daemon.end(job, A.FAILED, exit_code=1)
    first = daemon.drive(job).plan.plan_hash
    wishes.edit(daemon.store, job, {"train.max_steps": 5})
    view = daemon.drive(job)
    assert (view.state, view.approval) == (S.AWAITING_APPROVAL, None)
    assert view.plan.plan_hash != first
    wishes.approve(daemon.store, job, by="me")
    view = daemon.drive(job)
    assert (view.state, len(view.attempts), view.attempts[1].resumed_from) == (S.QUEUED, 2, None)


def test_every_end_is_quiet(daemon, good, vague):
    for request in (good, vague):
        job = daemon.store.create(request)
        daemon.drive(job)
        wishes.reject(daemon.store, job)
        view = daemon.drive(job)
        assert view.state in JOB_ENDS
        assert route(view) == "end"
        wishes.retry(daemon.store, job)
        assert daemon.drive(job).state in (S.AWAITING_APPROVAL, S.AWAITING_INPUT)
