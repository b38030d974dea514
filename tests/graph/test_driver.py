"""The driver: locks, leases, signals, and kills at random points. Real processes, real SIGKILL."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jobstore
import pytest

from tunesmith.graph import driver, machine, planning
from tunesmith.graph.driver import CRASHES, Turn, run
from tunesmith.graph.machine import Halted, NodeFailed
from tunesmith.orchestrator.errors import Conflict, NoDaemon, StorageError
from tunesmith.orchestrator.states import JOB_ENDS
from tunesmith.orchestrator.states import AttemptState as A
from tunesmith.orchestrator.states import JobState as S

JOB, OTHER = "j-aaaaaa", "j-bbbbbb"


def live(store):
    """What people and the daemon do meanwhile: answer, approve, start attempts and end them."""
    for job in store.jobs():
        doc = store.doc(job)
        attempt = max(doc["attempts"].values(), key=lambda item: item["number"], default=None)
        with contextlib.suppress(AssertionError):  # the job moved on since it was looked at
            if doc["state"] == S.AWAITING_INPUT:
                store.answer(job, **{doc["plan"]["questions"][0]["field"]: "smollm2-135m"})
            elif doc["state"] == S.AWAITING_APPROVAL and not doc["approval"]:
                store.approve(job)
            elif doc["state"] == S.QUEUED and attempt and attempt["state"] == A.SUBMITTED:
                store.start(job)
            elif doc["state"] == S.RUNNING and attempt["state"] == A.RUNNING:
                store.end(job, exit_code=0)


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)
    return found


def test_jobs_are_driven_to_their_end_and_an_idle_driver_ends(store, good, vague, tmp_path):
    store.create(JOB, good)
    store.create(OTHER, vague)
    began = time.monotonic()
    run(jobstore.Leases(store, live), tmp_path, idle_seconds=0.3)
    assert time.monotonic() - began >= 0.3
    for job in (JOB, OTHER):
        doc = store.doc(job)
        assert (doc["state"], doc["wrongs"], doc["owner"]) == (S.SUCCEEDED, [], None)
        assert [call[0] for call in doc["calls"]].count("submit") == 1
        assert (tmp_path / "jobs" / job / "graph.lock").read_bytes() == b""


def test_a_driver_ends_where_no_daemon_answers(tmp_path, caplog):
    class Nobody:
        def next(self, wait):
            raise NoDaemon("No daemon answers.")

    run(Nobody(), tmp_path)
    assert "No daemon answers" in caplog.text


def test_sigterm_breaks_off_the_long_poll_at_once(store, tmp_path):
    def term(_):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    run(jobstore.Leases(store, term), tmp_path, idle_seconds=3600)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_in_a_step_ends_the_driver_after_it_and_gives_the_lease_back(store, good, tmp_path, monkeypatch):
    real, done = planning.inspect, []

    def inspect(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        drafted = real(*given)
        done.append(1)
        return drafted

    monkeypatch.setattr(planning, "inspect", inspect)
    store.create(JOB, good)
    run(jobstore.Leases(store), tmp_path, idle_seconds=3600)
    assert done
    assert (store.doc(JOB)["plan"], store.doc(JOB)["owner"]) == (None, None)
    monkeypatch.undo()
    monkeypatch.setattr(planning, "intake", None)  # done before: the checkpoint knows
    store.nudge(JOB)
    run(jobstore.Leases(store), tmp_path, idle_seconds=0.05)
    assert store.doc(JOB)["state"] == S.AWAITING_APPROVAL


def test_an_unexpected_error_fails_the_job_as_internal_and_the_driver_goes_on(
    store, good, tmp_path, monkeypatch, caplog
):
    real = planning.size

    def size(draft, *given):
        if not broken:
            return real(draft, *given)
        broken.pop()
        raise ZeroDivisionError("the secret of the step")

    broken = [1] * machine.TRIES
    monkeypatch.setattr(planning, "size", size)
    store.create(JOB, good)
    store.create(OTHER, good)
    run(jobstore.Leases(store), tmp_path, idle_seconds=0.05)
    doc = store.doc(JOB)
    assert (doc["state"], doc["error"]["code"], doc["error"]["where"]) == (S.FAILED, "internal", "size")
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in str(doc)
    assert "Traceback" not in str(doc)
    assert store.doc(OTHER)["state"] == S.AWAITING_APPROVAL
    with machine.checkpoints(tmp_path / "graph.db") as saver:
        assert saver.get_tuple({"configurable": {"thread_id": JOB}}) is None
    store.want(JOB, "retry")
    run(jobstore.Leases(store), tmp_path, idle_seconds=0.05)
    assert store.doc(JOB)["state"] == S.AWAITING_APPROVAL


def test_a_store_that_cannot_write_the_plan_fails_the_job_with_its_own_words(store, good, tmp_path, monkeypatch):
    def full(self, job, plan):
        raise StorageError("The disk is full.", code="storage.full", fix="Free some space.")

    monkeypatch.setattr(jobstore.Port, "save_plan", full)
    store.create(JOB, good)
    run(jobstore.Leases(store), tmp_path, idle_seconds=0.05)
    doc = store.doc(JOB)
    assert (doc["state"], doc["error"]["code"], doc["error"]["fix"]) == (S.FAILED, "storage.full", "Free some space.")


def test_a_job_whose_attempt_still_runs_is_not_failed(store, good, tmp_path):
    store.create(JOB, good, yes=True)
    run(jobstore.Leases(store), tmp_path, idle_seconds=0.05)
    store.start(JOB)
    driver.fail(JOB, store.lease(JOB), NodeFailed("await"))
    assert store.doc(JOB)["state"] == S.RUNNING


def test_a_lost_lease_drops_the_job_and_the_driver_goes_on(store, good, tmp_path, monkeypatch):
    real = planning.size

    def size(*given):
        if store.doc(JOB)["fence"] == 1:
            store.lease(JOB)  # another driver was given the job
        return real(*given)

    monkeypatch.setattr(planning, "size", size)
    store.create(JOB, good)
    store.create(OTHER, good)
    run(jobstore.Leases(store), tmp_path, idle_seconds=0.05)
    assert store.doc(JOB)["plan"] is None
    assert store.doc(OTHER)["state"] == S.AWAITING_APPROVAL


def test_a_folder_that_cannot_be_made_does_not_end_the_driver(store, good, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "PAUSE_SECONDS", (0.01,))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / JOB).write_text("in the way")
    store.create(JOB, good)
    store.create(OTHER, good)
    run(jobstore.Leases(store), tmp_path, idle_seconds=0.05)
    assert store.doc(JOB)["state"] == S.PLANNING
    assert store.doc(OTHER)["state"] == S.AWAITING_APPROVAL


# --- the lock and its tally ---------------------------------------------------------------------------------------


def test_two_drivers_on_one_job_one_waits_or_drops_out(tmp_path):
    stop = threading.Event()
    with Turn.hold(tmp_path, stop, 1), pytest.raises(Halted, match="another driver"), Turn.hold(tmp_path, stop, 0.1):
        pytest.fail("two held one lock")
    first = contextlib.ExitStack()
    first.enter_context(Turn.hold(tmp_path, stop, 1))
    threading.Timer(0.1, first.close).start()
    with Turn.hold(tmp_path, stop, 30):
        pass


def test_told_to_end_a_driver_does_not_wait_for_the_lock(tmp_path):
    stop = threading.Event()
    stop.set()
    with Turn.hold(tmp_path, threading.Event(), 1), pytest.raises(Halted), Turn.hold(tmp_path, stop, 3600):
        pytest.fail("two held one lock")


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "graph.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"graph\.lock"), Turn.hold(tmp_path, threading.Event(), 1):
        pytest.fail("a link was followed")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", b"{}", b'{"step": 1, "crashes": "x", "inside": 2}', b"[]", b"null", bytes(range(256))]
)
def test_any_content_of_the_lock_is_taken(tmp_path, content):
    (tmp_path / "graph.lock").write_bytes(content)
    with Turn.hold(tmp_path, threading.Event(), 1) as turn:
        turn.enter("intake")


def died(folder, *steps):
    """A turn that enters steps and then dies: its lock is released and its tally stays."""
    with contextlib.ExitStack() as stack:
        turn = stack.enter_context(Turn.hold(folder, threading.Event(), 1))
        for step in steps:
            turn.enter(step)
        tally = (folder / "graph.lock").read_bytes()
    (folder / "graph.lock").write_bytes(tally)


def test_a_step_that_kills_its_process_is_given_up_in_the_end(tmp_path):
    for _ in range(CRASHES):
        died(tmp_path, "intake", "inspect")
    with Turn.hold(tmp_path, threading.Event(), 1) as turn:
        turn.enter("intake")
        with pytest.raises(NodeFailed, match=f"'inspect'.* {CRASHES} times"):
            turn.enter("inspect")
    died(tmp_path, "intake", "inspect")  # after an orderly end it counts anew


def test_only_a_step_that_reads_what_people_wrote_is_given_up(tmp_path):
    for _ in range(3 * CRASHES):
        died(tmp_path, "submit")
    with Turn.hold(tmp_path, threading.Event(), 1) as turn:
        turn.enter("submit")


def test_a_death_before_the_step_is_reached_again_is_not_counted(tmp_path):
    died(tmp_path, "intake", "inspect")
    for _ in range(CRASHES):
        died(tmp_path)
        died(tmp_path, "intake")
    with Turn.hold(tmp_path, threading.Event(), 1) as turn:
        turn.enter("inspect")
        assert turn.crashes == 1


def test_a_step_further_than_the_last_is_progress(tmp_path):
    for step in ("intake", "inspect", "size", "estimate", "submit", "await", "diagnose", "deliver"):
        for _ in range(CRASHES):
            died(tmp_path, step)


# --- kills ---------------------------------------------------------------------------------------------------------


class Drivers:
    """Forks driver processes over one store file and one home."""

    def __init__(self, path, home, rows, idle=60.0):
        home.mkdir(exist_ok=True)
        here = Path(__file__).parent
        command = [sys.executable, str(here / "zygote.py"), str(path), str(home), str(idle), str(rows)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
        with (home / "err").open("w") as errors:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.pids = []
        assert self.process.stdout.readline() == "ready\n", (home / "err").read_text()

    def start(self, line="drive"):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self.pids.append(int(self.process.stdout.readline()))
        return self.pids[-1]

    def close(self):
        for pid in self.pids:
            if jobstore._alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


@pytest.fixture
def drivers(tmp_path, rows):
    made = Drivers(tmp_path / "store.db", tmp_path / "home", rows)
    yield made
    made.close()


def soak(drivers, store, jobs, kills, seed, together=1):
    """Drive `jobs` jobs to their end while drivers are killed at random points; the number of kills made."""
    chance, made = random.Random(seed), 0
    pids = {}
    until = time.monotonic() + 240
    while not all(store.doc(job)["state"] in JOB_ENDS for job in jobs):
        assert time.monotonic() < until, {job: store.doc(job)["state"] for job in jobs}
        pids = {pid: due for pid, due in pids.items() if jobstore._alive(pid)}
        while len(pids) < together:
            pids[drivers.start()] = time.monotonic() + chance.uniform(0.0, 0.6)
        live(store)
        for pid, due in pids.items():
            if made < kills and time.monotonic() >= due:
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid: not jobstore._alive(pid))
                made += 1
        time.sleep(0.002)
    return made


def check_soak(store, jobs):
    for job in jobs:
        doc = store.doc(job)
        assert doc["state"] == S.SUCCEEDED, doc["error"]
        assert doc["wrongs"] == []
        assert len(doc["attempts"]) == 1
        assert [call[0] for call in doc["calls"]].count("submit") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "jobs", "together", "seed"), [(20, 12, 1, 1), (10, 8, 2, 2)])
def test_drivers_killed_at_random_points_lose_and_double_nothing(drivers, tmp_path, good, kills, jobs, together, seed):
    killed(drivers, tmp_path, good, kills, jobs, together, seed)


@pytest.mark.proof
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_hundred_kills(drivers, tmp_path, good, seed):
    killed(drivers, tmp_path, good, kills=200, jobs=120, together=2, seed=seed)


def killed(drivers, tmp_path, good, kills, jobs, together, seed):
    store = jobstore.JobStore(tmp_path / "store.db")
    with contextlib.closing(store.db):
        names = [store.create(f"j-{number:06d}", good) for number in range(jobs)]
        made = soak(drivers, store, names, kills, seed, together)
        check_soak(store, names)
    assert made >= kills // 2, "the jobs were done before the kills"


@pytest.mark.slow
def test_a_step_that_crashes_every_driver_fails_its_job_in_the_end(drivers, tmp_path, good):
    store = jobstore.JobStore(tmp_path / "store.db")
    with contextlib.closing(store.db):
        store.create(JOB, good)
        for _ in range(CRASHES):
            pid = drivers.start("crash inspect")
            wait_for(lambda pid=pid: not jobstore._alive(pid))
            assert store.doc(JOB)["state"] == S.PLANNING
        drivers.start("crash inspect")
        wait_for(lambda: store.doc(JOB)["state"] == S.FAILED)
        assert store.doc(JOB)["error"]["code"] == "internal"
        assert "inspect" in store.doc(JOB)["error"]["message"]


def test_an_older_driver_can_write_nothing_once_a_newer_one_has_the_lease(store, good):
    store.create(JOB, good)
    old, new = store.lease(JOB), store.lease(JOB)
    new.finish(JOB, S.CANCELLED)
    for write in (
        lambda: old.finish(JOB, S.FAILED),
        lambda: old.collect(JOB),
        lambda: old.diagnose(JOB, 1, "x", (), ()),
    ):
        with pytest.raises(Conflict):
            write()
    assert store.doc(JOB)["state"] == S.CANCELLED
