"""How many bytes one device must hold while a job trains: our own kernel's step, phase by phase, without torch.

What is described: adapters in float32 on a frozen base of the asked type, or all weights in float32 under autocast;
Adam in float32; packed batches with per-document attention, which never hold scores; logits for a chunk of supervised
positions at a time. What a micro-batch holds at its peak comes from the order of its operations (`step.py`, `block.py`
and `tape.py`); benchmarks/memory_cpu.py compares it with what torch gives out. T is the number of tokens in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Literal

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing.block import Shape
from tunesmith.executors.kernel.sizing.calibration import Correction
from tunesmith.executors.kernel.sizing.step import Head, micro_batch
from tunesmith.orchestrator.nouns import Estimate

GIB = 2**30
MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27, "mps": 1 << 24}  # logits held at a time, as in loops/loss.py
PREFILL = {"cpu": 1024, "cuda": 8192, "mps": 1024}  # tokens of prompts that go through at once, as in loops/refill.py
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
    scored: int | None = None  # positions whose logits are made; None: of all tokens
    packed: bool = True  # whether sequences share a row, each attended by itself
    trees: int = 1  # prompts that `branched` answers stand beside
    answer: int = 0  # tokens of the longest of them
    ahead: int = 0  # prompts of a step's other micro-batches, which are laid out with it
    window: int = 0  # tokens that attention looks back, 0 without a limit
    asked: bool = True  # whether the model without its adapter is asked about a micro-batch of log-probabilities
    alone: bool = False  # whether a step is one micro-batch, which then finds no gradients from before
    beside: int = 0  # bytes of another model: a teacher, or a reference that cannot be had by switching an adapter off
    known: Correction | None = None  # what earlier runs on the device say of these forms

    def but(self, **changes: object) -> Layout:
        """The same with some things changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


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
    """The peak by what it is made of, in bytes: what is live then, and `overhead`, what a process holds beside."""
    sizes = live(layout)
    moving = sizes["activations"] + sizes["logits"] + sizes["gradients"]
    return {**sizes, "overhead": PROCESS[layout.device] + round(SPREAD[layout.device] * moving)}


def live(layout: Layout) -> dict[str, int]:
    """Live bytes at the moment of an optimizer step when they are most, by what they are.

    As torch's allocators count them: no process, no fragments. What is there all the time is counted first; of what
    comes and goes, the larger of two phases: a micro-batch on its way forward and back, whose peak may lie anywhere in
    it, and the writing of answers. In clipping and in the optimizer's step nothing is held but gradients; an evaluation
    is a forward pass, and holds less than the same on its way back.
    """
    facts, full, width = layout.facts, layout.kind == "none", BYTES[layout.dtype]
    trained = trainable(facts, layout.kind, layout.rank, layout.targets)
    activations, logits, fresh = _training(_shape(layout), _head(layout), layout.checkpointing)
    gradients = fresh + 4 * trained * (not layout.alone)
    if activations + logits + gradients < 4 * trained:  # the optimizer's own step
        activations, logits, gradients = 0, 0, 4 * trained
    sizes = {
        "weights": _weights(layout),
        "adapter": 0 if full else 4 * trained,
        "optimizer": (2 if layout.optimizer == "adamw-8bit" else 8) * trained,
        "gradients": gradients,
        "activations": activations,
        "logits": logits,
    }
    cache = 2 * facts.layers * facts.kv_heads * facts.head_dim * width * layout.cached
    kept, passing = cache * layout.paged, cache * (not layout.paged)
    if layout.lent:  # all of it, also while training; and one layer, merged, on its way there
        sizes["rollout"] = layout.lent + 4 * width * _largest(facts)
    elif layout.slots:
        # a row's logits, raised to float32, and their exponentials; a matrix on its way into its merged place
        passing += (8 if width == 4 else 10) * facts.vocabulary * layout.slots + _prefill(layout)
        passing = max(passing, 8 * _largest(facts) * layout.copied)
        sizes["rollout"] = kept + (width * _copied(layout) if layout.copied else 0)
        sizes["rollout"] += max(0, passing - activations - logits - gradients)  # gone before training goes on
    if layout.beside:
        sizes["other_model"] = layout.beside
    return sizes


def saved_per_token(layout: Layout) -> float:
    """Bytes that one block keeps of each token for the backward pass."""
    head, shape = _head(layout), _shape(layout)

    def held(layers: int, tokens: int) -> int:
        facts = replace(layout.facts, layers=layers)
        return sum(_training(replace(shape, facts=facts, tokens=tokens), head, False))

    few, many = layout.tokens, 2 * layout.tokens
    return (held(9, many) - held(8, many) - held(9, few) + held(8, few)) / few


@lru_cache(maxsize=4096)
def _training(shape: Shape, head: Head, checkpointing: bool) -> tuple[int, int, int]:
    """(activations, logits, gradients beside those from before) of a micro-batch at its peak."""
    activations, logits, gradients, _ = micro_batch(shape, head, checkpointing=checkpointing).at
    return activations, logits, gradients


def _shape(layout: Layout) -> Shape:
    width, full = BYTES[layout.dtype], layout.kind == "none"
    return Shape(
        facts=layout.facts,
        tokens=layout.tokens,
        length=layout.longest,
        width=width,
        rank=0 if full else layout.rank,
        targets=frozenset() if full else frozenset(layout.targets),
        narrow=layout.kind == "qlora",
        dora=layout.kind == "dora",
        packed=layout.packed,
        fused=layout.packed and layout.device == "cuda" and width == 2,
        raised=layout.device == "cpu" and not (layout.kind == "dora" and width == 2),  # which autocast lowers again
        branched=layout.branched,
        looked=layout.looked,
        trees=max(1, layout.trees),
        answer=layout.answer,
        ahead=layout.ahead if layout.device == "cpu" else 0,
        window=layout.window,
        alone=layout.alone,
    )


def _head(layout: Layout) -> Head:
    facts, width = layout.facts, BYTES[layout.dtype]
    tile = 0
    if layout.head == "tiled":  # of every position; measured with TRL 1.16 on a CPU, 31 to 35 bytes for each
        tile = (
            min(layout.tokens, TILE[0]) * min(facts.vocabulary, TILE[1]) * (32 if layout.device == "cpu" else 2 * width)
        )
    return Head(
        kind=layout.head,
        scored=layout.tokens if layout.scored is None else min(layout.scored, layout.tokens),
        rows=max(16, CHUNK_ELEMENTS[layout.device] // facts.vocabulary),
        tile=tile,
        asked=layout.asked and layout.head == "logps" and layout.kind != "none",
    )


def _weights(layout: Layout) -> int:
    facts, width = layout.facts, BYTES[layout.dtype]
    if layout.kind == "qlora":
        narrow = facts.layers * sum(inputs * outputs for inputs, outputs in facts.linears.values())
        return round(NF4 * narrow) + width * (facts.params - narrow)
    return (4 if layout.kind == "none" else width) * facts.params


def _largest(facts: ModelFacts) -> int:
    return max(inputs * outputs for inputs, outputs in facts.linears.values())


def _prefill(layout: Layout) -> int:
    """Prompts on their way through the model, as many as go at once: their MLP, and the logits that follow them."""
    facts, width = layout.facts, BYTES[layout.dtype]
    tokens = min(PREFILL[layout.device], layout.slots * layout.longest)
    inner = facts.intermediate * max(1, facts.experts_used)
    return width * tokens * (3 * inner + 4 * facts.hidden)


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
