"""The daemon's HTTP over its Unix socket as typed methods: plain documents in and out, errors as they were raised.

httpx is imported on the first request, not before: it costs 0.15 s.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from tunesmith.orchestrator.errors import Conflict, InputError, NoDaemon, StorageError, TunesmithError, from_doc
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.inert import inert

if TYPE_CHECKING:
    import subprocess

    import httpx

Doc = dict[str, Any]

START_SECONDS = 30.0
_TRIES = 4
_PAUSE = 0.1

_started: list[subprocess.Popen[bytes]] = []  # kept, so that a daemon that outlives us is no "forgotten child"


class Client:
    """One home's daemon. Reads and writes are repeated when a connection breaks; writes carry an idempotency key.

    Every method raises NoDaemon where nothing answers, and otherwise the error that the daemon raised.
    """

    def __init__(self, home: Home, *, timeout: float = 30.0) -> None:
        self.home = home
        self._timeout = timeout
        self._http: httpx.Client | None = None
        self._address = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._http is not None:
            self._http.close()
            self._http = None

    # the daemon itself

    def health(self) -> Doc:
        """{"pid", "version", "home", "uptime_seconds", "schema_version"}; asked once, without repeats."""
        return self._call("GET", "/health", timeout=5.0, tries=1)

    def shutdown(self) -> Doc:
        """End the daemon, never a job."""
        return self._call("POST", "/shutdown", body={}, tries=1)

    # jobs

    def submit(
        self, request: Mapping[str, Any], *, approve: Mapping[str, Any] | None = None, key: str | None = None
    ) -> Doc:
        """Store a request. `approve` ({"by", "usd", "hours"}) approves the first plan saved. -> {"id", "state"}"""
        return self._call("POST", "/jobs", body={"request": dict(request), "approve": approve}, key=key)

    def jobs(self, *, limit: int = 200, before: str | None = None, state: str | None = None) -> Doc:
        """{"jobs": [summary], "next": ID | null}, newest first."""
        return self._call("GET", "/jobs", params={"limit": limit, "before": before, "state": state})

    def show(self, ref: str) -> Doc:
        """The `show` document of a job, by id, unique prefix, name, or `last`."""
        return self._call("GET", self._job(ref))

    def plan(self, ref: str) -> Doc | None:
        """The job's plan as a document, or None while there is none."""
        plan = self._call("GET", self._job(ref, "plan")).get("plan")
        return plan if isinstance(plan, dict) else None

    def events(self, ref: str, *, after: str = "", limit: int = 1000, wait: float = 0.0) -> Doc:
        """{"events", "cursor", "state", "ended"} after an opaque cursor; waits up to `wait` seconds for the first."""
        params = {"after": after or None, "limit": limit, "wait": wait or None}
        return self._call("GET", self._job(ref, "events"), params=params, timeout=self._timeout + wait)

    def metrics(self, ref: str, *, key: str | None = None, attempt: str | None = None) -> Doc:
        """{"series": {key: [[step, value, time], ...]}}; the newest attempt wins for each step."""
        return self._call("GET", self._job(ref, "metrics"), params={"key": key, "attempt": attempt})

    def logs(self, ref: str, *, attempt: int | None = None, after: int = 0) -> Doc:
        """{"text", "next", "ended"}: at most 256 KiB from byte `after`."""
        return self._call("GET", self._job(ref, "logs"), params={"attempt": attempt, "after": after or None})

    def answer(self, ref: str, fields: Mapping[str, Any], *, key: str | None = None) -> Doc:
        """Answer a plan's questions. -> {"state"}"""
        return self._call("POST", self._job(ref, "answer"), body={"fields": dict(fields)}, key=key)

    def edit(self, ref: str, sets: Mapping[str, Any], *, key: str | None = None) -> Doc:
        """Change settings; voids the plan and the approval. -> {"state"}"""
        return self._call("POST", self._job(ref, "edit"), body={"sets": dict(sets)}, key=key)

    def approve(
        self,
        ref: str,
        *,
        plan: str | None = None,
        by: str,
        usd: float | None = None,
        hours: float | None = None,
        key: str | None = None,
    ) -> Doc:
        """Approve the plan with this hash, or the one shown now. Raises Conflict for a stale hash."""
        body = {"plan": plan, "by": by, "usd": usd, "hours": hours}
        return self._call("POST", self._job(ref, "approve"), body=body, key=key)

    def reject(self, ref: str, *, key: str | None = None) -> Doc:
        """Turn the plan down; the job ends."""
        return self._call("POST", self._job(ref, "reject"), body={}, key=key)

    def cancel(self, ref: str, *, key: str | None = None) -> Doc:
        """End the job and whatever runs for it."""
        return self._call("POST", self._job(ref, "cancel"), body={}, key=key)

    def retry(self, ref: str, *, key: str | None = None) -> Doc:
        """Reopen a job that ended without a result."""
        return self._call("POST", self._job(ref, "retry"), body={}, key=key)

    # the rest

    def ask(self, question: str, job: str | None = None) -> Doc:
        """{"answer", "facts", "job"} from recorded facts."""
        return self._call("POST", "/ask", body={"question": question, "job": job})

    def backends(self) -> Doc:
        """{"backends": [{"name", "ready", "why_not", "devices"}]}"""
        return self._call("GET", "/backends")

    def queue(self) -> Doc:
        """{"running": [...], "queued": [...]}"""
        return self._call("GET", "/queue")

    def _job(self, ref: str, part: str = "") -> str:
        ref = ref.strip()
        if not ref.strip(".") or len(ref) > 200:
            raise InputError(
                f"There is no job {inert(ref, limit=40)!r}.", fix="List jobs: tunesmith jobs", code="job.unknown"
            )
        path = f"/jobs/{quote(ref, safe='', errors='replace')}"
        return f"{path}/{part}" if part else path

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Doc | None = None,
        timeout: float | None = None,
        key: str | None = None,
        tries: int = _TRIES,
    ) -> Doc:
        import httpx

        headers, content = {}, None
        if method == "POST":
            headers = {"Idempotency-Key": key or uuid.uuid4().hex, "Content-Type": "application/json"}
            content = json.dumps(body, allow_nan=False).encode()  # ASCII: text that is not valid Unicode survives
        query = {name: value for name, value in (params or {}).items() if value is not None}
        for attempt in range(tries):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                response = self._connection().request(
                    method, path, params=query, content=content, headers=headers, timeout=timeout or self._timeout
                )
            except (OSError, httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise no_daemon(self.home) from error
            except httpx.TimeoutException as error:
                raise NoDaemon(
                    "The daemon does not answer in time.",
                    fix="See whether it is busy: tunesmith daemon status",
                    code="daemon.slow",
                ) from error
            except httpx.TransportError:
                self.close()  # the daemon went away under the request: the key makes a repeat safe
                continue
            return _read(response)
        raise no_daemon(self.home)

    def _connection(self) -> httpx.Client:
        import httpx

        try:
            address = self.home.address
        except StorageError as error:
            raise no_daemon(self.home) from error
        # Knocking first costs 0.1 ms; httpcore forgets to close the socket of a connection that is refused.
        with socket.socket(socket.AF_UNIX) as knock:
            knock.connect(address)
        if self._http is None or address != self._address:
            self.close()
            # A private socket has no certificates to check; reading the bundle would cost 80 ms.
            transport = httpx.HTTPTransport(uds=address, verify=False)
            self._http = httpx.Client(transport=transport, base_url="http://localhost", trust_env=False)
            self._address = address
        return self._http


def _read(response: httpx.Response) -> Doc:
    try:
        doc = response.json()
    except ValueError:
        doc = None
    if response.is_success and isinstance(doc, dict):
        return doc
    if isinstance(doc, dict) and isinstance(doc.get("error"), dict):
        raise from_doc(doc["error"])
    raise TunesmithError(
        f"The daemon answered with status {response.status_code} and no document.",
        fix="See daemon.log in the home folder; tunesmith doctor says where that is.",
        code="daemon.answer",
    )


def no_daemon(home: Home) -> NoDaemon:
    """The error for a home where no daemon answers."""
    return NoDaemon(
        "No daemon answers.",
        why=f"Nothing listens on {inert(home.socket, limit=200)}.",
        fix="Start it: tunesmith daemon start",
    )


def running(home: Home) -> Doc | None:
    """The health of the daemon that answers now, or None."""
    with Client(home) as client:
        try:
            return client.health()
        except NoDaemon:
            return None


def ensure_daemon(home: Home, *, seconds: float = START_SECONDS) -> Doc:
    """The health of this home's daemon, started when none answers.

    Any number of callers may do this at once: the daemon's own lock lets one live, and all go on with that one. It is
    started in a session of its own, with its output in daemon.log, and outlives the caller. Raises NoDaemon, with what
    the log says, where none answers within `seconds`; StorageError where the home cannot be used.
    """
    health = running(home)
    if health is not None:
        return health
    home.make()
    process = _spawn(home)
    deadline = time.monotonic() + seconds
    pause = 0.02
    while time.monotonic() < deadline:
        health = running(home)
        if health is not None:
            return health
        code = process.poll()
        if code is not None and code != Conflict.exit_code:
            break  # not the loser of a race: it could not start at all
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)
    said = _last_line(home)
    raise NoDaemon(
        "The daemon could not be started.",
        why=said,
        fix=f"See {inert(home.daemon_log, limit=200)}, or run it in the foreground: tunesmith daemon run",
        code="daemon.start",
    )


def _spawn(home: Home) -> subprocess.Popen[bytes]:
    import subprocess

    log = os.open(home.daemon_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tunesmith.orchestrator.daemon", "run", "--home", str(home.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(log)
    _started.append(process)
    return process


def _last_line(home: Home) -> str:
    try:
        with home.daemon_log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - 4096, 0))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return inert(lines[-1], limit=300) if lines else ""
