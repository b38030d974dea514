"""Usual cards, by what their data sheets and drivers say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunesmith.orchestrator.nouns import Device


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as it is sold: its name, the GB on its box, and what its driver and its data sheet say.

    `mib` is the memory that nvidia-smi tells; FLOP/s are dense, in bfloat16 (T4: float16), with sums in float32.
    """

    name: str
    gb: int
    mib: int
    flops: float
    bandwidth: float

    @property
    def bytes(self) -> int:
        """Its memory in bytes."""
        return self.mib * 2**20

    def device(self, backend: str = "local", why_not: str | None = None) -> Device:
        """The card as a place to run."""
        return Device(
            backend=backend,
            hardware=self.name,
            kind="cuda",
            memory_bytes=self.bytes,
            peak_flops=self.flops,
            bandwidth=self.bandwidth,
            why_not=why_not,
        )


CARDS = (  # the slower of equal size first
    Card("RTX 3060", 12, 12288, 25.5e12, 360e9),
    Card("RTX 4070", 12, 12282, 58.3e12, 504e9),
    Card("T4", 16, 15360, 65e12, 320e9),
    Card("RTX 4080", 16, 16376, 97.5e12, 717e9),
    Card("A10G", 24, 23028, 70e12, 600e9),
    Card("RTX 3090", 24, 24576, 71e12, 936e9),
    Card("L4", 24, 23034, 121e12, 300e9),
    Card("RTX 4090", 24, 24564, 165e12, 1008e9),
    Card("RTX 5090", 32, 32607, 209e12, 1792e9),
    Card("A100 40GB", 40, 40960, 312e12, 1555e9),
    Card("L40S", 48, 46068, 362e12, 864e9),
    Card("A100 80GB", 80, 81920, 312e12, 2039e9),
    Card("H100 80GB", 80, 81559, 989e12, 3350e9),
    Card("H200", 141, 143771, 989e12, 4800e9),
)


def named(name: str) -> Card | None:
    """The card that a name means: "NVIDIA GeForce RTX 4090", "a 4090", "A100 80GB PCIe". None for its variants.

    An A100 whose size is not said is the larger one.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    if {"ti", "super", "laptop", "mobile"} & {*words}:  # with another memory
        return None
    said = {"".join(words[start:end]) for start in range(len(words)) for end in range(start + 1, start + 4)}
    for card in reversed(CARDS):
        model, *rest = card.name.lower().removeprefix("rtx ").split()
        if model in said and (not rest or {*rest} <= said or not re.search(r"\d+gb", name.lower())):
            return card
    return None


def of_size(gb: float) -> Card | None:
    """The fastest card with so much memory, or with the next more."""
    large = [card for card in CARDS if card.gb >= gb]
    return min(large, key=lambda card: (card.gb, -card.flops)) if large else None
