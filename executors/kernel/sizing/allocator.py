"""A replay of torch's CUDA caching allocator: what a device must give up for a series of allocations.

The rules are those of c10/cuda/CUDACachingAllocator.cpp in torch 2.13 for one stream with default settings: sizes in
steps of 512 bytes, segments of 2 MiB for up to 1 MiB, of 20 MiB for less than 10 MiB, of whole 2 MiB above; the best
fitting free block first, split where enough is left, joined with its free neighbours when given back; where the device
has no more, all free segments are returned to it and the request is made once again. With expandable segments each
pool is one range of addresses instead, backed by memory page by page, and free pages are what is returned.

An event is a pair: (name, bytes) takes memory, (name, 0) gives it back, and `EMPTY` is `torch.cuda.empty_cache()`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MIB = 1 << 20
STEP = 512
SMALL = MIB  # the largest request that is served from the pool of small blocks
PAGE = 2 * MIB
MEDIUM, MEDIUM_SEGMENT = 10 * MIB, 20 * MIB
ENDLESS = 1 << 60  # addresses of an expandable segment; the real one has 1 1/8 of the device's memory

Event = tuple[int, int]
EMPTY: Event = (-1, 0)


@dataclass(frozen=True, slots=True)
class Replay:
    """What a series of allocations came to, in bytes.

    live      most bytes handed out at once, as torch.cuda.max_memory_allocated() counts them
    reserved  most bytes taken of the device, as torch.cuda.max_memory_reserved() counts them
    held      bytes taken of the device at the end
    retries   how often everything free was returned to the device, because it had no more
    failed    the request that could not be met, None where all were
    """

    live: int
    reserved: int
    held: int
    retries: int
    failed: int | None = None

    @property
    def oom(self) -> bool:
        """Whether the device was too small."""
        return self.failed is not None


@dataclass(slots=True, eq=False)
class Block:
    """A range of addresses, between its neighbours of the same segment. `mapped` is whether memory stands behind it."""

    start: int
    size: int
    small: bool
    free: bool = True
    mapped: bool = True
    before: Block | None = None
    after: Block | None = None


class _Pool:
    """The free blocks of one kind, by size and then by address."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.page = PAGE if small else MEDIUM_SEGMENT
        self.order: list[tuple[int, int]] = []
        self.blocks: dict[int, Block] = {}
        self.unmapped: list[Block] = []  # of an expandable segment, by address

    def add(self, block: Block) -> None:
        block.free = True
        insort(self.order, (block.size, block.start))
        self.blocks[block.start] = block

    def take(self, block: Block) -> Block:
        del self.order[bisect_left(self.order, (block.size, block.start))]
        del self.blocks[block.start]
        return block

    def fitting(self, size: int) -> Block | None:
        """The smallest free block of at least `size` bytes; of equal ones that with the lowest address."""
        at = bisect_left(self.order, (size, 0))
        return self.blocks[self.order[at][1]] if at < len(self.order) else None


