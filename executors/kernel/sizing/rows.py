"""What a method makes of a source row, in tokens: trained, only read, written, and held while they are written.

These are the layouts of `loops`: SFT packs rows; DPO and GRPO compute a prompt once for all answers to it, where they
pack; TRL's trainers (KTO, RLOO, reward, distill) pad and repeat the prompt. A row of `length` tokens is the longest
sequence, a prompt with one answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.orchestrator.nouns import SAMPLED, JobSpec

THROUGH_TRL = ("kto", "rloo", "reward", "distill")
SLOTS = {"cpu": 64, "cuda": 256, "mps": 64}  # answers written at a time, as in loops/methods.py
CELLS, PAGE = 64, 256  # tokens of an answer's first room for keys and values, as in loops/cells.py and paged.py
SHORTER = 0.6  # of a pair's longer answer that its shorter one has: 0.61 in 299 real pairs
USUAL_SHARE = 0.7  # of max_completion that answers use on average: some end early, and weak models seldom do


def written(spec: JobSpec) -> int:
    """The most tokens that the model writes in an answer; 0 where it trains on given ones."""
    if spec.method not in SAMPLED:
        return 0
    return spec.distill.max_completion if spec.method == "distill" else spec.grpo.max_completion


def filled(length: int) -> int:
    """Tokens of the room that loops/cells.py gives a prompt: to the next 128, or eighth of a power of two above 1,024.

    Prompts of one room are attended together, so few rooms are faster, and the most that lies empty stays small.
    """
    step = max(128, (1 << (max(1, length) - 1).bit_length()) // 8)
    return math.ceil(max(1, length) / step) * step


def processes(hardware: str | Mapping[str, Any] | None) -> int:
    """How many processes the spec asks for: one for each of {gpus: N}, or {processes: N} on a CPU; otherwise one."""
    if not isinstance(hardware, Mapping):
        return 1
    count = hardware.get("gpus") or hardware.get("processes")
    return max(1, count) if isinstance(count, int) else 1


def shares(method: str, count: int) -> list[int]:
    """Micro-batches that TRL's trainers can cut a step of `count` into, the smallest first, as in loops/trl_plan.py.

    TRL weighs micro-batches alike, so they are equal; KTO compares the rows of one, so they have two at least.
    """
    least = min(count, 2 if method == "kto" else 1)
    return [share for share in range(least, count + 1) if count % share == 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of one method. `share` is the part of a row's longest sequence that is an answer."""

    spec: JobSpec
    length: int
    packing: bool
    share: float

    @property
    def method(self) -> str:
        """The spec's method."""
        return self.spec.method

    @property
    def written(self) -> int:
        """The most tokens that the model writes in an answer."""
        return written(self.spec)

    @property
    def answers(self) -> int:
        """Sequences that a row makes."""
        if self.method in ("dpo", "reward"):
            return 2
        return self.spec.grpo.num_generations if self.method in ("grpo", "rloo") else 1

    @property
    def forked(self) -> bool:
        """Whether the answers to a prompt share it."""
        return self.packing and self.method in ("dpo", "grpo")

    @property
    def repeats(self) -> int:
        """Optimizer steps taken on the same rows."""
        return self.spec.grpo.num_iterations if self.method in ("grpo", "rloo") else 1

    def counted(self, effective: int) -> int:
        """What micro-batches are cut from: the rows of a step, for RLOO all answers to them."""
        return effective * self.answers if self.method == "rloo" else effective

    # --- memory ---

    def budget(self) -> int:
        """Tokens that a micro-batch may hold for each that it counts, as the loops reckon."""
        if self.method == "grpo" and self.forked:
            return self.length + (self.answers - 1) * self.written
        return self.length if self.method == "rloo" else self.answers * self.length

    def most(self, longest: int) -> int:
        """Tokens that the longest row puts through the model, where its longest sequence has so many."""
        if self.method == "grpo" and self.forked:
            return longest + (self.answers - 1) * self.written
        return longest if self.method == "rloo" else self.answers * longest

    def usual(self, tokens: float) -> float:
        """Tokens of a row whose longest sequence (whose prompt, where the model writes) has so many."""
        if self.written:
            return tokens + self.answers * self.written
        return tokens * (1 + self.share * SHORTER) if self.answers == 2 else tokens

    def branched(self, tokens: int) -> int:
        """Those of `tokens` of forked rows that belong to answers; 0 where nothing is forked."""
        if not self.forked:
            return 0
        if self.written:
            return round(tokens * self.answers * self.written / max(1, self.budget()))
        return round(tokens * self.share * (1 + SHORTER) / (1 + self.share * SHORTER))

    def looked(self, tokens: int) -> int:
        """Keys and values that `tokens` of forked rows look at beyond their own: each answer sees the prompt too."""
        return self.answers * (tokens - self.branched(tokens)) if self.forked else 0

    def slots(self, effective: int, device: str) -> int:
        """Answers written at a time; TRL writes all of a step at once."""
        if not self.written:
            return 0
        made = effective * self.answers
        return made if self.method in THROUGH_TRL else min(made, SLOTS[device])

    def paged(self, device: str, dtype: str) -> bool:
        """Whether our rollout holds keys and values in pages, as it does on a GPU that computes in bfloat16."""
        return self.method == "grpo" and device == "cuda" and dtype == "bfloat16"

    def cached(self, effective: int, device: str, dtype: str) -> int:
        """Tokens whose keys and values there is room for while answers are written.

        In pages every row has what it may come to need. Elsewhere a prompt is held once for all answers to it, filled
        up to the next step, and the room for answers is doubled as they grow.
        """
        slots, prompt = self.slots(effective, device), max(1, self.length - self.written)
        if not self.written or self.method in THROUGH_TRL:
            return slots * self.length
        if self.paged(device, dtype):
            return slots * PAGE * (math.ceil(self.length / PAGE) + math.ceil(prompt / PAGE))
        room = CELLS << max(0, math.ceil(math.log2(self.written / CELLS)))
        return slots * room + math.ceil(slots / self.answers) * filled(prompt)

    # --- time ---

    def trained(self, mean: float, written: float) -> float:
        """Tokens that one row puts through a training pass, by its mean sequence and the mean answer written to it."""
        if self.written:
            return mean + self.answers * written if self.forked else self.answers * (mean + written)
        if self.answers == 2 and not self.forked:
            return 2 * mean
        return self.usual(mean)

    def read(self, mean: float, written: float, *, again: float) -> float:
        """Tokens that a row costs in passes without gradients; `again`: a table that is filled once needs this share.

        A reference, KTO's mismatched answers, prompts before they are answered, and what TRL computes twice.
        """
        trained, grpo = self.trained(mean, written), self.spec.grpo
        if self.method == "dpo":
            return again * trained if self.spec.dpo.reference == "base" else 0.0
        if self.method == "kto":
            return 2 * trained
        if self.method in ("grpo", "rloo"):
            prompt = mean if self.method == "grpo" else self.answers * mean
            return prompt + trained * (grpo.beta > 0) + trained * (self.method == "rloo" and grpo.num_iterations > 1)
        return mean if self.method == "distill" else 0.0

    def scored(self) -> float:
        """The share of trained tokens whose logits are computed."""
        if self.method == "reward":
            return 0.0
        if self.written:
            answers = self.answers * self.written
            return answers / max(1, answers + (1 if self.forked else self.answers) * (self.length - self.written))
        if self.answers == 2:
            return self.share * (1 + SHORTER) / (1 + self.share * SHORTER)
        return self.share
