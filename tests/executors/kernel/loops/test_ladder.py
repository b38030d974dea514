"""Where memory runs out, less goes at a time, and what is trained stays what it was."""

import json
from types import SimpleNamespace

import pytest
import torch

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.data import Prompt
from tunesmith.executors.kernel.loops import trial
from tunesmith.executors.kernel.loops.decode import Decoder
from tunesmith.executors.kernel.loops.grpo import Grpo, Judge
from tunesmith.executors.kernel.loops.ladder import RUNGS
from tunesmith.executors.kernel.loops.rollout import Rollout
from tunesmith.executors.kernel.loops.room import LEAST, Room
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.errors import JobFailed
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import GrpoSpec

SMALLER = {"padded": {"packing": False}, "packed": {"packing": True}, "full": {"adapter": {"kind": "none"}}}


def rungs(bench):
    return [event.values for event in bench.events(Kind.ALERT) if event.values["code"] == "oom.rung"]


def losses(bench):
    return list(bench.series("train/loss").values())


def same(bench, other, *, exactly=False):
    """Whether two runs had the same rows, losses and weights."""
    assert bench.engine.cursor.ledger == other.engine.cursor.ledger
    assert losses(bench) == (losses(other) if exactly else pytest.approx(losses(other), rel=1e-5, abs=1e-6))
    for name, item in bench.weights().items():
        assert torch.allclose(item, other.weights()[name], rtol=0, atol=0 if exactly else 1e-5), name


@pytest.mark.parametrize("layout", SMALLER)
def test_a_run_that_halves_its_micro_batch_is_the_run_that_had_the_smaller_one(
    layout, thirst, make_bench, make_spec, make_rows
):
    rows = make_rows(16, low=20, high=24)
    train = {"effective_batch": 8, "max_steps": 5, "max_length": 24, **SMALLER[layout]}
    small = make_bench(make_spec(micro_batch=2, **train), rows, name="small")
    small.engine.run()
    whole = make_bench(make_spec(micro_batch=8, **train), rows, name="whole")
    dry = thirst(whole.engine.net, 2 * 24)
    assert whole.engine.run().ended == "finished"
    same(whole, small, exactly=True)
    assert [item["rung"] for item in rungs(whole)] == [1, 2, 3]
    assert whole.engine.method.room == Room(2, 48)
    assert len(dry.refused) == 3
    told = [event.values for event in whole.events(Kind.LOG)]
    assert [item["level"] for item in told] == ["warning"] * 3
    assert "tried again with all unused memory freed" in told[0]["message"]
    assert "(CUDA out of memory)" in told[0]["message"]
    assert "2 rows at most" in told[2]["message"]


@pytest.mark.parametrize("at", [1, 3])
def test_memory_that_runs_out_later_skips_and_repeats_no_row(at, thirst, make_bench, make_spec, make_rows):
    rows = make_rows(20, low=20, high=24)
    spec = make_spec(effective_batch=8, micro_batch=8, epochs=2, max_length=24)
    calm = make_bench(spec, rows, name="calm")
    calm.engine.run()
    tight = make_bench(spec, rows, name="tight")
    usual = tight.engine._step

    def stepping():
        if tight.engine.cursor.step == at:
            thirst(tight.engine.net, 4 * 24)
        usual()

    tight.engine._step = stepping
    tight.engine.run()
    same(tight, calm)
    ledger = tight.engine.cursor.ledger
    assert sorted(row for step in ledger[:3] for row in step) == list(range(20))
    assert [item["step"] for item in rungs(tight)] == [at + 1] * 2
    assert losses(tight)[:at] == losses(calm)[:at]


def test_a_shortage_that_passes_costs_one_more_try(thirst, make_bench, make_spec, make_rows):
    rows, spec = make_rows(12), make_spec(max_steps=4)
    calm = make_bench(spec, rows, name="calm")
    calm.engine.run()
    tight = make_bench(spec, rows, name="tight")
    thirst(tight.engine.net, 0, once=True)
    tight.engine.run()
    same(tight, calm, exactly=True)
    assert [item["rung"] for item in rungs(tight)] == [1]
    assert tight.engine.ladder.doc() == {}


