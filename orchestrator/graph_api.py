"""The driver's side of the HTTP: leases and the writes of JobPort, each under the fence in the X-Fence header."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from tunesmith.orchestrator import processes
from tunesmith.orchestrator.attempts import handle_of
from tunesmith.orchestrator.errors import InputError, TunesmithError
from tunesmith.orchestrator.guard import json_object
from tunesmith.orchestrator.nouns import Attempt, Finding, Plan, Remedy
from tunesmith.orchestrator.plain import build, plain
from tunesmith.orchestrator.states import JobState
from tunesmith.orchestrator.wishes import paid

if TYPE_CHECKING:
    from tunesmith.orchestrator.api import Call, Core

Doc = dict[str, Any]
LONGEST_WAIT = 30.0


class GraphApi:
    """Routes under /graph."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.leases = core.leases

    def routes(self) -> list[tuple[str, str, Callable[[Call], Doc]]]:
        """(method, path, handler) of every route but the long poll."""
        return [
            ("POST", "/graph/release", self.release),
            ("GET", "/graph/devices", self.devices),
            ("GET", "/graph/{job}/view", self.view),
            ("POST", "/graph/{job}/plan", _typed(self.plan)),
            ("POST", "/graph/{job}/submit", _typed(self.submit)),
            ("POST", "/graph/{job}/diagnose", _typed(self.diagnose)),
            ("POST", "/graph/{job}/collect", self.collect),
            ("POST", "/graph/{job}/finish", _typed(self.finish)),
        ]

    async def lease(self, request: Request) -> Doc:
        body = await json_object(request)
        pid, wait = body.get("driver"), body.get("wait", 0)
        holder = processes.identity(pid) if type(pid) is int and pid > 0 else None
        if holder is None or isinstance(wait, bool) or not isinstance(wait, (int, float)):
            raise InputError("A lease needs the pid of a driver that lives, and a wait.", code="graph.lease")
        until = time.monotonic() + min(max(float(wait), 0.0), LONGEST_WAIT)
        with self.core.bell.listen("") as rung:
            while True:
                rung.clear()
                leased = await run_in_threadpool(self.leases.lease, holder)
                left = until - time.monotonic()
                if leased is not None:
                    return {"job": leased[0], "fence": leased[1]}
                if left <= 0 or self.core.bell.closed or await request.is_disconnected():
                    return {"job": None}
                await self.core.bell.wait(rung, min(left, 1.0))

    def release(self, call: Call) -> Doc:
        job, fence = call.body.get("job"), call.body.get("fence")
        if not isinstance(job, str) or type(fence) is not int:
            raise InputError("`job` and `fence` say which lease.", code="graph.lease")
        self.leases.release(job, fence)
        return {}

    def devices(self, call: Call) -> Doc:
        return {"devices": plain(self.core.backends.devices(call.query.get("backend") or None))}

    def view(self, call: Call) -> Doc:
        return {"view": plain(self.leases.view(call.path["job"], call.fence))}

    def plan(self, call: Call) -> Doc:
        plan = build(Plan, call.body["plan"])
        costs = paid(plan, self.core.backends.prices())
        self.leases.save_plan(call.path["job"], _fence(call), plan, paid=costs)
        return {}

    def submit(self, call: Call) -> Doc:
        self.leases.submit(call.path["job"], _fence(call), build(Attempt, call.body["attempt"]))
        return {}

    def diagnose(self, call: Call) -> Doc:
        self.leases.diagnose(
            call.path["job"],
            _fence(call),
            int(call.body["attempt"]),
            str(call.body["cause"]),
            [build(Finding, item) for item in call.body.get("evidence", [])],
            [build(Remedy, item) for item in call.body.get("remedies", [])],
        )
        return {}

    def collect(self, call: Call) -> Doc:
        job, fence = call.path["job"], _fence(call)
        row = self.leases.collectable(job, fence)
        with self.leases.busy(job):
            artifacts = self.core.backends.get(row["backend"]).collect(handle_of(row))
        self.leases.collected(job, fence, row["number"], artifacts)
        return {"artifacts": plain(tuple(artifacts))}

    def finish(self, call: Call) -> Doc:
        self.leases.finish(call.path["job"], _fence(call), JobState(call.body["state"]), call.body.get("error"))
        return {}


def _fence(call: Call) -> int:
    if call.fence is None:
        raise InputError("This write needs the lease's fence in X-Fence.", code="graph.fence", where="X-Fence")
    return call.fence


def _typed(handler: Callable[[Call], Doc]) -> Callable[[Call], Doc]:
    """A handler whose body has a shape to get wrong."""

    def checked(call: Call) -> Doc:
        try:
            return handler(call)
        except TunesmithError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "The body has not the shape asked for.", why=str(error)[:300], code="graph.body"
            ) from error

    return checked
