"""Which rows a step trains, and their layout."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.loops.batches import Sampler, best_fit, packed, padded


@given(rows=st.integers(1, 60), batch=st.integers(1, 70), seed=st.integers(0, 2**32 - 1), epochs=st.integers(1, 3))
def test_every_epoch_holds_every_row_once(rows, batch, seed, epochs):
    sampler = Sampler(rows, batch, seed)
    assert sampler.total_steps(epochs, None) == epochs * math.ceil(rows / batch)
    for epoch in range(epochs):
        first = epoch * sampler.steps_per_epoch
        steps = [sampler.step(first + step) for step in range(sampler.steps_per_epoch)]
        assert sorted(row for step in steps for row in step) == list(range(rows))
        assert all(len(step) == batch for step in steps[:-1])
        assert len(steps[-1]) == rows - batch * (len(steps) - 1)


def test_order_depends_on_seed_epoch_and_row_only():
    one, other = Sampler(50, 4, 1), Sampler(50, 4, 1)
    late = one.step(30)
    other.step(3)
    torch.manual_seed(0)
    assert other.step(30) == late
    assert Sampler(50, 8, 1).order(2) == one.order(2)  # another batch, the same order
    assert Sampler(50, 4, 2).order(0) != one.order(0)
    assert one.order(0) != one.order(1)
    # a row more does not change how the others follow each other
    assert [row for row in Sampler(51, 4, 1).order(0) if row != 50] == one.order(0)


def test_order_is_a_hash_and_no_generator():
    place = {row: hashlib.blake2b(b"42:3:%d" % row, digest_size=16).digest() for row in range(20)}
    assert Sampler(20, 2, 42).order(3) == sorted(range(20), key=place.__getitem__)
    assert Sampler(8, 2, 42).order(0)[:6] == [7, 1, 0, 6, 3, 2]


def test_steps_of_a_run():
    sampler = Sampler(10, 4, 0)
    assert sampler.total_steps(1, None) == 3
    assert sampler.total_steps(0.5, None) == 2
    assert sampler.total_steps(0.01, None) == 1
    assert sampler.total_steps(1, 50) == 50
    assert sampler.epochs_done(1) == pytest.approx(0.4)
    assert sampler.epochs_done(3) == 1.0
    assert sampler.epochs_done(4) == pytest.approx(1.4)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), budget=st.integers(10, 80))
def test_best_fit_loses_nothing_and_keeps_the_budget(lengths, budget):
    groups = best_fit(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[index] for index in group) <= budget or len(group) == 1
    # best fit never leaves two groups that fit into one
    sums = sorted(sum(lengths[index] for index in group) for group in groups)
    assert len(sums) < 2 or sums[0] + sums[1] > budget


def test_both_layouts_hold_the_same_supervised_tokens(make_rows):
    rows = make_rows(9)
    for batches in (padded(rows, 2, 0), padded(rows, 100, 0), packed(rows, 50), packed(rows, 10_000)):
        pairs = []
        for batch in batches:
            flat = batch.ids.reshape(-1)
            pairs += list(zip(flat[batch.picks].tolist(), batch.targets.tolist(), strict=True))
            assert batch.weight == len(batch.targets)
        expected = [
            (row.ids[at - 1], row.ids[at]) for row in rows for at in range(1, len(row.ids)) if row.labels[at] != -100
        ]
        assert sorted(pairs) == sorted(expected)
        assert sorted(number for batch in batches for number in batch.rows) == list(range(9))
        assert sum(batch.tokens for batch in batches) == sum(len(row.ids) for row in rows)


def test_packed_positions_restart_with_every_document(make_rows):
    (batch,) = packed(make_rows(4), 10_000)
    fed = batch.tokens - len(batch.documents)  # the last token of a row predicts nothing, so it is left out
    assert batch.ids.shape == batch.positions.shape == (1, fed)
    expected = [place for length in batch.documents for place in range(length)]
    assert batch.positions[0].tolist() == expected
    assert batch.bounds.tolist()[-1] == fed
    assert batch.bounds.diff().tolist() == list(batch.documents)


def test_padding_stands_on_the_right(make_rows):
    rows = make_rows(5)
    for batch in padded(rows, 2, 0):
        for at, number in enumerate(batch.rows):
            length = len(rows[number].ids) - 1
            assert batch.ids[at, :length].tolist() == rows[number].ids[:-1]
            assert set(batch.ids[at, length:].tolist()) <= {0}


def test_a_row_over_the_budget_goes_alone(make_rows):
    rows = make_rows(3, low=20, high=24)
    assert [batch.rows for batch in packed(rows, 8)] == [
        (row,) for row in sorted(range(3), key=lambda r: -len(rows[r].ids))
    ]


def test_the_first_token_is_never_predicted(make_rows):
    (row,) = make_rows(1)
    whole = type(row)(0, row.ids, list(row.ids))
    assert padded([whole], 1, 0)[0].weight == len(row.ids) - 1
