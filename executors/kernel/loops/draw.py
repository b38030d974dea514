"""How a token is drawn: one number for each (key, row, sample, position), and the distribution turned upside down.

The numbers follow from their names alone, so that a sample is the same whatever batch or slot it is written in.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

BLOCK = 256


def chances(key: str, row: int, sample: int, count: int) -> Tensor:
    """Numbers in [0, 1) for the positions 0 to `count` - 1 of a sample, float64; 10 us, and 30 ns each.

    They are the stream of SHAKE-128 over the names, eight bytes each, of which 53 bits are used.
    """
    stream = bytearray(hashlib.shake_128(f"{key}:{row}:{sample}".encode()).digest(8 * count))
    return torch.frombuffer(stream, dtype=torch.int64).bitwise_and(2**53 - 1).double() * 2.0**-53


def pick(logits: Tensor, chance: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [n, V], and its log-probability at this temperature: int64 [n] and float32 [n].

    The token is the first whose cumulative probability exceeds `chance`, float64 [n]; the likeliest where there is
    none. Probabilities are summed in blocks, and the blocks in float64: no token of probability zero is ever drawn,
    and rounding shifts no border by more than 1e-7. Reads the logits four times and never waits for the device.
    """
    count, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    top, likeliest = scaled.max(-1, keepdim=True)
    shares = scaled.new_zeros(count, blocks * BLOCK) if blocks * BLOCK != vocabulary else torch.empty_like(scaled)
    torch.sub(scaled, top, out=shares[:, :vocabulary]).exp_()
    shares = shares.view(count, blocks, BLOCK)
    ends = shares.sum(-1).double().cumsum(-1)
    total = ends[:, -1]
    token = likeliest if chance is None else _inverse(shares, ends, chance)[:, None]
    logp = (scaled.gather(1, token) - top).squeeze(1).double() - total.log()
    return token.squeeze(1), logp.float()


def _inverse(shares: Tensor, ends: Tensor, chance: Tensor) -> Tensor:
    wanted = _below(chance * ends[:, -1], ends[:, -1])
    block = (ends <= wanted[:, None]).sum(-1, keepdim=True)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0).squeeze(1)
    inner = shares.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    rest = _below(wanted - before, inner[:, -1])
    return block.squeeze(1) * BLOCK + (inner <= rest[:, None]).sum(-1)


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """The value, or the number next below the limit where it is not less: rounding must not lead past the end."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))
