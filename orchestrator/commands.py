"""One function per command: plain documents in and out, nothing printed. The command line and the screens share them.

What needs the daemon takes a Client; what runs in-process takes what it needs as a callable, so that nothing here
imports a planner or an executor.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.orchestrator.client import Client, Doc, ensure_daemon, no_daemon, running
from tunesmith.orchestrator.errors import Conflict, InputError, NoDaemon, NotReady, TunesmithError, Waiting, from_doc
from tunesmith.orchestrator.home import Home
from tunesmith.orchestrator.inert import inert
from tunesmith.orchestrator.states import JOB_ENDS, JobState

if TYPE_CHECKING:
    from tunesmith.orchestrator.nouns import Plan, Request

SCHEMA_VERSION = 1
WAIT_SECONDS = 15.0  # how long one question for events stays open
WAITING = frozenset({JobState.AWAITING_INPUT, JobState.AWAITING_APPROVAL})
_SPEC_SUFFIXES = (".yaml", ".yml", ".json")


def document(doc: Mapping[str, Any]) -> Doc:
    """`doc` with `schema_version` first, as every printed document carries it."""
    return {"schema_version": SCHEMA_VERSION, **doc}


# --- in-process ----------------------------------------------------------------------------------------------------


def request(
    target: str,
    *,
    backend: str | None = None,
    sets: Sequence[str] = (),
    quick: bool = False,
    cwd: str | None = None,
) -> Request:
    """The Request for a sentence, or for a spec file (an existing path, or a word that ends like one).

    Settings go into a spec at once; beside a sentence they travel with it. Raises InputError.
    """
    from tunesmith.orchestrator import documents, wire
    from tunesmith.orchestrator.nouns import Request

    cwd = cwd or os.getcwd()
    if is_spec(target, cwd):
        path = Path(cwd, target).expanduser()
        spec = beside(wire.spec_doc(path, sets), path.parent, Path(cwd))
        return wire.read_request({"spec": spec, "backend": backend, "quick": quick, "cwd": cwd})
    documents.check_plain({"backend": backend, "cwd": cwd}, name="The request")
    return Request(text=wire.read_text(target), sets=wire.read_sets(sets), backend=backend, quick=quick, cwd=cwd)


def beside(spec: Doc, folder: Path, cwd: Path) -> Doc:
    """A spec whose data lies beside its file: paths that lead nowhere from `cwd` begin at the spec's own folder."""

    def settle(name: str) -> str:
        if "\0" in name or "://" in name or _there(cwd, name) or not _there(folder, name):
            return name
        return os.path.normpath(folder / name)

    data = [{**item, "source": settle(item["source"])} for item in spec["data"]]
    changed = {**spec, "data": data}
    held_out = (spec.get("eval") or {}).get("source")
    if held_out:
        changed["eval"] = {**spec["eval"], "source": settle(held_out)}
    return changed


def _there(folder: Path, name: str) -> bool:
    """Whether a relative path or pattern leads to something from a folder."""
    try:
        return (folder / Path(name).expanduser()).exists() or ("*" in name and any(folder.glob(name)))
    except (OSError, ValueError, NotImplementedError):  # a name too long, an absolute pattern
        return False


def is_spec(target: str, cwd: str) -> bool:
    """Whether a word names a spec file rather than being a sentence."""
    target = target.strip()
    if not target.lower().endswith(_SPEC_SUFFIXES) or "\n" in target or "\0" in target:
        return False
    return Path(cwd, target).expanduser().is_file() or not any(char.isspace() for char in target)


def plan(wanted: Request, planner: Callable[[Request], Plan]) -> Doc:
    """The plan of a request; trains nothing and stores nothing."""
    from tunesmith.orchestrator.plain import plain

    doc: Doc = plain(planner(wanted))
    return document(doc)


def plan_exit_code(doc: Mapping[str, Any]) -> int:
    """2 where a plan holds an error, 3 where it holds a question, else 0."""
    if errors_of(doc):
        return InputError.exit_code
    return Waiting.exit_code if doc.get("questions") else 0


def errors_of(doc: Mapping[str, Any]) -> list[Doc]:
    """Every error finding of a plan document: its own, its stages' and their data's."""
    found: list[Doc] = list(doc.get("findings") or [])
    for stage in doc.get("stages") or []:
        found += [*(stage.get("findings") or []), *((stage.get("data") or {}).get("problems") or [])]
    return [item for item in found if item.get("level") == "error"]


def resolved_specs(doc: Mapping[str, Any]) -> list[Doc]:
    """The specs of a plan document as `run` accepts them, one for each stage."""
    return [stage["spec"] for stage in doc.get("stages") or []]


