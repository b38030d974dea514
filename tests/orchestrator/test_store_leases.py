from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tunesmith.orchestrator import wishes
from tunesmith.orchestrator.attempts import Attempts
from tunesmith.orchestrator.errors import Conflict, TunesmithError
from tunesmith.orchestrator.leases import MAX_TRIES, Leases
from tunesmith.orchestrator.nouns import Finding, Offer, Question
from tunesmith.orchestrator.plain import plain
from tunesmith.orchestrator.ports import Artifact
from tunesmith.orchestrator.remote import view_from
from tunesmith.orchestrator.states import AttemptState, JobState


def planned(core, plan: Any, yes: dict[str, Any] | None = None, **more: Any) -> str:
    core.create(yes)
    job, fence = core.lease()
    core.leases.save_plan(job, fence, plan, **more)
    core.leases.release(job, fence)
    return job


# --- leases --------------------------------------------------------------------------------------------------------


def test_one_holder_at_a_time(core) -> None:
    core.create()
    assert core.leases.lease("boot:1:1") is not None
    assert core.leases.lease("boot:2:2") is None


def test_a_mark_set_while_the_driver_works_is_not_lost(core) -> None:
    job = core.create()
    _, fence = core.lease()
    core.leases.save_plan(job, fence, core.make_plan())
    with core.store.transaction():
        core.store.mark(job)
    core.leases.release(job, fence)
    assert core.leases.wanted()
    job, fence = core.lease()
    core.leases.release(job, fence)
    assert not core.leases.wanted()


def test_a_superseded_driver_writes_nothing(core) -> None:
    job = core.create()
    _, old = core.lease()
    _, new = core.lease()
    assert new > old
    plan = core.make_plan()
    for write in (
        lambda: core.leases.view(job, old),
        lambda: core.leases.save_plan(job, old, plan),
        lambda: core.leases.submit(job, old, core.make_attempt(job, plan)),
        lambda: core.leases.diagnose(job, old, 1, "x", (), ()),
        lambda: core.leases.collectable(job, old),
        lambda: core.leases.collected(job, old, 1, ()),
        lambda: core.leases.finish(job, old, JobState.FAILED),
    ):
        with pytest.raises(Conflict) as caught:
            write()
        assert caught.value.code == "lease.lost"
    core.leases.release(job, old)
    core.leases.save_plan(job, new, plan)


@pytest.mark.parametrize(
    "wish",
    [
        lambda store, job: wishes.edit(store, job, {"train.epochs": 2}),
        wishes.cancel,
    ],
)
def test_a_wish_takes_the_lease_away(core, wish) -> None:
    job = core.create()
    _, fence = core.lease()
    wish(core.store, job)
    with pytest.raises(Conflict):
        core.leases.save_plan(job, fence, core.make_plan())


def test_the_lease_of_a_dead_driver_is_taken(core) -> None:
    job = core.create()
    clock = [0.0]
    leases = Leases(core.store, core.home, alive=lambda who: who != "dead", clock=lambda: clock[0])
    _, fence = leases.lease("dead")
    assert leases.reap() == [job]
    assert leases.lease("living") is None, "after a pause, not at once"
    clock[0] = 60.0
    assert leases.lease("living") == (job, fence + 2)
    with pytest.raises(Conflict):
        leases.save_plan(job, fence, core.make_plan())


def test_a_job_that_kills_its_driver_fails_in_the_end(core) -> None:
    job = core.create()
    clock = [0.0]
    leases = Leases(core.store, core.home, alive=lambda who: False, clock=lambda: clock[0])
    for tried in range(MAX_TRIES):
        assert core.store.job(job)["state"] == "planning", tried
        clock[0] += 100.0
        assert leases.lease("dead") is not None
        leases.reap()
    assert core.store.job(job)["state"] == "failed"
    assert not leases.wanted()
    assert json.loads(core.store.job(job)["error"])["code"] == "graph.stuck"
    assert wishes.retry(core.store, job) == "planning"


