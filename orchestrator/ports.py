"""The two ports: what an executor must do for the daemon, and what the daemon does for the graph.

Both are protocols over plain nouns, so that either side can be replaced by a real other one in tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from tunesmith.orchestrator.events import Event
from tunesmith.orchestrator.nouns import Approval, Attempt, Device, Finding, Plan, Remedy, Request
from tunesmith.orchestrator.states import AttemptState, JobState

Dead = Literal["yes", "no", "unknown"]
Signal = Literal["checkpoint", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """How an executor finds an attempt again after any restart. `data` is plain JSON and holds no secret."""

    backend: str
    key: str
    job: str
    number: int
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What became known since a cursor: new events in order, the state now, and the cursor to ask with next.

    `exit_code` is set once the attempt has ended (128 + n for signal n); `error` is an error document.
    """

    state: AttemptState
    events: tuple[Event, ...]
    cursor: str
    exit_code: int | None = None
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A result that is home and verified. `path` is absolute; `sha256` is of its manifest or of the file."""

    kind: str
    path: str
    bytes: int
    sha256: str


@runtime_checkable
class Executor(Protocol):
    """A backend. Found through the entry-point group `tunesmith.executors`; constructed with the home folder.

    Every call may be repeated; none may block for more than a few seconds. Raises BackendUnavailable where the backend
    cannot be reached, which never means that an attempt is dead.
    """

    name: str

    def devices(self) -> Sequence[Device]:
        """What may be run on. A device that is not ready says why in `why_not` and stays in the list."""
        ...

    def submit(self, attempt: Attempt) -> Handle:
        """Start an attempt, once: a repeated call with the same `attempt.key` returns the same handle."""
        ...

    def observe(self, handle: Handle, cursor: str) -> Observation:
        """Events after `cursor` ("" is the beginning), without loss or repeat, and the attempt's state."""
        ...

    def signal(self, handle: Handle, what: Signal) -> None:
        """Ask the worker to save a checkpoint and go on, or to save one and end (exit code 75)."""
        ...

    def collect(self, handle: Handle) -> Sequence[Artifact]:
        """Bring the results of an ended attempt home and verify every hash; StorageError where one does not verify."""
        ...

    def cancel(self, handle: Handle) -> None:
        """End the attempt now: TERM, and after a grace KILL of its whole family. Returns without waiting."""
        ...

    def prove_dead(self, handle: Handle) -> Dead:
        """Whether nothing of the attempt can still be running."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptView:
    """An attempt as the store knows it.

    `checkpoint` is its newest checkpoint, relative to the job's folder. `cause` is what `JobPort.diagnose` recorded for
    it; None until then, which is how the router knows that an ended attempt has not been diagnosed yet.
    """

    number: int
    backend: str
    state: AttemptState
    exit_code: int | None = None
    error: Mapping[str, Any] | None = None
    started_at: str | None = None
    ended_at: str | None = None
    resumed_from: str | None = None
    checkpoint: str | None = None
    cause: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """All that the graph may know of a job: the store's facts, from which its router finds the next node.

    `plan_stale` is True where the plan shown no longer stands (an edit, an answer, a retry from planning).
    `wanted` is what a person asked for and the graph has not yet carried out.
    """

    id: str
    state: JobState
    request: Request
    answers: Mapping[str, Any]
    plan: Plan | None
    plan_stale: bool
    approval: Approval | None
    attempts: tuple[AttemptView, ...]
    remedies: tuple[Remedy, ...]
    repairs_left: int
    wanted: Literal["cancel", "reject", "retry"] | None = None


class JobPort(Protocol):
    """What the graph asks of the daemon. Every write is fenced by the driver's lease and may be repeated.

    Raises Conflict where the lease was lost: the driver drops the job at once and writes nothing more.
    """

    def view(self, job: str) -> JobView:
        """The job's facts now."""
        ...

    def devices(self, backend: str | None) -> Sequence[Device]:
        """What the named backend offers, or all of them."""
        ...

    def save_plan(self, job: str, plan: Plan) -> None:
        """Store a plan. The job goes to awaiting_input (questions), awaiting_approval, or failed (error findings)."""
        ...

    def submit(self, job: str, attempt: Attempt) -> None:
        """Queue an attempt, once per key. The job goes to queued; the daemon starts it when its turn comes."""
        ...

    def diagnose(
        self, job: str, attempt: int, cause: str, evidence: Sequence[Finding], remedies: Sequence[Remedy]
    ) -> None:
        """Record why an attempt ended as it did, with the evidence, and what is proposed."""
        ...

    def collect(self, job: str) -> Sequence[Artifact]:
        """Bring home and verify the results of the last attempt. The job goes to delivering."""
        ...

    def finish(self, job: str, state: JobState, error: Mapping[str, Any] | None = None) -> None:
        """End the job: succeeded, failed, cancelled, rejected or lost. Clears `wanted`.

        A job that already stands in this end stays there (a `retry` that could not be carried out): the error is kept.
        """
        ...
