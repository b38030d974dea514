"""Documents that people and scripts read of a job: `show`, the summary in a list, and the queue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from tunesmith.orchestrator.attempts import Attempts
from tunesmith.orchestrator.metrics import Metrics
from tunesmith.orchestrator.nouns import SCHEMA_VERSION, Plan
from tunesmith.orchestrator.plain import plain
from tunesmith.orchestrator.states import ATTEMPT_ENDS, AttemptState, JobState
from tunesmith.orchestrator.store import Row, Store, split

Doc = dict[str, Any]


def show(store: Store, metrics: Metrics, job: str) -> Doc:
    """The `show` document: everything recorded of a job, of one moment."""
    row, plan, attempts = store.job(job), store.plan(job), store.attempts(job)
    stage = plan.stages[0] if plan is not None and plan.stages else None
    figures = metrics.latest([job])[job]
    request = json.loads(row["request"])
    return {
        "schema_version": SCHEMA_VERSION,
        "id": job,
        "name": row["name"],
        "state": row["state"],
        "backend": row["backend"],
        "method": row["method"],
        "model": row["model"],
        "created_at": row["created_at"],
        "updated_at": row["updated_at"],
        "ended_at": row["ended_at"],
        "wanted": row["wanted"],
        "request": request,
        "spec": plain(stage.spec) if stage else request["spec"],
        "plan_hash": plan.plan_hash if plan else None,
        "plan_stale": bool(row["plan_stale"]),
        "approval": plain(store.approval(job)),
        "answers": store.answers(job),
        "children": [],
        "attempts": [_attempt(item) for item in attempts],
        "progress": figures["progress"],
        "last": figures["last"],
        "questions": plain(plan.questions) if plan and not row["plan_stale"] else [],
        "remedies": _remedies(store, attempts),
        "findings": findings(plan, attempts),
        "alerts": metrics.alerts(job),
        "cost": cost(plan, attempts),
        "artifacts": [
            {key: item[key] for key in ("kind", "path", "bytes", "sha256", "attempt")}
            for item in store.rows("SELECT * FROM artifacts WHERE job = ? ORDER BY attempt, kind, path", job)
        ],
        "deliveries": [
            {"kind": item["kind"], "state": item["state"], "error": _json(item["error"])}
            for item in store.rows("SELECT * FROM deliveries WHERE job = ? ORDER BY kind", job)
        ],
        "error": _error(row, attempts),
    }


def summaries(store: Store, metrics: Metrics, rows: Sequence[Row]) -> list[Doc]:
    """A short document for each job of a page; three queries for the whole page, besides paid jobs' prices."""
    ids = [row["id"] for row in rows]
    figures = metrics.latest(ids)
    marks = ", ".join("?" * len(ids))
    found = store.rows(f"SELECT * FROM attempts WHERE job IN ({marks}) ORDER BY number", *ids)  # noqa: S608
    attempts = split(found, "job")
    return [
        {
            "id": row["id"],
            "name": row["name"],
            "state": row["state"],
            "backend": row["backend"],
            "method": row["method"],
            "model": row["model"],
            "created_at": row["created_at"],
            "updated_at": row["updated_at"],
            "ended_at": row["ended_at"],
            "wanted": row["wanted"],
            **figures[row["id"]],
            "cost": cost(_priced(store, row), attempts.get(row["id"], [])),
        }
        for row in rows
    ]


def queue(attempts: Attempts) -> Doc:
    """What runs and what waits for its turn, in the order of the turns."""
    return {
        "schema_version": SCHEMA_VERSION,
        "running": [_turn(row) for row in attempts.live()],
        "queued": [{**_turn(row), "position": place} for place, row in enumerate(attempts.waiting(), 1)],
    }


def findings(plan: Plan | None, attempts: Sequence[Row]) -> list[Doc]:
    """What the checks said of the plan, its stages and their data; then the evidence of the last attempt."""
    found: list[Any] = []
    if plan is not None:
        found += plan.findings
        for stage in plan.stages:
            found += [*stage.findings, *stage.data.problems]
    docs: list[Doc] = [plain(item) for item in found]
    if attempts and attempts[-1]["evidence"] and attempts[-1]["state"] != AttemptState.SUCCEEDED:
        docs += json.loads(attempts[-1]["evidence"])
    return docs


def cost(plan: Plan | None, attempts: Sequence[Row]) -> Doc:
    """{"usd", "source", "hours"}: the hours of every attempt, at the price of the plan's offer for its backend."""
    hours = sum(map(_hours, attempts))
    price = 0.0
    for stage in plan.stages if plan is not None else ():
        mine = [offer for offer in stage.offers if offer.backend == stage.spec.backend]
        named = [offer for offer in mine if offer.hardware == stage.spec.hardware]
        price = max((offer.usd_per_hour for offer in named or mine), default=price)
    return {"usd": round(price * hours, 4), "source": "formula" if price else "measured", "hours": round(hours, 4)}


def _attempt(row: Row) -> Doc:
    doc = json.loads(row["doc"])
    return {
        "number": row["number"],
        "backend": row["backend"],
        "state": row["state"],
        "exit_code": row["exit_code"],
        "error": _json(row["error"]),
        "cause": row["cause"],
        "submitted_at": row["submitted_at"],
        "started_at": row["started_at"],
        "ended_at": row["ended_at"],
        "resumed_from": doc.get("resume_from"),
        "checkpoint": row["checkpoint"],
    }


def _turn(row: Row) -> Doc:
    return {
        "id": row["job"],
        "name": row["name"],
        "attempt": row["number"],
        "backend": row["backend"],
        "state": row["state"],
        "priority": row["priority"],
        "submitted_at": row["submitted_at"],
        "started_at": row["started_at"],
    }


def _remedies(store: Store, attempts: Sequence[Row]) -> list[Doc]:
    if not attempts:
        return []
    last = attempts[-1]
    found = store.rows("SELECT doc FROM remedies WHERE job = ? AND attempt = ?", last["job"], last["number"])
    return [json.loads(row["doc"]) for row in found]


def _error(row: Row, attempts: Sequence[Row]) -> Any:
    """Why the job stands where it stands: its own error, or that of its last attempt unless the job succeeded."""
    if row["error"]:
        return json.loads(row["error"])
    if attempts and attempts[-1]["state"] in ATTEMPT_ENDS and row["state"] != JobState.SUCCEEDED:
        return _json(attempts[-1]["error"])
    return None


def _priced(store: Store, row: Row) -> Plan | None:
    return None if row["backend"] in (None, "local") else store.plan(row["id"])


def _hours(row: Row) -> float:
    if not row["started_at"]:
        return 0.0
    start = datetime.fromisoformat(row["started_at"])
    end = datetime.fromisoformat(row["ended_at"]) if row["ended_at"] else datetime.now(start.tzinfo)
    return max((end - start).total_seconds(), 0.0) / 3600


def _json(text: str | None) -> Any:
    return json.loads(text) if text else None
