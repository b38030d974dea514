"""A plan in the making, as plain data: it travels through the graph's state as JSON between the four steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tunesmith.orchestrator.errors import TunesmithError
from tunesmith.orchestrator.nouns import (
    DataReport,
    Device,
    Finding,
    JobSpec,
    Question,
    Request,
    Resolved,
    Size,
    TimeEstimate,
)

NO_DATA = DataReport(rows=None, used_rows=None, eval_rows=None, format=None, mapping=None, fingerprint=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One device with what a stage needs there; `why_not` says why it cannot be had or cannot hold the job."""

    device: Device
    fits: bool
    time: TimeEstimate | None = None
    why_not: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDraft:
    """One stage on its way: the spec, resolved by `size`, and what each step found."""

    spec: JobSpec
    resolved: tuple[Resolved, ...] = ()
    data: DataReport = NO_DATA
    size: Size | None = None
    time: TimeEstimate | None = None
    findings: tuple[Finding, ...] = ()
    fits: tuple[Fit, ...] = ()
    hardware: str = ""
    model_commit: str | None = None
    reward_hashes: tuple[str, ...] = ()

    def noting(self, *findings: Finding, **changes: Any) -> StageDraft:
        """This stage with more findings, and other fields changed."""
        return replace(self, findings=(*self.findings, *findings), **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What is known so far of a plan. `stages` is empty where no spec could be built: then it only asks or refuses."""

    request: Request
    intent: Literal["train", "status", "check", "advice", "export"]
    command: tuple[str, ...] = ()
    stages: tuple[StageDraft, ...] = ()
    questions: tuple[Question, ...] = ()
    findings: tuple[Finding, ...] = ()
    understood: tuple[Resolved, ...] = ()
    unread: tuple[str, ...] = ()
    answers: Mapping[str, Any] = field(default_factory=dict)

    def with_stages(self, stages: list[StageDraft]) -> Draft:
        """This draft with other stages."""
        return replace(self, stages=tuple(stages))


def finding_of(error: TunesmithError, level: Literal["error", "warning"] = "error") -> Finding:
    """An error as a finding: what happened and why in the message, the way out in the fix."""
    message = " ".join(part for part in (error.message, error.why) if part)
    return Finding(level=level, code=error.code, message=message, where=error.where, fix=error.fix)
