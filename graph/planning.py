"""Planning: from a request to a plan, in four pure steps that the graph wraps and `tunesmith plan` calls directly.

intake    words or a spec document -> a draft with specs, questions and findings
inspect   reads the data and looks the model up
size      fits each stage to the devices there are
estimate  offers, money, and the hash that an approval binds

Nothing here trains, stores, or loads torch, transformers, langgraph or pydantic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.graph import methods, settings
from tunesmith.graph.checks import problems
from tunesmith.graph.draft import Draft, Fit, StageDraft, finding_of
from tunesmith.graph.intake import Reading, read
from tunesmith.graph.rewarding import rewarded
from tunesmith.orchestrator.errors import BackendUnavailable, InputError, TunesmithError
from tunesmith.orchestrator.nouns import (
    DataReport,
    Device,
    Estimate,
    Finding,
    JobSpec,
    ModelRef,
    Offer,
    Plan,
    Question,
    Request,
    Resolved,
    Stage,
    TimeEstimate,
    plan_hash,
)
from tunesmith.orchestrator.nouns import Mapping as DataMapping
from tunesmith.orchestrator.plain import build, plain

NOT_YET = (
    ("deliver.push", "the result is not pushed"),
    ("deliver.merge", "the adapter is not merged"),
    ("deliver.gguf", "nothing is converted to GGUF"),
    ("eval.tasks", "no benchmark is run"),
    ("after", "it does not wait for other jobs"),
    ("storage", "checkpoints stay in the job's own folder"),
    ("notify", "nobody is notified"),
)
WORST = 1.3  # a job is stopped at this multiple of its high estimate where no cap is given

Devices = Callable[[str | None], Sequence[Device]]


def plan(
    request: Request, *, devices: Devices, answers: Mapping[str, Any] | None = None, cache: Path = Path("/nonexistent")
) -> Plan:
    """The plan of a request. Never raises for what a user wrote: that stands in findings and questions.

    Reads the data once and no model weights; asks the Hub only for data that is not here, for a few seconds at most.
    """
    draft = intake(request, answers or {})
    return estimate(size(inspect(draft, cache), devices, cache))


# --- intake ---------------------------------------------------------------------------------------------------------


def intake(request: Request, answers: Mapping[str, Any]) -> Draft:
    """Understand the request and build its specs. Touches no data; looks only whether local paths are there."""
    reading = _from_spec(request) if request.spec is not None else read(request.text or "")
    draft = Draft(
        request=request,
        intent=reading.intent,
        command=_command(reading, request, answers),
        questions=reading.questions,
        findings=reading.findings,
        understood=reading.understood,
        unread=reading.unread,
        answers=dict(answers),
    )
    if reading.intent != "train" or not reading.stages:
        return draft
    said = {**request.sets, **answers}
    docs = [settings.spelled_out(doc) for doc in reading.stages]
    refused = settings.apply(docs, said)
    quick = [settings.quicken(doc) if request.quick or reading.quick else [] for doc in docs]
    for doc in docs:
        settings.absolute(doc, request.cwd)
        if request.backend is not None:
            doc["backend"] = request.backend
    questions = tuple(item for item in reading.questions if not _settled(item, docs, said))
    asked = {item.field for item in questions}
    questions += tuple(item for item in methods.questions(docs) if item.field not in asked)
    findings = [item for item in reading.findings if not _overruled(item, said)]
    open_fields = {item.field for item in questions} | {item.where for item in findings if item.level == "error"}
    checked = [_checked(doc, index, len(docs), open_fields) for index, doc in enumerate(docs)]
    findings += [*refused, *(item for each in checked for item in each)]
    draft = replace(draft, questions=questions, findings=tuple(findings))
    if questions or refused or any(checked) or not all(doc.get("model") and doc.get("data") for doc in docs):
        return draft
    return draft.with_stages(
        [
            StageDraft(spec=build(JobSpec, doc), resolved=tuple(changed))
            for doc, changed in zip(docs, quick, strict=True)
        ]
    )


def _from_spec(request: Request) -> Reading:
    spec = dict(request.spec or {})
    stages = spec.get("stages")
    docs = tuple(dict(doc) for doc in stages) if isinstance(stages, (list, tuple)) else (spec,)
    return Reading(intent="train", stages=docs, command=("tunesmith", "run", "SPEC.yaml"))


def _command(reading: Reading, request: Request, answers: Mapping[str, Any]) -> tuple[str, ...]:
    """The command with the settings that came beside the request."""
    if not reading.command or reading.intent in ("status", "export"):
        return reading.command
    command = [*reading.command]
    if reading.intent == "train":
        command += ["--backend", request.backend] if request.backend else []
        command += ["--quick"] if request.quick else []
    if reading.intent == "train" or command[1:2] == ["check"]:
        for key, value in {**request.sets, **answers}.items():
            command += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(plain(value))}"]
    return tuple(command)


def _errors(findings: Sequence[Finding]) -> list[Finding]:
    return [item for item in findings if item.level == "error"]


def _settled(question: Question, docs: Sequence[settings.Doc], said: Mapping[str, Any]) -> bool:
    """Whether a setting or an answer has settled a question."""
    key = question.field
    prefix, _, rest = key.partition(".")
    if prefix == "stages":
        index, _, rest = rest.partition(".")
        return settings.get(docs[int(index)], rest) not in (None, "") if index.isdecimal() else False
    if key in said or key.split(".")[0] in said or (key.startswith("data.0.") and f"data.{key[7:]}" in said):
        return all(settings.get(doc, key) not in (None, "") for doc in docs)
    return False


_OF_WORDS = ("request.contradiction", "request.unsupported", "model.unknown", "spec.value", "method.unknown")


def _overruled(finding: Finding, said: Mapping[str, Any]) -> bool:
    """Whether a finding about the words no longer stands, because a setting says what is meant."""
    return (
        finding.code in _OF_WORDS
        and bool(finding.where)
        and any(key in said for key in (finding.where, finding.where.split(".")[0]))
    )


def _checked(doc: settings.Doc, index: int, count: int, asked: Set[str]) -> list[Finding]:
    """What is wrong with a document, less what is missing where a question or a finding already says so."""
    prefix = f"stages.{index}." if count > 1 else ""
    found = []
    for item in problems(doc):
        where = f"{prefix}{item.where}"
        if item.code == "spec.missing" and any(field.startswith(where) for field in asked):
            continue
        found.append(replace(item, where=where))
    if not found and not doc.get("data") and not any(field.startswith(f"{prefix}data") for field in asked):
        message = "The spec names no data."
        found.append(Finding(level="error", code="spec.missing", message=message, where=f"{prefix}data"))
    return found


# --- inspect --------------------------------------------------------------------------------------------------------


def inspect(draft: Draft, cache: Path) -> Draft:
    """Read the data and look the model up, for every stage. What cannot be read stands in the stage's findings."""
    stages, questions = rewarded([_inspected(stage, draft, cache) for stage in draft.stages])
    return replace(draft.with_stages(stages), questions=(*draft.questions, *questions))