class Allocator:
    """The allocator itself, one call at a time. `capacity` is what the device has for it, in bytes; None is no end."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.live = self.most_live = self.reserved = self.most_reserved = self.retries = 0
        self._pools = {small: _Pool(small) for small in (True, False)}
        self._held: dict[int, Block] = {}
        self._edge = 0  # where the next segment begins; one page further, so that no two segments touch

    def allocate(self, name: int, size: int) -> bool:
        """Take `size` bytes; False where the device has no more, and then nothing is taken."""
        size = rounded(size)
        pool = self._pools[size <= SMALL]
        block = self._found(pool, size) or self._new(pool, size)
        if block is None:
            self.retries += 1
            self.empty()
            block = self._new(pool, size)
            if block is None:
                return False
        pool.take(block)
        block.free = False
        rest = block.size - size
        if self._splits(pool, rest):
            after = Block(block.start + size, rest, pool.small)
            block.size = size
            _link(block, after, block.after)
            pool.add(after)
        self._held[name] = block
        self.live += block.size
        self.most_live = max(self.most_live, self.live)
        return True

    def free(self, name: int) -> None:
        """Give back what was taken under a name; nothing happens where it was not."""
        block = self._held.pop(name, None)
        if block is not None:
            self.live -= block.size
            pool = self._pools[block.small]
            pool.add(self._joined(pool, block))

    def empty(self) -> None:
        """Return to the device every segment that is free as a whole."""
        for pool in self._pools.values():
            for block in [item for item in pool.blocks.values() if item.before is None and item.after is None]:
                pool.take(block)
                self.reserved -= block.size

    def blocks(self) -> Iterator[Block]:
        """The blocks that are handed out."""
        return iter(self._held.values())

    def _found(self, pool: _Pool, size: int) -> Block | None:
        return pool.fitting(size)

    def _splits(self, pool: _Pool, rest: int) -> bool:
        return rest >= STEP if pool.small else rest > SMALL

    def _new(self, pool: _Pool, size: int) -> Block | None:
        """A fresh segment, free as a whole."""
        if pool.small:
            size = PAGE
        elif size < MEDIUM:
            size = MEDIUM_SEGMENT
        else:
            size = -(-size // PAGE) * PAGE
        if not self._reserve(size):
            return None
        block = Block(self._edge, size, pool.small)
        self._edge += size + PAGE
        pool.add(block)
        return block

    def _reserve(self, size: int) -> bool:
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.most_reserved = max(self.most_reserved, self.reserved)
        return True

    def _joined(self, pool: _Pool, block: Block) -> Block:
        """The block with the free neighbours that are backed as it is; they leave their lists."""
        for left, right in ((block.before, block), (block, block.after)):
            other = left if right is block else right
            if left is None or right is None or other is None or not other.free or other.mapped != block.mapped:
                continue
            if other.mapped:
                pool.take(other)
            else:
                pool.unmapped.remove(other)
            block.start = left.start
            block.size = left.size + right.size
            block.before, block.after = left.before, right.after
            if block.before is not None:
                block.before.after = block
            if block.after is not None:
                block.after.before = block
        return block


class Expandable(Allocator):
    """The same with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        for pool in self._pools.values():
            start = 0 if pool.small else -(-ENDLESS // pool.page) * pool.page  # begins with a page
            pool.unmapped.append(Block(start, ENDLESS, pool.small, mapped=False))

    def empty(self) -> None:
        """Return to the device every page that is free as a whole."""
        for pool in self._pools.values():
            for block in list(pool.blocks.values()):
                start, end = -(-block.start // pool.page) * pool.page, block.start + block.size
                end = end // pool.page * pool.page
                if start >= end:
                    continue
                pool.take(block)
                pieces = [Block(block.start, start - block.start, pool.small), Block(start, end - start, pool.small)]
                pieces.append(Block(end, block.start + block.size - end, pool.small))
                kept = [piece for piece in pieces if piece.size]
                before, last = block.before, block.after
                for piece in kept:
                    _link(before, piece, last)
                    before = piece
                for piece in kept:
                    if piece is not pieces[1]:
                        pool.add(piece)
                pieces[1].mapped = False
                self.reserved -= end - start
                self._stand(pool, self._joined(pool, pieces[1]))

    def _stand(self, pool: _Pool, block: Block) -> None:
        insort(pool.unmapped, block, key=_start)

    def _found(self, pool: _Pool, size: int) -> Block | None:
        """The best fit, where a block before unbacked addresses counts as large as it can grow."""
        at = bisect_left(pool.order, (size, 0))
        found = [pool.blocks[start] for _, start in pool.order[at : at + 1]]
        while found and at + 1 < len(pool.order):
            other = pool.blocks[pool.order[at + 1][1]]
            if _room(other) >= _room(found[0]):
                break
            found, at = [other], at + 1
        return found[0] if found else None

    def _splits(self, pool: _Pool, rest: int) -> bool:
        return rest >= STEP

    def _new(self, pool: _Pool, size: int) -> Block | None:
        """Free and newly backed addresses in a row, from the lowest that have the room."""
        block = next(row for row in map(_row, pool.unmapped) if sum(item.size for item in row) >= size)[0]
        while block.mapped is False or block.size < size:
            bare = block.after if block.mapped else block
            assert bare is not None
            wanted = min(bare.size, size - block.size if block.mapped else size)
            wanted = -(-wanted // pool.page) * pool.page
            if not self._reserve(wanted):
                return None
            pool.unmapped.remove(bare)
            if bare.size > wanted:
                rest = Block(bare.start + wanted, bare.size - wanted, pool.small, mapped=False)
                _link(bare, rest, bare.after)
                bare.size = wanted
                self._stand(pool, rest)
            bare.mapped = True
            block = self._joined(pool, bare)
            pool.add(block)
        return block


def rounded(size: int) -> int:
    """A request as it is served: whole steps of 512 bytes."""
    return max(STEP, -(-size // STEP) * STEP)


def replay(events: Iterable[Event], capacity: int | None = None, *, expandable: bool = False) -> Replay:
    """What these events come to on a device with `capacity` bytes for them; ends where it has no more.

    A larger device does not always hold what a smaller one holds: what the smaller returned earlier lies packed anew.
    """
    allocator = (Expandable if expandable else Allocator)(capacity)
    failed = None
    for event in events:
        name, size = event
        if size:
            if not allocator.allocate(name, size):
                failed = size
                break
        elif event == EMPTY:
            allocator.empty()
        else:
            allocator.free(name)
    return Replay(allocator.most_live, allocator.most_reserved, allocator.reserved, allocator.retries, failed)


def live_peak(events: Iterable[Event]) -> int:
    """Most bytes asked for at once, in whole steps, without a look at how they are laid out."""
    sizes: dict[int, int] = {}
    now = most = 0
    for name, size in events:
        if size:
            sizes[name] = rounded(size)
            now += sizes[name]
            most = max(most, now)
        else:
            now -= sizes.pop(name, 0)
    return most


def _link(before: Block | None, block: Block, after: Block | None) -> None:
    block.before, block.after = before, after
    if before is not None:
        before.after = block
    if after is not None:
        after.before = block


def _start(block: Block) -> int:
    return block.start


def _room(block: Block) -> int:
    return block.size + (block.after.size if block.after is not None and not block.after.mapped else 0)


def _row(bare: Block) -> list[Block]:
    """The addresses in a row that nobody holds, from an unbacked block on, with a free one right before it."""
    first = bare.before if bare.before is not None and bare.before.free else bare
    row = [first]
    while row[-1].after is not None and row[-1].after.free:
        row.append(row[-1].after)
    return row
