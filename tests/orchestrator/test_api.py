"""The HTTP of a real daemon process over its real socket; the test takes the driver's place."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import Counter
from typing import Any

import pytest

from tunesmith.orchestrator.errors import Conflict, InputError, NotReady, TunesmithError
from tunesmith.orchestrator.plain import plain
from tunesmith.orchestrator.states import JOB_ENDS

REQUEST = {"text": "SFT tiny on rows.jsonl", "cwd": "/"}


def request(name: str = "ok 3", **sets: Any) -> dict[str, Any]:
    return {**REQUEST, "sets": {"name": name, **sets}}


def submit(daemon, name: str = "ok 3", *, yes: bool = True, **sets: Any) -> str:
    approve = {"by": "test"} if yes else None
    return str(daemon.post("/jobs", {"request": request(name, **sets), "approve": approve})["id"])


def finish(daemon, job: str) -> dict[str, Any]:
    """Drive until the job has ended; its show document."""

    def ended() -> Any:
        daemon.drive()
        doc = daemon.get(f"/jobs/{job}")
        return doc if doc["state"] in JOB_ENDS and doc["wanted"] is None else None

    return daemon.poll(ended)


# --- one job -------------------------------------------------------------------------------------------------------


def test_a_job_from_request_to_result(daemon) -> None:
    job = submit(daemon, "ok 5")
    doc = finish(daemon, job)
    assert doc["state"] == "succeeded"
    assert doc["error"] is None
    assert doc["progress"]["step"] == 5
    assert doc["last"] == {"train/loss": 0.2}
    assert [item["kind"] for item in doc["artifacts"]] == ["adapter", "eval"]
    (attempt,) = doc["attempts"]
    assert (attempt["state"], attempt["exit_code"], attempt["number"]) == ("succeeded", 0, 1)
    assert doc["cost"]["usd"] == 0.0
    for key in (
        "id",
        "name",
        "backend",
        "spec",
        "plan_hash",
        "children",
        "questions",
        "remedies",
        "findings",
        "alerts",
    ):
        assert key in doc
    series = daemon.get(f"/jobs/{job}/metrics", key="train/loss")["series"]["train/loss"]
    assert [point[:2] for point in series] == [[1, 1.0], [2, 0.5], [3, 1 / 3], [4, 0.25], [5, 0.2]]
    (summary,) = daemon.get("/jobs")["jobs"]
    assert (summary["id"], summary["state"], summary["last"]) == (job, "succeeded", {"train/loss": 0.2})
    states = [item["values"]["state"] for item in everything(daemon, job) if "seq" in item and item["kind"] == "state"]
    order = list(dict.fromkeys(states))
    assert order == ["planning", "awaiting_approval", "queued", "running", "delivering", "succeeded"]
    starts = (daemon.home.attempt(job, 1) / "starts").read_text().split()
    assert len(starts) == 1


def everything(daemon, job: str) -> list[dict[str, Any]]:
    found, cursor = [], ""
    while True:
        page = daemon.get(f"/jobs/{job}/events", after=cursor, limit=3)
        found += page["events"]
        cursor = page["cursor"]
        if page["ended"]:
            return found


def test_the_stream_tells_everything_and_ends(daemon) -> None:
    job = submit(daemon)
    lines: list[str] = []

    def follow() -> None:
        with daemon.client() as client, client.stream("GET", f"/jobs/{job}/stream", timeout=60) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines.extend(response.iter_lines())

    thread = threading.Thread(target=follow)
    thread.start()
    finish(daemon, job)
    thread.join(30)
    assert not thread.is_alive()
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert told == everything(daemon, job)
    ids = [line[4:] for line in lines if line.startswith("id: ")]
    with daemon.client() as client:
        headers = {"Last-Event-ID": ids[4]}
        with client.stream("GET", f"/jobs/{job}/stream", headers=headers) as response:
            rest = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert rest == told[5:]


def test_a_long_poll_answers_when_something_comes(daemon) -> None:
    job = submit(daemon, yes=False)
    cursor = daemon.get(f"/jobs/{job}/events")["cursor"]
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(daemon.get(f"/jobs/{job}/events", after=cursor, wait=25)))
    thread.start()
    daemon.post(f"/jobs/{job}/cancel")
    thread.join(20)
    assert answers[0]["events"][0]["values"]["state"] == "cancelled"


def test_cancel_ends_what_runs(daemon) -> None:
    job = submit(daemon, "wait 60")
    daemon.drive()
    daemon.poll(lambda: daemon.get(f"/jobs/{job}")["attempts"][0]["state"] == "running")
    assert [item["id"] for item in daemon.get("/queue")["running"]] == [job]
    assert daemon.post(f"/jobs/{job}/cancel") == {"id": job, "state": "running"}
    doc = finish(daemon, job)
    assert (doc["state"], doc["attempts"][0]["state"], doc["attempts"][0]["exit_code"]) == (
        "cancelled",
        "cancelled",
        75,
    )


def test_a_failure_keeps_its_own_error_and_retry_goes_on(daemon) -> None:
    job = submit(daemon, "fail")
    doc = finish(daemon, job)
    assert doc["state"] == "failed"
    assert (doc["error"]["code"], doc["error"]["message"]) == ("data.row", "Row 3 is broken.")
    daemon.post(f"/jobs/{job}/retry")
    assert daemon.get(f"/jobs/{job}/events")["ended"] is False
    doc = finish(daemon, job)
    assert [item["number"] for item in doc["attempts"]] == [1, 2]


def test_logs_are_read_on_by_bytes(daemon) -> None:
    job = submit(daemon, "speak")
    assert finish(daemon, job)["attempts"][0]["exit_code"] == 0
    whole = (daemon.home.attempt(job, 1) / "log").read_text()
    assert "to stdout" in whole
    first = daemon.get(f"/jobs/{job}/logs")
    assert (first["text"], first["next"], first["ended"]) == (whole, len(whole.encode()), True)
    assert daemon.get(f"/jobs/{job}/logs", after=3, attempt=1)["text"] == whole[3:]
    with pytest.raises(InputError):
        daemon.get(f"/jobs/{job}/logs", attempt=9)


def test_approve_by_hash(daemon) -> None:
    job = submit(daemon, yes=False)
    with pytest.raises(NotReady):
        daemon.post(f"/jobs/{job}/approve", {"by": "ann"})
    daemon.drive()
    assert daemon.get(f"/jobs/{job}")["state"] == "awaiting_approval"
    plan = daemon.get(f"/jobs/{job}/plan")["plan"]
    with pytest.raises(Conflict) as caught:
        daemon.post(f"/jobs/{job}/approve", {"by": "ann", "plan": "0" * 64})
    assert caught.value.code == "plan.stale"
    assert daemon.post(f"/jobs/{job}/edit", {"sets": {"train.max_steps": 2}})["state"] == "planning"
    with pytest.raises(Conflict):
        daemon.post(f"/jobs/{job}/approve", {"by": "ann", "plan": plan["plan_hash"]})
    daemon.drive()
    again = daemon.get(f"/jobs/{job}/plan")["plan"]["plan_hash"]
    assert again != plan["plan_hash"]
    assert daemon.post(f"/jobs/{job}/approve", {"by": "ann", "plan": again})["state"] == "queued"
    assert finish(daemon, job)["state"] == "succeeded"


def test_yes_needs_a_cap_where_a_backend_costs_money(daemon) -> None:
    assert any(item["name"] == "costly" for item in daemon.get("/backends")["backends"])
    with pytest.raises(InputError) as caught:
        submit(daemon, backend="costly")
    assert (caught.value.code, daemon.get("/jobs")["jobs"]) == ("limits.usd", [])
    job = submit(daemon, backend="costly", yes=False)
    daemon.drive()
    with pytest.raises(InputError) as caught:
        daemon.post(f"/jobs/{job}/approve", {"by": "ann"})
    assert caught.value.code == "limits.usd"
    assert daemon.post(f"/jobs/{job}/approve", {"by": "ann", "usd": 1.5})["state"] == "queued"


def test_ask_answers_from_facts(daemon) -> None:
    job = submit(daemon, "ok 4")
    finish(daemon, job)
    said = daemon.post("/ask", {"question": "What is the loss?", "job": job})
    assert said["job"] == job
    assert "0.25" in said["answer"]


def test_backends_say_what_is_broken(idle) -> None:
    listed = {item["name"]: item for item in idle.get("/backends")["backends"]}
    assert listed["local"]["ready"]
    assert listed["local"]["devices"][0]["memory_bytes"] > 0
    assert not listed["broken"]["ready"]
    assert "no_such_module" in listed["broken"]["why_not"]


# --- once, and only once -------------------------------------------------------------------------------------------


def test_twenty_requests_with_one_key_are_one_job(daemon) -> None:
    answers: list[Any] = []

    def ask() -> None:
        answers.append(daemon.post("/jobs", {"request": REQUEST}, **{"Idempotency-Key": "one"}))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20
    assert len({answer["id"] for answer in answers}) == 1
    assert len(daemon.get("/jobs")["jobs"]) == 1
    with pytest.raises(Conflict) as caught:
        daemon.post("/jobs", {"request": {**REQUEST, "quick": True}}, **{"Idempotency-Key": "one"})
    assert caught.value.code == "idempotency.reused"


def test_a_refused_request_leaves_no_job_and_no_key(daemon) -> None:
    for _ in range(2):
        with pytest.raises(InputError):
            daemon.post("/jobs", {"request": {"text": ""}}, **{"Idempotency-Key": "two"})
    assert daemon.get("/jobs")["jobs"] == []
    assert daemon.post("/jobs", {"request": REQUEST}, **{"Idempotency-Key": "two"})["state"] == "planning"


def test_pages(daemon) -> None:
    jobs = [submit(daemon, yes=False) for _ in range(5)]
    first = daemon.get("/jobs", limit=2)
    rest = daemon.get("/jobs", limit=9, before=first["next"])
    assert [item["id"] for item in (*first["jobs"], *rest["jobs"])] == jobs[::-1]
    assert rest["next"] is None


# --- what must be refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        ({"headers": {"Host": "evil.example"}}, 400, "request.host"),
        ({"headers": {"Host": ""}}, 400, "request.host"),
        ({"headers": {"Origin": "http://evil.example"}}, 403, "request.origin"),
        ({"headers": {"Origin": "null"}}, 403, "request.origin"),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 400, "request.type"),
        ({"content": b"a=1", "headers": {"Content-Type": "application/x-www-form-urlencoded"}}, 400, "request.type"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "request.json"),
        ({"content": b'{"a": NaN}', "headers": {"Content-Type": "application/json"}}, 400, "request.json"),
        ({"content": b'{"a": "\\ud800"}', "headers": {"Content-Type": "application/json"}}, 400, "request.json"),
        ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400, "request.json"),
        ({"content": b"[]", "headers": {"Content-Type": "application/json"}}, 400, "request.json"),
        ({"content": b" " * 2**21, "headers": {"Content-Type": "application/json"}}, 413, "request.too_large"),
        ({"json": {"request": {"text": "x", "bogus": 1}}}, 400, None),
        ({"json": {"request": {}}}, 400, None),
        ({"json": {"request": REQUEST, "approve": {"usd": -1}}}, 400, "request.body"),
        ({"json": {"request": {**REQUEST, "backend": "moon"}}}, 400, "backend.unknown"),
        ({"json": {"request": REQUEST}, "headers": {"Idempotency-Key": "k" * 999}}, 400, "idempotency.key"),
    ],
)
def test_refused(idle, given: dict[str, Any], status: int, code: str | None) -> None:
    with idle.client() as client:
        response = client.post("/jobs", **given)
        assert client.get("/jobs").json()["jobs"] == []
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code or code is None
    assert "Traceback" not in response.text


def test_a_body_without_a_length_is_bounded_too(idle) -> None:
    def endless():
        for _ in range(64):
            yield b" " * 65536

    with idle.client() as client:
        response = client.post("/jobs", content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/nowhere", 404),
        ("DELETE", "/jobs/last", 405),
        ("GET", "/jobs/last", 404),
        ("GET", "/jobs/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/jobs/j-aaaaaa/events", 404),
        ("GET", "/jobs/j-aaaaaa/stream", 404),
        ("GET", "/jobs?limit=x", 400),
        ("GET", "/jobs?before=j-aaaaaa", 404),
        ("GET", "/jobs?state=nope", 400),
        ("POST", "/graph/lease", 400),
        ("POST", "/graph/j-aaaaaa/plan", 400),
        ("GET", "/graph/j-aaaaaa/view", 404),
        ("GET", "/graph/devices?backend=moon", 400),
    ],
)
def test_errors_are_documents(idle, method: str, path: str, status: int) -> None:
    with idle.client() as client:
        response = client.request(method, path)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) >= {"type", "code", "message", "why", "fix", "where", "exit_code"}


def test_hostile_references_and_names(daemon) -> None:
    for name in ("x\x1b]52;c;AAAA\x07", "'; DROP TABLE jobs; --", "last", "../x"):
        with pytest.raises(InputError):
            submit(daemon, name, yes=False)
    job = submit(daemon, "my bot 1.5", yes=False)
    assert daemon.get("/jobs/my bot 1.5")["id"] == job
    for ref in ("%00", "%F0%9F%92%A9", "a" * 3000, "'%20OR%201=1"):
        with pytest.raises(TunesmithError) as caught:
            daemon.get(f"/jobs/{ref}")
        assert caught.value.code == "job.unknown"


def test_half_a_request_holds_nobody_up(daemon) -> None:
    idle = []
    for _ in range(20):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(daemon.home.address)
        connection.send(
            b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        idle.append(connection)
    assert daemon.get("/health")["pid"] == daemon.process.pid
    for connection in idle:
        connection.close()
    assert submit(daemon, yes=False)


def test_readers_that_stop_reading_hold_nobody_up(daemon) -> None:
    job = submit(daemon, "ok 2000")
    stuck = []
    for _ in range(10):
        connection = socket.socket(socket.AF_UNIX)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(daemon.home.address)
        connection.send(f"GET /jobs/{job}/stream HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        stuck.append(connection)
    doc = finish(daemon, job)
    assert (doc["state"], doc["progress"]["step"]) == ("succeeded", 2000)
    assert len(everything_at_once(daemon, job)) >= 2000
    for connection in stuck:
        connection.close()
    assert "Traceback" not in daemon.said()


def everything_at_once(daemon, job: str) -> list[Any]:
    return list(daemon.get(f"/jobs/{job}/events", limit=10_000)["events"])


# --- the driver's side ---------------------------------------------------------------------------------------------


def test_writes_need_the_fence(daemon) -> None:
    job = submit(daemon, yes=False)
    leased = daemon.post("/graph/lease", {"driver": os.getpid(), "wait": 5})
    assert leased["job"] == job
    plan = {"plan": plain(daemon.make_plan())}
    with pytest.raises(InputError):
        daemon.post(f"/graph/{job}/plan", plan)
    with pytest.raises(Conflict):
        daemon.post(f"/graph/{job}/plan", plan, **{"X-Fence": "99"})
    with pytest.raises(InputError):
        daemon.post(f"/graph/{job}/plan", {"plan": {"stages": 3}}, **{"X-Fence": str(leased["fence"])})
    daemon.post(f"/graph/{job}/plan", plan, **{"X-Fence": str(leased["fence"])})
    daemon.post("/graph/release", leased)
    assert daemon.get(f"/jobs/{job}")["state"] == "awaiting_approval"
    assert daemon.post("/graph/lease", {"driver": os.getpid(), "wait": 0}) == {"job": None}


def test_a_lease_comes_when_work_comes(daemon) -> None:
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(daemon.post("/graph/lease", {"driver": os.getpid(), "wait": 25}))
    )
    thread.start()
    job = submit(daemon, yes=False)
    thread.join(20)
    assert answers[0]["job"] == job


def test_a_flood_of_jobs(daemon) -> None:
    with daemon.client() as client:
        states = Counter(client.post("/jobs", json={"request": REQUEST}).json()["state"] for _ in range(300))
    assert states == {"planning": 300}
    with daemon.client() as client:
        assert len(client.get("/jobs", params={"limit": 1000}).json()["jobs"]) == 300
