"""The job graph in LangGraph: nodes around pure functions and the port, led from node to node by `route`.

The store is the truth. LangGraph's checkpoints (graph.db) only save repeating a step after a restart, and hold ids,
hashes and plain JSON. Every node asks the store where the job stands before it writes, so it may run twice.
This is the only file that imports langgraph.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.event_hooks import SerdeEvent, register_serde_event_listener
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.errors import GraphBubbleUp, GraphRecursionError
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, RetryPolicy, interrupt
from langsmith import tracing_context

from tunesmith.graph import planning
from tunesmith.graph import route as names
from tunesmith.graph.decisions import admitted, basis, next_attempt, reason, refuse, refused_plan, spec
from tunesmith.graph.diagnose import diagnose
from tunesmith.graph.route import newest, route
from tunesmith.orchestrator.errors import Conflict, NoDaemon, TunesmithError
from tunesmith.orchestrator.nouns import Plan
from tunesmith.orchestrator.plain import build, plain
from tunesmith.orchestrator.ports import JobPort
from tunesmith.orchestrator.states import JobState

log = logging.getLogger("tunesmith.driver")

TRIES = 3
RECURSION_LIMIT = 60


class State(TypedDict, total=False):
    """What LangGraph keeps of a job: `draft` as JSON text, and `basis`, a hash of the request it was read from."""

    job: str
    basis: str
    draft: str


@dataclass(frozen=True, slots=True)
class Tools:
    """What the nodes work with; never stored. `enter` is called with its name before a node does anything."""

    port: JobPort
    cache: Path
    enter: Callable[[str], None]


class Halted(Exception):
    """The driver was told to end, or may not go on with this job; the next one takes over where it stood."""


class Unreadable(Exception):
    """What LangGraph kept of a job makes no sense (another version, a broken file): start from the store."""


class NodeFailed(Exception):
    """A node met an unexpected error; the cause is in the log."""

    def __init__(self, node: str, message: str = "") -> None:
        super().__init__(message or f"The step {node!r} met an unexpected error.")
        self.node = node


# --- the nodes -----------------------------------------------------------------------------------------------------

Body = Callable[[State, Tools], Command[str]]


def _intake(state: State, tools: Tools) -> Command[str]:
    view = tools.port.view(state["job"])
    if (there := route(view)) != names.INTAKE:
        return _go(there)
    draft = planning.intake(view.request, view.answers)
    return Command(update={"draft": json.dumps(plain(draft)), "basis": basis(view)}, goto=names.INSPECT)


def _inspect(state: State, tools: Tools) -> Command[str]:
    draft = planning.inspect(_draft(state), tools.cache)
    return Command(update={"draft": json.dumps(plain(draft))}, goto=names.SIZE)


def _size(state: State, tools: Tools) -> Command[str]:
    draft = planning.size(_draft(state), tools.port.devices, tools.cache)
    return Command(update={"draft": json.dumps(plain(draft))}, goto=names.ESTIMATE)


def _estimate(state: State, tools: Tools) -> Command[str]:
    plan = admitted(planning.estimate(_draft(state)))
    return _save(state["job"], tools, plan, state["basis"])


def _save(job: str, tools: Tools, plan: Plan, made_from: str | None) -> Command[str]:
    """Store the plan, unless the job moved on, or the request is no longer what the plan was made from."""
    view = tools.port.view(job)
    if (there := route(view)) != names.INTAKE or made_from not in (None, basis(view)):
        return _go(there)
    tools.port.save_plan(job, plan)
    return _go(route(tools.port.view(job)), {"draft": "", "basis": ""})


def _review(state: State, tools: Tools) -> Command[str]:
    view = tools.port.view(state["job"])
    there = route(view)
    if there == names.REVIEW:
        waiting = "answer" if view.state is JobState.AWAITING_INPUT else "approval"
        interrupt({"waiting": waiting, "plan_hash": view.plan.plan_hash if view.plan else None})
    return _go(there)


def _await(state: State, tools: Tools) -> Command[str]:
    view = tools.port.view(state["job"])
    there = route(view)
    if there == names.AWAIT:
        last = newest(view)
        interrupt({"waiting": "attempt", "attempt": last.number if last else None})
    return _go(there)


def _submit(state: State, tools: Tools) -> Command[str]:
    job = state["job"]
    view = tools.port.view(job)
    if (there := route(view)) == names.SUBMIT:
        try:
            tools.port.submit(job, next_attempt(view))
        except TunesmithError as error:
            refuse(job, tools.port, names.SUBMIT, error)
        there = route(tools.port.view(job))
    return _go(there)


def _diagnose(state: State, tools: Tools) -> Command[str]:
    job = state["job"]
    view = tools.port.view(job)
    last = newest(view)
    if (there := route(view)) == names.DIAGNOSE and last is not None:
        found = diagnose(last, spec(view), view)
        tools.port.diagnose(job, last.number, found.cause, found.evidence, ())
        there = route(tools.port.view(job))
    return _go(there)


def _deliver(state: State, tools: Tools) -> Command[str]:
    job = state["job"]
    if (there := route(tools.port.view(job))) == names.DELIVER:
        try:
            tools.port.collect(job)
            tools.port.finish(job, JobState.SUCCEEDED)
        except TunesmithError as error:
            refuse(job, tools.port, names.DELIVER, error)
        there = route(tools.port.view(job))
    return _go(there)


def _finish(node: str) -> Body:
    def body(state: State, tools: Tools) -> Command[str]:
        job = state["job"]
        view = tools.port.view(job)
        if (there := route(view)) == node:
            tools.port.finish(job, names.FINISHES[node], reason(node, view))
            there = route(tools.port.view(job))
        return _go(there)

    return body


def _draft(state: State) -> planning.Draft:
    try:
        return build(planning.Draft, json.loads(state["draft"]))
    except Exception as error:
        raise Unreadable("the draft in the graph's checkpoints cannot be read") from error


def _go(node: str, update: Mapping[str, Any] | None = None) -> Command[str]:
    return Command(goto=END if node == names.END else node, update=dict(update) if update else None)


# --- the graph -----------------------------------------------------------------------------------------------------

_NODES: dict[str, Body] = {
    names.INTAKE: _intake,
    names.INSPECT: _inspect,
    names.SIZE: _size,
    names.ESTIMATE: _estimate,
    names.REVIEW: _review,
    names.SUBMIT: _submit,
    names.AWAIT: _await,
    names.DIAGNOSE: _diagnose,
    names.DELIVER: _deliver,
    **{node: _finish(node) for node in names.FINISHES},
}
_CHAIN = {names.INTAKE: names.INSPECT, names.INSPECT: names.SIZE, names.SIZE: names.ESTIMATE}
_PLANNING = (*_CHAIN, names.ESTIMATE)


def _node(name: str) -> Any:
    """A node around its body: errors of planning become a refused plan, all others are logged and tried again."""
    body = _NODES[name]

    def node(state: State, *, runtime: Runtime[Tools]) -> Command[str]:
        tools = runtime.context
        tools.enter(name)
        try:
            try:
                return body(state, tools)
            except TunesmithError as error:
                if name not in _PLANNING or isinstance(error, (Conflict, NoDaemon)) or type(error) is TunesmithError:
                    raise
                log.info("%s: planning ends at %s: %s", state["job"], name, error)
                made_from = None if name == names.INTAKE else state["basis"]
                return _save(state["job"], tools, refused_plan(error), made_from)
        except (GraphBubbleUp, Conflict, NoDaemon, Unreadable):
            raise
        except Exception as error:
            log.exception("%s: the step %s failed", state["job"], name)
            raise NodeFailed(name) from error

    return node


def _entry(state: State, *, runtime: Runtime[Tools]) -> str:
    there = route(runtime.context.port.view(state["job"]))
    return END if there == names.END else there


Graph = CompiledStateGraph[State, Tools, State, State]


def graph(saver: BaseCheckpointSaver[str]) -> Graph:
    """The compiled job graph over a checkpoint store; about 3 ms."""
    drawn = StateGraph(State, context_schema=Tools)
    retry = RetryPolicy(max_attempts=TRIES, initial_interval=0.1, jitter=False, retry_on=NodeFailed)
    targets = (*(name for name in names.ROUTES if name != names.END), END)
    for name in _NODES:
        after = (_CHAIN[name], *targets) if name in _CHAIN else targets
        drawn.add_node(name, _node(name), retry_policy=retry, destinations=after)
    drawn.add_conditional_edges(START, _entry, list(targets))
    return drawn.compile(checkpointer=saver)


def advance(job: str, tools: Tools, database: Path) -> str:
    """Run a job's graph until it waits or ends. Returns the node where it waits, or "end".

    A checkpoint store that is missing, broken, poisoned or full never stops a job: it is moved aside, and after that
    done without. Raises Conflict, NoDaemon, Halted, and NodeFailed after TRIES tries.
    """
    for place in (database, database, None):
        try:
            with contextlib.ExitStack() as stack:
                saver = stack.enter_context(checkpoints(place)) if place else InMemorySaver(serde=Strict())
                return _advance(job, tools, saver)
        except (TunesmithError, Halted, NodeFailed):
            raise
        except GraphRecursionError as error:
            raise NodeFailed(names.INTAKE, "The job graph goes in circles.") from error
        except Exception:
            log.exception("%s: the graph's own checkpoints cannot be used; going on from the store", job)
            if place:
                move_aside(place)
    raise NodeFailed(names.INTAKE, "The job graph cannot run.")


def _advance(job: str, tools: Tools, saver: BaseCheckpointSaver[str]) -> str:
    machine = graph(saver)
    config: RunnableConfig = {"configurable": {"thread_id": job}, "recursion_limit": RECURSION_LIMIT}
    for _ in range(TRIES):
        with tracing_context(enabled=False):
            stood = machine.get_state(config)
            start: Any = {"job": job}
            if stood.interrupts:
                start = Command(resume={item.id: "look" for item in stood.interrupts})
            elif stood.created_at is not None:
                start = None  # after a kill `next` may be empty although steps are left: only invoking tells
            machine.invoke(start, config, context=tools, durability="sync")
            stood = machine.get_state(config)
        if stood.interrupts:
            return stood.next[0]
        saver.delete_thread(job)
        if route(tools.port.view(job)) == names.END:
            return names.END
    raise NodeFailed(names.INTAKE, "The job graph ends, but the job does not.")


# --- its checkpoints -----------------------------------------------------------------------------------------------


class Strict(JsonPlusSerializer):
    """Reads plain values and LangGraph's own types only; any other type in a row raises instead of being built."""

    def __init__(self) -> None:
        super().__init__(allowed_msgpack_modules=None, allowed_json_modules=None, pickle_fallback=False)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        if data[0] not in ("msgpack", "null"):
            raise ValueError(f"a checkpoint of the foreign type {data[0]!r}")
        blocked: list[SerdeEvent] = []
        forget = register_serde_event_listener(blocked.append)
        try:
            value = super().loads_typed(data)
        finally:
            forget()
        if blocked:
            raise ValueError(f"a checkpoint that names {blocked[0]['module']}.{blocked[0]['name']}")
        return value


@contextlib.contextmanager
def checkpoints(path: Path) -> Iterator[SqliteSaver]:
    """LangGraph's checkpoint store in a private SQLite file: WAL, synchronous=FULL, strict serializer."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(path, timeout=10, check_same_thread=False)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        yield SqliteSaver(connection, serde=Strict())


def forget(job: str, database: Path) -> None:
    """Drop what is kept of a job, so that it starts anew from the store. A store that cannot be used keeps nothing."""
    try:
        with checkpoints(database) as saver:
            saver.delete_thread(job)
    except (OSError, sqlite3.Error) as error:
        log.warning("%s: its checkpoints stay: %s", job, error)


def move_aside(path: Path) -> None:
    """Put a checkpoint store that cannot be used beside its place, replacing the last one put there."""
    for end in ("-wal", "-shm", ""):
        source, target = path.with_name(path.name + end), path.with_name(f"{path.name}.broken{end}")
        with contextlib.suppress(FileNotFoundError):
            try:
                os.replace(source, target)
                log.warning("%s was moved to %s", source, target)
            except FileNotFoundError:
                raise
            except OSError as error:
                log.warning("%s cannot be moved aside: %s", source, error)
