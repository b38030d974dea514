"""A small honest store behind the graph's port: JSON documents in SQLite, every move checked, every write fenced.

It plays the daemon and the person too. Opened on a file it serves several processes and survives their kill; `calls`
keeps every write that changed something, `wrongs` every request that an honest store must refuse.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from pathlib import Path

from tunesmith.orchestrator.errors import Conflict, NotReady
from tunesmith.orchestrator.nouns import Approval, Device, Plan, Remedy, Request
from tunesmith.orchestrator.plain import build, plain
from tunesmith.orchestrator.ports import Artifact, AttemptView, JobView
from tunesmith.orchestrator.states import ATTEMPT_ENDS, JOB_ENDS, AttemptState, JobState, attempt_may, job_may

S = JobState
CPU = Device(
    backend="local", hardware="cpu", kind="cpu", memory_bytes=8 * 2**30, count=1, peak_flops=5e10, bandwidth=1e10
)


class JobStore:
    def __init__(self, path=":memory:"):
        self.db = sqlite3.connect(path, isolation_level=None, timeout=20, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=NORMAL")
        self.db.execute("CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, doc TEXT NOT NULL)")

    @contextlib.contextmanager
    def change(self, job):
        """The job's document in one transaction; whatever raises leaves it as it was."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            row = self.db.execute("SELECT doc FROM jobs WHERE id = ?", (job,)).fetchone()
            doc = json.loads(row[0]) if row else {}
            yield doc
            self.db.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?)", (job, json.dumps(doc)))
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def doc(self, job):
        return json.loads(self.db.execute("SELECT doc FROM jobs WHERE id = ?", (job,)).fetchone()[0])

    def jobs(self):
        return [row[0] for row in self.db.execute("SELECT id FROM jobs ORDER BY id")]

    def view(self, job):
        doc = self.doc(job)
        attempts = tuple(
            build(AttemptView, {**item, "state": AttemptState(item["state"])}) for item in doc["attempts"].values()
        )
        return JobView(
            id=job,
            state=S(doc["state"]),
            request=build(Request, doc["request"]),
            answers=doc["answers"],
            plan=build(Plan, doc["plan"]) if doc["plan"] else None,
            plan_stale=doc["plan_stale"],
            approval=build(Approval, doc["approval"]) if doc["approval"] else None,
            attempts=attempts,
            remedies=tuple(build(Remedy, item) for item in doc["remedies"]),
            repairs_left=3,
            wanted=doc["wanted"],
        )

    # --- what a person does

    def create(self, job, request, yes=False):
        with self.change(job) as doc:
            doc.update(
                state=S.PLANNING, request=plain(request), answers={}, plan=None, plan_stale=False, approval=None,
                attempts={}, remedies=[], wanted=None, error=None, yes=yes, fence=0, owner=None, serial=1, seen=0,
                artifacts=[], calls=[], wrongs=[], causes={},
            )  # fmt: skip
        return job

    def answer(self, job, **fields):
        with self.change(job) as doc:
            doc["answers"].update(fields)
            self._stale(doc)

    def edit(self, job, **sets):
        with self.change(job) as doc:
            doc["request"]["sets"].update({key.replace("__", "."): value for key, value in sets.items()})
            self._stale(doc)

    def approve(self, job, plan_hash=None, hours=None):
        with self.change(job) as doc:
            if doc["state"] != S.AWAITING_APPROVAL:
                raise NotReady(f"{job} is {doc['state']}")
            plan_hash = plan_hash or doc["plan"]["plan_hash"]
            doc["approval"] = plain(Approval(plan_hash=plan_hash, by="test", hours=hours))
            doc["serial"] += 1
            _approved(doc)

    def want(self, job, what):
        with self.change(job) as doc:
            doc["wanted"] = what
            doc["serial"] += 1

    def nudge(self, job):
        """Mark the job although nothing happened."""
        with self.change(job) as doc:
            doc["serial"] += 1

    def _stale(self, doc):
        doc.update(plan_stale=True, approval=None, serial=doc["serial"] + 1)
        _move(doc, S.PLANNING)

    # --- what the daemon does

    def start(self, job):
        """The newest attempt begins to run."""
        with self.change(job) as doc:
            self._attempt(doc, state=AttemptState.RUNNING)
            if doc["state"] == S.QUEUED:
                _move(doc, S.RUNNING)

    def end(self, job, state=AttemptState.SUCCEEDED, **facts):
        """The newest attempt ends, and the job is marked."""
        with self.change(job) as doc:
            self._attempt(doc, state=state, **facts)
            if state is AttemptState.SUCCEEDED and doc["state"] == S.QUEUED:
                _move(doc, S.RUNNING)
            doc["serial"] += 1

    def _attempt(self, doc, **facts):
        last = max(doc["attempts"].values(), key=lambda item: item["number"])
        assert attempt_may(AttemptState(last["state"]), facts["state"]), (last["state"], facts["state"])
        last.update(facts)

    def lease(self, job):
        """A port under a new fence; every older one is now too late."""
        with self.change(job) as doc:
            doc["fence"] += 1
            return Port(self, job, doc["fence"])

    def marked(self):
        return [job for job in self.jobs() if (doc := self.doc(job))["serial"] > doc["seen"]]


