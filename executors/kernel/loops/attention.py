"""Exact attention for packed batches, without the flash-attn package.

Each document attends to itself only. On CUDA one `varlen_attn` call serves all documents; elsewhere each gets its own
scaled-dot-product call, which also leaves out the T x T mask. Registered with transformers under NAME; a model that
does not pass `documents` through, or needs what is not supported here, fails the self-test and trains padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from tunesmith.executors.kernel.loops.forks import Fork, Forks

NAME = "tunesmith_packed"


def register() -> None:
    """Make NAME known to transformers. It has no mask function on purpose: packed batches carry no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: tuple[int, ...] | None = None,
    bounds: Tensor | None = None,
    forks: Forks | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document: [1, heads, T, dim] in, [1, T, heads, dim] out.

    With `forks`, answers also look at the prompt that they continue.
    Raises NotImplementedError where a model asks for what is not exact here: soft caps, sinks, dropout, a bias.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if documents is None or query.shape[0] != 1 or attention_mask is not None or unsupported or dropout:
        raise NotImplementedError(f"packed attention without {', '.join(unsupported) or 'documents'}")
    query, key, value = lowered(query, key, value)
    fast = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if forks is not None and fast:
        # queries count from the end of their keys, as flash attention aligns causal masks: at the lower right
        key, value = key.index_select(2, forks.keys), value.index_select(2, forks.keys)
        both, longest = (forks.bounds, forks.key_bounds), (max(documents), forks.longest)
        return _varlen(query, key, value, both, longest, scaling, sliding_window), None
    if forks is not None:
        return _per_fork(query, key, value, forks, scaling, sliding_window), None
    if fast and bounds is not None:
        both, longest = (bounds, bounds), (max(documents), max(documents))
        return _varlen(query, key, value, both, longest, scaling, sliding_window), None
    return _per_document(query, key, value, documents, scaling, sliding_window), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention import varlen

    known = _parameters(varlen.varlen_attn)
    q, k, v = (item[0].transpose(0, 1) for item in (query, key, value))
    more: dict[str, Any] = {"scale": scale}
    left = -1 if window is None or window >= longest[1] else window - 1
    if "window_size" in known:
        more["window_size"] = (left, 0)
    elif left == -1:
        more["is_causal"] = True
    else:
        raise NotImplementedError("a sliding window on this version of torch")
    if "enable_gqa" in known:
        more["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = (item.repeat_interleave(q.shape[1] // k.shape[1], 1) for item in (k, v))
    out = varlen.varlen_attn(q, k, v, *bounds, *longest, **more)
    assert isinstance(out, Tensor)
    return out[None]


@cache
def _parameters(function: Any) -> frozenset[str]:
    """What a version of torch lets `varlen_attn` be told: windows and grouped heads came one after the other."""
    return frozenset(inspect.signature(function).parameters)


def _per_document(
    query: Tensor, key: Tensor, value: Tensor, documents: tuple[int, ...], scale: float | None, window: int | None
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    dtype = query.dtype
    query, key, value = _raised(query, key, value)
    pieces = []
    lengths = list(documents)
    for q, k, v in zip(*(torch.split(item, lengths, 2) for item in (query, key, value)), strict=True):
        mask = None
        if window is not None and q.shape[2] > window:
            place = torch.arange(q.shape[2], device=q.device)
            apart = place[:, None] - place[None, :]
            mask = (apart >= 0) & (apart < window)
        pieces.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(pieces, 2).transpose(1, 2).to(dtype)


def lowered(*items: Tensor) -> Sequence[Tensor]:
    """On CUDA under autocast in its type: rotary embeddings leave queries and keys in float32 there."""
    kind = items[0].device.type
    if kind != "cuda" or not torch.is_autocast_enabled(kind):
        return items
    return [item.to(torch.get_autocast_dtype(kind)) for item in items]


def _raised(*items: Tensor) -> list[Tensor]:
    """On a CPU in float32: torch 2.13's backward pass in bfloat16 takes twice the time for some 200 tokens."""
    return [item.float() if item.device.type == "cpu" else item for item in items]


def _per_fork(
    query: Tensor, key: Tensor, value: Tensor, forks: Forks, scale: float | None, window: int | None
) -> Tensor:
    """One call for each prompt and one for all answers to it. Copies a prompt's keys and values once an answer."""
    grouped = query.shape[1] != key.shape[1]
    dtype = query.dtype
    query, key, value = _raised(query, key, value)
    pieces = []
    for fork in forks.each:
        end = fork.start + fork.prompt
        q, k, v = (item[:, :, fork.start : end] for item in (query, key, value))
        if fork.prompt:
            pieces += [_per_document(q, k, v, (fork.prompt,), scale, window)[0].transpose(0, 1)]
        if fork.count:
            own = [_rows_of(fork, item) for item in (query, key, value)]
            k, v = (
                torch.cat([shared.expand(fork.count, -1, -1, -1), fresh], 2)
                for shared, fresh in zip((k, v), own[1:], strict=True)
            )
            out = scaled_dot_product_attention(
                own[0], k, v, attn_mask=_windowed(fork, window), scale=scale, enable_gqa=grouped
            )
            pieces.append(out.transpose(0, 1).flatten(1, 2).index_select(1, fork.real))
    return torch.cat(pieces, 1).transpose(0, 1)[None].to(dtype)


def _rows_of(fork: Fork, item: Tensor) -> Tensor:
    """The answers of a tree side by side: [count, heads, width, dim] out of [1, heads, T, dim]."""
    chosen = item[0].index_select(1, fork.index)
    return chosen.view(item.shape[1], fork.count, fork.width, item.shape[3]).transpose(0, 1)


def _windowed(fork: Fork, window: int | None) -> Tensor:
    """A fork's mask, narrowed where a layer looks back only `window` tokens."""
    if window is None or window >= fork.prompt + fork.width:
        return fork.mask
    place = torch.arange(fork.prompt + fork.width, device=fork.mask.device)
    apart = place[fork.prompt :, None] - place[None, :]
    return fork.mask.masked_fill(apart >= window, float("-inf"))