def _inspected(stage: StageDraft, draft: Draft, cache: Path) -> StageDraft:
    from tunesmith.executors.kernel import catalogue, data

    spec, findings = stage.spec, [*_not_built(stage.spec), *methods.misfits(stage.spec)]
    facts = folder = commit = None
    ref = _base(draft, spec.model)
    if ref is None:
        findings.append(_of_job(spec.model, "model.id"))
    else:
        try:
            folder = catalogue.at_hand(ref, cache)
            facts = catalogue.facts(ref, cache)
        except InputError as error:
            findings.append(finding_of(error))
        else:
            findings += [_unknown_model(ref)] if facts is None else _of_teacher(spec, facts, cache)
        commit = folder.name if folder is not None and folder.parent.name == "snapshots" else None
    report = data.inspect(spec, facts=facts, tokenizer_folder=folder)
    chosen = _mappings(spec, report)
    sources = tuple(
        source if mapping is None else replace(source, mapping=mapping)
        for source, mapping in zip(spec.data, chosen, strict=True)
    )
    resolved = tuple(
        Resolved(key=f"data.{index}.mapping", value=plain(mapping), why=f"what the columns say: {report.format}")
        for index, mapping in enumerate(chosen)
        if mapping is not None
    )
    return stage.noting(
        *findings,
        spec=replace(spec, data=sources),
        resolved=(*stage.resolved, *resolved),
        data=report,
        model_commit=commit,
    )


def _mappings(spec: JobSpec, report: DataReport) -> list[DataMapping | None]:
    """The mapping found for each source that leaves it to the plan; None where it is said, or cannot be known."""
    from tunesmith.executors.kernel import data

    if len(spec.data) == 1:
        return [report.mapping if spec.data[0].mapping == "auto" else None]
    return [
        data.mapping_of(source, method=spec.method) if source.mapping == "auto" and report.rows is not None else None
        for source in spec.data
    ]


