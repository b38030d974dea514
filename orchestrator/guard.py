"""What a request must be before anything reads it: from a client of this daemon, not a browser; small; JSON."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.orchestrator.errors import InputError

HOSTS = frozenset({"localhost", "tunesmith", "127.0.0.1", "[::1]"})
MAX_BODY = 1024 * 1024
MAX_GRAPH_BODY = 32 * 1024 * 1024  # a plan holds findings of a whole data set


class Guard:
    """ASGI middleware: refuses foreign Host headers and everything that carries an Origin, before any route runs.

    A page in a browser that reaches a local port (by name rebinding, or a form) sends both; our clients send neither.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refused = _refused(scope)
        if refused is None:
            await self.app(scope, receive, send)
            return
        error, status = refused
        await Response(json.dumps({"error": error.to_doc()}), status, media_type="application/json")(
            scope, receive, send
        )


def _refused(scope: Scope) -> tuple[InputError, int] | None:
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if scope["type"] != "http" or name not in HOSTS:
        return InputError(f"The host {host[:80]!r} is not this daemon.", code="request.host"), 400
    if b"origin" in headers:
        return InputError("Requests from web pages are not answered.", code="request.origin"), 403
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit_of(scope["path"]):
        return too_large(scope["path"]), 413
    return None


def limit_of(path: str) -> int:
    """The most bytes a request's body may have."""
    return MAX_GRAPH_BODY if path.startswith("/graph/") else MAX_BODY


def too_large(path: str) -> InputError:
    """The error for a body beyond the limit."""
    return InputError(f"The request is larger than {limit_of(path) // 1024} KiB.", code="request.too_large")


async def json_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body; an empty body is an empty object. Raises InputError for anything else.

    The body is read no further than its limit. Only application/json counts: a form in a browser cannot send it.
    """
    limit = limit_of(request.url.path)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large(request.url.path)
        parts.append(part)
    data = b"".join(parts)
    if not data:
        return {}
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise InputError("The body must be application/json.", code="request.type", where="Content-Type")
    try:
        doc = json.loads(data, parse_constant=_refuse)
        json.dumps(doc, ensure_ascii=False).encode()  # lone surrogates cannot be stored
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise InputError("The body is not valid JSON.", why=why, code="request.json") from error
    if not isinstance(doc, dict):
        raise InputError("The body must be a JSON object.", code="request.json")
    return doc


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
