"""What the nodes of the job graph decide, as plain functions: next attempt, refused plan, reason of an end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tunesmith.graph import route as names
from tunesmith.graph.diagnose import diagnose, error_doc, resume_point
from tunesmith.graph.route import newest, route, runnable
from tunesmith.orchestrator.errors import Conflict, NoDaemon, TunesmithError
from tunesmith.orchestrator.nouns import Attempt, Finding, JobSpec, Plan
from tunesmith.orchestrator.plain import build, plain
from tunesmith.orchestrator.ports import JobPort, JobView
from tunesmith.orchestrator.states import ATTEMPT_ENDS, JOB_ENDS, JobState


def basis(view: JobView) -> str:
    """A hash of what a plan is made from: a plan made from anything else is not saved."""
    return _hash({"request": plain(view.request), "answers": plain(view.answers)})


def spec(view: JobView) -> JobSpec | None:
    """The resolved spec of the plan shown, or None without a stage."""
    return view.plan.stages[0].spec if view.plan and view.plan.stages else None


def next_attempt(view: JobView) -> Attempt:
    """The attempt that an approved job runs next. Under the approval it already ran with, it resumes.

    Raises ValueError without an approved plan.
    """
    plan, approval, last = view.plan, view.approval, newest(view)
    if plan is None or approval is None:
        raise ValueError(f"{view.id} has no approved plan")
    stage = plan.stages[0]
    hours = [cap for cap in (stage.spec.limits.hours, approval.hours) if cap is not None]
    return Attempt(
        job=view.id,
        number=last.number + 1 if last else 1,
        spec=stage.spec,
        plan_hash=plan.plan_hash,
        data_fingerprint=stage.data.fingerprint,
        reward_hashes=stage.reward_hashes,
        resume_from=None if view.state is JobState.AWAITING_APPROVAL else resume_point(view),
        seconds_cap=min(hours) * 3600 if hours else None,
    )


def refused_plan(error: TunesmithError) -> Plan:
    """The plan of a request that cannot be planned: no stage, and the error as its finding."""
    message = " ".join(part for part in (error.message, error.why) if part)
    finding = Finding(level="error", code=error.code, message=message, where=error.where, fix=error.fix)
    return Plan(plan_hash=_hash(plain(finding)), intent="train", command=("tunesmith", "plan"), findings=(finding,))


def admitted(plan: Plan) -> Plan:
    """The plan, with an error finding where it is sound and yet nothing that a job can run."""
    if plan.errors or plan.questions or runnable(plan):
        return plan
    if plan.stages:
        finding = Finding(
            level="error",
            code="pipeline.unavailable",
            message=f"The plan has {len(plan.stages)} stages; a job runs one.",
            fix="Submit each stage as a job of its own.",
        )
    else:
        finding = Finding(
            level="error",
            code="intent.not_train",
            message=f"This asks for {plan.intent}, and nothing is trained for it.",
            fix=" ".join(plan.command),
        )
    return build(Plan, {**plain(plan), "findings": [*plain(plan.findings), plain(finding)]})


def refuse(job: str, port: JobPort, node: str, error: TunesmithError) -> None:
    """End the job with what the store or the backend said at `node`, unless the job moved on meanwhile.

    Raises the error again where it is no answer: a lost lease, no daemon, an error without a type.
    """
    if isinstance(error, (Conflict, NoDaemon)) or type(error) is TunesmithError:
        raise error
    view = port.view(job)
    if route(view) == node:
        port.finish(job, failed_state(view), error.to_doc())


def failed_state(view: JobView) -> JobState:
    """Where a failure leaves a job: failed, or the end it already stands in (a retry that could not be done)."""
    return view.state if view.state in JOB_ENDS else JobState.FAILED


def reason(node: str, view: JobView) -> Mapping[str, Any] | None:
    """The error document a job ends with at a finishing node; None where a person ended it."""
    last = newest(view)
    if node == names.FINISH_REJECTED or view.wanted == "cancel":
        return None
    if last is None or last.state not in ATTEMPT_ENDS:
        return TunesmithError("The job was under way, but no attempt of it is known.", code="attempt.none").to_doc()
    return error_doc(last, diagnose(last, spec(view), view))


def _hash(values: Any) -> str:
    """SHA-256 of any plain values, with text that is not Unicode and numbers that are none: nothing is checked yet."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