def _base(draft: Draft, ref: ModelRef) -> ModelRef | None:
    """The model whose shape counts: an earlier stage's for `stage:N`, none that is known here for `job:JOB`."""
    for _ in draft.stages:
        kind, _, number = ref.id.partition(":")
        if kind != "stage":
            break
        if not number.isdecimal() or not 1 <= int(number) <= len(draft.stages):
            return ref
        ref = draft.stages[int(number) - 1].spec.model
    return None if ref.id.startswith("job:") else ref


def _of_job(ref: ModelRef, where: str) -> Finding:
    return Finding(
        level="error",
        code="model.unavailable",
        message=f"This version cannot use the result of an earlier job ({ref.id[:100]}) as a model.",
        where=where,
        fix=f"Name a model: --set {where}=Qwen/Qwen3-0.6B, or the folder of its merged weights.",
    )


def _unknown_model(ref: ModelRef) -> Finding:
    from tunesmith.executors.kernel import sizing

    return finding_of(sizing.unknown_model(ref))


def _of_teacher(spec: JobSpec, student: Any, cache: Path) -> list[Finding]:
    """What is wrong with the model that a student shall learn from."""
    from tunesmith.executors.kernel import catalogue, sizing

    if spec.method != "distill" or spec.distill.teacher is None:
        return []
    ref = ModelRef(id=spec.distill.teacher)
    if ref.id.startswith(("job:", "stage:")):
        return [_of_job(ref, "distill.teacher")]
    try:
        teacher = catalogue.facts(ref, cache)
    except InputError as error:
        return [replace(finding_of(error), where="distill.teacher")]
    if teacher is None:
        return [replace(finding_of(sizing.unknown_model(ref)), where="distill.teacher")]
    misfit = methods.teacher_misfit(student, teacher)
    return [misfit] if misfit is not None else []


def _not_built(spec: JobSpec) -> list[Finding]:
    """What the spec asks for and this version does not do yet."""
    found = []
    doc = plain(spec)
    for key, effect in NOT_YET:
        if settings.get(doc, key):
            message = f"{key} is understood, and not available in this version: {effect}."
            found.append(Finding(level="warning", code="feature.unavailable", message=message, where=key))
    return found


# --- size -----------------------------------------------------------------------------------------------------------


def size(draft: Draft, devices: Devices, cache: Path) -> Draft:
    """Fit every stage to the chosen device, and look how it would fit every other. Reads no data."""
    if not draft.stages:
        return draft
    try:
        known = list(devices(None))
    except BackendUnavailable as error:
        return draft.with_stages([stage.noting(finding_of(error)) for stage in draft.stages])
    return draft.with_stages([_sized(stage, draft, known, cache) for stage in draft.stages])


def _sized(stage: StageDraft, draft: Draft, known: Sequence[Device], cache: Path) -> StageDraft:
    from tunesmith.executors.kernel import catalogue, sizing

    chosen, findings = choose(stage.spec, known)
    ref = _base(draft, stage.spec.model)
    if ref is None or any(item.where in ("model.id", "distill.teacher") for item in _errors(stage.findings)):
        return stage.noting(*findings)
    try:
        facts = catalogue.facts(ref, cache)
        taught = stage.spec.method == "distill" and stage.spec.distill.teacher is not None
        teacher = catalogue.facts(ModelRef(id=str(stage.spec.distill.teacher)), cache) if taught else None
        fits = tuple(_fit(stage, facts, device, teacher) for device in known)
        if chosen is None:
            return stage.noting(*findings, fits=fits)
        spec, sized, time, resolved, notes = sizing.resolve(stage.spec, facts, stage.data, chosen, teacher)
    except TunesmithError as error:
        return stage.noting(*findings, finding_of(error))
    resolved = [*stage.resolved, *(replace(item, value=plain(item.value)) for item in resolved)]
    if chosen not in known:
        return stage.noting(*findings, *notes, spec=spec, resolved=tuple(resolved), size=sized, time=time, fits=fits)
    if spec.backend != chosen.backend:
        resolved.append(Resolved(key="backend", value=chosen.backend, why="the first that is ready and fits"))
        spec = replace(spec, backend=chosen.backend)
    if spec.hardware != chosen.hardware and not _several(spec.hardware):
        resolved.append(Resolved(key="hardware", value=chosen.hardware, why=f"what is ready on {chosen.backend}"))
        spec = replace(spec, hardware=chosen.hardware)
    return stage.noting(
        *findings,
        *notes,
        spec=spec,
        resolved=tuple(resolved),
        size=sized,
        time=time,
        fits=fits,
        hardware=chosen.hardware,
    )


