"""A job on one device: what its method makes of it under any choice of knobs, in memory and in time.

`Job` holds what does not depend on memory, `Knobs` what memory and speed decide. Together they are a `Layout`, whose
bytes size.py counts, and a `Work`, whose seconds time.py counts. Everything here is a pure function of the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing import defaults, size, time
from tunesmith.executors.kernel.sizing.calibration import Corrections
from tunesmith.executors.kernel.sizing.rows import THROUGH_TRL, USUAL_SHARE, Rows, processes, shares
from tunesmith.executors.kernel.sizing.size import Kind, Layout
from tunesmith.orchestrator.nouns import DataReport, Device, Estimate, JobSpec, TimeEstimate

HEADS = {"sft": "loss", "kto": "tiled", "rloo": "tiled", "reward": "none"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """What is turned to make a job fit. `rows` are those of a micro-batch: packed, it is their budget of tokens."""

    kind: Kind
    dtype: str
    optimizer: str
    checkpointing: bool
    packing: bool
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A spec whose sizes are settled, but for what memory decides. `rank` is that of the adapter, if there is one.

    `known` is what earlier runs on the device say of the formulas.
    """

    spec: JobSpec
    facts: ModelFacts
    report: DataReport
    device: Device
    teacher: ModelFacts | None
    length: int
    effective: int
    rank: int
    targets: tuple[str, ...]
    known: Corrections

    # --- how many share what ---

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
    def safe(self) -> int:
        """Those of them that a high estimate may reach."""
        return int(size.SAFE_SHARE[self.device.kind] * self.budget)

    # --- rows ---

    def made(self, packing: bool) -> Rows:
        """What the method makes of a row."""
        known = self.report.tokens
        share = known.supervised_share if known is not None and known.supervised_share is not None else 0.5
        return Rows(spec=self.spec, length=self.length, packing=packing, share=share)

    @property
    def counted(self) -> int:
        """What micro-batches are cut from: the rows of a step, for RLOO all answers to them."""
        return self.made(False).counted(self.effective)

    @property
    def least(self) -> int:
        """Rows of the smallest micro-batch there can be."""
        return shares(self.spec.method, self.counted)[0] if self.spec.method in THROUGH_TRL else 1

    @property
    def total(self) -> int | None:
        """Optimizer steps; None where neither they nor the rows are known."""
        count = defaults.rows_of(self.spec, self.report)
        if self.spec.train.max_steps is not None or count is None:
            return self.spec.train.max_steps
        rounds = max(1, math.ceil(math.ceil(count / self.effective) * self.spec.train.epochs))
        return rounds * self.made(False).repeats

    def tokens(self, knobs: Knobs) -> tuple[int, int]:
        """(most tokens in a micro-batch, its longest sequence)."""
        rows, known = self.made(knobs.packing), self.report.tokens
        longest = rows.length
        if known is not None and known.exact:
            longest = min(rows.length, known.max + rows.written)
        most = knobs.rows * rows.most(longest)
        if rows.packing and self.spec.method not in THROUGH_TRL:
            # as many tokens as the rows could have, of those a step has
            usual = min(rows.length - rows.written, known.p95 if known is not None else rows.length)
            step = rows.most(longest) + (self.effective - 1) * rows.usual(usual)
            most = min(knobs.rows * rows.budget(), max(math.ceil(step), longest))
        return most, longest

    def batches(self, knobs: Knobs) -> int:
        """Micro-batches that a step has at least: packed, they hold more rows than they are made for."""
        rows, known = self.made(knobs.packing), self.report.tokens
        count = math.ceil(rows.counted(self.effective) / knobs.rows)
        if not rows.packing or known is None or not self.report.used_rows:
            return count
        usual = rows.usual(known.total.expected / self.report.used_rows)
        return max(1, min(count, math.ceil(self.effective * usual / (knobs.rows * rows.budget()))))

    # --- memory ---

    def layout(self, knobs: Knobs) -> Layout:
        """What is held with these knobs."""
        rows, kind, (tokens, longest) = self.made(knobs.packing), self.device.kind, self.tokens(knobs)
        effective = math.ceil(self.effective / self.ranks)  # this rank's
        return Layout(
            facts=self.facts,
            kind=knobs.kind,
            rank=self.rank,
            targets=size.target_names(self.facts, self.targets),
            dtype=knobs.dtype,
            tokens=tokens,
            longest=longest,
            checkpointing=knobs.checkpointing,
            optimizer=knobs.optimizer,
            device=kind,
            head=HEADS.get(self.spec.method, "logps"),  # type: ignore[arg-type]
            branched=rows.branched(tokens),
            looked=rows.looked(tokens),
            slots=rows.slots(effective, kind),
            cached=rows.cached(effective, kind, knobs.dtype),
            paged=rows.paged(kind, knobs.dtype),
            copied=self.spec.method == "grpo",
            lent=self._lent(),
            packed=rows.packing and self.spec.method not in THROUGH_TRL,
            beside=self._beside(knobs),
            known=self.known.memory,
        )

    def _lent(self) -> int:
        """Bytes that vLLM takes, as the run will: on one GPU only."""
        alone = self.spec.method == "grpo" and self.device.kind == "cuda" and self.ranks == 1
        return round(self.spec.grpo.vllm * self.device.memory_bytes) if alone else 0

    def _beside(self, knobs: Knobs) -> int:
        """Bytes of another model: the teacher, or a frozen copy to compare with where no adapter is switched off."""
        if self.teacher is not None:
            return size.BYTES[knobs.dtype] * self.teacher.params
        compared = self.spec.method == "kto" or (self.spec.method in ("grpo", "rloo") and self.spec.grpo.beta > 0)
        return 4 * self.facts.params if knobs.kind == "none" and compared else 0

    # --- time ---

    def duration(self, knobs: Knobs) -> TimeEstimate | None:
        """How long the whole job takes; None where nothing is known of the device's speed, or of the job's length."""
        if self.total is None:
            return None
        work = self._work(knobs, self.total)
        foretold = time.estimate(work, self.device)
        return None if foretold is None else self.known.timed(foretold, work.tokens)

    def rate(self, knobs: Knobs, device: Device) -> float:
        """Optimizer steps a second, foretold for a device of known speed: to compare knobs and devices by.

        Not tokens, for where answers share their prompt the same rows have fewer.
        """
        work = self._work(knobs, self.total or 100)
        foretold = time.estimate(work, device)
        if foretold is None:
            raise ValueError(f"nothing is known of the speed of {device.hardware}")
        return work.steps * foretold.tokens_per_second.expected / max(1.0, work.tokens.expected)

    def _work(self, knobs: Knobs, total: int) -> time.Work:
        known, rows, effective = self.report.tokens, self.made(knobs.packing), self.effective
        count = defaults.rows_of(self.spec, self.report)
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
        batches = self.batches(knobs)
        return time.Work(
            facts=self.facts,
            adapter=knobs.kind != "none",
            quantised=knobs.kind == "qlora",
            trained=size.trainable(self.facts, knobs.kind, self.rank, size.target_names(self.facts, self.targets)),
            checkpointing=knobs.checkpointing,
            dtype=knobs.dtype,
            tokens=tokens,
            supervised_share=rows.scored(),
            mean=mean + written,
            steps=total,
            micro_batches=total * batches,
            read=visits * rows.read(mean, written, again=again) + held * (mean if written else rows.trained(mean, 0)),
            passes=self._passes(rows, visits / effective, held, own),
            slots=rows.slots(own, self.device.kind),
            context=mean + written / 2,
            eager=self.spec.method in THROUGH_TRL,
            shared=batches / math.ceil(batches / sharing),  # a GPU without a micro-batch waits for the others
        )

    def _passes(self, rows: Rows, rounds: float, held: int, own: int) -> float:
        """Forward passes that write one token each: in every round of training, and for the rows held out.

        `own`: rows of a step for which one process writes, while the others write for theirs.
        """
        if not rows.written:
            return 0.0
        made, slots = own * rows.answers, rows.slots(own, self.device.kind)
        # none is faster than the longest answer
        training = max(rows.written, made * rows.written * USUAL_SHARE / slots)
        return rounds * training + math.ceil(held / self.effective) * rows.written
