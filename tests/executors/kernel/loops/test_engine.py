"""The loop: gradients that no layout changes, bitwise resume, evaluation, early stopping, orders."""

import hashlib
import json
import os
import signal

import pytest
import torch

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.loops.schedule import factor
from tunesmith.orchestrator.errors import InputError, JobFailed, StorageError
from tunesmith.orchestrator.events import Kind


def first_gradients(bench):
    """What the first optimizer step is taken with."""
    found = {}

    def keep(optimizer, args, kwargs):
        if not found:
            found.update({name: item.grad.clone() for item, name in bench.engine.names.items()})

    bench.engine.optimizer.register_step_pre_hook(keep)
    bench.engine._step()
    return found


def order(bench, what, serial=1):
    (bench.folder / "control").write_text(json.dumps({"signal": what, "serial": serial}))


def after_step(bench, step, what):
    """Do something when the engine has taken a step."""
    usual = bench.engine._step

    def stepping():
        usual()
        if bench.engine.cursor.step == step:
            what()

    bench.engine._step = stepping


LAYOUTS = {
    "one batch of 8": {"micro_batch": 8},
    "four of 2": {"micro_batch": 2},
    "eight of 1": {"micro_batch": 1},
    "packed in one": {"micro_batch": 8, "packing": True},
    "packed in several": {"micro_batch": 1, "max_length": 30, "packing": True},
    "recomputed": {"micro_batch": 4, "packing": True, "activation_checkpointing": True},
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_no_layout_changes_the_gradient(family, make_bench, make_spec, make_rows):
    rows = make_rows(8)
    results = {}
    for name, train in LAYOUTS.items():
        spec = make_spec(effective_batch=8, max_grad_norm=0.0, **train)
        bench = make_bench(spec, rows, name=name, family=family)
        gradients = first_gradients(bench)
        results[name] = gradients, bench.series("train/loss")[1], bench.engine.cursor.ledger
    wanted, loss, ledger = results["one batch of 8"]
    assert max(item.abs().max() for item in wanted.values()) > 1e-3
    for name, (gradients, other_loss, other_ledger) in results.items():
        assert other_ledger == ledger
        assert other_loss == pytest.approx(loss, abs=1e-6), name
        for key, gradient in wanted.items():
            assert (gradient - gradients[key]).abs().max() <= 1e-6, (name, key)


def test_loss_is_the_mean_over_supervised_tokens_of_the_step(make_bench, make_model, make_spec, make_rows):
    from torch.nn.functional import cross_entropy

    rows = make_rows(4)
    spec = make_spec(adapter={"kind": "none"}, effective_batch=4, micro_batch=1)
    bench = make_bench(spec, rows)
    bench.engine._step()
    model = make_model()
    total = tokens = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total += cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
    assert bench.series("train/loss")[1] == pytest.approx(total / tokens, rel=1e-6)


def test_metrics_of_a_run(make_bench, make_spec, make_rows):
    rows, held = make_rows(10), make_rows(3, seed=9)
    spec = make_spec(epochs=2, eval_steps=4)
    bench = make_bench(spec, rows, held_out=held)
    outcome = bench.engine.run()
    assert (outcome.ended, outcome.step) == ("finished", 6)
    assert sorted(bench.series("train/loss")) == [1, 2, 3, 4, 5, 6]
    assert sorted(bench.series("eval/loss")) == [0, 4, 6]
    rates = bench.series("train/learning_rate")
    assert [rates[step] for step in range(1, 7)] == [1e-2 * factor("cosine", step, 6, 2) for step in range(6)]
    assert bench.series("train/num_tokens")[3] == sum(len(row.ids) for row in rows)
    assert bench.series("train/epoch")[3] == 1.0
    assert bench.series("eval/loss")[6] < bench.series("eval/loss")[0]
    done = [event.values for event in bench.events(Kind.PROGRESS) if event.values["phase"] == "training"]
    assert done[-1]["done"] == done[-1]["total"] == 6
    assert done[-1]["eta_seconds"] == 0
    assert done[-1]["tokens_per_second"] > 0


def test_ledger_holds_every_row_once_an_epoch(make_bench, make_spec, make_rows):
    spec = make_spec(epochs=2)
    bench = make_bench(spec, make_rows(10))
    ledger = bench.engine.run().ledger
    assert [len(step) for step in ledger] == [4, 4, 2, 4, 4, 2]
    for epoch in (ledger[:3], ledger[3:]):
        assert sorted(row for step in epoch for row in step) == list(range(10))
    assert ledger[:3] != ledger[3:]


def test_evaluation_changes_nothing(make_bench, make_spec, make_rows):
    rows = make_rows(10)
    quiet = make_bench(make_spec(), rows, name="quiet")
    quiet.engine.run()
    busy = make_bench(make_spec(eval_steps=1), rows, held_out=make_rows(3, seed=1), name="busy")
    busy.engine.run()
    for name, item in quiet.weights().items():
        assert torch.equal(item, busy.weights()[name])


@pytest.mark.parametrize(
    "train",
    [
        {"packing": True},
        {"packing": False},
        {"packing": True, "adapter": {"kind": "none"}},
        {"adapter": {"dropout": 0.3}},
        {"adapter": {"kind": "dora"}},
        {"scheduler": "linear", "weight_decay": 0.1},
    ],
    ids=["packed", "padded", "full", "dropout", "dora", "linear"],
)
def test_resume_is_bitwise(train, make_bench, make_spec, make_rows):
    rows, held = make_rows(10), make_rows(3, seed=1)
    spec = make_spec(max_steps=7, eval_steps=3, **train)
    whole = make_bench(spec, rows, held_out=held, name="whole")
    whole.engine.run()

    cut = make_bench(spec, rows, held_out=held, name="cut")
    after_step(cut, 4, lambda: order(cut, "stop"))  # inside the second epoch
    assert cut.engine.run().ended == "stopped"
    found = checkpoint.newest_verified(cut.folder / "checkpoints")
    assert found.manifest["step"] == 4

    rest = make_bench(spec, rows, held_out=held, name="rest")
    torch.manual_seed(99)  # a new process has drawn other numbers
    rest.engine.resume(found.path)
    outcome = rest.engine.run()
    assert outcome.ended == "finished"
    assert outcome.ledger == whole.engine.cursor.ledger
    for name, item in whole.weights().items():
        assert torch.equal(item, rest.weights()[name]), name
    for key in ("train/loss", "train/grad_norm", "train/num_tokens", "eval/loss"):
        assert {**cut.series(key), **rest.series(key)} == whole.series(key), key


def test_resume_with_another_micro_batch_keeps_the_task(make_bench, make_spec, make_rows):
    rows = make_rows(10)
    whole = make_bench(make_spec(max_steps=6), rows, name="whole")
    whole.engine.run()
    cut = make_bench(make_spec(max_steps=6, micro_batch=4), rows, name="cut")
    after_step(cut, 2, lambda: order(cut, "stop"))
    cut.engine.run()
    rest = make_bench(make_spec(max_steps=6, micro_batch=1, packing=True), rows, name="rest")
    rest.engine.resume(checkpoint.newest_verified(cut.folder / "checkpoints").path)
    rest.engine.run()
    assert rest.engine.cursor.ledger == whole.engine.cursor.ledger
    assert rest.series("train/loss")[6] == pytest.approx(whole.series("train/loss")[6], rel=1e-4)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"effective_batch": 2}, "effective_batch"),
        ({"seed": 7}, "seed"),
        ({"adapter": {"rank": 8}}, "trainable"),
        ({"adapter": {"targets": ("q_proj",)}}, "trainable"),
    ],
)
def test_a_checkpoint_of_another_task_is_refused(change, named, make_bench, make_spec, make_rows):
    one = make_bench(make_spec(max_steps=2, save_steps=2), make_rows(10), name="one")
    one.engine.run()
    other = make_bench(make_spec(max_steps=4, **change), make_rows(10), name="other")
    with pytest.raises(InputError, match="another run") as caught:
        other.engine.resume(checkpoint.newest_verified(one.folder / "checkpoints").path)
    assert caught.value.code == "checkpoint.other_task"
    assert named in caught.value.why