def schema(name: str) -> Doc:
    """The JSON Schema of `spec`, `plan` or `event`."""
    from tunesmith.orchestrator import wire

    return wire.schema(name)


# --- jobs ----------------------------------------------------------------------------------------------------------


def submit(client: Client, wanted: Request, *, approve: Mapping[str, Any] | None = None) -> Doc:
    """Store a request. -> {"id", "state"}"""
    from tunesmith.orchestrator.plain import plain

    return client.submit(plain(wanted), approve=approve)


def settle(client: Client, ref: str, *, seconds: float = 600.0) -> Doc:
    """The `show` document once the job is no longer planning. Raises NotReady where that takes too long."""
    deadline = time.monotonic() + seconds
    cursor = ""
    while True:
        page = client.events(ref, after=cursor, wait=10.0)
        cursor = str(page.get("cursor") or cursor)
        if page.get("state") != JobState.PLANNING:
            return client.show(ref)
        if time.monotonic() > deadline:
            raise NotReady(
                "The job is still planning.", fix=f"Look again: tunesmith show {inert(ref)}", code="job.planning"
            )


def jobs(client: Client, *, limit: int = 200, before: str | None = None, state: str | None = None) -> Doc:
    """Summaries, newest first."""
    if state is not None and state not in {str(item) for item in JobState}:
        names = ", ".join(str(item) for item in JobState)
        raise InputError(f"{inert(state, limit=40)} is no state of a job.", why=f"States: {names}.", code="job.state")
    return document(client.jobs(limit=limit, before=before, state=state))


def show(client: Client, ref: str) -> Doc:
    """All that is known of one job."""
    return document(client.show(ref))


def job_plan(client: Client, ref: str) -> Doc:
    """The plan of a stored job. Raises NotReady while there is none."""
    found = client.plan(ref)
    if found is None:
        raise NotReady("The job has no plan yet.", fix=f"Look again: tunesmith show {inert(ref)}", code="job.no_plan")
    return document(found)


def watch(
    client: Client,
    ref: str,
    *,
    after: str = "",
    restart: bool = False,
    notice: Callable[[str], None] = lambda text: None,
) -> Iterator[Doc]:
    """Events as they come, until the job ends or waits for a person.

    A daemon that goes away is waited for, and started again with `restart`; nothing is lost or repeated, since the
    cursor goes on. Raises NoDaemon where none comes back within a minute.
    """
    cursor, wait = after, 0.0
    while True:
        try:
            page = client.events(ref, after=cursor, wait=wait)
        except NoDaemon as error:
            notice("The daemon went away; the job goes on without it. Waiting for it to come back.")
            _await_daemon(client, error, restart)
            notice("The daemon is back.")
            continue
        events = page.get("events") or []
        yield from events
        cursor = str(page.get("cursor") or cursor)
        waiting = page.get("state") in WAITING
        if not events and (page.get("ended") or (waiting and waits(client.show(ref)))):
            return
        wait = 0.0 if waiting and events else WAIT_SECONDS


def _await_daemon(client: Client, error: NoDaemon, restart: bool) -> None:
    client.close()
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        if restart:
            ensure_daemon(client.home)
            return
        if running(client.home) is not None:
            return
        time.sleep(0.5)
    raise error


def logs(client: Client, ref: str, *, attempt: int | None = None, follow: bool = False) -> Iterator[str]:
    """Pieces of an attempt's log (the newest one's by default), to its end; with `follow` until the attempt ends."""
    after = 0
    while True:
        page = client.logs(ref, attempt=attempt, after=after)
        text = str(page.get("text") or "")
        if text:
            yield text
        following = int(page.get("next") or after)
        moved = following > after
        after = following
        if page.get("ended") and not moved:
            return
        if not moved and not follow:
            return
        if not moved:
            time.sleep(0.5)


def metrics(client: Client, ref: str, *, key: str | None = None, attempt: str | None = None) -> Doc:
    """The series of a job."""
    return document(client.metrics(ref, key=key, attempt=attempt))


def answer(client: Client, ref: str, pairs: Sequence[str]) -> Doc:
    """Answer a plan's questions with FIELD=VALUE pairs."""
    from tunesmith.orchestrator import wire

    return _moved(client, ref, client.answer(ref, wire.read_answers(wire.parse_sets(pairs))))


