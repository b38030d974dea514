"""What to tell a person about a spec and what became of it: what is refused, what is unusual, what is assumed."""

from __future__ import annotations

import importlib.util

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing import defaults
from tunesmith.executors.kernel.sizing.rows import THROUGH_TRL, written
from tunesmith.orchestrator.nouns import DataReport, Device, Finding, JobSpec


def notes(
    asked: JobSpec, chosen: JobSpec, facts: ModelFacts, report: DataReport, device: Device, *, timed: bool
) -> list[Finding]:
    """Findings on a spec as `asked` and as `chosen`: errors for what the kernel will refuse, warnings, assumptions."""
    return [
        *_refused(asked, facts, report, device),
        *_unusual(asked, chosen, facts, report),
        *_assumed(chosen, report, timed),
    ]


def _refused(asked: JobSpec, facts: ModelFacts, report: DataReport, device: Device) -> list[Finding]:
    train = asked.train
    values = {"adapter.kind": asked.adapter.kind, "train.optimizer": train.optimizer, "train.dtype": train.dtype}
    reasons = {
        ("adapter.kind", "qlora"): defaults.no_4bit(device),
        ("train.optimizer", "adamw-8bit"): defaults.no_8bit(device),
        ("train.dtype", "float16"): defaults.no_float16(device),
    }
    refused = {what: why for what, why in reasons.items() if why}
    found = [*_through_trl(asked, device)] if asked.method in THROUGH_TRL else []
    found += [
        Finding(
            level="error",
            code=f"{key.partition('.')[0]}.unavailable",
            message=f"{key}={value} cannot be trained here. {why}",
            where=key,
            fix=f"Leave {key} to auto.",
        )
        for (key, value), why in refused.items()
        if values[key] == value
    ]
    unheld = report.eval_rows == 0 or (asked.eval.source is None and asked.eval.fraction == 0)
    if train.early_stopping is not None and unheld:
        found.append(
            Finding(
                level="error",
                code="train.early_stopping",
                message="train.early_stopping needs rows to evaluate on, and none are held out.",
                where="train.early_stopping",
                fix="Set eval.fraction above 0, name an eval.source, or leave train.early_stopping out.",
            )
        )
    if asked.adapter.targets != "auto" and asked.adapter.kind != "none" and not facts.experts:
        heads = {*facts.linears, "all-linear", "lm_head"}
        unknown = [name for name in asked.adapter.targets if name.rpartition(".")[2] not in heads]
        if unknown:
            found.append(
                Finding(
                    level="error",
                    code="adapter.targets",
                    message=f"{facts.id[:200]} has no linear layer {unknown[0]!r:.60}.",
                    where="adapter.targets",
                    fix=f"Choose from {', '.join(facts.linears)}.",
                )
            )
    return found


def _through_trl(asked: JobSpec, device: Device) -> list[Finding]:
    """What TRL's trainers do not do."""

    def error(code: str, message: str, where: str, fix: str) -> None:
        found.append(Finding(level="error", code=code, message=message, where=where, fix=fix))

    found: list[Finding] = []
    if device.backend == "local" and importlib.util.find_spec("trl") is None:
        message = f"{asked.method} is trained by TRL, which is not installed."
        error("method.unavailable", message, "method", 'Install it: pip install "tunesmith[train]".')
    if asked.train.packing is True:
        message = f"train.packing=true is not to be had with {asked.method}: TRL trains it, and pads its batches."
        error("train.unavailable", message, "train.packing", "Leave train.packing to auto.")
    if asked.method == "kto" and 1 in (asked.train.micro_batch, asked.train.effective_batch):
        key = "micro_batch" if asked.train.micro_batch == 1 else "effective_batch"
        message = f"kto cannot train with train.{key}=1: it compares each prompt with the answer of another row."
        error("kto.batch", message, f"train.{key}", f"Set train.{key} to 2 or more.")
    return found


def _unusual(asked: JobSpec, chosen: JobSpec, facts: ModelFacts, report: DataReport) -> list[Finding]:
    def warning(code: str, message: str, where: str, fix: str) -> None:
        found.append(Finding(level="warning", code=code, message=message, where=where, fix=fix))

    found: list[Finding] = []
    length, effective = int(chosen.train.max_length), int(chosen.train.effective_batch)
    if length > facts.context:
        warning(
            "train.beyond_context",
            f"train.max_length={length:,} is beyond the model's context of {facts.context:,}.",
            "train.max_length",
            f"Set it to {facts.context} or less.",
        )
    room = length - written(chosen)
    if report.tokens is not None and asked.train.max_length == "auto" and report.tokens.max > room:
        warning(
            "train.rows_too_long",
            f"Some rows are longer than {room:,} tokens (the longest seen has {report.tokens.max:,}).",
            "train.max_length",
            f"Set train.max_length={report.tokens.max + written(chosen)} to train on all of them.",
        )
    micro = int(chosen.train.micro_batch)
    if chosen.method == "dpo" and chosen.dpo.loss in ("aot", "aot_unpaired") and micro < effective:
        warning(
            "dpo.micro_batch",
            f"The loss {chosen.dpo.loss} sorts the pairs of a micro-batch, and one holds about {micro} of {effective}.",
            "train.micro_batch",
            f"Set train.micro_batch={effective} where memory allows, or choose another dpo.loss.",
        )
    if asked.method != "rloo" and asked.train.micro_batch != "auto" and asked.train.micro_batch > effective:
        warning(
            "train.micro_batch_unused",
            f"A step has {effective} rows, so a micro-batch of {asked.train.micro_batch} is never full.",
            "train.micro_batch",
            f"Set it to {effective} or less, or raise train.effective_batch.",
        )
    return found


def _assumed(chosen: JobSpec, report: DataReport, timed: bool) -> list[Finding]:
    if report.used_rows is not None and report.tokens is not None:
        return []
    return [
        Finding(
            level="info",
            code="size.assumed",
            message="The data could not be read from here: memory is planned for rows of "
            f"{chosen.train.max_length:,} tokens, and the time is {'a rough range' if timed else 'not known'}.",
            where="data",
            fix="Give train.max_length and train.max_steps to narrow it.",
        )
    ]
