"""What `auto` becomes, and why: one function for each choice, giving (value, reason for a person to read).

Evidence: LoRA on all linear layers with alpha 32 whatever the rank, and a learning rate about ten times that of full
training that hardly depends on the rank (Tinker's rule, fitted over Qwen and Llama); ranks beyond what the data holds
gain nothing.
"""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing.rows import THROUGH_TRL
from tunesmith.orchestrator.nouns import DataReport, Device, JobSpec, TokenStats

Choice = tuple[int, str]

_NO_BF16 = re.compile(r"\b(T4|V100|P100|P40|GTX|RTX 20\d\d|Quadro RTX|TITAN)\b", re.IGNORECASE)
_RATES = {  # of full training: TRL's defaults, but for the reward model, whose 1e-4 there is meant for adapters
    "dpo": (1e-6, "preference tuning takes small steps"),
    "kto": (1e-6, "preference tuning takes small steps"),
    "grpo": (1e-6, "reinforcement takes small steps"),
    "rloo": (1e-6, "reinforcement takes small steps"),
    "distill": (1e-6, "what is learnt from changes with the model, so steps are small"),
    "reward": (1e-5, "a new head is trained on a model that knows the language"),
}
ANSWERS_A_STEP = 64  # written for an optimizer step
_HEADROOM = {
    "tokenizer": 1.0,
    "sample": 1.25,
    "bytes-per-token": 1.5,
}  # the longest row seen is not the longest there is
UNKNOWN_LENGTH = 2048
UNKNOWN_ROWS = 1000


def cpu_prefers_bf16(info: str | None = None) -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: by its flags in /proc/cpuinfo (`info`)."""
    if info is None:
        try:
            with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
                info = file.read(64 * 1024)
        except OSError:
            return False
    flags = set(re.findall(r"[a-z0-9_]+", info.lower()))
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def has_bf16(device: Device) -> bool:
    """Whether a GPU computes in bfloat16 (Ampere and later)."""
    return device.kind == "cuda" and not _NO_BF16.search(device.hardware)


def no_4bit(device: Device) -> str | None:
    """Why a base in 4 bits cannot be had on a device; None where it can, as far as can be told from here."""
    if device.kind not in ("cuda", "cpu"):
        return f"It needs an NVIDIA GPU or a CPU; {device.hardware} is neither."
    if device.backend == "local" and importlib.util.find_spec("bitsandbytes") is None:
        return "It needs the package bitsandbytes (pip install bitsandbytes)."
    return None


def no_8bit(device: Device) -> str | None:
    """Why the 8-bit optimizer cannot be had on a device; None where it can: the same package does both."""
    return no_4bit(device)


def no_float16(device: Device) -> str | None:
    """Why float16 cannot be trained on a device; None where it can: its small gradients need a GPU's scaled losses."""
    return None if device.kind == "cuda" else "It needs an NVIDIA GPU."


def dtype(device: Device, full: bool) -> tuple[str, str]:
    """The type computed in: that of a frozen base, or of the products where all weights train in float32."""
    rest = "; the weights themselves stay in float32" if full else ", at half the memory; adapters stay in float32"
    if device.kind == "cuda":
        if has_bf16(device):
            return "bfloat16", f"the GPU computes fastest in bfloat16{rest}"
        return "float32", f"{device.hardware} has no bfloat16, and float16 loses small gradients"
    if device.kind == "cpu" and device.backend == "local" and cpu_prefers_bf16():
        return "bfloat16", f"this CPU multiplies bfloat16 faster{rest}"
    return "float32", "this device computes fastest in float32"


def rank(rows: int | None) -> Choice:
    """The adapter's rank, by how much there is to learn."""
    if rows is not None and rows > 10_000:
        return 32, f"{rows:,} rows hold more than a rank of 16 may"
    return 16, "enough for data of this size" if rows is not None else "a usual rank; the data could not be counted"


def alpha(chosen: int) -> tuple[float, str]:
    """The adapter's scale, as a numerator over the rank."""
    return 32.0, f"scaled by alpha/rank, so that the best learning rate hardly depends on the rank ({chosen})"


def targets(facts: ModelFacts) -> tuple[tuple[str, ...], str]:
    """Which linear layers carry an adapter."""
    if facts.experts:
        return tuple(facts.linears), "all linear layers of attention; experts are left as they are"
    return tuple(facts.linears), "all linear layers: adapters on attention alone learn worse"


def learning_rate(facts: ModelFacts, method: str, full: bool) -> tuple[float, str]:
    """The peak learning rate: Tinker's 5e-5 x 10 for LoRA x (2000 / hidden) ** P, within sober bounds."""
    if method in _RATES:
        rate, why = _RATES[method]
        return (rate if full else float(f"{10 * rate:.1g}")), f"{why}{'' if full else '; ten times for LoRA'}"
    power = 0.781 if facts.model_type == "llama" else 0.0775 if facts.model_type.startswith("qwen") else 0.4
    rate = 5e-5 * (1 if full else 10) * (2000 / facts.hidden) ** power
    low, high = (5e-6, 1e-4) if full else (1e-4, 1e-3)
    rate = min(high, max(low, rate))
    step = 10.0 ** (math.floor(math.log10(rate)) - 1)
    rate = float(f"{round(rate / step) * step:.2g}")
    kind = "full training" if full else "LoRA, which wants about ten times that of full training"
    return rate, f"by width ({facts.hidden}) for {kind}"