def edit(client: Client, ref: str, pairs: Sequence[str]) -> Doc:
    """Change settings with KEY=VALUE pairs; voids the plan and its approval."""
    from tunesmith.orchestrator import wire

    if not pairs:
        raise InputError("Nothing to change.", fix="Name it: tunesmith edit JOB --set train.epochs=3", code="set.none")
    return _moved(client, ref, client.edit(ref, wire.read_sets(wire.parse_sets(pairs))))


def approve(
    client: Client, ref: str, *, plan: str | None = None, usd: float | None = None, hours: float | None = None
) -> Doc:
    """Approve the plan with this hash, or the plan shown now. Raises Conflict where the hash is stale."""
    return _moved(client, ref, client.approve(ref, plan=plan, by=person(), usd=usd, hours=hours))


def reject(client: Client, ref: str) -> Doc:
    """Turn a plan down."""
    return _moved(client, ref, client.reject(ref))


def cancel(client: Client, ref: str) -> Doc:
    """End a job and whatever runs for it."""
    return _moved(client, ref, client.cancel(ref))


def retry(client: Client, ref: str) -> Doc:
    """Reopen a job that ended without a result."""
    return _moved(client, ref, client.retry(ref))


def ask(client: Client, question: str, ref: str | None = None) -> Doc:
    """Answer a question about a job, or about all of them, from recorded facts."""
    from tunesmith.orchestrator import wire

    return document(client.ask(wire.read_text(question), ref))


def backends(client: Client) -> Doc:
    """Every backend, whether it is ready, and its devices."""
    return document(client.backends())


def _moved(client: Client, ref: str, doc: Mapping[str, Any]) -> Doc:
    return document({"id": doc.get("id") or client.show(ref).get("id"), **doc})


def person() -> str:
    """Who says yes: the login name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def waits(shown: Mapping[str, Any]) -> bool:
    """Whether a job waits for a person. An approved job that ran before stays awaiting_approval for a moment."""
    if shown.get("state") == JobState.AWAITING_APPROVAL:
        return not shown.get("approval")
    return shown.get("state") in WAITING


def outcome(shown: Mapping[str, Any]) -> int:
    """The exit code that a job's `show` document calls for."""
    state = shown.get("state")
    if state == JobState.SUCCEEDED:
        return 0
    if waits(shown):
        return Waiting.exit_code
    if state in JOB_ENDS:
        return InputError.exit_code if refused(shown) else 1
    return 0


def refused(shown: Mapping[str, Any]) -> bool:
    """Whether a job failed before anything ran, because of what was asked."""
    return shown.get("state") == JobState.FAILED and not shown.get("attempts") and failure(shown) is not None


def failure(shown: Mapping[str, Any]) -> TunesmithError | None:
    """Why a job ended without a result, as its `show` document tells it, or None where it does not say."""
    error = shown.get("error")
    if isinstance(error, dict) and error.get("message"):
        return from_doc(error)
    for item in shown.get("findings") or []:
        if item.get("level") == "error":
            return finding_error(item)
    for attempt in reversed(shown.get("attempts") or []):
        error = attempt.get("error")
        if isinstance(error, dict) and error.get("message"):
            return from_doc(error)
    return None


def finding_error(item: Mapping[str, Any]) -> InputError:
    """An error finding as the error it stands for."""
    return InputError(
        str(item.get("message", "")),
        fix=str(item.get("fix") or ""),
        where=str(item.get("where") or ""),
        code=str(item.get("code") or "input"),
    )


# --- the daemon ----------------------------------------------------------------------------------------------------


def daemon_start(home: Home) -> Doc:
    """Start the daemon, or say which one runs."""
    before = running(home)
    health = before or ensure_daemon(home)
    return document({"running": True, "started": before is None, **_without_version(health)})


def daemon_status(home: Home) -> Doc:
    """The daemon's health. Raises NoDaemon where none answers."""
    health = running(home)
    if health is None:
        raise no_daemon(home)
    return document({"running": True, **_without_version(health)})


def daemon_stop(home: Home, *, seconds: float = 30.0) -> Doc:
    """End the daemon, never a job, and wait until it is gone."""
    with Client(home) as client:
        try:
            health = client.health()
            client.shutdown()
        except NoDaemon:
            return document({"running": False, "stopped": False})
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = running(home)
        if now is None or now.get("pid") != health.get("pid"):
            return document({"running": now is not None, "stopped": True, "pid": health.get("pid")})
        time.sleep(0.05)
    raise Conflict("The daemon does not end.", why=f"It still answers (pid {health.get('pid')}).", code="daemon.stuck")


def _without_version(doc: Mapping[str, Any]) -> Doc:
    return {key: value for key, value in doc.items() if key != "schema_version"}
