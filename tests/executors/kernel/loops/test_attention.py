"""Packed attention is exact, and the self-test sees when it is not."""

from itertools import pairwise

import pytest
import torch

from tunesmith.executors.kernel.loops import attention, selftest
from tunesmith.executors.kernel.loops.batches import packed, padded


def logits_of(net, batches):
    return {row: piece for batch in batches for row, piece in zip(batch.rows, per_row(net, batch), strict=True)}


def per_row(net, batch):
    with torch.no_grad():
        logits = net.logits(batch)
    sizes, width = [], batch.ids.shape[1]
    if batch.documents is None:
        sizes = [int(((batch.picks // width) == at).sum()) for at in range(len(batch.rows))]
    else:
        edges = batch.bounds.tolist()
        sizes = [int(((batch.picks >= a) & (batch.picks < b)).sum()) for a, b in pairwise(edges)]
    return torch.split(logits, sizes)


@pytest.mark.parametrize(
    "family, more",
    [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 6}), ("llama", {"num_key_value_heads": 4})],
)
def test_packed_equals_one_row_at_a_time(family, more, make_net, make_spec, make_rows):
    net = make_net(make_spec(), family, **more)
    net.outer.eval()
    rows = make_rows(7)
    single = logits_of(net, [batch for row in rows for batch in padded([row], 1, 0)])
    for other in (logits_of(net, packed(rows, 60)), logits_of(net, padded(rows, 3, 0))):
        assert other.keys() == single.keys()
        for row, logits in single.items():
            assert (logits - other[row]).abs().max() < 1e-5


def test_selftest_accepts_what_is_exact(make_net, make_spec, make_rows):
    net = make_net(make_spec())
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert verdict.problems == ()
    assert max(verdict.packing, verdict.attention, verdict.head) < 1e-5
    assert net.packed
    assert net.chunked
    assert net.outer.training


def test_selftest_sees_rows_that_look_at_each_other(make_net, make_spec, make_rows, monkeypatch):
    net = make_net(make_spec())
    exact = attention._per_document

    def leaking(query, key, value, documents, scale, window):
        return exact(query, key, value, (sum(documents),), scale, window)

    monkeypatch.setattr(attention, "_per_document", leaking)
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert not net.packed
    assert net.chunked
    assert verdict.packing > 1e-2
    assert "packed rows differ" in verdict.problems[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selftest_sees_attention_that_is_not_the_models(dtype, make_net, make_spec, make_rows, monkeypatch):
    net = make_net(make_spec(dtype=dtype))
    exact = attention._per_document
    monkeypatch.setattr(attention, "_per_document", lambda q, k, v, d, scale, window: exact(q, k, v, d, 3.0, window))
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert not net.packed
    assert verdict.packing < 1e-5
    assert "packed attention differs from the model's own" in verdict.problems[0]


def test_selftest_bears_with_rounding(make_net, make_spec, make_rows):
    net = make_net(make_spec(dtype="bfloat16"))
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert verdict.problems == ()
    assert verdict.attention > 1e-4


def rounded(net, amount, *, packed_only):
    """Let logits differ by `amount` times their spread wherever batches differ in size, as some processors round."""
    exact = net.logits

    def logits(batch):
        found = exact(batch)
        if packed_only and len(batch.documents or ()) < 2:
            return found
        draw = torch.Generator().manual_seed(batch.ids.numel())
        return found + amount * found.float().std() * torch.randn(found.shape, generator=draw).to(found.dtype)

    net.logits = logits


def test_selftest_measures_rounding_by_the_models_own(make_net, make_spec, make_rows):
    """Where products of other sizes round otherwise, packed rows may differ as much as padded ones do."""
    net = make_net(make_spec(dtype="bfloat16"))
    rounded(net, 0.04, packed_only=False)
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert verdict.problems == ()
    assert verdict.packing > 0.03
    assert verdict.noise > 0.03
    assert net.packed
    assert net.forked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selftest_does_not_take_a_difference_for_rounding(dtype, make_net, make_spec, make_rows):
    net = make_net(make_spec(dtype=dtype))
    rounded(net, 0.04, packed_only=True)
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert not net.packed
    assert "packed rows differ" in verdict.problems[0]


def test_selftest_sees_a_model_that_cannot_pack(make_net, make_spec, make_rows, monkeypatch):
    net = make_net(make_spec())

    def refusing(*args):
        raise NotImplementedError("a soft cap")

    monkeypatch.setattr(attention, "_per_document", refusing)
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert not net.packed
    assert "does not run on this model" in verdict.problems[0]


def test_selftest_sees_a_head_that_does_more_than_multiply(make_net, make_spec, make_rows):
    net = make_net(make_spec())
    usual = net.causal.forward

    def capped(*args, **kwargs):
        out = usual(*args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    net.causal.forward = capped
    verdict = selftest.check(net, make_rows(6), pad_id=0)
    assert not net.chunked
    assert net.packed
    assert "head" in verdict.problems[0]


@pytest.mark.parametrize("kwargs", [{"softcap": 3.0}, {"s_aux": 1}, {"documents": None}, {"dropout": 0.1}])
def test_what_is_not_exact_is_refused(kwargs):
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(NotImplementedError):
        attention.packed_attention(torch.nn.Identity(), q, q, q, None, **{"documents": (4,), **kwargs})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention runs on CUDA only")
def test_varlen_equals_per_document():
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, 90, 64, generator=draw, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    bounds = torch.tensor([0, 20, 51, 90], dtype=torch.int32, device="cuda")
    for window in (None, 8):
        fast = attention._varlen(q, k, v, (bounds, bounds), (39, 39), None, window)
        slow = attention._per_document(q, k, v, (20, 31, 39), None, window)
        assert (fast - slow).abs().max() < 2e-2


def reference(query, key, value, bounds, key_bounds, scale, window):
    """Attention over [tokens, heads, dim] as `varlen_attn` documents it, causal from the lower right; slow."""
    out = torch.empty_like(query)
    for (start, end), (low, high) in zip(pairwise(bounds.tolist()), pairwise(key_bounds.tolist()), strict=True):
        q = query[start:end].transpose(0, 1)
        k, v = (item[low:high].transpose(0, 1) for item in (key, value))
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        place = torch.arange(high - low)
        apart = place[high - low - (end - start) :, None] - place[None, :]
        seen = (apart >= 0) & ((apart <= window[0]) if window[0] >= 0 else (apart >= 0))
        scores = (q @ k.transpose(1, 2)) * (scale or q.shape[-1] ** -0.5)
        out[start:end] = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return out


def newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    return reference(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)


def oldest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None):
    assert query.shape == key.shape
    assert is_causal
    return reference(query, key, value, cu_seq_q, cu_seq_k, scale, (-1, 0))


@pytest.mark.parametrize("version, window", [(newest, None), (newest, 8), (newest, 100), (oldest, None)])
def test_varlen_is_called_as_each_version_wants_it(version, window, monkeypatch):
    """The kernel itself runs on CUDA only; here a slow one with its signature checks shapes, windows and heads."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", version)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 90, 16, generator=draw) for heads in (8, 2, 2))
    bounds = torch.tensor([0, 20, 51, 90], dtype=torch.int32)
    fast = attention._varlen(q, k, v, (bounds, bounds), (39, 39), None, window)
    slow = attention._per_document(q, k, v, (20, 31, 39), None, window)
    assert fast.shape == slow.shape == (1, 90, 8, 16)
    assert (fast - slow).abs().max() < 1e-5


def test_an_old_varlen_without_windows_is_refused(monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", oldest)
    q = torch.zeros(1, 2, 90, 16)
    bounds = torch.tensor([0, 90], dtype=torch.int32)
    with pytest.raises(NotImplementedError):
        attention._varlen(q, q, q, (bounds, bounds), (90, 90), None, 8)
