"""The nouns of the house: frozen, slotted, defined once. Untrusted bytes become nouns in orchestrator/wire.py only.

Everything is plain data: orchestrator/plain.py turns a noun into JSON-ready values and back.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from tunesmith.orchestrator.plain import digest, plain

SCHEMA_VERSION = 1

Auto = Literal["auto"]
Format = Literal["messages", "prompt-completion", "text", "preference", "unpaired", "prompt-only"]
Level = Literal["error", "warning", "info"]
Source = Literal["formula", "calibrated", "measured"]
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]

METHODS = ("sft", "dpo", "grpo", "kto", "rloo", "reward", "distill")
SAMPLED = ("grpo", "rloo", "distill")  # methods that train on what the model writes itself
DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


# --- what a user asks for ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which model: a hub id, an alias, a local folder, a .gguf file, `job:JOB`, or `stage:N`."""

    id: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """How columns become training rows. `columns` maps our role (prompt, completion, messages, text...) to a column."""

    kind: Format
    columns: Dict[str, str] = field(default_factory=dict)
    roles: Dict[str, str] = field(default_factory=dict)
    template: str | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """One data set: a file, glob, folder or hub id. `limit` takes the first rows, `fraction` a seeded share."""

    source: str
    config: str | None = None
    split: str = "train"
    limit: Count | None = None
    fraction: Annotated[float, Gt(0), Le(1)] | None = None
    weight: Positive = 1.0
    mapping: Mapping | Auto = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSpec:
    """What is held out before training and never trained on."""

    fraction: Annotated[float, Ge(0), Lt(1)] = 0.05
    source: str | None = None
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What is trained beside, or instead of, the base weights. `targets` are module names; kind none trains all."""

    kind: Literal["lora", "dora", "qlora", "none"] | Auto = "auto"
    rank: Annotated[int, Ge(1), Le(1024)] | Auto = "auto"
    alpha: Positive | Auto = "auto"
    targets: tuple[str, ...] | Auto = "auto"
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """How it is trained. `effective_batch` counts source rows per optimizer step, whatever the layout."""

    epochs: Positive = 1.0
    max_steps: Count | None = None
    learning_rate: Positive | Auto = "auto"
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Ge(0)] | Auto = "auto"
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    max_length: Annotated[int, Ge(8)] | Auto = "auto"
    effective_batch: Count | Auto = "auto"
    micro_batch: Count | Auto = "auto"
    packing: bool | Auto = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | Auto = "auto"
    optimizer: Literal["adamw", "adamw-8bit"] | Auto = "auto"
    activation_checkpointing: bool | Auto = "auto"
    save_steps: Count | Auto = "auto"
    keep_checkpoints: Count = 2
    eval_steps: Count | Auto = "auto"
    early_stopping: Count | None = None
    seed: Annotated[int, Ge(0), Lt(2**32)] = 42


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoSpec:
    """Direct preference optimisation, with TRL's names and defaults.

    `label_smoothing` is read by the losses robust, exo_pair, aot and aot_unpaired. The `reference` is the model as it
    was before training, or none at all: then every reference log-probability counts as 0.
    """

    beta: Positive = 0.1
    loss: DpoLoss = "sigmoid"
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    reference: Literal["base", "none"] = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSpec:
    """Group relative policy optimisation; rloo reads all but `loss`, `scale_rewards` and `vllm`.

    Ratios are clipped to [1 - epsilon, 1 + epsilon_high], where a missing `epsilon_high` is epsilon. Advantages are
    divided by the standard deviation of their group's rewards, of the whole step's (batch), or by nothing.
    `mask_truncated` leaves completions that were cut at `max_completion` out of the loss. `reward_weights` has one
    number for each reward; empty means 1 each. `vllm` is the share of a GPU's memory that vLLM takes to write answers
    with; 0 is the kernel's own rollout.
    """

    num_generations: Annotated[int, Ge(2)] = 8
    max_completion: Count = 256
    temperature: Positive = 1.0
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    beta: Annotated[float, Ge(0)] = 0.0
    num_iterations: Count = 1
    epsilon: Annotated[float, Gt(0), Lt(1)] = 0.2
    epsilon_high: Positive | None = None
    scale_rewards: Literal["group", "batch", "none"] = "group"
    mask_truncated: bool = False
    rewards: tuple[str, ...] = ("auto",)
    reward_weights: tuple[float, ...] = ()
    vllm: Annotated[float, Ge(0), Lt(1)] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KtoSpec:
    """Kahneman-Tversky optimisation: the weights even out unequal numbers of good and bad answers."""

    beta: Positive = 0.1
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSpec:
    """On-policy distillation: the student writes, and learns the teacher's distribution over what it wrote.

    `teacher` is a model as in `model.id`, of the same vocabulary. `beta` is the divergence: 0 is forward
    Kullback-Leibler, 1 reverse, and between them Jensen-Shannon.
    """

    teacher: str | None = None
    beta: Annotated[float, Ge(0), Le(1)] = 1.0
    max_completion: Count = 256
    temperature: Positive = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Caps a person sets. `memory_gb` counts GiB; `repairs` bounds what may be mended without asking."""

    usd: Annotated[float, Ge(0)] | None = None
    hours: Positive | None = None
    memory_gb: Positive | None = None
    repairs: Annotated[int, Ge(0)] = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """What happens with the result: pushed (private by default), merged, converted."""

    push: str | None = None
    private: bool = True
    merge: bool = False
    gguf: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """The whole request, immutable and hashed. `auto` is resolved in the plan; what the user set never changes."""

    tunesmith: int = 1
    name: str | None = None
    model: ModelRef
    data: tuple[DataSource, ...]
    eval: EvalSpec = EvalSpec()
    method: Literal["sft", "dpo", "grpo", "kto", "rloo", "reward", "distill"] = "sft"
    adapter: AdapterSpec = AdapterSpec()
    train: TrainSpec = TrainSpec()
    dpo: DpoSpec = DpoSpec()
    grpo: GrpoSpec = GrpoSpec()
    kto: KtoSpec = KtoSpec()
    distill: DistillSpec = DistillSpec()
    backend: str = "local"
    hardware: str | Dict[str, Any] | None = None
    limits: Limits = Limits()
    deliver: Deliver = Deliver()
    priority: int = 0
    after: tuple[str, ...] = ()
    storage: str | None = None
    notify: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was submitted, before it is understood: a sentence or a spec document, with what was set beside it.

    `cwd` is where relative paths begin; `sets` are dotted spec keys with plain values ("train.epochs": 3).
    """

    text: str | None = None
    spec: Dict[str, Any] | None = None
    sets: Dict[str, Any] = field(default_factory=dict)
    backend: str | None = None
    quick: bool = False
    cwd: str = "/"


# --- what the plan says --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A range with its source. `formula`: what was expected before earlier runs corrected it."""

    low: float
    expected: float
    high: float
    unit: Literal["bytes", "seconds", "usd", "tokens", "tokens/s"]
    source: Source = "formula"
    formula: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check before a run says; an error stops the run."""

    level: Level
    code: str
    message: str
    where: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Something the request lacks and that must not be guessed."""

    field: str
    text: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """One `auto` with the value chosen and why."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Lengths in tokens of the rows used. `exact` is False for a sample or for bytes per token."""

    p50: int
    p95: int
    max: int
    total: Estimate
    supervised_share: float | None = None
    truncated_rows: int = 0
    exact: bool = False
    method: Literal["sample", "tokenizer", "bytes-per-token"] = "bytes-per-token"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What is known of the data. `rows` is None where it could not be read from here."""

    rows: int | None
    used_rows: int | None
    eval_rows: int | None
    format: str | None
    mapping: Mapping | None
    fingerprint: str | None
    problems: tuple[Finding, ...] = ()
    tokens: TokenStats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """One earlier run in pairs, (foretold by formulas alone, measured): bytes held, tokens/s, seconds beside training.

    `exceeded`: it needed more bytes than the second number.
    """

    method: str
    family: str
    bytes: tuple[float, float] | None = None
    exceeded: bool = False
    rate: tuple[float, float] | None = None
    rest: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One place to run: a GPU, several, or a CPU, as a backend offers it. Peaks in FLOP/s, bandwidth in bytes/s.

    `stack` names it and the versions its speed and room depend on; `past` are runs on that very stack, newest first.
    """

    backend: str
    hardware: str
    kind: Literal["cpu", "cuda", "mps"]
    memory_bytes: int
    count: int = 1
    peak_flops: float = 0.0
    bandwidth: float = 0.0
    usd_per_hour: float = 0.0
    as_of: str | None = None
    why_not: str | None = None
    stack: Dict[str, str] = field(default_factory=dict)
    past: tuple[Past, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """How the same job would do on another card. `speed` is its tokens/s over those of the plan; None if not known."""

    hardware: str
    memory_bytes: int
    fits: bool
    speed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The job fitted to a device. `peak_bytes` is what one device must hold; `parts` adds up to its expected value.

    `elsewhere` are the next smaller and the next larger card.
    """

    params: int
    trainable: int
    peak_bytes: Estimate
    parts: Dict[str, int]
    device_bytes: int
    fits: bool
    micro_batch: int
    grad_accum: int
    max_length: int
    activation_checkpointing: bool
    quantization: str | None
    rank: int | None
    elsewhere: tuple[Elsewhere, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """How long it takes, and how fast it goes in real tokens."""

    seconds: Estimate
    tokens_per_second: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A backend and its hardware, whether the job fits, how long it takes and what it costs."""

    backend: str
    hardware: str
    fits: bool
    usd_per_hour: float
    seconds: Estimate | None = None
    usd: Estimate | None = None
    usd_worst: float | None = None
    as_of: str | None = None
    why_not: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One method of a plan: its resolved spec and all that is foretold of it.

    `reward_hashes` are the SHA-256 of the files that rewards come from, in the order of the spec.
    """

    spec: JobSpec
    resolved: tuple[Resolved, ...]
    data: DataReport
    size: Size | None
    time: TimeEstimate | None
    offers: tuple[Offer, ...] = ()
    findings: tuple[Finding, ...] = ()
    reward_hashes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Resolved stages, what was understood of the request, and what is still open."""

    plan_hash: str
    intent: Literal["train", "status", "check", "advice", "export"]
    command: tuple[str, ...]
    stages: tuple[Stage, ...] = ()
    questions: tuple[Question, ...] = ()
    findings: tuple[Finding, ...] = ()
    understood: tuple[Resolved, ...] = ()
    unread: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Every error finding, the plan's own first, then those of its stages and their data."""
        found = [*self.findings]
        for stage in self.stages:
            found += [*stage.findings, *stage.data.problems]
        return tuple(item for item in found if item.level == "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """Who said yes, to which plan, under which caps."""

    plan_hash: str
    by: str
    usd: float | None = None
    hours: float | None = None


# --- what runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One execution on one backend: the whole input of the kernel, written as attempt.json beside its outputs.

    `spec` has no `auto` left. `data_fingerprint` and `reward_hashes` are checked again when the attempt starts.
    `resume_from` is a checkpoint folder relative to the job's folder ("attempts/1/checkpoints/step-00000010"), or None.
    """

    job: str
    number: int
    spec: JobSpec
    plan_hash: str
    data_fingerprint: str | None = None
    reward_hashes: tuple[str, ...] = ()
    resume_from: str | None = None
    seconds_cap: float | None = None

    @property
    def key(self) -> str:
        """The idempotency key under which a backend knows this attempt."""
        return f"{self.job}:{self.number}:{spec_hash(self.spec)[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change proposed after a failure. `changes-task` always needs a person."""

    id: str
    kind: Literal["same-result", "changes-task"]
    text: str
    sets: Dict[str, Any] = field(default_factory=dict)


# --- what binds ----------------------------------------------------------------------------------------------------


def spec_hash(spec: JobSpec) -> str:
    """SHA-256 of a spec."""
    return digest(spec)


def plan_hash(
    specs: typing.Sequence[JobSpec],
    *,
    fingerprints: typing.Sequence[str | None],
    model_commits: typing.Sequence[str | None],
    reward_hashes: Dict[str, str] | None = None,
    hardware: typing.Sequence[str] = (),
) -> str:
    """What an approval binds: resolved specs (caps and backend with them), data, model commits, rewards, hardware.

    Estimates and offers are not in it: they may change while a person reads.
    """
    return digest(
        {
            "specs": [plain(spec) for spec in specs],
            "fingerprints": list(fingerprints),
            "model_commits": list(model_commits),
            "rewards": dict(reward_hashes or {}),
            "hardware": list(hardware),
        }
    )
