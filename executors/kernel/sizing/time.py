"""How many seconds a job takes: arithmetic and memory traffic against what the device can do.

A token costs 4 operations for each base parameter it passes where the base is frozen (forward, and the gradients of
activations), 6 where weights are trained too, 2 more with activation checkpointing; causal attention adds its share.
Between the products, element-wise kernels move bytes; on a GPU, small steps wait for launches. Where the model writes,
every pass adds one token to each answer in a slot: it reads all weights and what was written before, however few the
slots. The constants are those of traced steps (bytes per token, layer and hidden unit; kernels per layer), as is the
shape of the formula.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.orchestrator.nouns import Device, Estimate, TimeEstimate

_PRODUCTS = {"cpu": 0.30, "cuda": 0.55, "mps": 0.30}  # of the peak, in matrix products of these shapes
_TRAFFIC = {"cpu": 0.60, "cuda": 0.85, "mps": 0.60}  # of the bandwidth
_START = {"cpu": (6.0, 15.0, 60.0), "cuda": (10.0, 25.0, 90.0), "mps": (6.0, 15.0, 60.0)}  # imports, load, first step
_LAUNCH = 9e-6  # seconds for each kernel on a GPU
_READ = 1e9  # bytes/s of weights from disk
_LINK = 1e10  # bytes/s between GPUs, over PCIe
_MOVED = {(True, False): 888, (True, True): 1240, (False, False): 450, (False, True): 626}  # (adapter, checkpointing)
_KERNELS = {(True, False): 252, (True, True): 342, (False, False): 110, (False, True): 163}
_WRITING = {False: 14, True: 45}  # kernels of one block for one token: ours, and a model's own code
_PER_LAUNCH = {"cpu": 12e-6, "cuda": 9e-6, "mps": 12e-6}
_GUESSED_CPU = 1e11


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a job computes. Token counts are real tokens over the whole job; `mean` is a sequence's mean length.

    read      tokens in passes without gradients
    passes    forward passes that write one token to each of `slots` answers, `context` tokens long on average
    eager     whether the model's own code writes, launch by launch, as under TRL
    shared    how many GPUs work on a step, on average; `passes` and `slots` are those of one
    """

    facts: ModelFacts
    adapter: bool
    quantised: bool
    trained: int
    checkpointing: bool
    dtype: str
    tokens: Estimate
    supervised_share: float
    mean: float
    steps: int
    micro_batches: int
    read: float = 0.0
    passes: float = 0.0
    slots: int = 0
    context: float = 0.0
    eager: bool = False
    shared: float = 1.0


def flops_per_token(work: Work, *, forward_only: bool = False) -> float:
    """Operations for one real token, attention at the mean length and the head at supervised positions included."""
    facts = work.facts
    passes = 2.0 if forward_only else (4.0 if work.adapter else 6.0) + (2.0 if work.checkpointing else 0.0)
    head = facts.vocabulary * facts.hidden * work.supervised_share
    scores = facts.layers * facts.heads * facts.head_dim * work.mean  # causal: half of 4 x length x width, forward
    own = 0.0 if forward_only or not work.adapter else 6.0 * work.trained
    return passes * (facts.matmul_params + head) + scores * passes + own


def seconds_per_token(work: Work, device: Device, *, forward_only: bool = False) -> float:
    """Seconds for one token where nothing but arithmetic and traffic counts."""
    facts = work.facts
    peak = device.peak_flops or _GUESSED_CPU
    if device.kind == "cuda" and work.dtype == "float32":
        peak /= 2 if "T4" not in device.hardware else 8  # TF32, or no tensor cores at all
    products = flops_per_token(work, forward_only=forward_only) / (peak * _PRODUCTS[device.kind])
    width = 2.0 if work.dtype == "float32" else 1.0
    moved = (
        _MOVED[work.adapter, work.checkpointing] * facts.layers * facts.hidden * width * (1 / 3 if forward_only else 1)
    )
    bandwidth = device.bandwidth or peak / 100
    return products + moved / (bandwidth * _TRAFFIC[device.kind])


def seconds_per_pass(work: Work, device: Device) -> float:
    """Seconds to write one token to every answer in a slot."""
    facts, width = work.facts, 4 if work.dtype == "float32" else 2
    peak = device.peak_flops or _GUESSED_CPU
    bandwidth = (device.bandwidth or peak / 100) * _TRAFFIC[device.kind]
    seen = 2 * facts.layers * facts.kv_heads * facts.head_dim * width * work.context * work.slots
    read = (width * facts.active_params + seen) / bandwidth
    products = 2 * (facts.matmul_params + facts.vocabulary * facts.hidden) * work.slots
    launches = _WRITING[work.eager] * facts.layers * _PER_LAUNCH[device.kind]
    return max(read, products / (peak * _PRODUCTS[device.kind]), launches)


def estimate(work: Work, device: Device) -> TimeEstimate | None:
    """Seconds and real tokens per second; None for a GPU of which nothing is known. Wide: nothing was measured yet."""
    if device.kind != "cpu" and not device.peak_flops:
        return None
    facts = work.facts
    expected = work.tokens.expected * seconds_per_token(work, device)
    if device.kind == "cuda":
        kernels = _KERNELS[work.adapter, work.checkpointing] * facts.layers * work.micro_batches
        expected = max(expected, kernels * _LAUNCH)
    if work.quantised:  # each micro-batch unpacks the base weights
        reads = (3 if work.checkpointing else 2) * 2.5 * facts.matmul_params * work.micro_batches
        expected += reads / ((device.bandwidth or 1e11) * _TRAFFIC[device.kind])
    beside = work.read * seconds_per_token(work, device, forward_only=True)
    expected, beside = expected / work.shared, beside / work.shared
    if work.shared > 1:  # gradients in float32 go round all GPUs once to be added up, and once more as sums
        expected += 2 * 4 * work.trained * work.steps / _LINK
    beside += work.passes * seconds_per_pass(work, device)
    weights = facts.params * (4 if work.dtype == "float32" else 2)
    low, usual, high = _START[device.kind]
    start = usual + weights / _READ
    guessed = 1.0 if device.peak_flops else 2.0
    spread = max(1.0, work.tokens.high / max(1.0, work.tokens.expected))
    least = min(1.0, work.tokens.low / max(1.0, work.tokens.expected))
    total = expected + beside
    seconds = Estimate(
        low=low + weights / (4 * _READ) + total * least / (2.5 * guessed),
        expected=start + total,
        high=high + weights / (_READ / 4) + total * spread * 3.0 * guessed,
        unit="seconds",
    )
    rate = work.tokens.expected / max(total if work.passes else expected, 1e-9)
    speed = Estimate(low=rate / (3.0 * guessed), expected=rate, high=rate * 2.5 * guessed, unit="tokens/s")
    return TimeEstimate(seconds=seconds, tokens_per_second=speed)
