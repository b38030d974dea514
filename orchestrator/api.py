"""The daemon's HTTP: routes over the store, as docs/architecture.md lists them. Errors are documents, no tracebacks."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tunesmith.orchestrator import show, stream, wishes
from tunesmith.orchestrator.attempts import Attempts
from tunesmith.orchestrator.backends import Backends
from tunesmith.orchestrator.bell import Bell
from tunesmith.orchestrator.errors import (
    BackendUnavailable,
    Conflict,
    InputError,
    NotReady,
    StorageError,
    TunesmithError,
    Waiting,
)
from tunesmith.orchestrator.guard import Guard, json_object
from tunesmith.orchestrator.home import Home, write_text
from tunesmith.orchestrator.leases import Leases
from tunesmith.orchestrator.logs import read_log
from tunesmith.orchestrator.metrics import Metrics
from tunesmith.orchestrator.nouns import SCHEMA_VERSION
from tunesmith.orchestrator.plain import plain
from tunesmith.orchestrator.reading import Reading
from tunesmith.orchestrator.store import Store, dumps

Doc = dict[str, Any]
log = logging.getLogger("tunesmith.daemon")

PAGE = 1000
LONGEST_WAIT = 60.0
HEARTBEAT = 15.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request, read: path and query parameters, the JSON body, and the fence of a driver."""

    path: Mapping[str, Any]
    query: Mapping[str, str]
    keys: tuple[str, ...]  # every `key=` of the query
    body: Doc
    fence: int | None

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number of the query, within limits. Raises InputError."""
        text = self.query.get(name, "")
        if not text:
            return default
        if not text.isascii() or not text.isdecimal() or len(text) > 18:
            raise InputError(f"{name} must be a whole number, not {text[:40]!r}.", where=name, code="request.query")
        return min(max(int(text), low), high)


Handler = Callable[[Call], Doc]


@dataclass(frozen=True, slots=True)
class Core:
    """Everything the routes work with; composed by the daemon."""

    home: Home
    store: Store
    metrics: Metrics
    leases: Leases
    backends: Backends
    bell: Bell
    health: Callable[[], Doc]
    stop: Callable[[], None]
    reasons: Callable[[], Mapping[tuple[str, int], str]]


class Api:
    """The application: one method for each route that people use. The driver's routes are in graph_api.py."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.store = core.store

    def app(self) -> Starlette:
        """The ASGI application."""
        from tunesmith.orchestrator.graph_api import GraphApi

        graph = GraphApi(self.core)
        read, write = self._endpoint, self._writing
        routes = [
            Route("/health", read(lambda call: self.core.health()), methods=["GET"]),
            Route("/shutdown", read(self.shutdown), methods=["POST"]),
            Route("/jobs", write(self.submit), methods=["POST"]),
            Route("/jobs", read(self.jobs), methods=["GET"]),
            Route("/jobs/{ref}", read(self.job), methods=["GET"]),
            Route("/jobs/{ref}/plan", read(self.plan), methods=["GET"]),
            Route("/jobs/{ref}/events", self.events, methods=["GET"]),
            Route("/jobs/{ref}/stream", self.follow, methods=["GET"]),
            Route("/jobs/{ref}/metrics", read(self.series), methods=["GET"]),
            Route("/jobs/{ref}/logs", read(self.logs), methods=["GET"]),
            Route("/jobs/{ref}/answer", write(self.answer), methods=["POST"]),
            Route("/jobs/{ref}/edit", write(self.edit), methods=["POST"]),
            Route("/jobs/{ref}/approve", write(self.approve), methods=["POST"]),
            Route("/jobs/{ref}/reject", write(self.wish(wishes.reject)), methods=["POST"]),
            Route("/jobs/{ref}/cancel", write(self.wish(wishes.cancel)), methods=["POST"]),
            Route("/jobs/{ref}/retry", write(self.wish(wishes.retry)), methods=["POST"]),
            Route("/ask", read(self.ask), methods=["POST"]),
            Route("/backends", read(lambda call: {"backends": self.core.backends.listing()}), methods=["GET"]),
            Route("/queue", read(self.queue), methods=["GET"]),
            Route("/graph/lease", _raw(graph.lease), methods=["POST"]),
            *(Route(path, read(handler), methods=[method]) for method, path, handler in graph.routes()),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
        app.add_middleware(Guard)
        return app

    # --- jobs --------------------------------------------------------------------------------------------------

    def submit(self, call: Call) -> Doc:
        from tunesmith.orchestrator import wire

        yes = _caps(call.body.get("approve"))
        request = wire.read_request(call.body.get("request") or {})
        backend = request.backend or request.sets.get("backend") or (request.spec or {}).get("backend")
        if backend is not None and backend != "auto" and backend not in self.core.backends.names():
            from tunesmith.orchestrator.backends import unknown

            raise unknown(str(backend), self.core.backends.names())
        if yes is not None and yes["usd"] is None and self.core.backends.prices().get(str(backend), 0.0) > 0:
            limits = (request.spec or {}).get("limits")
            if request.sets.get("limits.usd") is None and not (isinstance(limits, dict) and limits.get("usd")):
                raise wishes.no_cap(str(backend))
        with self.store.transaction():
            job = self.store.create(request, yes)
            folder = self.core.home.job(job)
            write_text(folder / "request.json", dumps(request), durable=False)
        return {"id": job, "state": self.store.job(job)["state"]}

    def jobs(self, call: Call) -> Doc:
        before = call.query.get("before")
        rows, more = self.store.page(
            limit=call.number("limit", 200, 1, 1000),
            before=None if before is None else self.store.find(before),
            state=call.query.get("state"),
        )
        docs = show.summaries(self.store, self.core.metrics, rows)
        return {"schema_version": SCHEMA_VERSION, "jobs": docs, "next": docs[-1]["id"] if more else None}

    def job(self, call: Call) -> Doc:
        return show.show(self.store, self.core.metrics, self._ref(call))

    def plan(self, call: Call) -> Doc:
        return {"schema_version": SCHEMA_VERSION, "plan": plain(self.store.plan(self._ref(call)))}

    def series(self, call: Call) -> Doc:
        attempt = call.query.get("attempt", "all")
        number = None if attempt in ("", "all") else call.number("attempt", 1, 1, 10**6)
        found = self.core.metrics.series(self._ref(call), call.keys, number)
        return {"schema_version": SCHEMA_VERSION, "series": found}

    def logs(self, call: Call) -> Doc:
        number = call.number("attempt", 0, 1, 10**6)
        return read_log(self.store, self.core.home, self._ref(call), number, call.number("after", 0, 0, 2**62))

    def queue(self, call: Call) -> Doc:
        doc = show.queue(Attempts(self.store))
        reasons = self.core.reasons()
        for item in (*doc["running"], *doc["queued"]):
            item["why"] = reasons.get((item["id"], item["attempt"]))
        return doc

    # --- what people ask of a job ------------------------------------------------------------------------------

    def answer(self, call: Call) -> Doc:
        from tunesmith.orchestrator import wire

        job, fields = self._ref(call), wire.read_answers(_mapping(call.body, "fields"))
        return {"id": job, "state": wishes.answer(self.store, job, fields)}

    def edit(self, call: Call) -> Doc:
        from tunesmith.orchestrator import wire

        sets = wire.read_sets(_mapping(call.body, "sets"))
        if not sets:
            raise InputError("Nothing to change was given.", code="edit.empty", fix="--set KEY=VALUE")
        job = self._ref(call)
        return {"id": job, "state": wishes.edit(self.store, job, sets)}

    def approve(self, call: Call) -> Doc:
        job = self._ref(call)
        caps = _caps(call.body) or {}
        seen = call.body.get("plan")
        if seen is not None and not isinstance(seen, str):
            raise InputError("`plan` must be a plan's hash.", where="plan", code="request.body")
        plan = self.store.plan(job)
        costs = plan is not None and wishes.paid(plan, self.core.backends.prices())
        by = caps.get("by") or "somebody"
        state = wishes.approve(
            self.store, job, by=by, plan=seen, usd=caps.get("usd"), hours=caps.get("hours"), paid=costs
        )
        return {"id": job, "state": state}

    def wish(self, act: Callable[[Store, str], str]) -> Handler:
        """The handler of a wish that needs nothing but the job."""

        def handler(call: Call) -> Doc:
            job = self._ref(call)
            return {"id": job, "state": act(self.store, job)}

        return handler

    def ask(self, call: Call) -> Doc:
        from tunesmith.orchestrator import answers

        question, ref = call.body.get("question"), call.body.get("job")
        if not isinstance(question, str) or not question.strip():
            raise InputError("Ask something.", code="ask.empty", where="question")
        job = None if ref is None else self.store.find(str(ref))
        return answers.ask(question, job=job, read=Reading(self.store, self.core.metrics))

    def shutdown(self, call: Call) -> Doc:
        self.core.stop()
        return {}

    # --- following ---------------------------------------------------------------------------------------------

    async def events(self, request: Request) -> Response:
        try:
            call = await _read(request)
            limit = call.number("limit", PAGE, 1, 10 * PAGE)
            until = time.monotonic() + _wait(call.query.get("wait", "0"))
            job = await run_in_threadpool(self._ref, call)
            with self.core.bell.listen(job) as rung:
                while True:
                    rung.clear()
                    page = await self._page(job, call.query.get("after", ""), limit)
                    left = until - time.monotonic()
                    if page.items or page.ended or left <= 0 or self.core.bell.closed:
                        break
                    await self.core.bell.wait(rung, left)
        except Exception as error:
            return _failure(error)
        listing = ",".join(text for _, text in page.items)
        tail = dumps({"cursor": page.cursor, "state": page.state, "ended": page.ended})
        return _json(f'{{"events":[{listing}],{tail[1:]}')

    async def follow(self, request: Request) -> Response:
        try:
            call = await _read(request)
            job = await run_in_threadpool(self._ref, call)
            after = call.query.get("after") or request.headers.get("last-event-id", "")
            first = await self._page(job, after, PAGE)
        except Exception as error:
            return _failure(error)
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(self._sent(job, first), media_type="text/event-stream", headers=headers)

    async def _sent(self, job: str, page: stream.Page) -> AsyncIterator[str]:
        with self.core.bell.listen(job) as rung:
            while True:
                if page.items:
                    yield "".join(f"id: {cursor}\ndata: {text}\n\n" for cursor, text in page.items)
                elif page.ended or self.core.bell.closed:
                    return
                else:
                    waited = time.monotonic()
                    await self.core.bell.wait(rung, HEARTBEAT)
                    if time.monotonic() - waited >= HEARTBEAT:
                        yield ": still here\n\n"
                rung.clear()
                page = await self._page(job, page.cursor, PAGE)

    async def _page(self, job: str, after: str, limit: int) -> stream.Page:
        return await run_in_threadpool(stream.page, self.store, self.core.metrics, job, after, limit)

    # --- plumbing ----------------------------------------------------------------------------------------------

    def _ref(self, call: Call) -> str:
        return self.store.find(str(call.path["ref"]))

    def _endpoint(self, handler: Handler) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            call = await _read(request)
            return _json(dumps(await run_in_threadpool(handler, call)))

        return _raw(endpoint)

    def _writing(self, handler: Handler) -> Callable[[Request], Any]:
        """A route whose effect and answer are one transaction, remembered under the request's Idempotency-Key."""

        async def endpoint(request: Request) -> Response:
            call = await _read(request)
            key = request.headers.get("idempotency-key", "")
            if len(key) > 200:
                raise InputError("An Idempotency-Key has at most 200 characters.", code="idempotency.key")
            body = hashlib.sha256(f"{request.url.path}\n{dumps(call.body)}".encode()).hexdigest()
            return _json(await run_in_threadpool(self._once, handler, call, key, body))

        return _raw(endpoint)

    def _once(self, handler: Handler, call: Call, key: str, body: str) -> str:
        with self.store.transaction():
            known = self.store.remembered(key, body) if key else None
            if known is not None:
                return known
            answer = dumps(handler(call))
            if key:
                self.store.remember(key, body, answer)
            return answer


def _raw(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
    async def guarded(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except Exception as error:
            return _failure(error)
        return response if isinstance(response, Response) else _json(dumps(response))

    return guarded


async def _read(request: Request) -> Call:
    body = await json_object(request) if request.method == "POST" else {}
    fence = request.headers.get("x-fence", "")
    return Call(
        path=request.path_params,
        query=dict(request.query_params),
        keys=tuple(request.query_params.getlist("key")),
        body=body,
        fence=int(fence) if fence.isascii() and fence.isdecimal() and len(fence) < 16 else None,
    )


def _json(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")


def _failure(error: Exception) -> Response:
    if isinstance(error, (asyncio.CancelledError, ClientDisconnect)):
        raise error
    if not isinstance(error, TunesmithError):
        log.error("a request failed", exc_info=error)
        error = TunesmithError(
            "The daemon met an unexpected error.",
            why=type(error).__name__,
            fix="daemon.log in the home folder has the details.",
            code="internal",
        )
    return _json(dumps({"error": error.to_doc()}), status_of(error))


def status_of(error: TunesmithError) -> int:
    """The HTTP status that an error travels with."""
    if error.code == "job.unknown":
        return 404
    if error.code == "request.too_large":
        return 413
    for kinds, status in (
        ((InputError, NotReady), 400),
        ((Conflict, Waiting), 409),
        ((BackendUnavailable,), 503),
        ((StorageError,), 507),
    ):
        if isinstance(error, kinds):
            return status
    return 500


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    word = "is not answered here" if status == 404 else "cannot be asked this way"
    doc = InputError(f"{request.method} {request.url.path[:200]} {word}.", code=f"http.{status}").to_doc()
    return _json(dumps({"error": doc}), status)


def _mapping(body: Doc, name: str) -> dict[str, Any]:
    value = body.get(name)
    if not isinstance(value, dict):
        raise InputError(f"`{name}` must be a mapping.", where=name, code="request.body")
    return value


def _caps(value: Any) -> dict[str, Any] | None:
    """Who approves, and under which caps, from a request's body."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InputError("`approve` must be a mapping.", where="approve", code="request.body")
    found: dict[str, Any] = {"by": str(value.get("by") or os.environ.get("USER") or "somebody")[:200]}
    for name in ("usd", "hours"):
        amount = value.get(name)
        if amount is not None and (isinstance(amount, bool) or not isinstance(amount, (int, float)) or not amount >= 0):
            raise InputError(f"`{name}` must be a number of at least 0.", where=name, code="request.body")
        found[name] = None if amount is None else float(amount)
    return found


def _wait(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise InputError(f"wait must be a number of seconds, not {text[:40]!r}.", where="wait", code="request.query")
    return min(seconds, LONGEST_WAIT)