class Port:
    """JobPort over the store, bound to one lease."""

    def __init__(self, store, job, fence):
        self.store, self.job, self.fence = store, job, fence

    @contextlib.contextmanager
    def write(self, job, name, *facts):
        with self.store.change(job) as doc:
            if doc["fence"] != self.fence:
                raise Conflict("the lease was lost")
            before = json.dumps(doc, sort_keys=True)
            yield doc
            if json.dumps(doc, sort_keys=True) != before:
                doc["calls"].append([name, *facts])

    def refuse(self, job, why):
        with self.store.change(job) as doc:
            doc["wrongs"].append(why)
        raise NotReady(why)

    def view(self, job):
        return self.store.view(job)

    def devices(self, backend):
        return [CPU]

    def save_plan(self, job, plan):
        with self.write(job, "save_plan", plan.plan_hash) as doc:
            if doc["state"] in JOB_ENDS and doc["wanted"] == "retry":
                _move(doc, S.PLANNING)
                doc["wanted"] = None
            if doc["state"] != S.PLANNING:
                raise Conflict(f"no plan is wanted while {doc['state']}")
            doc.update(plan=plain(plan), plan_stale=False, approval=None, error=None)
            if plan.errors:
                _move(doc, S.FAILED)
                doc["error"] = plain(plan.errors[0])
            elif plan.questions:
                _move(doc, S.AWAITING_INPUT)
            else:
                _move(doc, S.AWAITING_APPROVAL)
                if doc["yes"]:
                    doc["yes"] = False
                    doc["approval"] = plain(Approval(plan_hash=plan.plan_hash, by="yes"))
                    _approved(doc)

    def submit(self, job, attempt):
        doc = self.store.doc(job)
        if attempt.key not in doc["attempts"]:
            live = [item for item in doc["attempts"].values() if AttemptState(item["state"]) not in ATTEMPT_ENDS]
            if live:
                self.refuse(job, "a second attempt while one has not ended")
            if attempt.number != len(doc["attempts"]) + 1:
                self.refuse(job, "an attempt out of turn")
            if doc["plan_stale"] or not doc["approval"] or attempt.plan_hash != doc["plan"]["plan_hash"]:
                self.refuse(job, "a plan that nobody approved")
            if doc["approval"]["plan_hash"] != attempt.plan_hash:
                self.refuse(job, "a plan that nobody approved")
        with self.write(job, "submit", attempt.number) as doc:
            if attempt.key in doc["attempts"]:
                return
            if doc["state"] != S.QUEUED:
                _move(doc, S.QUEUED)
            view = AttemptView(
                number=attempt.number, backend="local", state=AttemptState.SUBMITTED, resumed_from=attempt.resume_from
            )
            doc["attempts"][attempt.key] = plain(view)
            doc.update(wanted=None, error=None, caps=attempt.seconds_cap)

    def diagnose(self, job, attempt, cause, evidence, remedies):
        with self.write(job, "diagnose", attempt, cause) as doc:
            for item in doc["attempts"].values():
                if item["number"] == attempt:
                    item["cause"] = cause
            doc["evidence"] = [plain(item) for item in evidence]

    def collect(self, job):
        with self.write(job, "collect") as doc:
            last = max(doc["attempts"].values(), key=lambda item: item["number"])
            if last["state"] != AttemptState.SUCCEEDED:
                raise NotReady("nothing to collect")
            if doc["state"] != S.DELIVERING:
                _move(doc, S.DELIVERING)
            artifact = Artifact(kind="adapter", path=f"/jobs/{job}/output/adapter", bytes=1, sha256="0" * 64)
            doc["artifacts"] = [plain(artifact)]
        return [artifact]

    def finish(self, job, state, error=None):
        with self.write(job, "finish", state) as doc:
            if doc["state"] != state:
                _move(doc, state)
            doc.update(wanted=None, error=dict(error) if error else doc["error"])


class Leases:
    """Leases of one driver process: marked jobs that nobody alive holds. `actor` moves the world on in between."""

    def __init__(self, store, actor=None):
        self.store, self.actor, self.serials = store, actor, {}

    def next(self, wait):
        until = time.monotonic() + wait
        while True:
            if self.actor:
                self.actor(self.store)
            for job in self.store.marked():
                with self.store.change(job) as doc:
                    if _alive(doc["owner"]) or doc["serial"] <= doc["seen"]:
                        continue
                    doc["owner"] = os.getpid()
                    self.serials[job] = doc["serial"]
                return job, self.store.lease(job)
            if time.monotonic() >= until:
                return None
            time.sleep(0.01)

    def release(self, job):
        with self.store.change(job) as doc:
            if doc["owner"] == os.getpid():
                doc.update(owner=None, seen=max(doc["seen"], self.serials[job]))


def _alive(pid):
    if pid is None:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _approved(doc):
    """A first approval queues the job; one after earlier attempts leaves it to the graph to begin anew."""
    if not doc["attempts"] and doc["approval"]["plan_hash"] == doc["plan"]["plan_hash"]:
        _move(doc, S.QUEUED)


def _move(doc, new):
    old = S(doc["state"])
    if not job_may(old, new):
        raise Conflict(f"a job may not go from {old} to {new}")
    doc["state"] = new
