"""The graph's ports over the daemon's socket: leases, and a JobPort bound to the fence of one lease."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tunesmith.orchestrator.errors import NoDaemon, StorageError, TunesmithError, from_doc
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.nouns import Attempt, Device, Finding, Plan, Remedy
from tunesmith.orchestrator.plain import build, plain
from tunesmith.orchestrator.ports import Artifact, JobPort, JobView
from tunesmith.orchestrator.states import AttemptState, JobState

if TYPE_CHECKING:
    import httpx

Doc = dict[str, Any]

PATIENCE_SECONDS = 15.0  # a daemon that restarts is waited for; every call may be repeated
ANSWER_SECONDS = 60.0
COLLECT_SECONDS = 6 * 3600.0  # results may be large, and every byte is verified


class Line:
    """A connection to the daemon of one home that survives the daemon's restart. Raises NoDaemon when it does not."""

    def __init__(self, home: Home, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.home = home
        self.patience_seconds = patience_seconds
        self._http: httpx.Client | None = None

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def call(
        self,
        method: str,
        path: str,
        body: Doc | None = None,
        *,
        fence: int | None = None,
        seconds: float = ANSWER_SECONDS,
        patient: bool = True,
    ) -> Doc:
        """The answer's document. Raises the error that the daemon raised."""
        import httpx

        headers = {} if fence is None else {"X-Fence": str(fence)}
        until = time.monotonic() + (self.patience_seconds if patient else 0.0)
        while True:
            try:
                timeout = httpx.Timeout(10.0, read=seconds)
                response = self._open().request(method, path, json=body, headers=headers, timeout=timeout)
                doc = response.json()
                break
            except (httpx.TransportError, StorageError, ValueError) as error:
                self.close()
                if time.monotonic() >= until:
                    raise NoDaemon(
                        "No daemon answers.", why=str(error)[:200], fix="Start it: tunesmith daemon start"
                    ) from error
                time.sleep(0.1)
        if response.is_success and isinstance(doc, dict):
            return doc
        raise (
            from_doc(doc["error"])
            if isinstance(doc, dict) and "error" in doc
            else TunesmithError(f"The daemon answered with status {response.status_code}.", code="daemon.answer")
        )

    def _open(self) -> httpx.Client:
        import httpx

        if self._http is None:
            transport = httpx.HTTPTransport(uds=self.home.address)
            self._http = httpx.Client(transport=transport, base_url="http://localhost", trust_env=False)
        return self._http


class RemoteLeases:
    """Jobs that need a decision, as graph/driver.py takes them."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self._fences: dict[str, int] = {}

    def next(self, wait: float) -> tuple[str, JobPort] | None:
        """A leased job and the port bound to its fence, or None when none came within `wait` seconds."""
        doc = self.line.call(
            "POST", "/graph/lease", {"driver": os.getpid(), "wait": wait}, seconds=wait + ANSWER_SECONDS
        )
        if doc.get("job") is None:
            return None
        job, fence = str(doc["job"]), int(doc["fence"])
        self._fences[job] = fence
        return job, RemotePort(self.line, fence)

    def release(self, job: str) -> None:
        """Give the lease of a job back."""
        fence = self._fences.pop(job, None)
        if fence is not None:
            self.line.call("POST", "/graph/release", {"job": job, "fence": fence})


class RemotePort:
    """JobPort for one leased job, over HTTP."""

    def __init__(self, line: Line, fence: int) -> None:
        self.line = line
        self.fence = fence

    def view(self, job: str) -> JobView:
        """The job's facts now."""
        return view_from(self.line.call("GET", f"/graph/{job}/view", fence=self.fence)["view"])

    def devices(self, backend: str | None) -> Sequence[Device]:
        """What the named backend offers, or all of them."""
        query = "" if backend is None else f"?backend={quote(backend, safe='')}"
        return [build(Device, item) for item in self.line.call("GET", f"/graph/devices{query}")["devices"]]

    def save_plan(self, job: str, plan: Plan) -> None:
        """Store a plan."""
        self._write(job, "plan", {"plan": plain(plan)})

    def submit(self, job: str, attempt: Attempt) -> None:
        """Queue an attempt, once for its key."""
        self._write(job, "submit", {"attempt": plain(attempt)})

    def diagnose(
        self, job: str, attempt: int, cause: str, evidence: Sequence[Finding], remedies: Sequence[Remedy]
    ) -> None:
        """Record why an attempt ended as it did, and what is proposed."""
        body = {
            "attempt": attempt,
            "cause": cause,
            "evidence": plain(list(evidence)),
            "remedies": plain(list(remedies)),
        }
        self._write(job, "diagnose", body)

    def collect(self, job: str) -> Sequence[Artifact]:
        """Bring home and verify the results of the last attempt."""
        doc = self._write(job, "collect", {}, seconds=COLLECT_SECONDS)
        return [build(Artifact, item) for item in doc["artifacts"]]

    def finish(self, job: str, state: JobState, error: Mapping[str, Any] | None = None) -> None:
        """End the job."""
        self._write(job, "finish", {"state": str(state), "error": None if error is None else plain(error)})

    def _write(self, job: str, what: str, body: Doc, *, seconds: float = ANSWER_SECONDS) -> Doc:
        return self.line.call("POST", f"/graph/{job}/{what}", body, fence=self.fence, seconds=seconds)


def view_from(doc: Doc) -> JobView:
    """The JobView that `plain` wrote, its states as states again."""
    view = build(JobView, doc)
    attempts = tuple(replace(item, state=AttemptState(item.state)) for item in view.attempts)
    return replace(view, state=JobState(view.state), attempts=attempts)
