"""Mistakes that training code is known for, each with the check that catches it.

Elsewhere: the scale of accumulation (test_engine, test_dpo), rollouts with stale weights (test_rollout), varlen's
signatures (test_attention), ranks with weights that a step does not touch (test_ranks), stop tokens (data/).
"""

from dataclasses import replace

import pytest
import torch

from tunesmith.executors.kernel.loops import selftest
from tunesmith.executors.kernel.loops.batches import packed, padded
from tunesmith.executors.kernel.loops.forks import Tree, forked
from tunesmith.executors.kernel.loops.merged import Merged


def gradients(net, batch):
    net.outer.zero_grad()
    net.summed_loss(batch).backward()
    return {name: item.grad.clone() for name, item in net.trainable()}


def closest(ours, theirs):
    return max(
        float((ours[name] - item).abs().max() / item.abs().max().clamp(min=1e-9)) for name, item in theirs.items()
    )


@pytest.mark.parametrize("adapter", [{}, {"kind": "dora"}, {"kind": "none"}])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_activation_checkpointing_changes_no_gradient(adapter, layout, make_net, make_spec, make_rows):
    """Inputs of the first layer are frozen under an adapter: a careless recomputation gives no gradients at all."""
    rows = make_rows(5)
    (batch,) = packed(rows, 1000) if layout == "packed" else padded(rows, 8, 0)
    plain = gradients(make_net(make_spec(adapter)), batch)
    net = make_net(make_spec(adapter, activation_checkpointing=True))
    recomputed = []
    net.causal.model.layers[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    assert closest(gradients(net, batch), plain) < 1e-5
    assert len(recomputed) == 2  # forward, and once more on the way back
    assert min(float(item.abs().max()) for item in plain.values()) > 0


def test_shared_prompts_under_activation_checkpointing(make_net, make_spec):
    (batch,) = forked([Tree(0, [3, 4, 5], ([6, 7, 8], [9, 10]))], 100)
    found = []
    for on in (False, True):
        net = make_net(make_spec(activation_checkpointing=on))
        net.token_logps(batch)[0].sum().backward()
        found.append({name: item.grad for name, item in net.trainable()})
    assert closest(*found) < 1e-5


def test_dropout_is_the_same_when_a_layer_is_computed_again(make_net, make_spec, make_rows):
    (batch,) = packed(make_rows(4), 1000)
    found = []
    for on in (False, True):
        net = make_net(make_spec({"dropout": 0.3}, activation_checkpointing=on))
        torch.manual_seed(11)
        found.append(gradients(net, batch))
    assert closest(*found) < 1e-5


def test_positions_that_do_not_restart_are_seen(make_net, make_spec, make_rows):
    """With rotary positions that run on, attention inside a document is the same: only absolute places would differ.

    So the check compares with one row at a time on a model whose positions count, and rejects what is shifted inside.
    """
    net = make_net(make_spec())
    rows = make_rows(4)
    (batch,) = packed(rows, 1000)
    with torch.no_grad():
        right = net.logits(batch)
        doubled = net.logits(replace(batch, positions=batch.positions * 2))
        zero = net.logits(replace(batch, positions=batch.positions * 0))
    assert (doubled - right).abs().max() > 1e-2
    assert (zero - right).abs().max() > 1e-2
    expected = [place for length in batch.documents for place in range(length)]
    assert batch.positions[0].tolist() == expected


def test_a_tied_head_is_frozen_under_an_adapter_and_stays_tied_in_the_copy(make_net, make_spec, make_rows):
    net = make_net(make_spec())
    assert net.head.weight is net.causal.model.embed_tokens.weight
    assert not net.head.weight.requires_grad
    before = net.head.weight.clone()
    (batch,) = packed(make_rows(4), 1000)
    gradients(net, batch)
    assert net.head.weight.grad is None
    assert torch.equal(net.head.weight, before)
    copy = Merged(net).model
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert copy.lm_head.weight.data_ptr() == net.head.weight.data_ptr()


def test_a_tied_head_gets_both_of_its_gradients_with_all_weights(make_model, make_net, make_spec, make_rows):
    """The chunked head's gradient and the embedding's, in one weight: as the model's own loss gives them."""
    (batch,) = padded(make_rows(5), 8, 0)
    net = make_net(make_spec({"kind": "none"}))
    ours = gradients(net, batch)
    plain = make_model()
    logits = plain(input_ids=batch.ids).logits.reshape(-1, 97).index_select(0, batch.picks)
    torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum").backward()
    theirs = {name: item.grad for name, item in plain.named_parameters()}
    assert ours.keys() == theirs.keys()
    assert closest(ours, theirs) < 1e-4


def test_padding_is_seen_by_nobody(make_net, make_spec, make_rows):
    """Right padding and causal attention: what stands in the padding makes no difference, in values or gradients."""
    net = make_net(make_spec())
    (batch,) = padded(make_rows(5), 8, 0)
    real = torch.zeros_like(batch.ids, dtype=torch.bool)
    for at, number in enumerate(batch.rows):
        real[at, : len(make_rows(5)[number].ids) - 1] = True
    assert not real.all()
    other = replace(batch, ids=batch.ids.masked_fill(~real, 55))
    assert closest(gradients(net, other), gradients(net, batch)) < 1e-6


def test_the_selftest_sees_an_untied_or_scaled_head(make_net, make_spec, make_rows, monkeypatch):
    net = make_net(make_spec())
    head = net.head.forward
    monkeypatch.setattr(net.head, "forward", lambda states: head(states) * 0.5)
    verdict = selftest.check(net, make_rows(4), pad_id=0)
    assert not net.chunked
    assert "head does more than multiply" in verdict.problems[0]
