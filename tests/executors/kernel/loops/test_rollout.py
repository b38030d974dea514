"""What the rollout writes is what the model in training would have written, whatever batch, slot or way it goes."""

import functools
import gc
import random
import weakref

import pytest
import torch

from tunesmith.executors.kernel.loops import cells
from tunesmith.executors.kernel.loops.cells import Cells
from tunesmith.executors.kernel.loops.decode import Decoder
from tunesmith.executors.kernel.loops.forks import Tree, spread
from tunesmith.executors.kernel.loops.merged import Merged
from tunesmith.executors.kernel.loops.paged import Graphs, Pages
from tunesmith.executors.kernel.loops.refill import Refill
from tunesmith.executors.kernel.loops.rollout import Ask, Rollout

LIMIT = 9
FAMILIES = [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 5}), ("llama", {"tie_word_embeddings": False})]


def make_asks(count=5, samples=3, seed=0):
    draw = random.Random(seed)
    return [Ask(at, [draw.randrange(3, 90) for _ in range(draw.randint(1, 14))], range(samples)) for at in range(count)]


@pytest.fixture
def make_rollout(make_net, make_spec):
    def make(family="llama", *, stops=(2,), slots=64, temperature=1.0, limit=LIMIT, net=None, spec=None, **more):
        net = net or make_net(spec or make_spec(), family, **more)
        net.outer.eval()
        return Rollout(net, stops=frozenset(stops), max_completion=limit, temperature=temperature, slots=slots)

    return make


def key_of(samples):
    return {(item.row, item.sample): (item.ids, item.ended) for item in samples}


def by_the_trainer(net, asks, samples, temperature):
    """Log-probabilities of the samples by the model in training, adapters unmerged, one sequence each."""
    prompts = {ask.row: list(ask.ids) for ask in asks}
    found = []
    for item in samples:
        (batch,) = spread([Tree(item.row, prompts[item.row], (item.ids,))], 1, 0)
        with torch.no_grad():
            found.append(net.token_logps(batch, temperature)[0])
    return found


@pytest.mark.parametrize("family, more", FAMILIES)
def test_greedy_equals_generate(family, more, make_rollout):
    rollout = make_rollout(family, **more)
    assert rollout.way == "cells"
    assert rollout.problems == ()
    for ask, item in zip(asks := make_asks(samples=1), rollout.generate(asks, key="k", greedy=True), strict=True):
        ids = torch.tensor([list(ask.ids)])
        with torch.no_grad():
            out = rollout.net.outer.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LIMIT,
                pad_token_id=0, eos_token_id=2,
            )  # fmt: skip
        assert item.ids == out[0, ids.shape[1] :].tolist()
        assert item.ended == (item.ids[-1] == 2)


