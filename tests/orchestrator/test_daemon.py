from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tunesmith.orchestrator import processes
from tunesmith.orchestrator.client import Client
from tunesmith.orchestrator.drivers import CRASHES, Drivers
from tunesmith.orchestrator.errors import NoDaemon
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.states import JOB_ENDS

HEAVY = ("torch", "transformers", "langgraph", "datasets", "trl", "peft", "pyarrow", "ray")


def submit(daemon, name: str) -> str:
    request = {"text": "SFT tiny on rows.jsonl", "cwd": "/", "sets": {"name": name}}
    return str(daemon.post("/jobs", {"request": request, "approve": {"by": "test"}})["id"])


def finish(daemon, *jobs: str) -> list[dict[str, Any]]:
    def ended() -> Any:
        daemon.drive()
        docs = [daemon.get(f"/jobs/{job}") for job in jobs]
        return docs if all(doc["state"] in JOB_ENDS for doc in docs) else None

    return daemon.poll(ended, 60.0)


def starts(daemon, job: str) -> int:
    return sum(len(path.read_text().split()) for path in daemon.home.job(job).glob("attempts/*/starts"))


def run_another(home: Home) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "tunesmith.orchestrator.daemon", "run", "--home", str(home.path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


# --- one daemon, private -------------------------------------------------------------------------------------------


def test_the_socket_is_private(daemon) -> None:
    found = daemon.home.socket.lstat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    for path in daemon.home.path.iterdir():
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path


def test_a_second_daemon_names_the_first_and_exits_6(daemon) -> None:
    done = run_another(daemon.home)
    assert done.returncode == 6
    assert f"pid {daemon.process.pid}" in done.stderr
    assert "Traceback" not in done.stderr
    assert daemon.get("/health")["pid"] == daemon.process.pid


def test_eight_at_once_leave_one(home: Home, driver_place: None) -> None:
    command = [sys.executable, "-P", "-m", "tunesmith.orchestrator.daemon", "run", "--home", str(home.path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    until = time.monotonic() + 60
    while sum(process.poll() is None for process in running) > 1 and time.monotonic() < until:
        time.sleep(0.05)
    (winner,) = [process for process in running if process.poll() is None]
    losers = [process for process in running if process is not winner]
    for loser in losers:
        assert loser.stderr is not None
        assert (loser.returncode, f"pid {winner.pid}" in loser.stderr.read()) == (6, True)
        loser.stderr.close()
    with Client(home) as client:
        assert client.health()["pid"] == winner.pid
        client.shutdown()
    assert winner.wait(20) == 0
    assert winner.stderr is not None
    winner.stderr.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away(daemon, tmp_path: Path) -> None:
    for folder in (daemon.home.path, *daemon.home.path.parents):
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    daemon.home.socket.chmod(0o666)
    program = (
        "import os, socket, sys\nos.setgid(12345); os.setuid(12345)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "try:\n    s.send(b'GET /health HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n'); print(len(s.recv(999)))\n"
        "except OSError: print(0)\n"
    )
    command = [sys.executable, "-I", "-c", program, daemon.home.address]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
    assert daemon.get("/health")["pid"] == daemon.process.pid


def test_a_home_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_another(Home(tmp_path / "file"))
    assert done.returncode == 1
    assert "TUNESMITH_HOME" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_with_a_long_path(tmp_path: Path) -> None:
    home = Home(tmp_path / ("x" * 80) / ("y" * 80)).make()
    command = [sys.executable, "-P", "-m", "tunesmith.orchestrator.daemon", "run", "--home", str(home.path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with Client(home) as client:
            until = time.monotonic() + 30
            while True:
                try:
                    assert client.health()["pid"] == process.pid
                    break
                except NoDaemon:
                    assert time.monotonic() < until
                    time.sleep(0.05)
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_it_stays_light(daemon) -> None:
    submit(daemon, "ok 3")
    daemon.drive()
    daemon.get("/backends")
    mapped = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert not any(f"/{name}/" in mapped for name in HEAVY)
    assert psutil.Process(daemon.process.pid).memory_info().rss < 200 * 2**20


# --- ending it, and killing it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["term", "shutdown"])
def test_ending_the_daemon_ends_no_job(daemon, how: str) -> None:
    job = submit(daemon, "nap 1")
    daemon.drive()
    daemon.poll(lambda: starts(daemon, job))
    if how == "term":
        assert daemon.end(signal.SIGTERM) == 0
    else:
        daemon.post("/shutdown")
        assert daemon.process.wait(20) == 0
    assert not daemon.home.socket.exists()
    daemon.start()
    (doc,) = finish(daemon, job)
    assert (doc["state"], len(doc["attempts"]), starts(daemon, job)) == ("succeeded", 1, 1)


def test_killed_while_a_job_runs_and_started_again(daemon) -> None:
    """As if nothing had happened: the same attempt, every line, its exit code; it ends while no daemon is there."""
    job = submit(daemon, "nap 1")
    daemon.drive()
    daemon.poll(lambda: starts(daemon, job))
    daemon.end(signal.SIGKILL)
    assert daemon.home.socket.exists(), "a stale socket is left behind, and replaced"
    daemon.poll(lambda: (daemon.home.attempt(job, 1) / "exit").exists())
    daemon.start()
    (doc,) = finish(daemon, job)
    assert doc["state"] == "succeeded"
    assert [item["exit_code"] for item in doc["attempts"]] == [0]
    assert doc["last"]["train/loss"] == pytest.approx(1 / 3)
    assert [item["kind"] for item in doc["artifacts"]] == ["adapter", "eval"]
    assert starts(daemon, job) == 1
    lines = [item["line"] for item in daemon.get(f"/jobs/{job}/events")["events"] if "line" in item]
    assert lines == list(range(1, len(lines) + 1))


def test_metrics_are_rebuilt_when_their_file_is_gone(daemon) -> None:
    job = submit(daemon, "ok 50")
    finish(daemon, job)
    before = daemon.get(f"/jobs/{job}/events", limit=1000)["events"]
    daemon.end(signal.SIGKILL)
    for path in daemon.home.path.glob("metrics.db*"):
        path.unlink()
    daemon.start()
    daemon.poll(lambda: daemon.get(f"/jobs/{job}/events", limit=1000)["events"] == before)
    assert daemon.get(f"/jobs/{job}")["progress"]["step"] == 50


@pytest.mark.slow
def test_killed_again_and_again(daemon) -> None:
    """Twelve kills at seeded moments under jobs of mixed fates: none lost, none doubled, every end the right one."""
    random.seed(11)
    fates = {"ok 20": "succeeded", "nap 0.4": "succeeded", "fail": "failed", "die": "failed"}
    jobs = {submit(daemon, name): state for name, state in [*fates.items()] * 2}
    for _ in range(12):
        until = time.monotonic() + random.uniform(0.05, 0.6)
        while time.monotonic() < until:
            daemon.drive()
        daemon.end(signal.SIGKILL)
        daemon.start()
    docs = finish(daemon, *jobs)
    assert {doc["id"]: doc["state"] for doc in docs} == jobs
    assert {doc["id"]: starts(daemon, doc["id"]) for doc in docs} == dict.fromkeys(jobs, 1)
    home = str(daemon.home.path)
    for process in psutil.process_iter(["environ", "status"]):
        if (
            process.info["status"] != psutil.STATUS_ZOMBIE
            and (process.info["environ"] or {}).get("TUNESMITH_HOME") == home
        ):
            daemon.poll(lambda process=process: not processes.alive(str(processes.identity(process.pid))))


# --- the driver process --------------------------------------------------------------------------------------------


def test_a_driver_that_cannot_start_fails_the_job_with_the_reason(home: Home, core) -> None:
    job = core.create()
    clock = [0.0]
    command = [sys.executable, "-c", "import sys; sys.exit('No module named langgraph')"]
    drivers = Drivers(core.leases, home, command=command, clock=lambda: clock[0])
    until = time.monotonic() + 60
    while core.store.job(job)["state"] == "planning":
        drivers.tick()
        clock[0] += 1.0
        time.sleep(0.01)
        assert time.monotonic() < until
    assert core.store.job(job)["state"] == "failed"
    assert "langgraph" in core.store.job(job)["error"]
    assert home.driver_log.read_text().count("langgraph") == CRASHES
    assert stat.S_IMODE(home.driver_log.stat().st_mode) == 0o600


def test_a_driver_that_hangs_is_killed(home: Home, core) -> None:
    job = core.create()
    clock = [0.0]
    core.leases.clock = lambda: clock[0]
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    drivers = Drivers(core.leases, home, command=command, clock=lambda: clock[0])
    drivers.tick()
    pid = drivers.pid
    assert pid is not None
    leased = core.leases.lease(str(processes.identity(pid)))
    assert leased is not None
    clock[0] += 3000.0
    drivers.tick()
    assert drivers.pid == pid
    core.leases.view(*leased)
    clock[0] += 3000.0
    with core.leases.busy(job):
        clock[0] += 9000.0
        drivers.tick()
    assert drivers.pid == pid
    clock[0] += 3700.0
    drivers.tick()
    until = time.monotonic() + 20
    while core.store.job(job)["holder"] is not None:
        drivers.tick()
        assert time.monotonic() < until
    drivers.stop()


def test_no_second_driver_beside_a_living_one(home: Home, core, driver_place: None) -> None:
    core.create()
    drivers = Drivers(core.leases, home, command=[sys.executable, "-c", ""])
    for _ in range(5):
        drivers.tick()
    assert not home.driver_log.exists()


# --- identity ------------------------------------------------------------------------------------------------------


def test_a_process_is_known_by_more_than_its_pid() -> None:
    who = str(processes.identity(os.getpid()))
    assert processes.alive(who)
    boot, pid, ticks = who.rsplit(":", 2)
    assert not processes.alive(f"{boot}:{pid}:{int(ticks) + 1}")
    assert not processes.alive(f"other-boot:{pid}:{ticks}")
    assert not processes.alive("nonsense")
    assert not processes.kill(f"{boot}:{pid}:{int(ticks) + 1}")
    child = subprocess.Popen([sys.executable, "-c", ""])
    known = processes.identity(child.pid)
    while known is not None and processes.alive(known):
        time.sleep(0.01)
    assert processes.identity(child.pid) is None, "a zombie does not live"
    child.wait()
