"""The replay of torch's CUDA caching allocator: its published rules one by one, and laws that hold for any series."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.sizing.allocator import EMPTY, MIB, Allocator, Expandable, live_peak, replay, rounded

KINDS = pytest.mark.parametrize("expandable", [False, True])


@st.composite
def series(draw, most=40):
    """Allocations of all kinds of sizes, given back in any order, with the cache emptied now and then."""
    sizes = st.one_of(
        st.integers(1, 4096), st.integers(4097, MIB), st.integers(MIB + 1, 10 * MIB), st.integers(10 * MIB, 90 * MIB)
    )
    events, live = [], []
    for name in range(draw(st.integers(1, most))):
        events.append((name, draw(sizes)))
        live.append(name)
        while live and draw(st.integers(0, 2)) == 0:
            events.append((live.pop(draw(st.integers(0, len(live) - 1))), 0))
        if draw(st.integers(0, 15)) == 0:
            events.append(EMPTY)
    return events


def apply(allocator, event):
    name, size = event
    if size:
        return allocator.allocate(name, size)
    return allocator.empty() if event == EMPTY else allocator.free(name)


@pytest.mark.parametrize(
    ("size", "taken"),
    [
        (1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB), (21 * MIB, 22 * MIB),
    ],
)  # fmt: skip
def test_what_a_first_request_takes_of_the_device(size, taken):
    assert replay([(1, size)]).reserved == taken
    pages = 2 * MIB if size <= MIB else 20 * MIB
    assert replay([(1, size)], expandable=True).reserved == -(-size // pages) * pages


def test_sizes_are_whole_steps_of_512_bytes():
    assert [rounded(size) for size in (1, 512, 513)] == [512, 512, 1024]
    assert replay([(1, 1), (2, 513)]).live == 1536


def test_small_and_large_requests_do_not_share_a_segment():
    assert replay([(1, 3 * MIB), (2, 1)]).reserved == 22 * MIB


def test_a_rest_of_up_to_1_mib_stays_with_a_large_block():
    assert replay([(1, 20 * MIB), (1, 0), (2, 19 * MIB)]).live == 20 * MIB
    assert replay([(1, 20 * MIB), (1, 0), (2, 18 * MIB), (3, 2 * MIB)]).reserved == 20 * MIB


def test_the_best_fit_is_taken():
    """The 30 MiB segment serves 25, so that 60 still finds its own."""
    events = [(1, 60 * MIB), (2, 30 * MIB), (1, 0), (2, 0), (3, 25 * MIB), (4, 60 * MIB)]
    assert replay(events).reserved == 90 * MIB


def test_neighbours_are_joined_when_given_back():
    events = [(1, 40 * MIB), (1, 0), (2, 20 * MIB), (3, 20 * MIB), (2, 0), (3, 0), (4, 40 * MIB)]
    assert replay(events).reserved == 40 * MIB


def test_a_full_device_gets_free_segments_back_and_is_asked_once_more():
    events = [(1, 40 * MIB), (1, 0), (2, 60 * MIB)]
    assert replay(events).reserved == 100 * MIB
    bounded = replay(events, 80 * MIB)
    assert (bounded.oom, bounded.retries, bounded.reserved, bounded.held) == (False, 1, 60 * MIB, 60 * MIB)


def test_what_does_not_fit_is_said_and_not_raised():
    found = replay([(1, 40 * MIB), (2, 60 * MIB), (1, 0)], 80 * MIB)
    assert found.oom
    assert found.failed == 60 * MIB
    assert found.held == 40 * MIB


def test_a_split_segment_is_not_returned():
    events = [(1, 40 * MIB), (1, 0), (2, 20 * MIB), EMPTY]
    assert replay(events).held == 40 * MIB


def test_expandable_segments_return_pages_and_use_the_addresses_again():
    events = [(1, 40 * MIB), (2, 40 * MIB), (1, 0)]
    assert replay([*events, EMPTY], expandable=True).held == 40 * MIB
    again = replay([*events, EMPTY, (3, 30 * MIB), (4, 10 * MIB)], expandable=True)
    assert (again.held, again.reserved) == (80 * MIB, 80 * MIB)


def test_expandable_segments_grow_the_free_block_at_their_end():
    events = [(1, 40 * MIB), (1, 0), (2, 60 * MIB)]
    assert replay(events, expandable=True).reserved == 60 * MIB


@KINDS
@given(events=series())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_two_blocks_overlap_and_books_balance(expandable, events):
    allocator = (Expandable if expandable else Allocator)()
    asked = {}
    for event in events:
        apply(allocator, event)
        asked = {**asked, event[0]: event[1]} if event[1] else {k: v for k, v in asked.items() if k != event[0]}
        ranges = sorted((block.start, block.start + block.size) for block in allocator.blocks())
        assert all(one[1] <= other[0] for one, other in pairwise(ranges))
        assert sum(end - start for start, end in ranges) == allocator.live <= allocator.reserved
        assert sum(map(rounded, asked.values())) <= allocator.live
    for name in asked:
        allocator.free(name)
    assert allocator.live == 0
    allocator.empty()
    assert allocator.reserved == 0


@KINDS
@given(events=series(), share=st.floats(0.3, 1.2))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_device_gives_no_more_than_it_has(expandable, events, share):
    free = replay(events, expandable=expandable)
    capacity = int(share * free.reserved)
    bounded = replay(events, capacity, expandable=expandable)
    assert bounded.reserved <= capacity
    assert bounded.live <= free.live
    assert not bounded.oom or share < 1
    if capacity >= free.reserved:
        assert bounded == free  # any larger device is the same as an endless one
    if capacity < live_peak(events):
        assert bounded.oom


@KINDS
@given(events=series())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_more_layers_of_the_same_never_take_less(expandable, events):
    """The same again beside what is still held: neither figure falls."""
    once = replay(events, expandable=expandable)
    moved = [event if event == EMPTY else (event[0] + 1000, event[1]) for event in events]
    twice = replay([*events, *moved], expandable=expandable)
    assert twice.live >= once.live
    assert twice.reserved >= once.reserved


def test_expandable_segments_waste_less_in_the_mean():
    shares = []
    for seed in range(12):
        draw = random.Random(seed)
        events, live = [], []
        for name in range(800):
            events.append((name, draw.choice((draw.randrange(1, MIB), draw.randrange(MIB, 200 * MIB)))))
            live.append(name)
            while live and draw.random() < 0.49:
                events.append((live.pop(draw.randrange(len(live))), 0))
        shares.append(replay(events, expandable=True).reserved / replay(events).reserved)
    assert sum(shares) / len(shares) < 0.97