@pytest.mark.parametrize("family, more", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_trainers(family, more, temperature, make_rollout):
    rollout = make_rollout(family, temperature=temperature, **more)
    asks = make_asks()
    samples = rollout.generate(asks, key="1:0")
    assert [(item.row, item.sample) for item in samples] == [(ask.row, n) for ask in asks for n in ask.samples]
    assert len({tuple(item.ids) for item in samples}) > len(asks)
    for item, logps in zip(samples, by_the_trainer(rollout.net, asks, samples, temperature), strict=True):
        assert torch.tensor(item.logps) == pytest.approx(logps, abs=1e-5)


@pytest.mark.parametrize("adapter", [{"kind": "dora"}, {"kind": "none"}])
def test_other_adapters_and_all_weights(adapter, make_rollout, make_spec):
    rollout = make_rollout(spec=make_spec(adapter=adapter))
    asks = make_asks()
    samples = rollout.generate(asks, key="1:0")
    for item, logps in zip(samples, by_the_trainer(rollout.net, asks, samples, 1.0), strict=True):
        assert torch.tensor(item.logps) == pytest.approx(logps, abs=1e-5)


def test_a_sample_does_not_depend_on_its_company(make_rollout):
    asks = make_asks(6, 4)
    rollout = make_rollout()
    expected = key_of(rollout.generate(asks, key="1:0"))
    lengths = {len(ids) for ids, _ in expected.values()}
    assert len(lengths) > 2  # so that rows end at different times
    for slots in (1, 3, 7):
        assert key_of(make_rollout(net=rollout.net, slots=slots).generate(asks, key="1:0")) == expected
    backwards = rollout.generate([Ask(ask.row, ask.ids, ask.samples[::-1]) for ask in asks[::-1]], key="1:0")
    assert key_of(backwards) == expected
    assert [item.sample for item in backwards[:4]] == [3, 2, 1, 0]
    alone = rollout.generate([Ask(asks[2].row, asks[2].ids, (3,))], key="1:0")
    assert key_of(alone)[2, 3] == expected[2, 3]
    assert key_of(rollout.generate(asks, key="1:1")) != expected


def test_stop_tokens_and_the_limit_end_a_sample(make_rollout):
    free = make_rollout(stops=())
    samples = free.generate(make_asks(), key="1:0")
    assert all(len(item.ids) == len(item.logps) == LIMIT and not item.ended for item in samples)
    stop = samples[0].ids[3]
    for item in make_rollout(net=free.net, stops=(stop, 2)).generate(make_asks(), key="1:0"):
        inside = [at for at, token in enumerate(item.ids) if token in (stop, 2)]
        assert inside == ([len(item.ids) - 1] if item.ended else [])
        assert len(item.ids) <= LIMIT


def test_a_stop_between_tokens_gives_nothing_and_the_next_call_is_whole(make_rollout):
    rollout = make_rollout(slots=4)
    looked, told = [], []

    def stopped():
        looked.append(1)
        return len(looked) > 5

    assert rollout.generate(make_asks(), key="1:0", stopped=stopped, told=lambda *args: told.append(args)) is None
    assert len(told) > 1
    whole = rollout.generate(make_asks(), key="1:0", told=lambda *args: told.append(args))
    assert key_of(whole) == key_of(make_rollout(net=rollout.net).generate(make_asks(), key="1:0"))


def test_a_stale_copy_shows_in_log_probabilities_and_a_refresh_mends_it(make_rollout):
    """The trap of rollouts that are written with weights of long ago."""
    rollout = make_rollout()
    asks = make_asks()
    with torch.no_grad():
        for _, item in rollout.net.trainable():
            item.data.add_(0.05)  # past the counters: only values tell
    samples = rollout.generate(asks, key="1:0")
    gaps = [
        (torch.tensor(item.logps) - logps).abs().mean()
        for item, logps in zip(samples, by_the_trainer(rollout.net, asks, samples, 1.0), strict=True)
    ]
    assert max(gaps) > 1e-2
    rollout.refresh()
    samples = rollout.generate(asks, key="1:0")
    for item, logps in zip(samples, by_the_trainer(rollout.net, asks, samples, 1.0), strict=True):
        assert torch.tensor(item.logps) == pytest.approx(logps, abs=1e-5)


def test_a_copy_notices_by_itself_that_weights_were_changed(make_rollout):
    rollout = make_rollout()
    with torch.no_grad():
        for _, item in rollout.net.trainable():
            item.add_(0.05)
    assert rollout.merged.stale
    samples = rollout.generate(make_asks(), key="1:0")
    for item, logps in zip(samples, by_the_trainer(rollout.net, make_asks(), samples, 1.0), strict=True):
        assert torch.tensor(item.logps) == pytest.approx(logps, abs=1e-5)


def test_the_copy_shares_what_is_not_adapted(make_net, make_spec):
    net = make_net(make_spec(adapter={"targets": ("q_proj",)}))
    merged = Merged(net)
    own = dict(merged.model.named_parameters())
    for name, item in net.causal.named_parameters():
        if "q_proj" not in name:
            assert own[name].data_ptr() == item.data_ptr(), name
    assert merged.model.lm_head.weight.data_ptr() == net.causal.model.embed_tokens.weight.data_ptr()
    assert merged.own_bytes == sum(
        4 * item.numel() for name, item in net.causal.named_parameters() if name.endswith("q_proj.base_layer.weight")
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stands", ["packed", "plain"])
def test_an_adapted_head_is_merged_like_any_layer(tied, stands, make_rollout, make_spec, monkeypatch):
    if stands == "plain":
        monkeypatch.setattr("tunesmith.executors.kernel.loops.matrix.Packed.possible", lambda *_: False)
    spec = make_spec(adapter={"targets": ("q_proj", "lm_head")})
    rollout = make_rollout(spec=spec, tie_word_embeddings=tied)
    assert (rollout.way, rollout.problems) == ("cells", ())
    asks = make_asks()
    samples = rollout.generate(asks, key="1:0")
    for item, logps in zip(samples, by_the_trainer(rollout.net, asks, samples, 1.0), strict=True):
        assert torch.tensor(item.logps) == pytest.approx(logps, abs=1e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize("kernel", [True, False])
def test_prompts_of_many_lengths_in_several_grids(window, slots, kernel, make_rollout, monkeypatch):
    """Grids of one prompt and of several, full and not; also without torch's kernel for CPUs, as on other devices."""
    if not kernel:
        monkeypatch.setattr(cells, "_fused", lambda: None)
    family, more = ("mistral", {"sliding_window": window}) if window else ("llama", {})
    rollout = make_rollout(family, slots=slots, max_position_embeddings=512, **more)
    assert (rollout.way, rollout.problems) == ("cells", ())
    draw = random.Random(3)
    lengths = (5, 130, 127, 260, 2, 131)
    asks = [Ask(at, [draw.randrange(3, 90) for _ in range(n)], range(1 + at % 3)) for at, n in enumerate(lengths)]
    samples = rollout.generate(asks, key="1:0")
    for item, logps in zip(samples, by_the_trainer(rollout.net, asks, samples, 1.0), strict=True):
        assert torch.tensor(item.logps) == pytest.approx(logps, abs=1e-5)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_a_row_that_may_see_nothing_weighs_nothing(dtype, near, monkeypatch):
    draw = torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn(2, 3, n, 16, generator=draw).to(dtype) for n in (4, 20, 20))
    hidden = torch.zeros(2, 1, 4, 20, dtype=torch.bool)
    hidden[0, :, 1] = True
    hidden[1, ..., 7:] = True
    mask = cells._added(hidden, dtype)
    out, total = cells.softmax_over(query, keys, values, mask, 0.25)
    monkeypatch.setattr(cells, "_fused", lambda: None)
    other, other_total = cells.softmax_over(query, keys, values, mask, 0.25)
    assert out.isfinite().all()
    assert (total[0, :, 1] < -1e29).all()
    assert (other_total[0, :, 1] < -1e29).all()
    seen = ~hidden.all(-1).expand(2, 3, 4)
    assert out.float()[seen] == pytest.approx(other.float()[seen], abs=near)
    assert total[seen] == pytest.approx(other_total[seen], abs=near)


def test_a_model_that_cannot_falls_back_in_words_and_is_right(make_rollout, monkeypatch):
    def broken(self, query, key, value, scale, window):
        return query.transpose(1, 2) * 0

    exact = make_rollout()
    monkeypatch.setattr(Cells, "attend", broken)
    rollout = make_rollout(net=exact.net, slots=2)
    assert rollout.way == "plain"
    assert "differs from the model in training" in rollout.problems[0]
    monkeypatch.undo()
    assert key_of(rollout.generate(make_asks(), key="1:0")) == key_of(exact.generate(make_asks(), key="1:0"))


def test_another_engine_is_taken_only_where_it_is_exact(make_rollout, make_net, make_spec):
    """vLLM's place in a rollout: weights that were not handed over show in the self-test, a refusal in its words."""
    net, closed = make_net(make_spec()), []

    class Engine:
        """Writes by our own cells, with weights that are `off` by so much."""

        stale = False

        def __init__(self, off):
            inner = make_rollout(net=make_net(make_spec()))
            with torch.no_grad():
                for item in inner.merged.model.parameters():
                    if item.numel() > 1 and item.is_contiguous():
                        item.add_(off)
            self.write, self.refresh, self.close = inner._write, inner.refresh, lambda: closed.append(off)

    def refused():
        raise RuntimeError("vLLM is not installed")

    def rollout(engine):
        return Rollout(net, stops=frozenset({2}), max_completion=LIMIT, temperature=1.0, slots=8, engine=engine)

    taken = rollout(lambda: Engine(0.0))
    assert (taken.way, taken.problems, closed) == ("vllm", (), [])
    assert key_of(taken.generate(make_asks(), key="1:0")) == key_of(
        make_rollout(net=net).generate(make_asks(), key="1:0")
    )
    off = rollout(lambda: Engine(0.5))
    assert (off.way, off.vllm, closed) == ("cells", None, [0.5])
    assert "by vllm differs" in off.problems[0]
    without = rollout(refused)
    assert without.way == "cells"
    assert "vLLM is not installed" in without.problems[0]


def test_an_empty_prompt_is_refused(make_rollout):
    with pytest.raises(ValueError, match="at least one token"):
        make_rollout().generate([Ask(0, [], (0,))], key="k")


# --- the way of CUDA, its attention written out in plain torch --------------------------------------------------------


def paged_attention(
    query,
    keys,
    values,
    bounds,
    room,
    max_q,
    max_k,
    *,
    scale,
    window_size,
    enable_gqa,
    seqused_k,
    block_table,
    num_splits,
):
    """What torch documents of `varlen_attn` over pages, one query a row."""
    assert max_q == 1
    assert enable_gqa == (query.shape[1] != keys.shape[2])
    out = torch.empty_like(query)
    for row, used in enumerate(seqused_k.tolist()):
        pages = block_table[row].long()
        k, v = (pool[pages].flatten(0, 1)[:used].transpose(0, 1) for pool in (keys, values))
        k, v = (item.repeat_interleave(query.shape[1] // k.shape[0], 0) for item in (k, v))
        scores = torch.einsum("hd,hkd->hk", query[row], k) * scale
        if window_size[0] >= 0:
            scores[:, : max(0, used - 1 - window_size[0])] = -torch.inf
        out[row] = torch.einsum("hk,hkd->hd", scores.softmax(-1), v)
    return out


@pytest.mark.parametrize("family, more", FAMILIES[:3])
@pytest.mark.parametrize("replayed", [False, True])
def test_pages_write_what_cells_write(family, more, replayed, make_rollout, monkeypatch):
    """Sharing, copies of last pages, rows that come and go: with few pages, and steps replayed as graphs would be."""
    from tunesmith.executors.kernel.loops import paged

    monkeypatch.setattr(paged, "PAGE", 4)
    rollout = make_rollout(family, **more)
    asks = make_asks(6, 4)
    expected = rollout.generate(asks, key="1:0")
    longest = max(len(ask.ids) for ask in asks)
    count = paged.affordable(3, LIMIT, longest, 1, 4 * 40)
    pages = Pages(5, LIMIT, longest, torch.device("cpu"), count=max(count, 30), attention=paged_attention)
    decoder = Decoder(rollout.merged, pages, slots=5, limit=LIMIT, stops=(2,), temperature=1.0)
    if replayed:
        captured = []

        def capture(step):
            captured.append(step)
            step()  # a warm-up, whose traces in `state` are to be put back
            return step

        decoder._graphs = Graphs(5, state_of(decoder), capture)
    with torch.inference_mode():
        made = Refill(decoder, asks, key="1:0", slots=5, stops=frozenset((2,))).run(None, None)
    assert key_of(made) == key_of(expected)
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-5)
    assert sorted(pages._free) == list(range(1, pages.count))  # every page came back
    if replayed:
        assert 1 <= len(captured) <= len(decoder._graphs.buckets)


def state_of(decoder):
    return decoder.token, decoder.place, decoder.count, decoder.alive


def test_greedy_and_sampled_steps_have_graphs_of_their_own(make_rollout):
    """A graph replays the branch that was taken when it was captured, whatever is wanted now."""
    rollout = make_rollout()
    asks = make_asks()
    pages = Pages(4, LIMIT, 14, torch.device("cpu"), attention=paged_attention)
    decoder = Decoder(rollout.merged, pages, slots=4, limit=LIMIT, stops=(2,), temperature=1.0)

    def capture(step):
        frozen = decoder.greedy

        def replay():
            wanted, decoder.greedy = decoder.greedy, frozen
            step()
            decoder.greedy = wanted

        return replay

    decoder._graphs = Graphs(4, state_of(decoder), capture)
    for key in ("1:0", None, "1:1", None):
        with torch.inference_mode():
            made = Refill(decoder, asks, key=key, slots=4, stops=frozenset((2,))).run(None, None)
        assert key_of(made) == key_of(rollout.generate(asks, key=key or "", greedy=key is None))


@pytest.fixture
def uncollected():
    """What is let go must go by itself: the collector of cycles may come minutes later."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_keys_and_values_go_with_the_call(make_rollout, monkeypatch, uncollected):
    kept = []

    class Watched(Cells):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(weakref.ref(self))

    monkeypatch.setattr("tunesmith.executors.kernel.loops.rollout.Cells", Watched)
    rollout = make_rollout()
    rollout.generate(make_asks(), key="1:0")
    rollout.generate(make_asks(), key="1:0", stopped=lambda: True)
    assert [held() for held in kept] == [None] * 3  # the first is of the self-test


@pytest.mark.parametrize("way", ["pages", "graphs"])
def test_old_pages_go_before_new_ones_are_made(make_rollout, monkeypatch, uncollected, way):
    rollout = make_rollout(limit=3)
    kept = []

    def pages(longest, limit):
        assert [held() for held in kept] == [None] * len(kept)
        made = Pages(64, limit, longest, torch.device("cpu"), count=200, attention=paged_attention)
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr(rollout, "_pages", pages)
    # A graph does not hold the step that was captured; this one ends all rows.
    monkeypatch.setattr(Graphs, "_captured", lambda self, step: functools.partial(self._state[-1].zero_))
    rollout.way = way
    for longest in (3, 9, 14):
        rollout.generate([Ask(0, [5] * longest, range(2))], key="1:0")
    assert len(kept) == 3


def test_pages_are_as_many_as_memory_has_room_for():
    from tunesmith.executors.kernel.loops import paged

    assert paged.affordable(2, 256, 256, 10, 10**12) == 1 + 2 * (2 + 1)
    assert paged.affordable(64, 256, 256, 10, 0) == 1 + 2 + 1
    few = paged.affordable(64, 256, 256, 10, 256 * 10 * 100)
    assert 4 < few <= 60
    with pytest.raises(ValueError, match="too few"):
        Pages(2, 256, 256, torch.device("cpu"), count=2, attention=paged_attention)
