"""A prompt computed once for all of its answers is the arithmetic of as many sequences."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tunesmith.executors.kernel.loops import attention, selftest
from tunesmith.executors.kernel.loops.forks import Tree, forked, spread


def make_trees(count, seed=0, answers=3):
    draw = random.Random(seed)

    def tokens(low, high):
        return [draw.randrange(3, 90) for _ in range(draw.randint(low, high))]

    return [Tree(10 + at, tokens(1, 12), tuple(tokens(1, 9) for _ in range(answers))) for at in range(count)]


def hushed(trees, seed=5):
    """The same trees, some tokens of each answer read only; never its last."""
    draw = random.Random(seed)

    def places(answer):
        return tuple(at for at in range(len(answer) - 1) if draw.random() < 0.4)

    return [replace(tree, silent=tuple(map(places, tree.answers))) for tree in trees]


def by_member(values, batch):
    return {member: values[batch.owners == at].tolist() for at, member in enumerate(batch.members)}


@pytest.mark.parametrize("layout", ["forked", "spread"])
def test_every_token_of_every_answer_is_scored_once(layout):
    trees = make_trees(7)
    batches = forked(trees, 60) if layout == "forked" else spread(trees, 2, 0)
    assert len(batches) > 2
    seen = {}
    for batch in batches:
        seen |= by_member(batch.targets, batch)
        assert batch.tokens == sum(trees[number - 10].tokens for number in batch.rows)
    assert seen == {(at, n): list(answer) for at, tree in enumerate(trees) for n, answer in enumerate(tree.answers)}


@pytest.mark.parametrize("layout", ["forked", "spread"])
def test_silent_tokens_are_fed_and_not_scored(layout):
    heard, trees = make_trees(7), hushed(make_trees(7))
    made = [forked(each, 60) if layout == "forked" else spread(each, 2, 0) for each in (heard, trees)]
    seen = {}
    for usual, batch in zip(*made, strict=True):
        assert torch.equal(batch.ids, usual.ids)
        seen |= by_member(batch.targets, batch)
    silent = {(at, n): set(places) for at, tree in enumerate(trees) for n, places in enumerate(tree.silent)}
    assert any(0 in places for places in silent.values())
    assert seen == {
        (at, n): [token for place, token in enumerate(answer) if place not in silent[at, n]]
        for at, tree in enumerate(trees)
        for n, answer in enumerate(tree.answers)
    }


def test_a_forked_batch_feeds_a_prompt_once_and_no_last_token():
    trees = make_trees(4)
    (batch,) = forked(trees, 10_000)
    assert batch.ids.shape == (1, sum(len(t.prompt) + sum(len(a) - 1 for a in t.answers) for t in trees))
    assert list(batch.documents) == batch.forks.bounds.diff().tolist()
    for tree, fork in zip(trees, batch.forks.each, strict=True):
        places = batch.positions[0, fork.start :][: tree.fed].tolist()
        own = [len(tree.prompt) + place for answer in tree.answers for place in range(len(answer) - 1)]
        assert places == [*range(len(tree.prompt)), *own]


def test_a_tree_is_never_split():
    trees = make_trees(9)
    for batch in forked(trees, 30):
        assert len(batch.members) == 3 * len(batch.rows)


@pytest.mark.parametrize(
    "family, more",
    [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 5}), ("llama", {"num_key_value_heads": 4})],
)
def test_logits_and_gradients_equal_separate_sequences(family, more, make_net, make_spec):
    trees = [
        *make_trees(5),
        *hushed(make_trees(3, seed=1)),
        Tree(99, (), ([4, 5, 6, 7], [8, 9])),
        Tree(98, [3, 4, 5], ([7], [7, 8])),
    ]

    def run(layout):
        net = make_net(make_spec(), family, **more)
        found = {}
        for batch in layout:
            logps, entropy = net.token_logps(batch, 0.7)
            found |= by_member(logps.detach(), batch)
            weights = torch.tensor([1.0 + member[0] - 2 * member[1] for member in batch.members])
            (logps * weights[batch.owners]).sum().backward()
            assert bool((entropy > 0).all())
        return found, {name: item.grad for name, item in net.trainable()}

    ours, gradients = run(forked(trees, 50))
    theirs, expected = run(spread(trees, 1, 0))
    assert ours.keys() == theirs.keys()
    for member, values in theirs.items():
        assert ours[member] == pytest.approx(values, abs=2e-5)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-6


def test_the_varlen_kernel_is_given_the_same_problem(make_net, make_spec, monkeypatch):
    """On CUDA one varlen call serves all; a slow one with its signature shows that it is asked the right thing."""
    from torch.nn.attention import varlen

    def slow(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size, enable_gqa=False):
        out = torch.empty_like(query)
        for (a, b), (c, d) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
            q, k, v = query[a:b].transpose(0, 1), key[c:d].transpose(0, 1), value[c:d].transpose(0, 1)
            k, v = (item.repeat_interleave(q.shape[0] // k.shape[0], 0) for item in (k, v))
            assert b - a <= max_q
            assert d - c <= max_k
            mask = torch.ones(b - a, d - c).tril(d - c - (b - a)).bool()
            scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
            out[a:b] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out

    monkeypatch.setattr(varlen, "varlen_attn", slow)
    draw = torch.Generator().manual_seed(0)
    (batch,) = forked(make_trees(4), 10_000)
    forks, length = batch.forks, batch.ids.shape[1]
    q, k, v = (torch.randn(1, heads, length, 8, generator=draw) for heads in (4, 2, 2))
    ours = attention._per_fork(q, k, v, forks, 0.3, None)
    gathered = (item.index_select(2, forks.keys) for item in (k, v))
    bounds, longest = (forks.bounds, forks.key_bounds), (max(batch.documents), forks.longest)
    assert (attention._varlen(q, *gathered, bounds, longest, 0.3, None) - ours).abs().max() < 1e-5


def test_the_selftest_accepts_sharing_and_sees_it_broken(make_net, make_spec, make_rows, monkeypatch):
    net = make_net(make_spec())
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert verdict.problems == ()
    assert verdict.sharing < 1e-5
    assert net.forked

    exact = attention._windowed
    monkeypatch.setattr(attention, "_windowed", lambda fork, window: exact(fork, window).roll(1, 1))
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert not net.forked
    assert net.packed
    assert "shared prompt" in verdict.problems[0]