def test_other_rows_are_refused(make_bench, make_spec, make_rows):
    one = make_bench(make_spec(max_steps=2, save_steps=2), make_rows(10), name="one")
    one.engine.run()
    renumbered = [type(row)(row.row + 1, row.ids, row.labels) for row in make_rows(10)]
    other = make_bench(make_spec(max_steps=4), renumbered, name="other")
    with pytest.raises(InputError, match="row order"):
        other.engine.resume(checkpoint.newest_verified(one.folder / "checkpoints").path)


def test_checkpoints_are_kept_and_pruned(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(max_steps=7, save_steps=2, keep_checkpoints=2), make_rows(10))
    bench.engine.run()
    assert [step for step, _ in checkpoint.steps(bench.folder / "checkpoints")] == [6, 4]
    events = bench.events(Kind.CHECKPOINT)
    assert [event.step for event in events] == [2, 4, 6]
    assert events[-1].values["path"] == "checkpoints/step-00000006"
    manifest = (bench.folder / events[-1].values["path"] / "manifest.json").read_bytes()
    assert hashlib.sha256(manifest).hexdigest() == events[-1].values["sha256"]
    assert {path.name for path in (bench.folder / "checkpoints").iterdir()} == {"step-00000004", "step-00000006"}


def test_a_checkpoint_is_written_when_asked_and_training_goes_on(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(max_steps=6), make_rows(10))
    after_step(bench, 2, lambda: order(bench, "checkpoint", 1))
    assert bench.engine.run().ended == "finished"
    assert [event.step for event in bench.events(Kind.CHECKPOINT)] == [2]