def test_a_job_left_undone_is_not_forgotten(core) -> None:
    job = core.create()
    clock = [0.0]
    leases = Leases(core.store, core.home, clock=lambda: clock[0])
    leases.release(*leases.lease(core.me))
    assert core.store.job(job)["tries"] == 1
    clock[0] = 100.0
    leased, fence = leases.lease(core.me)
    leases.save_plan(leased, fence, core.make_plan())
    leases.release(leased, fence)
    assert core.store.job(job)["tries"] == 0
    assert not leases.wanted()


def test_a_new_daemon_marks_what_was_forgotten(core) -> None:
    job = core.create()
    with core.store.transaction():
        core.store.settle(job)
    assert not core.leases.wanted()
    core.leases.heal()
    assert core.leases.wanted()


def test_without_any_driver_the_jobs_say_so(core) -> None:
    job = core.create()
    core.leases.give_up(TunesmithError("No driver.", code="graph.unavailable"))
    assert core.store.job(job)["state"] == "failed"
    waiting = planned(core, core.make_plan())
    core.leases.give_up(TunesmithError("No driver.", code="graph.unavailable"))
    assert core.store.job(waiting)["state"] == "awaiting_approval"


# --- what the graph writes -----------------------------------------------------------------------------------------


def test_a_plan_decides_the_state(core) -> None:
    error = Finding(level="error", code="data.missing_file", message="No such file.", where="x.jsonl")
    question = Question(field="model.id", text="Which model?")
    offer = Offer(backend="local", hardware="a100", fits=True, usd_per_hour=2.0)
    plan = core.make_plan()
    costly = replace(plan, stages=(replace(plan.stages[0], offers=(offer,)),))
    yes = {"by": "ann", "usd": None, "hours": None}
    cases = [
        (plan, None, False, "awaiting_approval"),
        (plan, yes, False, "queued"),
        (core.make_plan(questions=(question,)), yes, False, "awaiting_input"),
        (core.make_plan(errors=(error,), questions=(question,)), yes, False, "failed"),
        (core.make_plan(stages=0), yes, False, "failed"),
        (costly, yes, True, "awaiting_approval"),
        (costly, {**yes, "usd": 3.0}, True, "queued"),
    ]
    for made, given, paid, expected in cases:
        job = planned(core, made, given, paid=paid)
        assert core.store.job(job)["state"] == expected
    assert json.loads(core.store.job(job)["error"] or "null") is None


def test_yes_without_a_cap_says_why_it_waits(core) -> None:
    job = planned(core, core.make_plan(), {"by": "ann"}, paid=True)
    error = json.loads(core.store.job(job)["error"])
    assert (error["code"], error["exit_code"]) == ("limits.usd", 2)
    assert wishes.approve(core.store, job, by="ann", paid=True, usd=1.0) == "queued"
    assert core.store.job(job)["error"] is None


def test_yes_holds_for_the_first_sound_plan(core) -> None:
    question = Question(field="model.id", text="Which model?")
    job = planned(core, core.make_plan(questions=(question,)), {"by": "ann"})
    wishes.answer(core.store, job, {"model.id": "tiny"})
    leased, fence = core.lease()
    core.leases.save_plan(leased, fence, core.make_plan())
    assert core.store.job(job)["state"] == "queued"
    assert "--yes" in core.store.approval(job).by


def test_saving_a_plan_again_changes_nothing(core) -> None:
    core.create({"by": "ann"})
    job, fence = core.lease()
    for _ in range(2):
        core.leases.save_plan(job, fence, core.make_plan())
    assert core.store.job(job)["plan"] == 1
    assert json.loads((core.home.job(job) / "plan.json").read_text()) == plain(core.store.plan(job))
    assert json.loads((core.home.job(job) / "spec.json").read_text())["model"]["id"] == "tiny"
    row = core.store.job(job)
    assert (row["backend"], row["method"], row["model"]) == ("local", "sft", "tiny")


