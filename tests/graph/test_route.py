"""The router is total and keeps its promises over every combination of facts that a store could hold."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.graph.diagnose import diagnose
from tunesmith.graph.route import FINISHES, ROUTES, approved, newest, route
from tunesmith.orchestrator.nouns import (
    Approval,
    DataReport,
    DataSource,
    Finding,
    JobSpec,
    ModelRef,
    Plan,
    Question,
    Request,
    Stage,
)
from tunesmith.orchestrator.ports import AttemptView, JobView
from tunesmith.orchestrator.states import (
    ATTEMPT_ENDS,
    JOB_ENDS,
    JOB_MOVES,
    AttemptState,
    JobState,
    job_may,
)

SPEC = JobSpec(model=ModelRef(id="m"), data=(DataSource(source="d"),))
REPORT = DataReport(rows=1, used_rows=1, eval_rows=0, format="text", mapping=None, fingerprint="sha256:0")
STAGE = Stage(spec=SPEC, resolved=(), data=REPORT, size=None, time=None)
PLAN = Plan(plan_hash="p", intent="train", command=("tunesmith",), stages=(STAGE,))
WRONG = Finding(level="error", code="x", message="x")
PLANS = (
    None,
    PLAN,
    replace(PLAN, findings=(WRONG,)),
    replace(PLAN, questions=(Question(field="model.id", text="?"),)),
    replace(PLAN, stages=()),
    replace(PLAN, stages=(STAGE, STAGE)),
)
APPROVALS = (None, Approval(plan_hash="p", by="me"), Approval(plan_hash="other", by="me"))
WANTED = (None, "cancel", "reject", "retry")
CAUSES = (None, "succeeded", "stopped", "cancelled", "code", "lost")


def view(state=JobState.RUNNING, plan=PLAN, stale=False, approval=APPROVALS[1], attempts=(), wanted=None):
    return JobView(
        id="j-aaaaaa",
        state=state,
        request=Request(),
        answers={},
        plan=plan,
        plan_stale=stale,
        approval=approval,
        attempts=tuple(attempts),
        remedies=(),
        repairs_left=0,
        wanted=wanted,
    )


def attempt(state, number=1, cause=None, **facts):
    return AttemptView(number=number, backend="local", state=state, cause=cause, **facts)


def check(facts):
    there = route(facts)
    last = newest(facts)
    live = last is not None and last.state not in ATTEMPT_ENDS
    assert there in ROUTES
    assert there == route(facts), "not pure"
    if there == "submit":
        assert not live
        assert facts.plan is not None
        assert facts.approval is not None
        assert facts.approval.plan_hash == facts.plan.plan_hash
        assert not facts.plan_stale
        assert len(facts.plan.stages) == 1
        assert not facts.plan.errors
        assert not facts.plan.questions
        assert job_may(facts.state, JobState.QUEUED) or facts.state is JobState.QUEUED
    if facts.state in JOB_ENDS and facts.wanted != "retry":
        assert there == "end"
    if facts.state is JobState.SUCCEEDED:
        assert there == "end"
    if there == "end":
        assert facts.state in JOB_ENDS
    if there in FINISHES:
        assert not live
        assert job_may(facts.state, FINISHES[there]), (facts.state, there)
    if there in ("diagnose", "deliver") and facts.state is not JobState.DELIVERING:
        assert last is not None
        assert not live
    if there == "diagnose":
        diagnose(last, SPEC, facts)
    if there == "intake":
        assert facts.state is JobState.PLANNING or JobState.PLANNING in JOB_MOVES[facts.state]
    return there


def test_it_is_total_and_keeps_its_promises_over_every_combination():
    ends = [(), *((attempt(state, cause=cause),) for state in AttemptState for cause in CAUSES)]
    seen = set()
    for state, plan, stale, approval, attempts, wanted in itertools.product(
        JobState, PLANS, (False, True), APPROVALS, ends, WANTED
    ):
        seen.add(check(view(state, plan, stale, approval, attempts, wanted)))
    assert seen == set(ROUTES), "a route that nothing leads to"


@given(
    st.sampled_from(JobState),
    st.sampled_from(PLANS),
    st.booleans(),
    st.sampled_from(APPROVALS),
    st.lists(st.tuples(st.sampled_from(AttemptState), st.sampled_from(CAUSES)), max_size=5),
    st.sampled_from(WANTED),
    st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_several_attempts_in_any_order(state, plan, stale, approval, attempts, wanted, random):
    made = [attempt(item, number, cause) for number, (item, cause) in enumerate(attempts, 1)]
    random.shuffle(made)
    check(view(state, plan, stale, approval, made, wanted))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (view(JobState.PLANNING, plan=None, approval=None), "intake"),
        (view(JobState.PLANNING, stale=True), "intake"),
        (view(JobState.PLANNING, wanted="cancel"), "finish_cancelled"),
        (view(JobState.AWAITING_INPUT, plan=PLANS[3], approval=None), "review"),
        (view(JobState.AWAITING_INPUT, plan=PLANS[3], stale=True), "intake"),
        (view(JobState.AWAITING_APPROVAL, approval=None), "review"),
        (view(JobState.AWAITING_APPROVAL, approval=APPROVALS[2]), "review"),
        (view(JobState.AWAITING_APPROVAL), "submit"),
        (view(JobState.AWAITING_APPROVAL, stale=True), "intake"),
        (view(JobState.AWAITING_APPROVAL, wanted="reject"), "finish_rejected"),
        (view(JobState.AWAITING_APPROVAL, wanted="cancel"), "finish_cancelled"),
        (view(JobState.QUEUED, attempts=[attempt(AttemptState.SUBMITTED)]), "await"),
        (view(JobState.RUNNING, attempts=[attempt(AttemptState.UNKNOWN)]), "await"),
        (view(JobState.RUNNING, attempts=[attempt(AttemptState.RUNNING)], wanted="cancel"), "await"),
        (view(JobState.RUNNING, attempts=[attempt(AttemptState.CANCELLED)], wanted="cancel"), "diagnose"),
        (view(attempts=[attempt(AttemptState.FAILED, cause="code")], wanted="cancel"), "finish_cancelled"),
        (view(JobState.RUNNING, attempts=[attempt(AttemptState.FAILED)]), "diagnose"),
        (view(JobState.RUNNING, attempts=[attempt(AttemptState.FAILED, cause="oom.host")]), "finish_failed"),
        (view(JobState.RUNNING, attempts=[attempt(AttemptState.FAILED, cause="stopped")]), "finish_cancelled"),
        (view(JobState.RUNNING, attempts=[attempt(AttemptState.LOST, cause="lost")]), "finish_lost"),
        (view(JobState.RUNNING, attempts=[attempt(AttemptState.SUCCEEDED, cause="succeeded")]), "deliver"),
        (view(JobState.DELIVERING, attempts=[attempt(AttemptState.SUCCEEDED, cause="succeeded")]), "deliver"),
        (view(JobState.FAILED, attempts=[attempt(AttemptState.FAILED, cause="code")]), "end"),
        (view(JobState.FAILED, attempts=[attempt(AttemptState.FAILED, cause="code")], wanted="retry"), "submit"),
        (view(JobState.LOST, attempts=[attempt(AttemptState.LOST, cause="lost")], wanted="retry"), "submit"),
        (view(JobState.FAILED, plan=PLANS[2], approval=None, wanted="retry"), "intake"),
        (view(JobState.REJECTED, wanted="retry"), "intake"),
        (view(JobState.FAILED, attempts=[attempt(AttemptState.UNKNOWN)], wanted="retry"), "await"),
    ],
)  # fmt: skip
def test_each_road(facts, expected):
    assert route(facts) == expected


def test_an_approval_of_another_plan_approves_nothing():
    assert approved(view())
    assert not approved(view(approval=APPROVALS[2]))
    assert not approved(view(plan=replace(PLAN, plan_hash="q")))
