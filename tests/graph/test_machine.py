"""The job graph over an honest store: the main road, every side road, and everything that may be lost on the way."""

import logging
from dataclasses import replace

import pytest
from driving import JOB, rows_of, through

from tunesmith.graph import machine, planning
from tunesmith.graph.machine import Halted, NodeFailed
from tunesmith.orchestrator.errors import Conflict, InputError, NoDaemon, StorageError, TunesmithError
from tunesmith.orchestrator.nouns import Request
from tunesmith.orchestrator.states import AttemptState as A
from tunesmith.orchestrator.states import JobState as S


def test_the_main_road(drive, store, good):
    store.create(JOB, good)
    assert drive() == "review"
    assert drive.state() == S.AWAITING_APPROVAL
    plan = store.view(JOB).plan
    assert len(plan.stages) == 1
    store.approve(JOB, hours=2)
    assert drive() == "await"
    view = store.view(JOB)
    assert (view.state, len(view.attempts), view.attempts[0].resumed_from) == (S.QUEUED, 1, None)
    assert store.doc(JOB)["caps"] == 7200
    store.start(JOB)
    store.end(JOB, exit_code=0)
    assert drive() == "end"
    assert drive.state() == S.SUCCEEDED
    assert store.view(JOB).attempts[0].cause == "succeeded"
    assert drive.calls() == ["save_plan", "submit", "diagnose", "collect", "finish"]
    assert store.doc(JOB)["artifacts"]
    planned = ["intake", "inspect", "size", "estimate"]
    assert drive.steps == [*planned, "review", "review", "submit", "await", "await", "diagnose", "deliver"]


def test_an_attempt_is_told_how_many_processes_there_are_to_be(drive, store, good):
    request = replace(good, spec={**good.spec, "hardware": {"processes": 2}})
    store.create(JOB, request, yes=True)
    port, given = store.lease(JOB), []
    submit = port.submit
    port.submit = lambda job, attempt: (given.append(attempt), submit(job, attempt))
    assert drive(port) == "await"
    assert [attempt.spec.hardware for attempt in given] == [{"processes": 2}]


def test_yes_goes_through_without_a_stop(drive, store, good):
    store.create(JOB, good, yes=True)
    assert drive() == "await"
    assert drive.calls() == ["save_plan", "submit"]


def test_a_question_is_answered(drive, store, vague):
    store.create(JOB, vague)
    through(drive, store)
    assert drive.state() == S.SUCCEEDED
    assert store.view(JOB).plan.stages[0].spec.model.id
    assert store.doc(JOB)["wrongs"] == []


@pytest.mark.parametrize("stop", [0, 1, 2, None])
def test_graph_db_deleted_at_an_interrupt_gives_the_same_ending(drive, store, vague, stop):
    """At each one alone, and (None) at every one."""
    seen = iter(range(3))

    def delete():
        if next(seen) == stop or stop is None:
            for path in drive.folder.glob("graph.db*"):
                path.unlink()

    store.create(JOB, vague)
    through(drive, store, delete)
    doc = store.doc(JOB)
    assert doc["state"] == S.SUCCEEDED
    assert drive.calls() == ["save_plan", "save_plan", "submit", "diagnose", "collect", "finish"]
    assert doc["wrongs"] == []


def test_an_interrupt_resumed_without_what_it_waits_for_waits_again(drive, store, good):
    store.create(JOB, good)
    for _ in range(4):
        assert drive() == "review"
    store.approve(JOB)
    for _ in range(4):
        assert drive() == "await"
    store.start(JOB)
    assert drive() == "await"
    assert drive.calls() == ["save_plan", "submit"]


def test_an_edit_voids_the_plan_and_its_approval(drive, store, good):
    store.create(JOB, good)
    drive()
    first = store.view(JOB).plan.plan_hash
    store.approve(JOB)
    with store.change(JOB) as doc:  # the edit is faster than the driver
        doc["state"] = S.AWAITING_APPROVAL
    store.edit(JOB, train__max_steps=7)
    assert drive() == "review"
    view = store.view(JOB)
    assert view.plan.plan_hash != first
    assert view.plan.stages[0].spec.train.max_steps == 7
    assert (view.approval, view.attempts) == (None, ())


def test_a_stale_approval_submits_nothing(drive, store, good):
    store.create(JOB, good)
    drive()
    store.approve(JOB, plan_hash="0" * 64)
    assert drive() == "review"
    assert store.view(JOB).attempts == ()
    assert store.doc(JOB)["wrongs"] == []
    store.approve(JOB)
    assert drive() == "await"


def test_a_request_changed_while_it_is_planned_is_planned_again(drive, store, good):
    store.create(JOB, good)
    edits = []

    def enter(node):
        drive.steps.append(node)
        if node == "estimate" and not edits:
            edits.append(node)
            with store.change(JOB) as doc:
                doc["request"]["sets"] = {"train.max_steps": 9}

    assert drive(enter=enter) == "review"
    assert store.view(JOB).plan.stages[0].spec.train.max_steps == 9
    assert drive.calls() == ["save_plan"]
    assert drive.steps.count("intake") == 2