def effective_batch(spec: JobSpec, rows: int | None) -> Choice:
    """Rows for each optimizer step: large where there are rows enough to still take a hundred steps."""
    if spec.method in ("grpo", "rloo"):
        made = spec.grpo.num_generations
        size = _power_of_two(ANSWERS_A_STEP / made, 1, 64)
        size = size if rows is None else min(size, max(1, rows))
        return size, f"{size} prompts with {made} answers each: {size * made} answers are compared in a step"
    if rows is None:
        return 16, "a usual size; the data could not be counted"
    seen, max_steps = rows * spec.train.epochs, spec.train.max_steps
    if max_steps is not None:
        size = _power_of_two(seen / max_steps, 8, 64)
        return min(size, max(1, rows)), f"{max_steps} steps over {rows:,} rows"
    size = _power_of_two(seen / 100, 4, 64)
    return min(size, max(1, rows)), f"about {max(1, math.ceil(seen / size)):,} steps over {rows:,} rows"


def _power_of_two(value: float, low: int, high: int) -> int:
    size = low
    while size * 2 <= min(value, high):
        size *= 2
    return size


def max_length(facts: ModelFacts, tokens: TokenStats | None, written: int = 0) -> Choice:
    """The longest sequence trained on: every row that is seen fits, but for outliers.

    `written` tokens of an answer follow each row, where the model writes it.
    """
    room = max(8, facts.context - written)
    more = f", and {written:,} are written after it" if written else ""
    if tokens is None or tokens.max <= 0:
        length = min(UNKNOWN_LENGTH, room)
        return length + written, f"assumed, as the lengths of the data are not known{more}"
    longest = tokens.max * (1.0 if tokens.exact else _HEADROOM[tokens.method])
    bound = max(1024, 4 * tokens.p95)
    length = min(_round_up(min(longest, bound), 64), room)
    if length >= tokens.max:
        return length + written, f"every row seen fits (the longest has about {tokens.max:,} tokens){more}"
    if length == room:
        return length + written, f"the model's context; the longest row has about {tokens.max:,} tokens{more}"
    why = f"95 % of rows have at most {tokens.p95:,} tokens; a few outliers are longer than this{more}"
    return length + written, why


def _round_up(value: float, step: int) -> int:
    return max(step, math.ceil(value / step) * step)


def packing(method: str, length: int, tokens: TokenStats | None) -> tuple[bool, str]:
    """Whether rows share a sequence, each seeing itself alone; and whether answers share their prompt."""
    if method in THROUGH_TRL:
        return False, f"{method} is trained by TRL, which pads its batches"
    if method in ("dpo", "grpo"):
        return True, "a prompt is computed once for all its answers, and nothing is spent on padding"
    if tokens is not None and tokens.p50 >= 0.9 * length:
        return False, "rows are about equally long, so there is no padding to save"
    if tokens is None:
        return True, "no computing is spent on padding"
    return True, f"half of the rows have at most {tokens.p50:,} of {length:,} tokens; no computing is spent on padding"


def warmup_steps(total: int | None) -> Choice:
    """Steps until the full learning rate is reached."""
    if total is None:
        return 10, "a few steps; the number of steps is not known yet"
    return min(100, math.ceil(0.05 * total)), f"5 % of {total:,} steps"


def save_steps(total: int | None, seconds_per_step: float | None) -> Choice:
    """Steps between checkpoints: ten to a run, and little lost to a crash."""
    if total is None:
        return 100, "the number of steps is not known yet"
    steps = max(10, math.ceil(total / 10))
    why = "ten checkpoints to a run, not more often than every ten steps"
    if seconds_per_step and steps * seconds_per_step > 900:
        steps, why = max(1, int(900 / seconds_per_step)), "about every 15 minutes, so that a crash costs little"
    return min(steps, total), why


def eval_steps(total: int | None) -> Choice:
    """Steps between evaluations on the rows held out."""
    if total is None:
        return 100, "the number of steps is not known yet"
    return min(total, max(10, math.ceil(total / 5))), "five evaluations to a run"


def rows_of(spec: JobSpec, report: DataReport) -> int | None:
    """Rows that one epoch trains on, as far as known: those used without those held out, as often as weights say."""
    if report.used_rows is None:
        return None
    held = (report.eval_rows or 0) if spec.eval.source is None else 0
    weight = sum(source.weight for source in spec.data) / len(spec.data)
    return max(1, round((report.used_rows - held) * weight))