def test_an_order_is_obeyed_once_and_a_newer_one_again(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(max_steps=6), make_rows(10))
    after_step(bench, 2, lambda: order(bench, "checkpoint", 1))
    after_step(bench, 4, lambda: order(bench, "checkpoint", 2))
    bench.engine.run()
    assert [event.step for event in bench.events(Kind.CHECKPOINT)] == [2, 4]


def test_sigterm_ends_at_a_checkpoint(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(max_steps=6), make_rows(10))
    after_step(bench, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with bench.engine.control.listening():
        outcome = bench.engine.run()
    assert (outcome.ended, outcome.step) == ("stopped", 3)
    assert [event.step for event in bench.events(Kind.CHECKPOINT)] == [3]


def test_a_stop_in_an_evaluation_is_made_up_for(make_bench, make_spec, make_rows):
    rows, held = make_rows(10), make_rows(6, seed=1)
    spec = make_spec(max_steps=6, eval_steps=3)
    whole = make_bench(spec, rows, held_out=held, name="whole")
    whole.engine.run()
    cut = make_bench(spec, rows, held_out=held, name="cut")
    usual = cut.engine.evaluation.loss

    def stopping(batch):
        if cut.engine.cursor.step == 3:
            order(cut, "stop")
        return usual(batch)

    cut.engine.evaluation.loss = stopping
    assert cut.engine.run().ended == "stopped"
    assert sorted(cut.series("eval/loss")) == [0]
    rest = make_bench(spec, rows, held_out=held, name="rest")
    rest.engine.resume(checkpoint.newest_verified(cut.folder / "checkpoints").path)
    rest.engine.run()
    assert {**cut.series("eval/loss"), **rest.series("eval/loss")} == whole.series("eval/loss")


def test_early_stopping_takes_the_best_weights(make_bench, make_spec, make_rows):
    rows, held = make_rows(8), make_rows(6, seed=3)
    spec = make_spec(epochs=60, learning_rate=0.05, eval_steps=2, early_stopping=2, scheduler="constant")
    bench = make_bench(spec, rows, held_out=held)
    outcome = bench.engine.run()
    losses = bench.series("eval/loss")
    best = min((step for step in losses if step > 0), key=losses.get)
    assert outcome.ended == "early"
    assert outcome.best_step == best
    assert outcome.step == best + 4
    assert bench.engine.restore_best() == best
    bench.engine.cursor.evaluated_step = -1
    bench.engine._evaluate()
    assert bench.events(Kind.METRIC)[-1].values["eval/loss"] == losses[best]


def test_without_a_judged_evaluation_the_last_weights_are_delivered_and_nothing_is_lamented(
    make_bench, make_spec, make_rows
):
    spec = make_spec(max_steps=3, eval_steps=2, early_stopping=2)
    bench = make_bench(spec, make_rows(8), held_out=make_rows(6, seed=3))
    bench.engine.evaluation.assess = lambda picked, turn: iter([(0.0, 0)])
    outcome = bench.engine.run()
    assert (outcome.ended, outcome.step, outcome.best_step) == ("finished", 3, None)
    assert bench.engine.restore_best() == 3
    assert bench.events(Kind.ALERT) == []
    assert bench.series("eval/loss") == {}
    assert any("No held-out row has a loss" in event.values["message"] for event in bench.events(Kind.LOG))


def test_a_scale_that_is_never_found_ends_the_job(make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(max_steps=200), make_rows(8))
    scaler, steps = bench.engine.scaler, []

    class Scaler:
        """Of float16: it passes over steps whose gradient is not finite."""

        def is_enabled(self):
            return True

        def unscale_(self, optimizer):
            for group in optimizer.param_groups:
                for item in group["params"]:
                    item.grad.fill_(torch.inf)

        def step(self, optimizer):
            steps.append(1)

        def __getattr__(self, name):
            return getattr(scaler, name)

    bench.engine.scaler = Scaler()
    with pytest.raises(JobFailed) as caught:
        bench.engine.run()
    assert caught.value.code == "nan"
    assert len(steps) == 51


def test_damaged_best_weights_are_not_taken(make_bench, make_spec, make_rows):
    spec = make_spec(epochs=60, learning_rate=0.05, eval_steps=2, early_stopping=2, scheduler="constant")
    bench = make_bench(spec, make_rows(8), held_out=make_rows(6, seed=3))
    outcome = bench.engine.run()
    last = bench.weights()
    best = checkpoint.step_folder(bench.folder / "checkpoints", outcome.best_step)
    os.truncate(best / "adapter_model.safetensors", 100)
    assert bench.engine.restore_best() == outcome.step
    assert all(torch.equal(item, last[name]) for name, item in bench.weights().items())
    (alert,) = bench.events(Kind.ALERT)
    assert alert.values["code"] == "checkpoint.corrupt"


@pytest.mark.slow
def test_early_stopping_goes_on_over_a_resume(make_bench, make_spec, make_rows):
    rows, held = make_rows(8), make_rows(6, seed=3)
    spec = make_spec(epochs=60, learning_rate=0.05, eval_steps=2, early_stopping=2, scheduler="constant")
    whole = make_bench(spec, rows, held_out=held, name="whole")
    outcome = whole.engine.run()
    cut = make_bench(spec, rows, held_out=held, name="cut")
    after_step(cut, outcome.best_step + 3, lambda: order(cut, "stop"))
    assert cut.engine.run().ended == "stopped"
    rest = make_bench(spec, rows, held_out=held, name="rest")
    rest.engine.resume(checkpoint.newest_verified(cut.folder / "checkpoints").path)
    again = rest.engine.run()
    assert (again.ended, again.step, again.best_step) == ("early", outcome.step, outcome.best_step)
    whole.engine.restore_best()
    rest.engine.restore_best()
    for name, item in whole.weights().items():
        assert torch.equal(item, rest.weights()[name])


def test_early_stopping_needs_rows(make_bench, make_spec, make_rows):
    with pytest.raises(InputError) as caught:
        make_bench(make_spec(early_stopping=2), make_rows(4))
    assert caught.value.code == "train.early_stopping"


@pytest.mark.parametrize("save_steps", [1, 100])
def test_broken_weights_end_the_run_and_are_never_saved(save_steps, make_bench, make_spec, make_rows):
    bench = make_bench(make_spec(max_steps=6, save_steps=save_steps), make_rows(10))

    def break_it():
        with torch.no_grad():
            next(iter(bench.engine.names)).view(-1)[0] = float("inf")

    after_step(bench, 2, break_it)
    with pytest.raises(JobFailed) as caught:
        bench.engine.run()
    assert caught.value.code == "nan"
    assert [step for step, _ in checkpoint.steps(bench.folder / "checkpoints")] == ([1] if save_steps == 1 else [])


def test_a_failed_save_leaves_the_old_checkpoint(make_bench, make_spec, make_rows, monkeypatch):
    bench = make_bench(make_spec(max_steps=4, save_steps=2), make_rows(10))
    usual = bench.engine.net.save

    def full(folder):
        usual(folder)
        if bench.engine.cursor.step == 4:
            raise OSError(28, "No space left on device")

    bench.engine.net.save = full
    with pytest.raises(StorageError) as caught:
        bench.engine.run()
    assert caught.value.code == "storage.full"
    found = checkpoint.newest_verified(bench.folder / "checkpoints")
    assert found.manifest["step"] == 2
    assert found.passed_over == ()
    assert [path.name for path in (bench.folder / "checkpoints").iterdir()] == ["step-00000002"]


def test_full_weights_train_and_are_saved_whole(make_bench, make_model, make_spec, make_rows, tmp_path):
    from transformers import LlamaForCausalLM

    spec = make_spec(adapter={"kind": "none"}, max_steps=3, packing=True)
    bench = make_bench(spec, make_rows(10))
    bench.engine.run()
    bench.engine.net.save(tmp_path / "whole")
    again = LlamaForCausalLM.from_pretrained(str(tmp_path / "whole"))
    assert again.config._attn_implementation == "sdpa"
    start = make_model().state_dict()
    for name, item in bench.engine.net.causal.state_dict().items():
        assert torch.equal(item, again.state_dict()[name]), name
    assert not torch.equal(again.state_dict()["lm_head.weight"], start["lm_head.weight"])
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_weight_decay_leaves_vectors_alone(make_bench, make_spec, make_rows):
    spec = make_spec(adapter={"kind": "none"}, weight_decay=0.1)
    bench = make_bench(spec, make_rows(4))
    decays = {
        bench.engine.names[item]: group["weight_decay"]
        for group in bench.engine.optimizer.param_groups
        for item in group["params"]
    }
    assert decays["model.norm.weight"] == 0
    assert decays["model.layers.0.self_attn.q_proj.weight"] == 0.1


@pytest.mark.slow
def test_bfloat16_learns(make_bench, make_spec, make_rows):
    for adapter in ({}, {"kind": "none"}, {"dropout": 0.1}):
        spec = make_spec(dtype="bfloat16", max_steps=12, packing=True, adapter=adapter)
        bench = make_bench(spec, make_rows(12), name=str(sorted(adapter)))
        bench.engine.run()
        losses = bench.series("train/loss")
        assert losses[12] < losses[1] - 0.2
        assert all(item.dtype == torch.float32 for _, item in bench.engine.net.trainable())
