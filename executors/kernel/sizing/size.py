"""How many bytes one device must hold while a job trains: closed forms of our own kernel's step.

What the forms describe: adapters in float32 on a frozen base of the asked type, or all weights in float32 under
autocast; Adam in float32; packed batches with per-document attention, which never hold scores; logits for a chunk of
supervised positions at a time. T is the number of tokens in a micro-batch. What autograd saves in each block are exact
integers, counted with saved-tensor hooks on `loops` (transformers 5.23, peft 0.21); test_saved_bytes.py counts again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing.calibration import Correction
from tunesmith.orchestrator.nouns import Estimate

GIB = 2**30
MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27, "mps": 1 << 24}  # logits held at a time, as in loops/loss.py
TILE = (4096, 32768)  # tokens and words of TRL's fused head
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
    head: Literal["loss", "logps", "tiled", "none"] = "loss"  # what is made of the last states; TRL's is tiled
    branched: int = 0  # those of `tokens` that are answers to a prompt that stands beside them once
    looked: int = 0  # keys and values that they see of it
    slots: int = 0  # answers written at a time
    cached: int = 0  # tokens whose keys and values are held for that
    paged: bool = False  # whether those lie in pages that are kept from step to step
    copied: bool = False  # whether what writes has a copy of the adapted layers, the adapter merged in
    lent: int = 0  # bytes of the device that another library writes answers with
    beside: int = 0  # bytes of another model: a teacher, or a reference that cannot be had by switching an adapter off
    known: Correction | None = None  # what earlier runs on the device say of these forms

    def but(self, **changes: object) -> Layout:
        """The same with some things changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


# Bytes that autograd keeps of each token in one block, by kind and the bytes of the type computed in: for each unit of
# (hidden, intermediate, query width, key width, rank of one target).
_SAVED: dict[tuple[str, int], tuple[int, int, int, int, int]] = {
    ("lora", 4): (16, 16, 12, 8, 4),
    ("lora", 2): (12, 8, 6, 4, 2),
    ("dora", 4): (32, 32, 20, 24, 4),
    ("dora", 2): (26, 16, 10, 12, 2),
    ("none", 4): (24, 16, 12, 8, 0),
    ("none", 2): (26, 8, 6, 4, 0),
}
_SAVED_QK_NORM = {("none", 4): 8, ("none", 2): 6}  # for each unit of query and key width; 4 with an adapter
_COPIES = {
    ("dora", 4): 6.5,
    ("dora", 2): 3.7,
    ("none", 2): 2.0,
}  # bytes for each parameter of the blocks, until backward
_EAGER = {"gemma2": 8}  # attention that holds its scores: bytes for each head and pair of positions


def saved_per_token(layout: Layout) -> int:
    """Bytes that one block keeps of each token for the backward pass."""
    facts, key = layout.facts, _key(layout)
    full, width = layout.kind == "none", BYTES[layout.dtype]
    hidden, inner, query, narrow, rank = _SAVED[key]
    wide, thin = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    total = hidden * facts.hidden + inner * facts.intermediate * max(1, facts.experts_used)
    total += query * wide + narrow * thin + rank * layout.rank * len(layout.targets) + 4 * facts.heads + 8
    raised = key == ("lora", 2) and layout.device == "cpu"  # attention in float32 there: it is faster
    if raised:
        total += 4 * (wide + thin)
    if facts.norms > 2:
        total += (16 if full else 8) * facts.hidden + 8
        total += 2 * (wide + thin) if key == ("none", 2) else 0
    if facts.qk_norm:
        total += _SAVED_QK_NORM.get(key, 4) * (wide + thin) + 4 * (facts.heads + facts.kv_heads)
    if facts.model_type == "phi3" and not raised:  # query, key and value are copied out of one product
        total += width * (wide + thin) - (6 * facts.hidden if key in (("dora", 2), ("none", 2)) else 0)
    return total + _EAGER.get(facts.model_type, 0) * facts.heads * layout.longest


def beside_per_token(layout: Layout) -> int:
    """Bytes a token needs beside what is saved: the gradients of one block, or the last norm and the head's input."""
    facts, full = layout.facts, layout.kind == "none"
    block = 2 * BYTES[layout.dtype] * facts.intermediate * max(1, facts.experts_used) + 4 * facts.hidden
    if layout.checkpointing:
        return block
    return max(block + (4 * facts.hidden if full else 0), (26 if full else 21) * facts.hidden)


def _key(layout: Layout) -> tuple[str, int]:
    return ("lora" if layout.kind == "qlora" else layout.kind), BYTES[layout.dtype]


