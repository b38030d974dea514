"""Runs of TRL's trainers that are stopped, resumed, asked for checkpoints, or given up."""

import json

import pytest
import torch

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.loops import trl
from tunesmith.orchestrator.errors import InputError, JobFailed
from tunesmith.orchestrator.events import Kind

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("method", trl.METHODS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(method, bench):
    """Stopped inside an epoch (3) and at its end (5), each time resumed by another attempt: the run never stopped."""
    whole = bench(method, name="whole", adapter={"dropout": 0.1})
    expected = whole.engine.run()
    parts, origin = [], None
    for number, at in enumerate((3, 5, None)):
        part = bench(method, name=f"part{number}", adapter={"dropout": 0.1}, train={"save_steps": 100})
        parts.append(part)
        if origin is not None:
            part.engine.resume(origin)
        part.tell_after(at)
        outcome = part.engine.run()
        if at is not None:
            assert (outcome.ended, outcome.step) == ("stopped", at)
            (origin,) = part.folders()
            assert origin.name == f"step-{at:08d}"
            checkpoint.verify(origin)
        assert outcome.ledger == expected.ledger[:at]
    for key in ("train/loss", "train/num_tokens", "train/learning_rate", "train/epoch", "eval/loss"):
        told = [(step, value) for part in parts for step, value in part.series(key).items()]
        assert told == list(whole.series(key).items()), key
    assert (outcome.ended, outcome.step) == ("finished", 6)
    assert same(parts[-1].weights(), whole.weights())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kto", "reward"])
def test_full_weights_resume_and_are_delivered(method, bench, student, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    whole = bench(method, name="whole", adapter={"kind": "none"})
    whole.engine.run()
    second = bench(method, name="second", adapter={"kind": "none"})
    second.engine.resume(whole.folder / "checkpoints" / "step-00000004")
    second.engine.run()
    assert same(second.weights(), whole.weights())
    second.engine.net.save(tmp_path / "out")
    kind = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    plain = kind.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    for name, item in second.weights().items():
        assert torch.equal(plain.get_parameter(name), item)
    if method == "reward":
        assert (plain.config.num_labels, plain.config.pad_token_id) == (1, 256)
        return
    for file in ("config.json", "generation_config.json"):  # a trainer's own settings are gone
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((student / file).read_text())


@pytest.mark.slow
def test_a_stop_inside_a_step_or_an_evaluation_leaves_no_trace(bench):
    whole = bench("rloo", name="whole")
    whole.engine.run()

    inside = bench("rloo", name="inside", train={"save_steps": 100})
    scored = inside.engine.scored

    def tell(*given):
        if inside.engine.cursor.step == 4:
            inside.tell("stop")
        return scored(*given)

    inside.engine.scored = tell
    outcome = inside.engine.run()
    assert (outcome.ended, outcome.step) == ("stopped", 4)
    assert max(inside.series("train/loss")) == 4

    assessing = bench("rloo", name="assessing", train={"save_steps": 100})
    assessing.engine.resume(*inside.folders())
    asked = assessing.engine.assessing

    def stop(step, done, total):
        assessing.tell("stop")
        asked(step, done, total)

    assessing.engine.assessing = stop
    outcome = assessing.engine.run()
    assert (outcome.ended, outcome.step) == ("stopped", 6)
    assert assessing.series("eval/loss") == {}

    last = bench("rloo", name="last")
    last.engine.resume(*assessing.folders())
    outcome = last.engine.run()
    assert (outcome.ended, outcome.step) == ("finished", 6)
    assert last.series("eval/reward") == {6: whole.series("eval/reward")[6]}
    assert same(last.weights(), whole.weights())


@pytest.mark.slow
def test_a_stop_before_the_first_step_saves_nothing(bench):
    run = bench("reward", eval=0.0)
    run.tell("stop")
    assert run.engine.run().ended == "stopped"
    assert run.events(Kind.CHECKPOINT) == []
    assert run.events(Kind.METRIC) == []


@pytest.mark.slow
def test_a_checkpoint_is_written_when_asked_for_and_old_ones_go(bench):
    run = bench("reward", train={"save_steps": 2, "keep_checkpoints": 2, "max_steps": 7})
    run.tell_after(5, "checkpoint")
    assert run.engine.run().ended == "finished"
    assert [event.step for event in run.events(Kind.CHECKPOINT)] == [2, 4, 5, 6]
    assert [path.name for path in run.folders()] == ["step-00000005", "step-00000006"]


@pytest.mark.slow
def test_training_ends_early_and_the_best_weights_are_kept(bench):
    train = {"learning_rate": 0.2, "scheduler": "constant", "early_stopping": 2, "eval_steps": 1, "max_steps": 40}
    run = bench("reward", eval=0.3, train={**train, "save_steps": 100, "keep_checkpoints": 1})
    outcome = run.engine.run()
    measured = run.series("eval/loss")
    best = min((step for step in measured if step), key=lambda step: measured[step])
    assert (outcome.ended, outcome.best_step) == ("early", best)
    assert outcome.step == best + 2 < 40
    last = run.weights()
    assert run.engine.restore_best() == best
    assert not same(run.weights(), last)

    other = bench("reward", name="other", eval=0.3, train={**train, "save_steps": 100, "keep_checkpoints": 1})
    other.engine.resume(run.folder / "checkpoints" / f"step-{best:08d}")
    assert other.engine.run().best_step == best
    assert other.engine.restore_best() == best
    assert same(other.weights(), run.weights())


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run(bench):
    run = bench("reward", train={"learning_rate": 1e30, "eval_steps": 100, "max_steps": 12})
    with pytest.raises(JobFailed) as caught:
        run.engine.run()
    assert caught.value.code == "nan"
    for folder in run.folders():
        checkpoint.verify(folder)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(bench, rows_for):
    run = bench("reward")
    run.engine.run()
    (folder,) = run.folders()
    for other in (
        bench("kto", name="b"),
        bench("reward", name="c", train={"seed": 7}),
        bench("reward", name="d", adapter={"rank": 2}),
        bench("reward", name="e", rows=rows_for["reward"][:12]),
    ):
        with pytest.raises(InputError) as caught:
            other.engine.resume(folder)
        assert caught.value.code == "checkpoint.other_task"