def test_submit_needs_an_approval_of_exactly_this_plan(core) -> None:
    core.create()
    job, fence = core.lease()
    plan = core.make_plan()
    core.leases.save_plan(job, fence, plan)
    with pytest.raises(Conflict) as caught:
        core.leases.submit(job, fence, core.make_attempt(job, plan))
    assert caught.value.code == "plan.not_approved"
    wishes.approve(core.store, job, by="ann")
    other = core.make_plan(max_steps=99)
    swapped = replace(core.make_attempt(job, plan), spec=other.stages[0].spec)
    for wrong in (core.make_attempt(job, other), swapped, core.make_attempt("j-aaaaaa", plan)):
        with pytest.raises(Conflict):
            core.leases.submit(job, fence, wrong)
    with pytest.raises(Conflict) as caught:
        core.leases.submit(job, fence, core.make_attempt(job, plan, 2))
    assert caught.value.code == "attempt.number"
    for _ in range(3):
        core.leases.submit(job, fence, core.make_attempt(job, plan))
    assert len(core.store.attempts(job)) == 1
    assert core.store.job(job)["state"] == "queued"


def test_two_attempts_never_live_at_once(core) -> None:
    job = core.queued()
    with core.store.transaction():
        core.store.mark(job)
    leased, fence = core.lease()
    plan = core.store.plan(job)
    with pytest.raises(Conflict) as caught:
        core.leases.submit(leased, fence, core.make_attempt(job, plan, 2, resume_from="attempts/1/checkpoints/x"))
    assert caught.value.code == "attempt.live"
    with pytest.raises(Conflict):
        core.leases.finish(leased, fence, JobState.FAILED)
    with pytest.raises(Conflict):
        core.leases.save_plan(leased, fence, plan)


def test_from_attempt_to_result(core) -> None:
    job = core.queued()
    attempts = Attempts(core.store)
    attempts.begin(job, 1)
    attempts.end(job, 1, AttemptState.SUCCEEDED, 0, None)
    leased, fence = core.lease()
    with core.store.transaction():
        core.store.move(job, JobState.RUNNING)
    evidence = (Finding(level="info", code="attempt.exit", message="0"),)
    for _ in range(2):
        core.leases.diagnose(job, fence, 1, "succeeded", evidence, ())
    assert core.leases.view(job, fence).attempts[0].cause == "succeeded"
    artifact = Artifact(kind="adapter", path="/x/adapter", bytes=3, sha256="0")
    for _ in range(2):
        core.leases.collected(job, fence, core.leases.collectable(job, fence)["number"], [artifact])
    assert core.store.job(job)["state"] == "delivering"
    core.leases.finish(job, fence, JobState.SUCCEEDED)
    core.leases.finish(job, fence, JobState.SUCCEEDED)
    with pytest.raises(Conflict):
        core.leases.finish(job, fence, JobState.FAILED)
    core.leases.release(leased, fence)
    assert not core.leases.wanted()
    kinds = [row["kind"] for row in core.store.events(job)]
    assert kinds.count("diagnosis") == 1


def test_nothing_is_collected_of_a_failure(core) -> None:
    job = core.queued()
    Attempts(core.store).begin(job, 1)
    Attempts(core.store).end(job, 1, AttemptState.FAILED, 1, None)
    leased, fence = core.lease()
    with pytest.raises(Conflict) as caught:
        core.leases.collectable(leased, fence)
    assert caught.value.code == "attempt.no_result"


def test_the_view_travels_as_it_is(core) -> None:
    job = core.queued()
    Attempts(core.store).begin(job, 1)
    Attempts(core.store).checkpoint(job, 1, "attempts/1/checkpoints/step-00000010")
    Attempts(core.store).end(job, 1, AttemptState.FAILED, 137, {"code": "killed", "message": "gone"})
    view = core.leases.view(job)
    assert view_from(json.loads(json.dumps(plain(view)))) == view
    assert view.attempts[0].state is AttemptState.FAILED
    assert view.attempts[0].checkpoint == "attempts/1/checkpoints/step-00000010"
    assert view.plan == core.make_plan()
