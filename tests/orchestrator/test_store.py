from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.orchestrator import wishes
from tunesmith.orchestrator.attempts import Attempts, handle_of
from tunesmith.orchestrator.errors import Conflict, InputError, NotReady, StorageError, Waiting
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.nouns import Finding, Offer, Question, Request
from tunesmith.orchestrator.ports import Handle
from tunesmith.orchestrator.schema import MIGRATIONS
from tunesmith.orchestrator.states import AttemptState, JobState
from tunesmith.orchestrator.store import Store


def events(core: Any, job: str) -> list[str]:
    return [json.loads(row["doc"])["state"] for row in core.store.events(job) if row["kind"] == "state"]


# --- jobs and references -------------------------------------------------------------------------------------------


def test_a_new_job_plans_and_needs_the_graph(core) -> None:
    job = core.create(name="bot")
    row = core.store.job(job)
    assert (row["state"], row["name"], row["wake"], row["seen"]) == ("planning", "bot", 1, 0)
    assert core.leases.wanted()


def test_references(core) -> None:
    first, second = core.create(name="bot"), core.create()
    assert core.store.find(first) == first
    assert core.store.find("last") == second
    assert core.store.find("bot") == first
    assert core.store.find(second[2:]) == second
    assert core.store.find(second[:7]) == second or first[:7] == second[:7]


@pytest.mark.parametrize("ref", ["nope", "j-", "%", "'; DROP TABLE jobs; --", "\0", "x" * 5000, "_", "J-AAAAAA", ""])
def test_references_to_nothing(core, ref: str) -> None:
    with pytest.raises(InputError) as caught:
        core.store.find(ref)
    assert caught.value.code == "job.unknown"


def test_last_without_a_job(core) -> None:
    with pytest.raises(InputError, match="no job yet"):
        core.store.find("last")


def test_an_ambiguous_reference_lists_what_it_could_mean(core) -> None:
    jobs = [core.create(name="bot") for _ in range(3)]
    with pytest.raises(InputError) as caught:
        core.store.find("bot")
    assert caught.value.code == "job.ambiguous"
    assert all(job in caught.value.message for job in jobs)
    with pytest.raises(InputError) as caught:
        core.store.find("j-")
    assert caught.value.code in ("job.ambiguous", "job.unknown")


def test_pages_newest_first(core) -> None:
    jobs = [core.create() for _ in range(5)]
    rows, more = core.store.page(limit=2)
    assert ([row["id"] for row in rows], more) == ([jobs[4], jobs[3]], True)
    rows, more = core.store.page(limit=3, before=jobs[3])
    assert ([row["id"] for row in rows], more) == ([jobs[2], jobs[1], jobs[0]], False)
    assert core.store.page(state="queued") == ([], False)
    with pytest.raises(InputError):
        core.store.page(state="sleeping")


def test_a_hostile_name_is_only_text(core) -> None:
    job = core.create(name="a'); DROP TABLE jobs; --\x1b[2J\ud800")
    assert core.store.job(job)["name"].startswith("a'); DROP TABLE jobs")


# --- transactions --------------------------------------------------------------------------------------------------


def test_a_failed_transaction_leaves_nothing(core) -> None:
    job = core.create()

    def fail() -> None:
        with core.store.transaction():
            core.store.move(job, JobState.CANCELLED)
            with core.store.transaction():
                core.store.record(job, {"state": "x"})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert core.store.job(job)["state"] == "planning"
    assert len(core.store.events(job)) == 1


def test_an_inner_failure_undoes_the_inner_part_only(core) -> None:
    job = core.create()

    def inner() -> None:
        with core.store.transaction():
            core.store.move(job, JobState.AWAITING_APPROVAL)
            core.store.move(job, JobState.SUCCEEDED)

    with core.store.transaction():
        core.store.set(job, name="kept")
        with pytest.raises(Conflict):
            inner()
    row = core.store.job(job)
    assert (row["name"], row["state"], len(core.store.events(job))) == ("kept", "planning", 1)


def test_state_and_event_are_one(core) -> None:
    job = core.create()
    with core.store.transaction():
        core.store.move(job, JobState.AWAITING_APPROVAL)
        core.store.move(job, JobState.QUEUED)
        core.store.move(job, JobState.QUEUED)
    assert events(core, job) == ["planning", "awaiting_approval", "queued"]
    assert [row["seq"] for row in core.store.events(job)] == [1, 2, 3]


