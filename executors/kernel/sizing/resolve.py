"""Fits a spec to a device: every `auto` becomes a value with a reason, and what the user set stays as it is.

Knobs are turned in an order: first those that leave the result as it is (micro-batch with accumulation, activation
checkpointing), then an 8-bit optimizer for full training, then a quantised base; length, rank, method and model never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, cast

from tunesmith.executors.kernel import catalogue
from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing import advice, defaults, size, time
from tunesmith.executors.kernel.sizing.rows import THROUGH_TRL, USUAL_SHARE, Rows, processes, shares, written
from tunesmith.executors.kernel.sizing.size import Kind, Layout, in_gib
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import (
    DataReport,
    Device,
    Estimate,
    Finding,
    JobSpec,
    ModelRef,
    Resolved,
    Size,
    TimeEstimate,
)

HEADS = {"sft": "loss", "kto": "tiled", "rloo": "tiled", "reward": "none"}
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768, "mps": 8192}  # a micro-batch of more tokens is no faster


def unknown_model(ref: ModelRef) -> InputError:
    """The error for a model that neither the catalogue nor this machine knows."""
    near = catalogue.nearest(ref.id)
    return InputError(
        f"The model {ref.id[:200]!r} is not known.",
        why="It is not in the catalogue, no folder of that name is here, and it is not in the Hugging Face cache.",
        fix=f"Did you mean {', '.join(near[:-1])} or {near[-1]}? A local folder with config.json works too.",
        where="model.id",
        code="model.unknown",
    )


def resolve(
    spec: JobSpec, facts: ModelFacts | None, report: DataReport, device: Device, teacher: ModelFacts | None = None
) -> tuple[JobSpec, Size, TimeEstimate | None, list[Resolved], list[Finding]]:
    """The spec without any `auto`, what it needs, how long it takes, why each value was chosen, and what to know.

    A job that cannot fit is returned all the same, with `Size.fits` False and the error finding `size.does_not_fit`
    saying what would. The time is None where nothing is known of the device's speed, or nothing of the data.
    `teacher` is the model that a distillation learns from. Raises InputError("model.unknown") without facts. Cost:
    some milliseconds, no I/O but /proc/cpuinfo.
    """
    if facts is None:
        raise unknown_model(spec.model)
    fitting = _Fitting(spec=spec, facts=facts, report=report, device=device, teacher=teacher)
    fitting.choose()
    layout, micro = fitting.fit()
    chosen = fitting.schedule(layout, micro)
    sized = fitting.size(layout, micro)
    findings = [*fitting.findings, *advice.notes(spec, chosen, facts, report, device, timed=fitting.time is not None)]
    return chosen, sized, fitting.time, fitting.resolved, findings


@dataclass(slots=True)
class _Fitting:
    """One pass from a spec to a fitted one. `values` are dotted keys with what they have become."""

    spec: JobSpec
    facts: ModelFacts
    report: DataReport
    device: Device
    teacher: ModelFacts | None = None
    values: dict[str, Any] = field(default_factory=dict)
    resolved: list[Resolved] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    time: TimeEstimate | None = None

    # --- what does not depend on memory ---

    def choose(self) -> None:
        """Everything but the knobs that memory turns."""
        spec, facts, rows = self.spec, self.facts, defaults.rows_of(self.spec, self.report)
        tokens, full = self.report.tokens, spec.adapter.kind == "none"
        self._set("train.dtype", *defaults.dtype(self.device, full))
        self._set("train.max_length", *defaults.max_length(facts, tokens, written(spec)))
        self._set("train.effective_batch", *defaults.effective_batch(spec, rows))
        self._set("train.packing", *defaults.packing(spec.method, self.values["train.max_length"], tokens))
        self._set("train.learning_rate", *defaults.learning_rate(facts, spec.method, full))
        rank, why = defaults.rank(rows)
        self._set("adapter.rank", rank, "all weights are trained" if full else why)
        self._set("adapter.alpha", *defaults.alpha(self.values["adapter.rank"]))
        self._set("adapter.targets", *defaults.targets(facts))

    def _set(self, key: str, value: Any, why: str) -> Any:
        """The user's value where there is one, else this one, with its reason written down."""
        given = self._given(key)
        if given != "auto":
            self.values[key] = given
            return given
        if key in self.values:
            self.resolved = [item for item in self.resolved if item.key != key]
        self.values[key] = value
        self.resolved.append(Resolved(key=key, value=value, why=why))
        return value

    def _given(self, key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(self.spec, section), name)

    # --- what memory decides ---

    @property
    def ranks(self) -> int:
        """Processes that share each step, each with the whole model: on GPUs of their own, or on one machine's CPU."""
        return processes(self.spec.hardware)

    @property
    def sharers(self) -> int:
        """Processes that share the device's memory."""
        return 1 if self.device.kind == "cuda" else self.ranks

    @property
    def budget(self) -> int:
        """Bytes that a process may plan with: its part of the device's, or of the user's cap."""
        cap, there = self.spec.limits.memory_gb, self.device.memory_bytes
        return (min(there, int(cap * size.GIB)) if cap is not None else there) // self.sharers

    @property
    def rows(self) -> Rows:
        """What the method makes of a row, with the values chosen so far."""
        known = self.report.tokens
        share = known.supervised_share if known is not None and known.supervised_share is not None else 0.5
        length, packing = int(self.values["train.max_length"]), bool(self.values["train.packing"])
        return Rows(spec=self.spec, length=length, packing=packing, share=share)

    def tokens_of(self, count: int) -> tuple[int, int]:
        """(most tokens in a micro-batch of `count` rows, its longest sequence)."""
        rows, known = self.rows, self.report.tokens
        longest = rows.length
        if known is not None and known.exact:
            longest = min(rows.length, known.max + rows.written)
        most = count * rows.most(longest)
        if rows.packing and self.spec.method not in THROUGH_TRL:
            # as many tokens as the rows could have, of those a step has
            usual = min(rows.length - rows.written, known.p95 if known is not None else rows.length)
            step = rows.most(longest) + (int(self.values["train.effective_batch"]) - 1) * rows.usual(usual)
            most = min(count * rows.budget(), max(math.ceil(step), longest))
        return most, longest

    def layout(self, kind: str, count: int, checkpointing: bool, optimizer: str, **changes: Any) -> Layout:
        """What is held with these knobs."""
        tokens, longest = self.tokens_of(count)
        rows, effective = self.rows, math.ceil(int(self.values["train.effective_batch"]) / self.ranks)  # this rank's
        values: dict[str, Any] = {
            "facts": self.facts,
            "kind": cast(Kind, kind),
            "rank": int(self.values["adapter.rank"]),
            "targets": size.target_names(self.facts, tuple(self.values["adapter.targets"])),
            "dtype": str(self.values["train.dtype"]),
            "tokens": tokens,
            "longest": longest,
            "checkpointing": checkpointing,
            "optimizer": optimizer,
            "device": self.device.kind,
            "head": HEADS.get(self.spec.method, "logps"),
            "branched": rows.branched(tokens),
            "looked": rows.looked(tokens),
            "slots": rows.slots(effective, self.device.kind),
            "cached": rows.cached(effective, self.device.kind, str(self.values["train.dtype"])),
            "paged": rows.paged(self.device.kind, str(self.values["train.dtype"])),
            "copied": self.spec.method == "grpo",
            "lent": self._lent(),
            "beside": self._beside(kind == "none"),
        }
        return Layout(**{**values, **changes})

    def _lent(self) -> int:
        """Bytes that vLLM takes, as the run will: on one GPU only."""
        alone = self.spec.method == "grpo" and self.device.kind == "cuda" and self.ranks == 1
        return round(self.spec.grpo.vllm * self.device.memory_bytes) if alone else 0

    def _beside(self, full: bool) -> int:
        """Bytes of another model: the teacher, or a frozen copy to compare with where no adapter is switched off."""
        if self.teacher is not None:
            return size.BYTES[str(self.values["train.dtype"])] * self.teacher.params
        compared = self.spec.method == "kto" or (self.spec.method in ("grpo", "rloo") and self.spec.grpo.beta > 0)
        return 4 * self.facts.params if full and compared else 0

    def _dtypes(self) -> list[str]:
        """The type chosen; where that is float32 for want of bfloat16, float16 too, which losses are scaled for."""
        chosen = str(self.values["train.dtype"])
        free = self._given("train.dtype") == "auto" and self.device.kind == "cuda" and chosen == "float32"
        overflows = self.facts.model_type.startswith("gemma")
        return [chosen, "float16"] if free and not overflows else [chosen]

    def _knobs(self) -> Iterator[tuple[str, str, str, bool]]:
        """(adapter kind, dtype, optimizer, checkpointing) in the order they are tried; the user's values only."""
        train, adapter = self.spec.train, self.spec.adapter
        kinds: list[str] = [adapter.kind]
        if adapter.kind == "auto":
            kinds = ["lora", "qlora"] if defaults.no_4bit(self.device) is None else ["lora"]
        flags = [False, True] if train.activation_checkpointing == "auto" else [train.activation_checkpointing]
        for kind in kinds:
            optimizers: list[str] = ["adamw"] if train.optimizer == "auto" else [train.optimizer]
            if train.optimizer == "auto" and kind == "none" and defaults.no_8bit(self.device) is None:
                optimizers.append("adamw-8bit")
            for dtype, optimizer, flag in product(self._dtypes(), optimizers, flags):
                yield kind, dtype, optimizer, flag

    def _rows_at_once(self) -> list[int]:
        """Micro-batches to try, the largest first: those that split the effective batch most evenly."""
        given, effective = self.spec.train.micro_batch, self.rows.counted(int(self.values["train.effective_batch"]))
        if self.spec.method in THROUGH_TRL:
            sizes = shares(self.spec.method, effective)[::-1]
            if given != "auto":
                return [next((rows for rows in sizes if rows <= given), sizes[-1])]
        elif given != "auto":
            return [given]
        else:
            sizes = sorted({math.ceil(effective / count) for count in range(1, effective + 1)}, reverse=True)
        most = TOKENS_AT_ONCE[self.device.kind]
        fast = [rows for rows in sizes if self.tokens_of(rows)[0] <= most and self._batches(rows) >= self.ranks]
        return fast if fast[-1:] == sizes[-1:] else [*fast, sizes[-1]]

    def _least(self) -> int:
        """Rows of the smallest micro-batch there can be."""
        counted = self.rows.counted(int(self.values["train.effective_batch"]))
        return shares(self.spec.method, counted)[0] if self.spec.method in THROUGH_TRL else 1

    def _batches(self, micro: int) -> int:
        """Micro-batches that a step has at least: packed, they hold more rows than they are made for."""
        rows, effective, known = self.rows, int(self.values["train.effective_batch"]), self.report.tokens
        count = math.ceil(rows.counted(effective) / micro)
        if not rows.packing or known is None or not self.report.used_rows:
            return count
        usual = rows.usual(known.total.expected / self.report.used_rows)
        return max(1, min(count, math.ceil(effective * usual / (micro * rows.budget()))))

    def fit(self) -> tuple[Layout, int]:
        """The first knobs that fit with their largest micro-batch; the least that could be tried where none do."""
        last: tuple[Layout, int] | None = None
        for kind, dtype, optimizer, flag in self._knobs():
            for rows in self._rows_at_once():
                last = self.layout(kind, rows, flag, optimizer, dtype=dtype), rows
                if size.fits(last[0], self.budget):
                    return self._settle(*last)
        if last is None:
            raise AssertionError("there is always something to try")
        return self._settle(*last)

    def _settle(self, layout: Layout, rows: int) -> tuple[Layout, int]:
        effective = self.rows.counted(int(self.values["train.effective_batch"]))
        share = in_gib(size.SAFE_SHARE[self.device.kind] * self.budget)
        count, given = math.ceil(effective / rows), self._given("train.micro_batch")
        bits = 8 * size.BYTES[layout.dtype]
        reason = {
            "lora": "LoRA trains a small adapter and leaves the model as it is",
            "qlora": f"in {bits} bits the model does not fit into {share}; its weights are held in 4 bits",
        }
        self._set("adapter.kind", layout.kind, reason.get(layout.kind, ""))
        if layout.dtype != self.values["train.dtype"]:
            why = f"{self.device.hardware} has no bfloat16, and float32 does not fit into {share}; losses are scaled"
            self._set("train.dtype", layout.dtype, why)
        what = "answers" if self.spec.method == "rloo" else "rows"
        why = f"the most that is fast and fits into {share}; {count} of them make a step of {effective} {what}"
        why += f", which {self.ranks} processes share" if self.ranks > 1 else ""
        self._set("train.micro_batch", rows, why)
        if given not in ("auto", rows):
            why = f"steps are cut into equal micro-batches: of {effective} {what}, {rows} go at once where {given} may"
            self.resolved.append(Resolved(key="train.micro_batch", value=rows, why=why))
        why = (
            f"without it the step does not fit into {share}" if layout.checkpointing else "it fits without, and faster"
        )
        self._set("train.activation_checkpointing", layout.checkpointing, why)
        why = "Adam's moments in 8 bits, as in 32 they do not fit" if layout.optimizer != "adamw" else "the usual one"
        self._set("train.optimizer", layout.optimizer, why)
        return layout, rows

    # --- what follows from both ---

    def schedule(self, layout: Layout, micro: int) -> JobSpec:
        """Steps, time, and the spec without any `auto`."""
        spec, rows = self.spec, defaults.rows_of(self.spec, self.report)
        effective = int(self.values["train.effective_batch"])
        total = spec.train.max_steps
        if total is None and rows is not None:
            total = max(1, math.ceil(math.ceil(rows / effective) * spec.train.epochs)) * self.rows.repeats
        self.time = self._time(layout, micro, total, rows)
        train_seconds = self.time.seconds.expected / total if self.time and total else None
        self._set("train.warmup_steps", *defaults.warmup_steps(total))
        self._set("train.save_steps", *defaults.save_steps(total, train_seconds))
        self._set("train.eval_steps", *defaults.eval_steps(total))
        order = {key: number for number, key in enumerate(_ORDER)}
        self.resolved.sort(key=lambda item: order[item.key])
        changes: dict[str, dict[str, Any]] = {"adapter": {}, "train": {}}
        for key, value in self.values.items():
            section, name = key.split(".")
            changes[section][name] = value
        return replace(
            spec, adapter=replace(spec.adapter, **changes["adapter"]), train=replace(spec.train, **changes["train"])
        )

    def _time(self, layout: Layout, micro: int, total: int | None, count: int | None) -> TimeEstimate | None:
        known, rows = self.report.tokens, self.rows
        effective = int(self.values["train.effective_batch"])
        if total is None:
            return None
        visits = total / rows.repeats * effective  # rows taken up, each time one is
        if known is not None and count is not None:
            used = max(1, self.report.used_rows or count)
            low, mean, high = (value / used for value in (known.total.low, known.total.expected, known.total.high))
        else:  # only the number of steps is known
            length = rows.length - rows.written
            low, mean, high = length / 20, length / 2, float(length)
        tokens = Estimate(
            low=total * effective * rows.trained(low, rows.written / 10),
            expected=total * effective * rows.trained(mean, rows.written * USUAL_SHARE),
            high=total * effective * rows.trained(high, rows.written),
            unit="tokens",
        )
        written = rows.written * USUAL_SHARE
        again = min(1.0, count / visits) if count is not None else 1.0
        held = (self.report.eval_rows or 0) * (1 + math.ceil(total / max(1, defaults.eval_steps(total)[0])))
        sharing = self.ranks // self.sharers  # GPUs; processes on a CPU share its cores, and gain nothing
        own = math.ceil(effective / sharing)  # rows of a step for which one of them writes answers
        passes = self._passes(rows, visits / effective, held, own)
        batches = self._batches(micro)
        work = time.Work(
            facts=self.facts,
            adapter=layout.kind != "none",
            quantised=layout.kind == "qlora",
            trained=size.trainable(layout.facts, layout.kind, layout.rank, layout.targets),
            checkpointing=layout.checkpointing,
            dtype=layout.dtype,
            tokens=tokens,
            supervised_share=rows.scored(),
            mean=mean + written,
            steps=total,
            micro_batches=total * batches,
            read=visits * rows.read(mean, written, again=again) + held * (mean if written else rows.trained(mean, 0)),
            passes=passes,
            slots=rows.slots(own, self.device.kind),
            context=mean + written / 2,
            eager=self.spec.method in THROUGH_TRL,
            shared=batches / math.ceil(batches / sharing),  # a GPU without a micro-batch waits for the others
        )
        return time.estimate(work, self.device)

    def _passes(self, rows: Rows, rounds: float, held: int, own: int) -> float:
        """Forward passes that write one token each: in every round of training, and for the rows held out.

        `own`: rows of a step for which one process writes, while the others write for theirs.
        """
        if not rows.written:
            return 0.0
        effective = int(self.values["train.effective_batch"])
        made, slots = own * rows.answers, rows.slots(own, self.device.kind)
        training = max(
            rows.written, made * rows.written * USUAL_SHARE / slots
        )  # none is faster than the longest answer
        return rounds * training + math.ceil(held / effective) * rows.written

    def size(self, layout: Layout, micro: int) -> Size:
        """The size of what was chosen; the error finding where it does not fit."""
        effective = int(self.values["train.effective_batch"])
        peak, fits = size.peak(layout), size.fits(layout, self.budget)
        if not fits:
            least = self._least()
            tried = least, *self.tokens_of(least)
            self.findings.append(advice.does_not_fit(layout, self.device, self.budget, tried, self.sharers))
        return Size(
            params=self.facts.params,
            trainable=size.trainable(layout.facts, layout.kind, layout.rank, layout.targets),
            peak_bytes=peak,
            parts=size.parts(layout),
            device_bytes=self.budget,
            fits=fits,
            micro_batch=micro,
            grad_accum=max(1, math.ceil(self.rows.counted(effective) / micro)),
            max_length=int(self.values["train.max_length"]),
            activation_checkpointing=layout.checkpointing,
            quantization="nf4" if layout.kind == "qlora" else None,
            rank=None if layout.kind == "none" else layout.rank,
        )


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