def _fit(stage: StageDraft, facts: Any, device: Device, teacher: Any) -> Fit:
    from tunesmith.executors.kernel import sizing

    bare = replace(device, past=())  # it has done its work in the estimates, and need not travel on
    if device.why_not is not None:
        return Fit(device=bare, fits=False, why_not=device.why_not)
    try:
        kept = _several(stage.spec.hardware) and _is_wanted(stage.spec.hardware, device)
        hardware = stage.spec.hardware if kept else device.hardware
        spec = replace(stage.spec, backend=device.backend, hardware=hardware)
        _, sized, time, _, notes = sizing.resolve(spec, facts, stage.data, device, teacher)
    except TunesmithError as error:
        return Fit(device=bare, fits=False, why_not=error.message)
    why = next((item.message for item in notes if item.level == "error"), None)
    return Fit(device=bare, fits=sized.fits and why is None, time=time, why_not=why)


def choose(spec: JobSpec, known: Sequence[Device]) -> tuple[Device | None, list[Finding]]:
    """The device a spec asks for: the first ready one of its backend and hardware, in the backend's own order.

    Where there is none, but a usual card is meant, that card with the error: so it can be seen what it would do.
    """
    stand_in = _stand_in(spec)
    note = f" What is foretold is for the {stand_in.hardware}." if stand_in is not None else ""
    of_backend = [device for device in known if spec.backend in (device.backend, "auto")]
    if not of_backend:
        names = ", ".join(dict.fromkeys(device.backend for device in known)) or "none"
        message = f"The backend {spec.backend!r} is not available here."
        fix = f"Available: {names}.{note}"
        return stand_in, [Finding(level="error", code="backend.unknown", message=message, where="backend", fix=fix)]
    wanted = [device for device in of_backend if _is_wanted(spec.hardware, device)]
    if not wanted:
        names = ", ".join(device.hardware for device in of_backend)
        message = f"{spec.backend} has no hardware {_hardware(spec.hardware)}."
        fix = f"It has {names}.{note}"
        return stand_in, [Finding(level="error", code="hardware.unknown", message=message, where="hardware", fix=fix)]
    ready = [device for device in wanted if device.why_not is None]
    if ready:
        return ready[0], []
    message = f"{wanted[0].hardware} on {wanted[0].backend} is not ready: {wanted[0].why_not}"
    return wanted[0], [Finding(level="error", code="backend.not_ready", message=message, where="backend")]


def _stand_in(spec: JobSpec) -> Device | None:
    """The usual card that a spec means by its name, or by its memory; None where it means none."""
    from tunesmith.executors.kernel.sizing import cards

    hardware, memory = spec.hardware, spec.limits.memory_gb
    card = cards.named(hardware) if isinstance(hardware, str) else None
    if isinstance(hardware, Mapping) and hardware.get("gpus") and memory is not None:
        card = cards.of_size(memory)
    return None if card is None else card.device("elsewhere", why_not="It is not here.")


def _is_wanted(hardware: str | Mapping[str, Any] | None, device: Device) -> bool:
    if hardware is None:
        return True
    if isinstance(hardware, Mapping):
        count = hardware.get("gpus", 0)
        if not count:
            return device.kind == "cpu"
        return device.kind != "cpu" and isinstance(count, int) and device.count >= count
    asked, name = _squeezed(hardware), _squeezed(device.hardware)
    if asked in ("gpu", "cuda"):
        return device.kind != "cpu"
    return (
        asked == name
        or asked == device.kind
        or (len(asked) > 1 and name.startswith(asked))
        or _names(hardware, device.hardware)
    )


def _names(asked: str, full: str) -> bool:
    """Whether a card's short name means the one of a full name: "RTX 4090" is an "NVIDIA GeForce RTX 4090", no "Ti"."""
    short, long = (" ".join(re.findall(r"[a-z0-9]+", name.lower())) for name in (asked, full))
    return bool(short and re.search(rf"\b{re.escape(short)}\b(?! (?:ti|super|laptop)\b)", long))


def _several(hardware: str | Mapping[str, Any] | None) -> bool:
    """Whether a spec asks for several processes: then that stands, for no device's name says how many."""
    from tunesmith.executors.kernel.sizing.rows import processes

    return processes(hardware) > 1