@pytest.mark.parametrize(("wish", "end"), [("cancel", S.CANCELLED), ("reject", S.REJECTED)])
def test_a_person_ends_it_before_anything_ran(drive, store, good, wish, end):
    store.create(JOB, good)
    drive()
    store.want(JOB, wish)
    assert drive() == "end"
    assert (drive.state(), store.doc(JOB)["wanted"], store.doc(JOB)["error"]) == (end, None, None)


def test_cancel_waits_for_the_attempt_to_be_dead(drive, store, good):
    store.create(JOB, good, yes=True)
    drive()
    store.start(JOB)
    store.want(JOB, "cancel")
    assert drive() == "await"
    store.end(JOB, A.CANCELLED, exit_code=75)
    assert drive() == "end"
    assert (drive.state(), store.view(JOB).attempts[0].cause) == (S.CANCELLED, "cancelled")


@pytest.mark.parametrize(
    ("state", "facts", "end", "code"),
    [
        (A.FAILED, {"exit_code": 137}, S.FAILED, "attempt.oom.host"),
        (A.FAILED, {"exit_code": 2, "error": InputError("Row 3.", code="data.row").to_doc()}, S.FAILED, "data.row"),
        (A.FAILED, {"exit_code": 75}, S.CANCELLED, "attempt.stopped"),
        (A.LOST, {}, S.LOST, "attempt.lost"),
    ],
)
def test_an_attempt_that_did_not_succeed_ends_the_job_with_its_reason(drive, store, good, state, facts, end, code):
    store.create(JOB, good, yes=True)
    drive()
    store.start(JOB)
    store.end(JOB, state, **facts)
    assert drive() == "end"
    doc = store.doc(JOB)
    assert (doc["state"], doc["error"]["code"]) == (end, code)
    assert doc["error"]["message"]
    assert drive.calls() == ["save_plan", "submit", "diagnose", "finish"]


@pytest.mark.parametrize("end", [A.FAILED, A.LOST, A.CANCELLED])
def test_retry_queues_another_attempt_from_the_newest_checkpoint(drive, store, good, end):
    store.create(JOB, good, yes=True)
    drive()
    store.start(JOB)
    store.end(JOB, end, exit_code=1, checkpoint="attempts/1/checkpoints/step-00000010")
    assert drive() == "end"
    assert drive() == "end", "nothing leaves an end by itself"
    store.want(JOB, "retry")
    assert drive() == "await"
    view = store.view(JOB)
    assert (view.state, view.wanted, len(view.attempts)) == (S.QUEUED, None, 2)
    assert max(view.attempts, key=lambda item: item.number).resumed_from == "attempts/1/checkpoints/step-00000010"
    store.start(JOB)
    store.end(JOB, exit_code=0)
    assert drive() == "end"
    assert drive.state() == S.SUCCEEDED


def test_retry_of_what_was_never_planned_plans_again(drive, store, good, rows):
    moved = rows.rename(rows.with_name("moved.jsonl"))
    store.create(JOB, good)
    assert drive() == "end"
    doc = store.doc(JOB)
    assert doc["state"] == S.FAILED
    assert doc["plan"]["plan_hash"]
    assert str(rows.name) in doc["error"]["message"]
    assert doc["error"]["code"].startswith("data")
    moved.rename(rows)
    store.want(JOB, "retry")
    assert drive() == "review"
    assert drive.state() == S.AWAITING_APPROVAL


@pytest.mark.parametrize("step", ["intake", "inspect", "size", "estimate"])
def test_an_error_of_planning_becomes_a_finding_and_never_a_crash(drive, store, good, monkeypatch, step):
    def refuse(*_):
        raise InputError("It is broken.", why="Because.", fix="Mend it.", where="row 3", code="data.test")

    monkeypatch.setattr(planning, step, refuse)
    store.create(JOB, good)
    assert drive() == "end"
    plan = store.view(JOB).plan
    assert drive.state() == S.FAILED
    [finding] = plan.errors
    assert (finding.code, finding.message, finding.where, finding.fix) == (
        "data.test", "It is broken. Because.", "row 3", "Mend it.",
    )  # fmt: skip


def test_an_answer_that_cannot_be_read_is_a_finding_too(drive, store, vague, monkeypatch):
    """The second planning fails at its first step: nothing of the first one may stand in its way."""
    real = planning.intake

    def intake(request, answers):
        if answers:
            raise InputError("There is no such model.", code="model.unknown")
        return real(request, answers)

    monkeypatch.setattr(planning, "intake", intake)
    store.create(JOB, vague)
    assert drive() == "review"
    store.answer(JOB, **{"model.id": "nonsense"})
    assert drive() == "end"
    assert (drive.state(), store.doc(JOB)["error"]["code"]) == (S.FAILED, "model.unknown")


def test_a_sentence_that_trains_nothing_fails_with_the_command_that_helps(drive, store, tmp_path):
    store.create(JOB, Request(text="How is the training going?", cwd=str(tmp_path)))
    assert drive() == "end"
    assert drive.state() == S.FAILED
    assert store.view(JOB).plan.errors


