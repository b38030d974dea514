"""A step before the first: it meets the largest batch there is, and leaves nothing behind."""

import pytest
import torch

from tunesmith.executors.kernel.loops import trial
from tunesmith.executors.kernel.loops.gauge import Gauge
from tunesmith.executors.kernel.loops.room import Room

LAYOUTS = {
    "padded": {"packing": False},
    "packed": {"packing": True, "max_length": 24},
    "full": {"adapter": {"kind": "none"}, "weight_decay": 0.1},
    "dropout": {"adapter": {"dropout": 0.3}},
    "recomputed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_after_a_trial_is_the_run_without_one(layout, make_bench, make_spec, make_rows):
    rows, held = make_rows(12), make_rows(4, seed=1)
    spec = make_spec(max_steps=4, eval_steps=2, **LAYOUTS[layout])
    runs = []
    for name in ("calm", "tried"):
        torch.manual_seed(5)
        bench = make_bench(spec, rows, held_out=held, name=name)
        before, drawn = bench.weights(), torch.get_rng_state()
        if name == "tried":
            tried = trial.step(bench.engine)
            assert tried.shortage is None
            assert torch.equal(torch.get_rng_state(), drawn)
            assert all(torch.equal(item, before[key]) for key, item in bench.weights().items())
            assert all(item.grad is None for item in bench.engine.names)
            assert not bench.engine.optimizer.state
        bench.engine.run()
        numbers = {key: bench.series(key) for key in ("train/loss", "train/grad_norm", "eval/loss")}
        runs.append((bench.weights(), numbers, torch.get_rng_state()))
    (weights, numbers, drawn), (others, other_numbers, other_drawn) = runs
    assert numbers == other_numbers
    assert torch.equal(drawn, other_drawn)
    assert all(torch.equal(item, others[key]) for key, item in weights.items())


def test_the_state_that_a_resumed_run_has_is_left_alone(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(max_steps=2), make_rows(8))
    bench.engine.run()
    before = {
        name: {key: item.clone() for key, item in bench.engine.optimizer.state[parameter].items()}
        for parameter, name in bench.engine.names.items()
    }
    trial.step(bench.engine)
    for parameter, name in bench.engine.names.items():
        for key, item in bench.engine.optimizer.state[parameter].items():
            assert torch.equal(item, before[name][key]), (name, key)


@pytest.mark.parametrize("packing", [True, False])
def test_no_batch_of_the_run_is_larger(packing, make_bench, make_spec, make_rows):
    rows = make_rows(40, low=3, high=30)
    spec = make_spec(effective_batch=6, micro_batch=2, max_length=30, packing=packing, epochs=3)
    bench = make_bench(spec, rows)
    tried = trial.step(bench.engine)
    steps = range(bench.engine.total)
    met = [batch.ids.numel() for step in steps for batch in bench.engine._batches(step)]
    assert tried.tokens >= max(met)
    assert tried.tokens <= (2 * 30 if packing else 2 * max(met))


def test_memory_that_is_missing_is_told_and_leaves_nothing_either(thirst, make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(), make_rows(8))
    before = bench.weights()
    thirst(bench.engine.net, 1)
    tried = trial.step(bench.engine)
    assert tried.measured is None
    assert tried.shortage.gpu
    assert len(tried.batch.rows) == 2
    assert not bench.engine.optimizer.state
    assert all(item.grad is None for item in bench.engine.names)
    assert all(torch.equal(item, before[key]) for key, item in bench.weights().items())


def test_another_error_is_raised(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(), make_rows(8))

    def broken(batch):
        raise RuntimeError("shapes cannot be multiplied")

    bench.engine.method.loss = broken
    with pytest.raises(RuntimeError, match="shapes"):
        trial.step(bench.engine)
    assert not bench.engine.optimizer.state


def test_more_rows_at_a_time_take_more_memory(make_bench, make_spec, make_rows):
    """The process's own memory, as the system counts it: four times the rows, three times the growth at least."""
    rows = make_rows(64, low=240, high=250)
    peaks = []
    for micro in (8, 32):
        spec = make_spec(effective_batch=64, micro_batch=micro, max_length=256)
        shape = {"num_hidden_layers": 4, "intermediate_size": 512, "hidden_size": 64}
        bench = make_bench(spec, rows, name=str(micro), **shape)
        trial.step(bench.engine)  # what libraries take once
        tried = trial.step(bench.engine)
        assert len(tried.batch.rows) == micro
        assert tried.measured.seconds > 0
        assert tried.measured.reserved is None
        assert tried.measured.resident > tried.measured.peak
        peaks.append(tried.measured.peak)
    assert peaks[1] > 3 * peaks[0] > 0


def test_a_gauge_sees_what_was_held_and_given_back():
    gauge = Gauge(torch.device("cpu"))
    block = torch.ones(64 * 2**20 // 4)
    del block
    measured = gauge.read()
    assert 60 * 2**20 < measured.peak < 90 * 2**20


def test_rehearsals_of_a_smaller_room_are_smaller(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(effective_batch=8, micro_batch=8), make_rows(20))
    whole = trial.step(bench.engine)
    bench.engine.method.limit = Room(2, 128)
    assert len(trial.step(bench.engine).batch.rows) == 2 < len(whole.batch.rows)