def _squeezed(name: str) -> str:
    return "".join(one for one in name.lower() if one.isalnum())


def _hardware(hardware: str | Mapping[str, Any] | None) -> str:
    if isinstance(hardware, Mapping):
        return ", ".join(f"{value} {key}" for key, value in hardware.items()) or "none"
    return repr(hardware)


# --- estimate -------------------------------------------------------------------------------------------------------


def estimate(draft: Draft) -> Plan:
    """The plan: offers with their price, findings about the caps, and the hash that an approval binds."""
    stages = tuple(
        Stage(
            spec=stage.spec,
            resolved=stage.resolved,
            data=stage.data,
            size=stage.size,
            time=stage.time,
            offers=tuple(_offer(stage.spec, fit) for fit in stage.fits),
            findings=(*stage.findings, *_over_caps(stage)),
            reward_hashes=stage.reward_hashes,
        )
        for stage in draft.stages
    )
    findings = list(draft.findings)
    if len(stages) > 1:
        message = f"A pipeline of {len(stages)} stages is understood, and not available in this version."
        fix = "Run its stages one after the other."
        findings.append(Finding(level="error", code="pipeline.unavailable", message=message, where="stages", fix=fix))
    made = plan_hash(
        [stage.spec for stage in draft.stages],
        fingerprints=[stage.data.fingerprint for stage in draft.stages],
        model_commits=[stage.model_commit for stage in draft.stages],
        reward_hashes={
            f"{index}.{place}": hash
            for index, stage in enumerate(draft.stages)
            for place, hash in enumerate(stage.reward_hashes)
        },
        hardware=[stage.hardware for stage in draft.stages],
    )
    return Plan(
        plan_hash=made,
        intent=draft.intent,
        command=draft.command,
        stages=stages,
        questions=draft.questions,
        findings=tuple(findings),
        understood=draft.understood,
        unread=draft.unread,
    )


def _offer(spec: JobSpec, fit: Fit) -> Offer:
    device, seconds = fit.device, fit.time.seconds if fit.time else None
    usd, worst = None, None
    if seconds is not None:
        price = device.usd_per_hour / 3600
        usd = Estimate(
            low=seconds.low * price,
            expected=seconds.expected * price,
            high=seconds.high * price,
            unit="usd",
            source=seconds.source,
        )
        longest = spec.limits.hours * 3600 if spec.limits.hours is not None else seconds.high * WORST
        worst = longest * price
        if spec.limits.usd is not None:
            worst = min(worst, spec.limits.usd)
    return Offer(
        backend=device.backend,
        hardware=device.hardware,
        fits=fit.fits,
        usd_per_hour=device.usd_per_hour,
        seconds=seconds,
        usd=usd,
        usd_worst=worst,
        as_of=device.as_of,
        why_not=fit.why_not,
    )


def _over_caps(stage: StageDraft) -> list[Finding]:
    """Caps that the estimates say will be met before the end: the job would be stopped there."""
    limits, time, found = stage.spec.limits, stage.time, []
    if time is None:
        return []
    if limits.hours is not None and time.seconds.expected > limits.hours * 3600:
        found.append(_cap("limits.hours", f"{limits.hours:g} h", _hours(time), time.seconds.low > limits.hours * 3600))
    price = next((fit.device.usd_per_hour for fit in stage.fits if _is_chosen(stage, fit)), 0.0)
    usd = time.seconds.expected / 3600 * price
    if limits.usd is not None and usd > limits.usd:
        low = time.seconds.low / 3600 * price
        found.append(_cap("limits.usd", f"${limits.usd:g}", f"about ${usd:.2f}", low > limits.usd))
    return found


def _is_chosen(stage: StageDraft, fit: Fit) -> bool:
    return (fit.device.backend, fit.device.hardware) == (stage.spec.backend, stage.hardware)


def _hours(time: TimeEstimate) -> str:
    return f"{time.seconds.low / 3600:.1f} to {time.seconds.high / 3600:.1f} h"


def _cap(key: str, cap: str, needed: str, surely: bool) -> Finding:
    likely = "" if surely else "probably "
    return Finding(
        level="error" if surely else "warning",
        code="limits.too_low",
        message=f"It needs {needed}, and {key} is {cap}: it would {likely}be stopped before its end.",
        where=key,
        fix=f"Raise {key}, or train on fewer rows, or for fewer steps.",
    )


__all__ = ["Draft", "StageDraft", "choose", "estimate", "inspect", "intake", "plan", "size"]
