"""What a micro-batch holds: halved until rows part, and filled as full as any step could fill it."""

import random
from itertools import combinations

import pytest

from tunesmith.executors.kernel.loops.batches import packed, padded
from tunesmith.executors.kernel.loops.room import LEAST, Room, fullest


def test_the_smaller_of_two():
    assert Room(4, 100).within(None) == Room(4, 100)
    assert Room(4, 100).within(Room(2, 300)) == Room(2, 100)


@pytest.mark.parametrize("packing", [True, False])
def test_halving_parts_the_rows_of_a_batch_until_each_is_alone(packing, make_rows):
    rows = make_rows(13, low=5, high=40)

    def laid_out(room):
        return packed(rows, room.tokens) if packing else padded(rows, room.rows, 0)

    room, largest = Room(32, 2048), None
    while True:
        batches = laid_out(room)
        assert sorted(row for batch in batches for row in batch.rows) == list(range(13))
        batch = max(batches, key=lambda item: len(item.rows))
        assert largest is None or len(batch.rows) < largest
        largest = len(batch.rows)
        smaller = room.below(batch)
        if smaller is None:
            break
        assert smaller.rows <= max(1, room.rows // 2)
        assert smaller.tokens <= room.tokens // 2
        room = smaller
    assert largest == 1


def test_halves_are_those_of_the_micro_batch_asked_for(make_rows):
    """A step that had only three rows to give is parted by two, as a run with micro-batches of two does it."""
    (batch,) = padded(make_rows(3), 8, 0)
    assert Room(8, 8 * 64).below(batch) == Room(2, 2 * 64)


def test_without_a_batch_it_is_halved_once():
    assert Room(6, 60).below(None) == Room(3, 30)
    assert Room(1, 60).below(None) is None
    assert LEAST.below(None) is None


@pytest.mark.parametrize("seed", range(40))
def test_packed_rows_fill_a_micro_batch_nearly_as_full_as_any_do(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, draw.choice([8, 30])) for _ in range(draw.randint(1, 11))]
    room, most = Room(1, draw.choice([12, 31, 60])), draw.randint(1, 5)
    chosen = fullest(lengths, room, most, packed=True)
    assert len(chosen) == len(set(chosen)) <= most
    total = sum(lengths[at] for at in chosen)
    assert total <= room.tokens or len(chosen) == 1
    sums = [sum(some) for count in range(1, most + 1) for some in combinations(lengths, count)]
    best = max([item for item in sums if item <= room.tokens] + [max(lengths)])
    assert 0.9 * best <= total <= best


def test_a_long_document_stands_before_short_ones_of_the_same_sum():
    assert fullest([8, 16, 8, 4], Room(1, 16), 4, packed=True) == [1]


def test_padded_the_longest_rows_are_the_largest_batch():
    lengths = [3, 9, 9, 1, 7]
    assert sorted(fullest(lengths, Room(3, 1), 8, packed=False)) == [1, 2, 4]
    assert fullest(lengths, Room(3, 1), 1, packed=False) == [1]


def test_a_row_over_the_room_goes_by_itself():
    assert fullest([5, 70, 6], Room(4, 60), 4, packed=True) == [1]
