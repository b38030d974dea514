"""What each `auto` becomes where memory has no say, and the job that is left for the search."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing import calibration, defaults
from tunesmith.executors.kernel.sizing.job import Job
from tunesmith.executors.kernel.sizing.rows import written
from tunesmith.executors.kernel.sizing.search import Found, search
from tunesmith.orchestrator.nouns import DataReport, Device, JobSpec, Resolved, TimeEstimate


@dataclass(slots=True)
class Settings:
    """The values of a spec under construction, by dotted key, and what was told of those that were `auto`."""

    spec: JobSpec
    values: dict[str, Any] = field(default_factory=dict)
    told: list[Resolved] = field(default_factory=list)

    def auto(self, key: str, value: Any, why: str) -> Any:
        """The user's value where there is one, else this one, with its reason written down."""
        section, name = key.split(".")
        given = getattr(getattr(self.spec, section), name)
        if given != "auto":
            value = given
        else:
            self.told.append(Resolved(key=key, value=value, why=why))
        self.values[key] = value
        return value

    def in_order(self) -> list[Resolved]:
        """What was told, the adapter first."""
        return sorted(self.told, key=lambda item: _ORDER.index(item.key))

    def whole(self) -> JobSpec:
        """The spec with every value in its place."""
        changes: dict[str, dict[str, Any]] = {"adapter": {}, "train": {}}
        for key, value in self.values.items():
            section, name = key.split(".")
            changes[section][name] = value
        adapter, train = (replace(getattr(self.spec, name), **made) for name, made in changes.items())
        return replace(self.spec, adapter=adapter, train=train)


def settle(
    spec: JobSpec, facts: ModelFacts, report: DataReport, device: Device, teacher: ModelFacts | None
) -> tuple[Job, Settings]:
    """Everything but the knobs that the search turns."""
    made, full = Settings(spec), spec.adapter.kind == "none"
    rows, tokens = defaults.rows_of(spec, report), report.tokens
    length = made.auto("train.max_length", *defaults.max_length(facts, tokens, written(spec)))
    effective = made.auto("train.effective_batch", *defaults.effective_batch(spec, rows))
    made.auto("train.learning_rate", *defaults.learning_rate(facts, spec.method, full))
    rank, why = defaults.rank(rows)
    rank = made.auto("adapter.rank", rank, "all weights are trained" if full else why)
    made.auto("adapter.alpha", *defaults.alpha(rank))
    targets = made.auto("adapter.targets", *defaults.targets(facts))
    job = Job(
        spec=spec,
        facts=facts,
        report=report,
        device=device,
        teacher=teacher,
        length=int(length),
        effective=int(effective),
        rank=int(rank),
        targets=tuple(targets),
        known=calibration.corrections(device.past, method=spec.method, family=facts.model_type, kind=device.kind),
    )
    return job, made


def again(job: Job, **changes: Any) -> tuple[Job, Found]:
    """The same job with another spec, model, report or device: what would be found for it."""
    asked = {"spec": job.spec, "facts": job.facts, "report": job.report, "device": job.device, "teacher": job.teacher}
    other, _ = settle(**{**asked, **changes})
    return other, search(other)


def schedule(settings: Settings, total: int | None, foretold: TimeEstimate | None) -> None:
    """What follows from the number of steps and from how long one takes."""
    seconds = foretold.seconds.expected / total if foretold and total else None
    settings.auto("train.warmup_steps", *defaults.warmup_steps(total))
    settings.auto("train.save_steps", *defaults.save_steps(total, seconds))
    settings.auto("train.eval_steps", *defaults.eval_steps(total))


_ORDER = (
    "adapter.kind",
    "adapter.rank",
    "adapter.alpha",
    "adapter.targets",
    "train.learning_rate",
    "train.effective_batch",
    "train.micro_batch",
    "train.max_length",
    "train.packing",
    "train.dtype",
    "train.optimizer",
    "train.activation_checkpointing",
    "train.warmup_steps",
    "train.save_steps",
    "train.eval_steps",
)
