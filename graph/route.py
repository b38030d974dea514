"""The whole control flow of a job in one pure function: from the store's facts to the name of the next node.

Nothing else decides where a job goes. The graph asks `route` on entry and after every node that touches the store, so
that its own checkpoints can be lost at any time with the same ending.
"""

from __future__ import annotations

from tunesmith.orchestrator.nouns import Plan
from tunesmith.orchestrator.ports import AttemptView, JobView
from tunesmith.orchestrator.states import ATTEMPT_ENDS, JOB_ENDS, AttemptState, JobState

INTAKE = "intake"
INSPECT = "inspect"
SIZE = "size"
ESTIMATE = "estimate"
REVIEW = "review"
SUBMIT = "submit"
AWAIT = "await"
DIAGNOSE = "diagnose"
DELIVER = "deliver"
FINISH_FAILED = "finish_failed"
FINISH_CANCELLED = "finish_cancelled"
FINISH_REJECTED = "finish_rejected"
FINISH_LOST = "finish_lost"
END = "end"

FINISHES = {
    FINISH_FAILED: JobState.FAILED,
    FINISH_CANCELLED: JobState.CANCELLED,
    FINISH_REJECTED: JobState.REJECTED,
    FINISH_LOST: JobState.LOST,
}
ROUTES = (INTAKE, REVIEW, SUBMIT, AWAIT, DIAGNOSE, DELIVER, *FINISHES, END)


def route(view: JobView) -> str:
    """The next node for a job: one of ROUTES. Pure and total; the first rule that fits decides.

    Never `submit` without a standing approval of exactly this plan, nor while an attempt has not ended; never out of an
    end unless a person asked for `retry`.
    """
    state, last = view.state, newest(view)
    if state in JOB_ENDS and (state is JobState.SUCCEEDED or view.wanted != "retry"):
        return END
    if last is not None and last.state not in ATTEMPT_ENDS:
        return AWAIT  # also under `cancel`: the daemon ends the attempt first, and an unknown one is left by proof only
    if state in JOB_ENDS:
        return SUBMIT if approved(view) and state is not JobState.REJECTED else INTAKE
    if state in _UNDERWAY and last is not None and last.cause is None:
        return DIAGNOSE
    if view.wanted == "cancel":
        return FINISH_CANCELLED
    if state is JobState.PLANNING:
        return INTAKE
    if state in (JobState.AWAITING_INPUT, JobState.AWAITING_APPROVAL):
        if view.wanted == "reject":
            return FINISH_REJECTED
        if view.plan is None or view.plan_stale:
            return INTAKE
        return SUBMIT if approved(view) and state is JobState.AWAITING_APPROVAL else REVIEW
    if state is JobState.DELIVERING:
        return DELIVER
    if state is JobState.PAUSED:
        return SUBMIT if view.wanted == "retry" and approved(view) else AWAIT
    return _underway(view, last)


def _underway(view: JobView, last: AttemptView | None) -> str:
    """Queued, running or evaluating, with no attempt alive and the last one diagnosed."""
    if view.state is JobState.QUEUED and (last is None or view.wanted == "retry"):
        return SUBMIT if approved(view) else INTAKE
    if last is None:
        return FINISH_LOST
    return FINISH_CANCELLED if last.cause == "stopped" else _AFTER[last.state]


_UNDERWAY = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.EVALUATING})
_AFTER = {
    AttemptState.SUCCEEDED: DELIVER,
    AttemptState.FAILED: FINISH_FAILED,
    AttemptState.CANCELLED: FINISH_CANCELLED,
    AttemptState.LOST: FINISH_LOST,
}


def newest(view: JobView) -> AttemptView | None:
    """The attempt with the highest number, or None before the first."""
    return max(view.attempts, key=lambda attempt: attempt.number, default=None)


def approved(view: JobView) -> bool:
    """Whether the plan shown may run: it stands, it can, and a person said yes to exactly this one."""
    plan = view.plan
    if plan is None or view.plan_stale or view.approval is None:
        return False
    return view.approval.plan_hash == plan.plan_hash and runnable(plan)


def runnable(plan: Plan) -> bool:
    """Whether a plan names one thing to train, with nothing open and nothing wrong."""
    return len(plan.stages) == 1 and not plan.questions and not plan.errors