def target_names(facts: ModelFacts, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The linear layers of a block that targets mean: last names, or all of them for peft's "all-linear"."""
    last = [name.rpartition(".")[2] for name in wanted]
    return tuple(name for name in facts.linears if name in last or "all-linear" in last)


def trainable(facts: ModelFacts, kind: Kind, rank: int, targets: tuple[str, ...]) -> int:
    """How many parameters are trained: rank x (inputs + outputs) for each target, and DoRA's magnitudes."""
    if kind == "none":
        return facts.params - facts.extra_params
    shapes = [facts.linears[name] for name in targets if name in facts.linears]
    magnitudes = sum(outputs for _, outputs in shapes) if kind == "dora" else 0
    return facts.layers * (sum(rank * (inputs + outputs) for inputs, outputs in shapes) + magnitudes)


def parts(layout: Layout) -> dict[str, int]:
    """The peak by what it is made of, in bytes."""
    facts, key, width = layout.facts, _key(layout), BYTES[layout.dtype]
    full = layout.kind == "none"
    trained = trainable(facts, layout.kind, layout.rank, layout.targets)
    narrow = blocks = facts.layers * sum(inputs * outputs for inputs, outputs in facts.linears.values())
    if facts.experts:  # which are no linear layers, and stay as they are
        blocks += facts.layers * facts.experts * 3 * facts.hidden * facts.intermediate
    if layout.kind == "qlora":
        weights = round(NF4 * narrow) + width * (facts.params - narrow)
    else:
        weights = (4 if full else width) * facts.params
    saved = saved_per_token(layout)
    kept = (
        facts.layers * (4 if full else width) * facts.hidden + saved if layout.checkpointing else facts.layers * saved
    )
    activations = layout.tokens * (kept + beside_per_token(layout))
    pairs = 2 * facts.kv_heads * facts.head_dim  # a token's key and value in one block
    forked = layout.looked * pairs
    if layout.device == "cpu":  # answers are cut out of their batch, to be seen beside their prompt
        forked += layout.branched * (facts.heads * facts.head_dim + pairs)
    activations += forked * (4 if layout.device == "cpu" else width) * (1 if layout.checkpointing else facts.layers)
    activations += round(_COPIES.get(key, 0) * blocks / (facts.layers if layout.checkpointing else 1))
    if layout.kind == "qlora":  # one dequantised layer at a time
        activations += width * max(inputs * outputs for inputs, outputs in facts.linears.values())
    logits = _logits(layout)
    sizes = {
        "weights": weights,
        "adapter": 0 if full else 4 * trained,
        "optimizer": (2 if layout.optimizer == "adamw-8bit" else 8) * trained,
        "gradients": 4 * trained,
        "activations": activations,
        "logits": logits,
    }
    moving = sizes["activations"] + sizes["logits"] + sizes["gradients"]
    if layout.lent:  # all of it, also while training; and one layer, merged, on its way there
        sizes["rollout"] = layout.lent + 4 * width * max(inputs * outputs for inputs, outputs in facts.linears.values())
    elif layout.slots:
        cache = facts.layers * pairs * width * layout.cached
        writing = cache * (not layout.paged) + 10 * facts.vocabulary * layout.slots
        sizes["rollout"] = max(0, writing - moving)  # gone before training begins again
        sizes["rollout"] += cache * layout.paged + (width * _copied(layout) if layout.copied else 0)
    if layout.beside:
        sizes["other_model"] = layout.beside
    sizes["overhead"] = PROCESS[layout.device] + round(SPREAD[layout.device] * moving)
    return sizes


def _logits(layout: Layout) -> int:
    """Bytes of the logits that are held at a time, and of what is made of them."""
    facts, width = layout.facts, BYTES[layout.dtype]
    if layout.head == "none":
        return 0
    if layout.head == "tiled":  # of every position; measured with TRL 1.16 on a CPU, 31 to 35 bytes for each
        elements = min(layout.tokens, TILE[0]) * min(facts.vocabulary, TILE[1])
        logits = elements * (32 if layout.device == "cpu" else 2 * width)
    else:
        elements = min(layout.tokens * facts.vocabulary, max(CHUNK_ELEMENTS[layout.device], 16 * facts.vocabulary))
        logits = elements * (8 if width == 4 and layout.head == "loss" else 12)
    if layout.kind == "none":  # the head's gradient, summed in float32 beside its last share
        logits += 8 * facts.vocabulary * facts.hidden
    return logits


def _copied(layout: Layout) -> int:
    """Parameters that what writes holds a second time: adapted layers, or all where autocast would cast them anew."""
    facts = layout.facts
    if layout.kind == "none":
        blocks = facts.layers * sum(inputs * outputs for inputs, outputs in facts.linears.values())
        return 0 if layout.dtype == "float32" else blocks + facts.vocabulary * facts.hidden
    shapes = [facts.linears[name] for name in layout.targets if name in facts.linears]
    return facts.layers * sum(inputs * outputs for inputs, outputs in shapes)


def peak(layout: Layout) -> Estimate:
    """The most bytes held at once: the sum of `parts`, a tenth less or a sixth of the moving parts more."""
    sizes = parts(layout)
    expected = sum(sizes.values())
    fixed = sizes["weights"] + sizes["adapter"] + sizes["optimizer"] + layout.beside
    moving = expected - fixed
    formula = Estimate(low=fixed + 0.7 * moving, expected=expected, high=fixed + ceil(1.2 * moving), unit="bytes")
    return formula if layout.known is None else layout.known.apply(formula)


def fits(layout: Layout, budget: float) -> bool:
    """Whether the high estimate stays within the safe share of `budget` bytes."""
    return peak(layout).high <= SAFE_SHARE[layout.device] * budget


def in_gib(count: float) -> str:
    """Bytes for people: "5.2 GiB"."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.0f} MiB"