@pytest.mark.parametrize("name", ["x\0y", "\u202e\x1b[31m", "x" * 100_000, 10**30, float("nan"), "\ud800"])
def test_a_draft_with_values_that_no_database_likes_goes_from_step_to_step(drive, store, good, monkeypatch, name):
    monkeypatch.setattr(planning, "estimate", lambda draft: refuse_with(draft.request.spec["name"]))
    store.create(JOB, Request(spec={**good.spec, "name": name}, cwd=good.cwd))
    assert drive() == "end"
    assert drive.steps == ["intake", "inspect", "size", "estimate"]
    assert store.doc(JOB)["error"]["message"] == repr(name)


def refuse_with(value):
    raise InputError(repr(value), code="test")


@pytest.mark.parametrize("step", ["intake", "inspect", "size", "estimate", "submit"])
def test_an_unexpected_error_is_tried_a_bounded_number_of_times(drive, store, good, monkeypatch, caplog, step):
    tries = []

    def broken(*_):
        tries.append(1)
        raise ZeroDivisionError("secret detail")

    if step == "submit":
        monkeypatch.setattr(machine, "next_attempt", broken)
    else:
        monkeypatch.setattr(planning, step, broken)
    store.create(JOB, good, yes=True)
    with caplog.at_level(logging.ERROR), pytest.raises(NodeFailed, match=step) as caught:
        drive()
    assert len(tries) == machine.TRIES
    assert "ZeroDivisionError" in caplog.text
    assert "secret detail" not in str(caught.value)
    assert not list(drive.folder.glob("*.broken"))


def test_a_passing_error_is_forgiven(drive, store, good, monkeypatch):
    real, tries = planning.size, []

    def flaky(*given):
        tries.append(1)
        if len(tries) < machine.TRIES:
            raise ConnectionResetError("a hiccup")
        return real(*given)

    monkeypatch.setattr(planning, "size", flaky)
    store.create(JOB, good)
    assert drive() == "review"


@pytest.mark.parametrize(
    "error", [StorageError("The disk is full.", code="storage.full"), InputError("No such backend.")]
)
def test_what_the_store_refuses_ends_the_job_with_that_reason(drive, store, good, error):
    store.create(JOB, good, yes=True)
    port = store.lease(JOB)

    def refuse(job, attempt):
        raise error

    port.submit = refuse
    assert drive(port) == "end"
    assert (drive.state(), store.doc(JOB)["error"]["message"]) == (S.FAILED, error.message)


def test_results_that_do_not_verify_fail_the_job(drive, store, good):
    store.create(JOB, good, yes=True)
    drive()
    store.start(JOB)
    store.end(JOB, exit_code=0)
    port = store.lease(JOB)

    def refuse(job):
        raise StorageError("adapter.safetensors does not verify.", code="storage.hash")

    port.collect = refuse
    assert drive(port) == "end"
    assert (drive.state(), store.doc(JOB)["error"]["code"]) == (S.FAILED, "storage.hash")


@pytest.mark.parametrize("method", ["view", "save_plan", "submit"])
@pytest.mark.parametrize("error", [Conflict("the lease was lost"), NoDaemon("nobody answers")])
def test_a_lost_lease_or_daemon_leaves_at_once_and_writes_nothing(drive, store, good, method, error):
    store.create(JOB, good, yes=True)
    port = store.lease(JOB)
    count = []

    def lost(*_):
        count.append(1)
        raise error

    setattr(port, method, lost)
    with pytest.raises(type(error)):
        drive(port)
    assert len(count) == 1, "a lost lease is not tried again"
    before = drive.calls()
    assert drive() == "await", "the next driver goes on"
    assert drive.calls()[: len(before)] == before
    assert drive.calls() == ["save_plan", "submit"]


def test_a_port_under_an_old_fence_can_write_nothing(drive, store, good):
    store.create(JOB, good)
    old = store.lease(JOB)
    store.lease(JOB)
    with pytest.raises(Conflict):
        drive(old)
    assert store.doc(JOB)["plan"] is None


def test_being_told_to_end_stops_before_the_next_step_and_goes_on_there(drive, store, good):
    store.create(JOB, good)

    def enter(node):
        drive.steps.append(node)
        if node == "size":
            raise Halted("told to end")

    with pytest.raises(Halted):
        drive(enter=enter)
    assert drive() == "review"
    assert drive.steps == ["intake", "inspect", "size", "size", "estimate", "review"]


def test_a_job_that_ended_leaves_no_rows(drive, store, good):
    store.create(JOB, good, yes=True)
    drive()
    store.start(JOB)
    store.end(JOB, exit_code=0)
    assert rows_of(drive.database)
    drive()
    assert rows_of(drive.database) == 0


def test_an_error_without_a_type_is_unexpected(drive, store, good):
    store.create(JOB, good, yes=True)
    port = store.lease(JOB)

    def odd(*_):
        raise TunesmithError("500", code="internal")

    port.submit = odd
    with pytest.raises(NodeFailed):
        drive(port)
    assert drive.state() == S.QUEUED
