"""How many bytes one device must hold while a job trains: closed forms of our own kernel's step.

What the forms describe: transformers' own modules with frozen base weights, PEFT adapters in fp32, Adam in fp32, a loss
that makes logits for a chunk of supervised positions at a time, per-document attention that never holds scores.
T is the number of tokens in a micro-batch. Activations are what autograd saves in each block (exact integers, counted
with saved-tensor hooks on transformers 5.23 and peft 0.21) and what the backward pass of one block needs beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.orchestrator.nouns import Estimate

GIB = 2**30
MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOSS_CHUNK = 1024  # supervised positions whose logits are held at a time
NF4 = 0.5156  # bytes for each quantised parameter: 4 bits, and its share of the doubly quantised scales
SAFE_SHARE = {"cpu": 0.85, "cuda": 0.95, "mps": 0.85}  # of a device's memory; the rest is other programs' and luck
PROCESS = {"cpu": 700 * MIB, "cuda": 600 * MIB, "mps": 700 * MIB}  # libraries, or a CUDA context with workspaces
SPREAD = {"cpu": 0.15, "cuda": 0.07, "mps": 0.15}  # allocator and scratch beyond live bytes, of what is not weights

Kind = Literal["lora", "dora", "qlora", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What is held and how. `tokens` is the most that one micro-batch holds, `longest` its longest sequence."""

    facts: ModelFacts
    kind: Kind
    rank: int
    targets: tuple[str, ...]
    dtype: str
    tokens: int
    longest: int
    checkpointing: bool = False
    optimizer: str = "adamw"
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    generations: int = 0  # rollouts held at a time (GRPO)

    def but(self, **changes: object) -> Layout:
        """The same with some things changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


# Bytes that autograd keeps in one block, for each token: (hidden, intermediate, query width, key width, rank of each
# target, heads), first with base weights in fp32, then in 16 bits with adapters in fp32.
_SAVED_LORA = {4: (16, 16, 8, 8, 4, 4), 2: (28, 10, 8, 4, 4, 4)}
_SAVED_FULL = {4: (24, 16, 8, 8, 0, 4), 2: (16, 8, 4, 4, 0, 4)}
_SAVED_NORMS = {  # two more norms in a block (Gemma 2 and 3)
    True: {4: 8, 2: 8},
    False: {4: 16, 2: 20},
}
_SAVED_QK_NORM = {True: {4: 4, 2: 4}, False: {4: 8, 2: 6}}  # for each query and key width
_BACKWARD_HIDDEN = 26  # bytes a token and hidden unit beside what is saved: the last norm, the head's input, one block
_EAGER = {"gemma2": 8}  # attention that holds its scores: bytes for each head and pair of positions


def saved_per_token(layout: Layout) -> int:
    """Bytes that one block keeps of each token for the backward pass."""
    facts, lora = layout.facts, layout.kind != "none"
    width = BYTES[layout.dtype]
    hidden, inner, query, key, rank, heads = (_SAVED_LORA if lora else _SAVED_FULL)[width]
    wide, narrow = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    inner_width = facts.intermediate * max(1, facts.experts_used)
    total = hidden * facts.hidden + inner * inner_width + query * wide + key * narrow + heads * facts.heads + 8
    total += rank * layout.rank * len(layout.targets) if lora else 0
    if facts.norms > 2:
        total += _SAVED_NORMS[lora][width] * facts.hidden
    if facts.qk_norm:
        total += _SAVED_QK_NORM[lora][width] * (wide + narrow) + 4 * (facts.heads + facts.kv_heads)
    return total + _EAGER.get(facts.model_type, 0) * facts.heads * layout.longest


def trainable(facts: ModelFacts, kind: Kind, rank: int, targets: tuple[str, ...]) -> int:
    """How many parameters are trained: rank x (inputs + outputs) for each target, and DoRA's magnitudes."""
    if kind == "none":
        return facts.params - facts.extra_params
    shapes = [facts.linears[name] for name in targets if name in facts.linears]
    magnitudes = sum(outputs for _, outputs in shapes) if kind == "dora" else 0
    return facts.layers * (sum(rank * (inputs + outputs) for inputs, outputs in shapes) + magnitudes)


def parts(layout: Layout) -> dict[str, int]:
    """The peak by what it is made of, in bytes."""
    facts, width = layout.facts, BYTES[layout.dtype]
    trained = trainable(facts, layout.kind, layout.rank, layout.targets)
    full = layout.kind == "none"
    if layout.kind == "qlora":
        blocks = facts.layers * sum(inputs * outputs for inputs, outputs in facts.linears.values())
        if facts.experts:  # experts are quantised too
            blocks += facts.layers * facts.experts * 3 * facts.hidden * facts.intermediate
        weights = round(NF4 * blocks) + width * (facts.params - blocks)
    else:
        weights = width * facts.params
    state = width if full else 4  # Adam's two moments are as wide as what they belong to
    moments = 2 * (1 if layout.optimizer == "adamw-8bit" else state) * trained
    saved = saved_per_token(layout)
    if layout.checkpointing:
        kept = facts.layers * width * facts.hidden + saved
    else:
        kept = facts.layers * saved
    activations = layout.tokens * (kept + _BACKWARD_HIDDEN * facts.hidden)
    if layout.kind == "qlora":  # one dequantised layer at a time
        activations += width * max(inputs * outputs for inputs, outputs in facts.linears.values())
    if layout.generations:  # keys and values of the sequences being written
        activations += 2 * facts.layers * width * facts.kv_heads * facts.head_dim * layout.generations * layout.longest
    chunk = min(layout.tokens, LOSS_CHUNK) * facts.vocabulary
    sizes = {
        "weights": weights,
        "adapter": 0 if full else 4 * trained,
        "optimizer": moments,
        "gradients": (width if full else 4) * trained,
        "activations": activations,
        "logits": chunk * (width + 8),  # logits, their fp32 copy and its gradient
    }
    moving = sizes["activations"] + sizes["logits"] + sizes["gradients"]
    sizes["overhead"] = PROCESS[layout.device] + round(SPREAD[layout.device] * moving)
    return sizes


def peak(layout: Layout) -> Estimate:
    """The most bytes held at once: the sum of `parts`, a tenth less or a sixth of the moving parts more."""
    sizes = parts(layout)
    expected = sum(sizes.values())
    fixed = sizes["weights"] + sizes["adapter"] + sizes["optimizer"]
    moving = expected - fixed
    return Estimate(low=fixed + 0.7 * moving, expected=expected, high=fixed + ceil(1.2 * moving), unit="bytes")


def fits(layout: Layout, budget: float) -> bool:
    """Whether the high estimate stays within the safe share of `budget` bytes."""
    return peak(layout).high <= SAFE_SHARE[layout.device] * budget


def in_gib(count: float) -> str:
    """Bytes for people: "5.2 GiB"."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.0f} MiB"


def add_up(sizes: Mapping[str, int]) -> int:
    """The total of `parts`."""
    return sum(sizes.values())
