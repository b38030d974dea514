"""The processes that train one model together; most often there is one.

Data parallel without a wrapper: every rank holds the whole model and derives the same batches from the same rows; it
works off its share of each step, and the gradients are added up once a step. Messages about tensors go over NCCL where
they lie on GPUs, all others over gloo, on the loopback device; the ranks find one another through a file in the
attempt's folder, so no port is opened to anybody else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tunesmith.orchestrator.errors import JobFailed, TunesmithError

T = TypeVar("T")

BUCKET_BYTES = 32 * 2**20  # sent as one message: a small model's gradients in one, a large one's without a second copy
SILENCE = timedelta(minutes=30)  # a rank may be busy alone for so long, saving a checkpoint for instance
LOOK_SECONDS = 0.02
_DEVICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class Ranks:
    """One process by itself: rank 0 of 1. What several do together is a subclass's."""

    rank = 0
    world = 1

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of a list: every world-th item."""
        return list(items[self.rank :: self.world])

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors up over all ranks, in place."""

    def agree(self, flag: bool) -> bool:
        """What rank 0 says."""
        return flag

    def gather(self, item: Any) -> list[Any]:
        """Plain data of every rank, by rank; several ranks get it as JSON gives it back."""
        return [item]

    def same(self, what: str, item: Any) -> None:
        """Make sure that all ranks hold the same plain data. Raises JobFailed (ranks.apart) naming `what`."""
        first, *others = self.gather(item)
        apart = [rank for rank, other in enumerate(others, 1) if other != first]
        if apart:
            raise JobFailed(
                f"The processes of this attempt do not have the same {what}.",
                code="ranks.apart",
                why=f"{'Ranks' if len(apart) > 1 else 'Rank'} {', '.join(map(str, apart))} of {self.world} differ "
                "from rank 0.",
                fix="Retry the job. If it happens again, use one device.",
            )

    def leave(self) -> None:
        """Part from the others, when nothing is left to be said. Every rank does."""


ALONE = Ranks()


class Joined(Ranks):
    """One of several processes on this machine, each in the same place of the same program.

    `lost` turns a broken connection into the error to raise; `check` raises where another rank is known to have ended.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        lost: Callable[[BaseException], TunesmithError],
        check: Callable[[], None],
    ) -> None:
        self.rank = rank
        self.world = world
        self._store = store
        self._lost = lost
        self._check = check

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors up over all ranks, in place: one message for each bucket. Every rank ends with the same bits."""
        for bucket in buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                self._call("all_reduce", bucket[0])
                continue
            flat = torch.cat([item.reshape(-1) for item in bucket])
            self._call("all_reduce", flat)
            parts = torch.split(flat, [item.numel() for item in bucket])
            torch._foreach_copy_(bucket, [part.view_as(item) for part, item in zip(parts, bucket, strict=True)])

    def agree(self, flag: bool) -> bool:
        """What rank 0 says. A byte over gloo: no device is waited for."""
        said = torch.tensor([flag], dtype=torch.uint8)
        self._call("broadcast", said, 0)
        return bool(said.item())

    def gather(self, item: Any) -> list[Any]:
        """Plain data of every rank, by rank, as JSON gives it back."""
        mine = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        self._call("all_gather", sizes, torch.tensor([mine.numel()]))
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: mine.numel()] = mine
        texts = [torch.empty_like(padded) for _ in range(self.world)]
        self._call("all_gather", texts, padded)
        pairs = zip(texts, lengths, strict=True)
        return [json.loads(text[:length].numpy().tobytes()) for text, length in pairs]

    def leave(self) -> None:
        """Wait until every rank has come here, however long, and close the connections."""
        # through the file: a rank that closes first must not break into what another still reads
        meet(self._store, "leave", self.rank, self.world, self._check)
        torch.distributed.destroy_process_group()

    def drop(self) -> None:
        """Close the connections without a word to the others, who are gone; NCCL, which may wait for them, is left."""
        if "nccl" not in torch.distributed.get_backend_config():
            torch.distributed.destroy_process_group()

    def _call(self, name: str, *args: Any) -> None:
        try:
            getattr(torch.distributed, name)(*args)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._lost(error) from error


def join(
    path: Path,
    rank: int,
    world: int,
    device: torch.device,
    *,
    lost: Callable[[BaseException], TunesmithError],
    check: Callable[[], None],
    pause: Callable[[], None] = lambda: None,
    silence: timedelta = SILENCE,
) -> Joined:
    """Meet the other ranks through the file `path`, which is theirs alone, and connect.

    Waits for them as long as neither `check` nor `pause`, asked here only, raises; from then on a rank that says
    nothing for `silence` is lost.
    """
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    for name in _DEVICES:
        os.environ.setdefault(name, loopback)
    distributed = torch.distributed
    store = distributed.FileStore(str(path))  # type: ignore[attr-defined]

    def looked() -> None:
        check()
        pause()

    meet(store, "join", rank, world, looked)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=silence)
    except RuntimeError as error:
        raise lost(error) from error
    return Joined(store, rank, world, lost, check)


def meet(store: Any, place: str, rank: int, world: int, check: Callable[[], None]) -> None:
    """Wait until every rank has come to this place. `check` is called now and then, and may raise."""
    store.set(f"{place}/{rank}", "here")
    others = [f"{place}/{other}" for other in range(world)]
    while not store.check(others):
        check()
        time.sleep(LOOK_SECONDS)


def fingerprint(tensors: Sequence[Tensor]) -> list[str]:
    """The norm of each tensor, exactly: plain data that tells ranks whether they hold the same. Waits."""
    norms = torch._foreach_norm([item.detach() for item in tensors])
    return [float(norm).hex() for norm in norms]


def buckets(tensors: Sequence[Tensor], most: int = BUCKET_BYTES) -> Iterator[list[Tensor]]:
    """Tensors of one type and device, in order, up to `most` bytes together; a larger one by itself. Empty ones go."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for item in tensors:
        if item.numel():
            kinds.setdefault((item.dtype, item.device), []).append(item.detach())
    for kind in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for item in kind:
            if bucket and size + item.nbytes > most:
                yield bucket
                bucket, size = [], 0
            bucket.append(item)
            size += item.nbytes
        yield bucket