def test_the_backward_pass_may_run_out_as_well(make_bench, make_spec, make_rows):
    rows, spec = make_rows(12), make_spec(max_steps=4, effective_batch=6, micro_batch=6)
    calm = make_bench(make_spec(max_steps=4, effective_batch=6, micro_batch=3), rows, name="calm")
    calm.engine.run()
    tight = make_bench(spec, rows, name="tight")

    def refuse(module, given, grads):
        if len(grads[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    tight.engine.net.causal.model.layers[0].mlp.register_full_backward_hook(refuse)
    tight.engine.run()
    same(tight, calm, exactly=True)
    assert len(rungs(tight)) == 2


def test_single_rows_that_do_not_fit_are_computed_twice(thirst, make_bench, make_spec, make_rows):
    rows = make_rows(12, low=20, high=24)
    train = {"effective_batch": 4, "max_steps": 4, "max_length": 24}
    small = make_bench(make_spec(micro_batch=1, activation_checkpointing=True, **train), rows, name="small")
    small.engine.run()
    tight = make_bench(make_spec(micro_batch=2, **train), rows, name="tight")
    thirst(tight.engine.net, 12)
    tight.engine.run()
    same(tight, small)
    assert tight.engine.net.checkpointed
    assert [("twice" in item, item.get("rows")) for item in rungs(tight)] == [(False, None), (False, 1), (True, 1)]


def test_the_last_rung_gives_up_all_that_is_left(thirst, make_bench, make_spec, make_rows):
    rows = make_rows(64, low=20, high=24)
    tight = make_bench(make_spec(effective_batch=64, micro_batch=64, max_steps=2, max_length=24), rows)
    thirst(tight.engine.net, 12)
    tight.engine.run()
    found = rungs(tight)
    assert [item["rung"] for item in found] == [1, 2, 3, 4]
    assert [item.get("rows") for item in found] == [None, 32, 16, 1]
    assert (tight.engine.method.room, tight.engine.net.checkpointed) == (LEAST, True)
    assert tight.engine.cursor.step == 2


@pytest.mark.parametrize("micro", [1, 2, 64])
def test_at_most_four_rungs_are_taken_and_the_end_names_what_is_left(micro, thirst, make_bench, make_spec, make_rows):
    rows = make_rows(64, low=20, high=24)
    bench = make_bench(make_spec(effective_batch=64, micro_batch=micro, max_steps=2, save_steps=1), rows)
    before = bench.weights()
    dry = thirst(bench.engine.net, 1)
    with pytest.raises(JobFailed) as caught:
        bench.engine.run()
    assert len(rungs(bench)) == {1: 2, 2: 3, 64: 4}[micro] <= RUNGS
    assert len(dry.refused) == len(rungs(bench)) + 1
    error = caught.value
    assert (error.code, error.where) == ("oom.cuda", "step 1")
    assert error.message == "The GPU ran out of memory at step 1."
    for words in ("train.optimizer: adamw-8bit", "adapter.kind: qlora", "train.max_length"):
        assert words in error.fix
    assert bench.engine.cursor.step == 0
    assert all(torch.equal(item, before[name]) for name, item in bench.weights().items())
    assert all(item.grad is None for item in bench.engine.names)


def test_a_resume_goes_on_with_what_was_given_up(thirst, make_bench, make_spec, make_rows):
    rows = make_rows(16, low=20, high=24)
    spec = make_spec(effective_batch=8, micro_batch=8, max_steps=6, max_length=24, save_steps=2)
    small = make_bench(make_spec(effective_batch=8, micro_batch=2, max_steps=6, max_length=24), rows, name="small")
    small.engine.run()
    cut = make_bench(spec, rows, name="cut")
    thirst(cut.engine.net, 2 * 24)
    usual = cut.engine._step

    def stepping():
        usual()
        if cut.engine.cursor.step == 3:
            (cut.folder / "control").write_text(json.dumps({"signal": "stop", "serial": 1}))

    cut.engine._step = stepping
    assert cut.engine.run().ended == "stopped"
    rest = make_bench(spec, rows, name="rest")
    dry = thirst(rest.engine.net, 2 * 24)
    rest.engine.resume(checkpoint.newest_verified(cut.folder / "checkpoints").path)
    assert rest.engine.method.room == Room(2, 48)
    rest.engine.run()
    assert dry.refused == []
    assert rungs(rest) == []
    assert "2 rows at most" in rest.events(Kind.LOG)[0].values["message"]
    assert losses(cut) + losses(rest) == losses(small)
    assert rest.engine.cursor.ledger == small.engine.cursor.ledger
    assert all(torch.equal(item, small.weights()[name]) for name, item in rest.weights().items())


def test_another_device_begins_with_all_again(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(), make_rows(8))
    bench.engine.ladder.resume({"rows": 1, "tokens": 1, "twice": True, "device": "NVIDIA H100, 85 bytes"})
    assert bench.engine.method.limit is None
    assert not bench.engine.net.checkpointed
    bench.engine.ladder.resume({"rows": 1, "tokens": 1, "twice": True, "device": "cpu"})
    assert bench.engine.method.room == LEAST
    assert bench.engine.net.checkpointed


def test_a_stop_is_obeyed_between_two_rungs(thirst, make_bench, make_spec, make_rows):
    rows = make_rows(16, low=20, high=24)
    spec = make_spec(effective_batch=8, micro_batch=8, max_steps=4, max_length=24)
    bench = make_bench(spec, rows, name="cut")
    dry = thirst(bench.engine.net, 1e9)

    def tell(event):
        if event.kind is Kind.ALERT and event.values["rung"] == 2:
            (bench.folder / "control").write_text(json.dumps({"signal": "stop", "serial": 1}))

    bench.reporter.listeners.append(tell)
    stepping = bench.engine._step

    def tight():
        dry.limit = 1 if bench.engine.cursor.step == 2 else 1e9
        stepping()

    bench.engine._step = tight
    outcome = bench.engine.run()
    assert (outcome.ended, outcome.step) == ("stopped", 2)
    assert [item["rung"] for item in rungs(bench)] == [1, 2]
    found = checkpoint.newest_verified(bench.folder / "checkpoints")
    rest = make_bench(spec, rows, name="rest")
    rest.engine.resume(found.path)
    assert rest.engine.method.room.rows == 4
    rest.engine.run()
    calm = make_bench(spec, rows, name="calm")
    calm.engine.run()
    assert rest.engine.cursor.ledger == calm.engine.cursor.ledger
    assert losses(bench) + losses(rest) == pytest.approx(losses(calm), rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_memory_that_an_evaluation_lacks_leaves_training_as_it_was(packing, thirst, make_bench, make_spec, make_rows):
    rows, held = make_rows(12), make_rows(7, seed=3, low=20, high=24)
    spec = make_spec(max_steps=5, eval_steps=2, micro_batch=4, max_length=24, packing=packing)
    calm = make_bench(spec, rows, held_out=held, name="calm")
    calm.engine.run()
    tight = make_bench(spec, rows, held_out=held, name="tight")
    thirst(tight.engine.net, 2 * 24, training=False)
    tight.engine.run()
    same(tight, calm, exactly=True)
    (rung,) = rungs(tight)
    assert (rung["together"], rung["step"]) == (2, 0)
    assert "training stays as it is" in rung["message"]
    assert tight.series("eval/loss") == pytest.approx(calm.series("eval/loss"), rel=1e-5)
    assert tight.engine.method.limit is None
    assert tight.engine.net.outer.training


def test_an_evaluation_that_never_fits_ends_the_attempt(thirst, make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(max_steps=2, micro_batch=2), make_rows(8), held_out=make_rows(5, seed=1))
    thirst(bench.engine.net, 1, training=False)
    with pytest.raises(JobFailed) as caught:
        bench.engine.run()
    assert caught.value.code == "oom.cuda"
    assert [item["together"] for item in rungs(bench)] == [1]


def test_an_error_of_another_kind_takes_no_rung(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(max_steps=2), make_rows(8))

    def break_it(module, args):
        raise RuntimeError("shapes cannot be multiplied")

    bench.engine.net.causal.get_input_embeddings().register_forward_pre_hook(break_it)
    with pytest.raises(RuntimeError, match="shapes"):
        bench.engine.run()
    assert rungs(bench) == []


def test_what_is_measured_of_a_step_counts_one_try_only(make_bench, make_spec, make_rows):
    """A meter that a failed try has filled half is as it was before the next one."""
    bench = make_bench(make_spec(max_steps=1, effective_batch=4, micro_batch=1), make_rows(4))
    meter = bench.engine.method.meter
    meter.names = ("tries",)
    usual, tries = bench.engine.method.loss, []

    def loss(batch):
        meter.add("tries", 1.0)
        tries.append(batch)
        if len(tries) == 3:
            raise MemoryError
        return usual(batch)

    bench.engine.method.loss = loss
    drained = []
    drain = meter.drain
    meter.drain = lambda device: drained.append(drain(device)) or drained[-1]
    bench.engine._step()
    assert len(tries) == 3 + 4
    assert [item.tolist() for item in drained] == [[[4.0, 4.0]]]


# --- answers that are written -------------------------------------------------------------------------------------


class Evens:
    """A reward: the share of even tokens."""

    names = ("evens",)

    def score(self, prompts, completions, completion_ids, columns, step):
        values = [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
        return SimpleNamespace(values=[[value] for value in values], totals=values, told={}, extra={}, alerts=())


@pytest.fixture
def make_grpo_bench(make_net, make_spec, make_bench, tmp_path):
    """An engine over a real GRPO; the rollout writes up to 16 answers at a time."""

    def make(name, **train):
        spec = make_spec(effective_batch=4, max_steps=4, packing=True, **train)
        net = make_net(spec)
        net.outer.eval()
        rollout = Rollout(net, stops=frozenset({2}), max_completion=6, temperature=1.0, slots=16)
        (tmp_path / name).mkdir()
        sizes = {"micro_batch": spec.train.micro_batch, "max_length": 64, "packing": True, "pad_id": 0}
        method = Grpo(
            net, [Prompt(at, [3 + at, 5, 7 + at, 9], "", {}) for at in range(8)],
            GrpoSpec(num_generations=4, max_completion=6, num_iterations=2), rollout=rollout,
            judge=Judge(str, Evens()), reporter=Reporter(tmp_path / name, 1), seed=0, **sizes,
        )  # fmt: skip
        return make_bench(spec, (), name=name, net=net, method=method)

    return make


def test_answers_that_cannot_be_written_at_a_time_are_written_fewer_at_a_time(make_grpo_bench, monkeypatch):
    calm = make_grpo_bench("calm")
    calm.engine.run()
    usual, wide = Decoder.step, []

    def step(self):
        if len(self.store.rows) > 6:
            wide.append(len(self.store.rows))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        usual(self)

    monkeypatch.setattr(Decoder, "step", step)
    tight = make_grpo_bench("tight")
    tight.engine.run()
    assert [(item["slots"], item["step"], item.get("rows")) for item in rungs(tight)] == [(8, 1, None), (4, 1, None)]
    assert tight.engine.method.limit is None
    same(tight, calm)
    for key in ("train/reward", "train/completions/mean_length", "train/entropy"):
        assert tight.series(key) == pytest.approx(calm.series(key), rel=1e-5), key
    monkeypatch.undo()
    again = make_grpo_bench("again")
    again.engine.ladder.resume(tight.engine.ladder.doc())
    assert again.engine.method.rollout.slots == 4


def test_a_training_pass_that_does_not_fit_keeps_the_answers_it_is_about(thirst, make_grpo_bench):
    calm = make_grpo_bench("calm", micro_batch=4)
    calm.engine.run()
    tight = make_grpo_bench("tight", micro_batch=4)
    thirst(tight.engine.net, 40)
    tight.engine.run()
    assert [item["rung"] for item in rungs(tight)][:2] == [1, 2]
    assert all(item["step"] == 1 for item in rungs(tight))
    same(tight, calm)
    for key in ("train/reward", "train/rewards/evens", "train/entropy", "train/rollout_gap"):
        assert tight.series(key) == pytest.approx(calm.series(key), rel=1e-4, abs=1e-6), key


def test_a_trial_of_grpo_makes_answers_up_and_forgets_them(make_grpo_bench):
    calm = make_grpo_bench("calm")
    calm.engine.run()
    tried = make_grpo_bench("tried")
    found = trial.step(tried.engine)
    assert found.batch.members
    assert found.tokens == 4 * (4 + 4 * 5)  # four prompts of four tokens, four answers of six each, the last never fed
    tried.engine.run()
    same(tried, calm, exactly=True)
    for key in ("train/reward", "train/entropy", "train/clip_ratio/region_mean"):
        assert tried.series(key) == calm.series(key), key