def test_an_illegal_move_is_a_conflict(core) -> None:
    job = core.create()
    with pytest.raises(Conflict) as caught, core.store.transaction():
        core.store.move(job, JobState.SUCCEEDED)
    assert caught.value.code == "job.state"


def test_events_are_append_only(core) -> None:
    job = core.create()
    with pytest.raises(sqlite3.IntegrityError, match="append-only"), core.store.transaction():
        core.store.write("UPDATE events SET doc = '{}' WHERE job = ?", job)


def test_a_write_needs_a_transaction(core) -> None:
    with pytest.raises(RuntimeError):
        core.store.write("DELETE FROM jobs")


def test_readers_are_not_held_up_by_a_writer(core) -> None:
    job = core.create()
    seen = []
    with core.store.transaction():
        core.store.move(job, JobState.CANCELLED)
        reader = threading.Thread(target=lambda: seen.append(core.store.job(job)["state"]))
        reader.start()
        reader.join(10)
    assert seen == ["planning"]


def test_many_threads_write(core) -> None:
    threads = [threading.Thread(target=lambda: [core.create() for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(core.store.page(limit=1000)[0]) == 80


def test_changes_are_told_after_the_commit(home: Home) -> None:
    told: list[frozenset[str]] = []
    store = Store(home.state_db, on_change=told.append)
    job = store.create(Request(text="x"))
    assert told == [frozenset({job})]
    with pytest.raises(sqlite3.IntegrityError), store.transaction():
        store.write("UPDATE jobs SET id = NULL WHERE id = ?", job)
    assert len(told) == 1
    store.close()


# --- idempotency ---------------------------------------------------------------------------------------------------


def test_a_key_gives_the_same_answer_once(core) -> None:
    with core.store.transaction():
        core.store.remember("k", "body", '{"a":1}')
    assert core.store.remembered("k", "body") == '{"a":1}'
    assert core.store.remembered("other", "body") is None
    with pytest.raises(Conflict) as caught:
        core.store.remembered("k", "another body")
    assert caught.value.code == "idempotency.reused"


# --- durability ----------------------------------------------------------------------------------------------------


def test_settings_of_the_file(core) -> None:
    assert core.store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert core.store._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert core.store._db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)


def test_a_newer_file_is_refused_untouched(home: Home) -> None:
    Store(home.state_db).close()
    with sqlite3.connect(home.state_db) as db:
        db.execute("PRAGMA user_version = 999")
    db.close()
    with pytest.raises(StorageError) as caught:
        Store(home.state_db)
    assert caught.value.code == "storage.newer"


def test_a_damaged_file_is_refused_untouched(home: Home) -> None:
    home.state_db.write_bytes(b"this is no database, and it is long enough to look at" * 100)
    before = home.state_db.read_bytes()
    with pytest.raises(StorageError) as caught:
        Store(home.state_db)
    assert caught.value.code == "storage.corrupt"
    assert home.state_db.read_bytes() == before


def test_a_killed_writer_leaves_whole_transactions(home: Home) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom tunesmith.orchestrator.home import Home\n"
        "from tunesmith.orchestrator.nouns import Request\nfrom tunesmith.orchestrator.store import Store\n"
        "store = Store(Home(Path(sys.argv[1])).state_db)\n"
        "for number in range(20):\n    job = store.create(Request(text='x'))\nprint(job, flush=True)\n"
        "with store.transaction():\n    store.create(Request(text='half'))\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(home.path)], capture_output=True, text=True, check=False)
    assert done.returncode == -9
    store = Store(home.state_db)
    rows, _ = store.page()
    assert len(rows) == 20
    assert rows[0]["id"] == done.stdout.strip()
    assert all(len(store.events(row["id"])) == 1 for row in rows)
    store.close()


def test_a_full_disk_is_said_so_and_harms_nothing(tmp_path: Path) -> None:
    place = tmp_path / "mount"
    place.mkdir()
    program = (
        "import sys, os\nfrom pathlib import Path\nfrom tunesmith.orchestrator.errors import StorageError\n"
        "from tunesmith.orchestrator.nouns import Request\nfrom tunesmith.orchestrator.store import Store\n"
        "store = Store(Path(sys.argv[1]) / 'state.db')\nmade = 0\n"
        "try:\n    while True:\n        store.create(Request(text='x' * 20000)); made += 1\n"
        "except StorageError as error: print(error.code)\n"
        "print(len(store.page(limit=10000)[0]) == made > 3)\n"
        "try: store.create(Request(text='x' * 20000))\nexcept StorageError as error: print(error.code)\n"
        "os.unlink(Path(sys.argv[1]) / 'ballast')\nstore.create(Request(text='y')); print('again')\n"
        "print(store.row('PRAGMA integrity_check')[0]); store.close()\n"
    )
    script = 'mount -t tmpfs -o size=3m none "$0" && head -c 300000 /dev/zero > "$0/ballast" && "$1" -c "$2" "$0"'
    command = ["unshare", "-m", "sh", "-c", script, str(place), sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("no mount may be made here")
    assert done.stdout.split() == ["storage.full", "True", "storage.full", "again", "ok"], done.stderr


# --- what a person asks --------------------------------------------------------------------------------------------


def shown(core, **changes: Any) -> tuple[str, Any]:
    """A job whose plan waits for approval."""
    plan = core.make_plan(**changes)
    job = core.create()
    leased, fence = core.lease()
    core.leases.save_plan(leased, fence, plan)
    core.leases.release(leased, fence)
    return job, plan


def test_approve_queues_and_marks(core) -> None:
    job, plan = shown(core)
    before = core.store.job(job)["wake"]
    assert wishes.approve(core.store, job, by="ann", plan=plan.plan_hash, hours=2.0) == "queued"
    approval = core.store.approval(job)
    assert (approval.by, approval.plan_hash, approval.hours) == ("ann", plan.plan_hash, 2.0)
    assert core.store.job(job)["wake"] == before + 1
    assert wishes.approve(core.store, job, by="bob") == "queued"
    assert core.store.approval(job).by == "ann"


def test_a_stale_hash_is_a_conflict(core) -> None:
    job, _ = shown(core)
    with pytest.raises(Conflict) as caught:
        wishes.approve(core.store, job, by="ann", plan="0" * 64)
    assert caught.value.code == "plan.stale"
    assert core.store.approval(job) is None


def test_approving_too_early(core) -> None:
    with pytest.raises(NotReady):
        wishes.approve(core.store, core.create(), by="ann")
    core.leases.release(*core.lease())
    job, _ = shown(core, questions=(Question(field="model.id", text="Which model?"),))
    with pytest.raises(Waiting):
        wishes.approve(core.store, job, by="ann")


def test_money_needs_a_cap(core) -> None:
    job, plan = shown(core)
    with pytest.raises(InputError) as caught:
        wishes.approve(core.store, job, by="ann", paid=True)
    assert caught.value.code == "limits.usd"
    assert wishes.approve(core.store, job, by="ann", paid=True, usd=5.0) == "queued"
    offer = Offer(backend="local", hardware="a100", fits=True, usd_per_hour=2.5)
    costly = replace(plan, stages=(replace(plan.stages[0], offers=(offer,)),))
    assert wishes.paid(costly, {})
    assert not wishes.paid(plan, {})
    assert wishes.paid(plan, {"local": 1.0})


def test_an_edit_voids_plan_and_approval(core) -> None:
    job, plan = shown(core)
    wishes.approve(core.store, job, by="ann")
    assert wishes.edit(core.store, job, {"train.epochs": 3}) == "planning"
    assert core.store.approval(job) is None
    assert core.store.job(job)["plan_stale"] == 1
    assert core.store.request(job).sets == {"train.epochs": 3}
    assert wishes.edit(core.store, job, {"train.seed": 7}) == "planning"
    assert core.store.request(job).sets == {"train.epochs": 3, "train.seed": 7}
    leased, fence = core.lease()
    core.leases.save_plan(leased, fence, plan)
    assert core.store.approval(job) is None, "the same plan again is not approved by an old word"


def test_answers_lead_to_a_new_plan(core) -> None:
    question = Question(field="model.id", text="Which model?")
    job, _ = shown(core, questions=(question,))
    with pytest.raises(InputError) as caught:
        wishes.answer(core.store, job, {"modle": "x"})
    assert "model.id" in caught.value.fix
    assert wishes.answer(core.store, job, {"model.id": "tiny"}) == "planning"
    assert core.store.answers(job) == {"model.id": "tiny"}
    with pytest.raises(NotReady):
        wishes.answer(core.store, job, {"model.id": "tiny"})


def test_reject_and_then_retry(core) -> None:
    job, _ = shown(core)
    assert wishes.reject(core.store, job) == "rejected"
    assert wishes.reject(core.store, job) == "rejected"
    with pytest.raises(NotReady):
        wishes.approve(core.store, job, by="ann")
    assert wishes.retry(core.store, job) == "planning"


def test_cancel_what_never_started(core) -> None:
    job = core.queued()
    assert wishes.cancel(core.store, job) == "cancelled"
    assert core.store.attempts(job)[0]["state"] == "cancelled"
    assert wishes.cancel(core.store, job) == "cancelled"
    assert not core.leases.wanted()


def test_cancel_what_runs_waits_for_its_end(core) -> None:
    job = core.queued()
    attempts = Attempts(core.store)
    assert attempts.begin(job, 1)
    attempts.started(handle_of(core.store.attempts(job)[0]))
    assert wishes.cancel(core.store, job) == "running"
    assert core.store.job(job)["wanted"] == "cancel"
    with pytest.raises(NotReady):
        wishes.edit(core.store, job, {"train.epochs": 2})
    with pytest.raises(NotReady):
        wishes.retry(core.store, job)


def test_what_succeeded_stays(core) -> None:
    job = core.queued()
    attempts = Attempts(core.store)
    attempts.begin(job, 1)
    attempts.started(handle_of(core.store.attempts(job)[0]))
    attempts.end(job, 1, AttemptState.SUCCEEDED, 0, None)
    leased, fence = core.lease()
    core.leases.diagnose(leased, fence, 1, "succeeded", (), ())
    core.leases.collected(leased, fence, 1, ())
    core.leases.finish(leased, fence, JobState.SUCCEEDED)
    for wish in (wishes.cancel, wishes.retry, wishes.reject):
        with pytest.raises(NotReady):
            wish(core.store, job)
    with pytest.raises(NotReady):
        wishes.edit(core.store, job, {"train.epochs": 2})


def test_retry_keeps_the_approval_and_the_state(core) -> None:
    job = core.queued()
    Attempts(core.store).begin(job, 1)
    Attempts(core.store).end(job, 1, AttemptState.FAILED, 1, None)
    leased, fence = core.lease()
    core.leases.diagnose(leased, fence, 1, "code", (), ())
    core.leases.finish(leased, fence, JobState.FAILED, {"message": "it broke"})
    core.leases.release(leased, fence)
    assert wishes.retry(core.store, job) == "failed"
    assert core.store.job(job)["wanted"] == "retry"
    assert core.leases.wanted()
    assert wishes.cancel(core.store, job) == "failed"
    assert core.store.job(job)["wanted"] is None


def test_a_planning_error_is_retried_from_planning(core) -> None:
    job, _ = shown(core, errors=(Finding(level="error", code="data.missing_file", message="No such file."),))
    assert core.store.job(job)["state"] == "failed"
    assert wishes.retry(core.store, job) == "planning"
    assert core.store.job(job)["error"] is None


def test_an_error_keeps_no_secret(core) -> None:
    job = core.queued()
    token = "hf_" + "a1" * 20
    error = {"code": "x", "message": f"401 for https://me:{token}@hub", "why": ["nested", token]}
    Attempts(core.store).begin(job, 1)
    Attempts(core.store).end(job, 1, AttemptState.FAILED, 1, error)
    leased, fence = core.lease()
    core.leases.diagnose(leased, fence, 1, "code", (Finding(level="error", code="x", message=token),), ())
    core.leases.finish(leased, fence, JobState.FAILED, error)
    found = [
        tuple(row) for table in ("jobs", "attempts", "events") for row in core.store.rows(f"SELECT * FROM {table}")
    ]
    assert token not in repr(found)
    assert "401 for" in core.store.job(job)["error"]


def test_an_attempt_ends_once_and_by_its_reason(core) -> None:
    job = core.queued()
    attempts = Attempts(core.store)
    attempts.begin(job, 1)
    attempts.started(Handle(backend="local", key="k", job=job, number=1, data={"pid": 1}))
    attempts.ending(job, 1, "deadline")
    attempts.ending(job, 1, "cancel")
    attempts.end(job, 1, AttemptState.CANCELLED, 75, None)
    attempts.end(job, 1, AttemptState.SUCCEEDED, 0, None)
    (row,) = core.store.attempts(job)
    assert (row["state"], row["exit_code"]) == ("failed", 75)
    assert "attempt.deadline" in row["error"]
    with pytest.raises(Conflict):
        attempts.move(job, 1, AttemptState.RUNNING)
