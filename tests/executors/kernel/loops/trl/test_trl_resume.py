"""Runs of TRL's trainers that are stopped, resumed, asked for checkpoints, or given up."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.loops import trl
from tunesmith.executors.kernel.loops.trl_held import ROUND
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


@pytest.fixture
def trained(monkeypatch):
    """The prompts that go through rloo's loss, by the run's name and the step they are trained in."""
    from trl import RLOOTrainer

    found = {}
    usual = RLOOTrainer._compute_loss

    def look(self, model, inputs):
        key = (Path(self.args.output_dir).parent.name, self.state.global_step)
        prompts = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
        found.setdefault(key, []).extend(self.processing_class.decode(ids[kept]) for ids, kept in prompts)
        return usual(self, model, inputs)

    monkeypatch.setattr(RLOOTrainer, "_compute_loss", look)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_a_round_of_rloo_that_was_cut_goes_on_with_its_rows_and_its_answers(lost, bench, rows_for, trained):
    """Cut inside rounds (1, 4, 8) and between two (6); the last part goes by other micro-batches.

    Where the answers of a round are lost, it writes new ones for the same rows.
    """
    more = {"rows": rows_for["rloo"][:7], "eval": 0.0, "grpo": {"num_generations": 3, "num_iterations": 3}}
    train = {"max_steps": 9, "save_steps": 100}
    whole = bench("rloo", name="whole", train=train, **more)
    expected = whole.engine.run()
    told, origin = {}, None
    for number, at in enumerate((1, 4, 6, 8, None)):
        part = bench("rloo", name=f"part{number}", train={**train, "micro_batch": 2 if at else 4}, **more)
        if origin is not None:
            if lost:
                (origin / ROUND).unlink(missing_ok=True)
            part.engine.resume(origin)
        part.tell_after(at)
        outcome = part.engine.run()
        told |= part.series("train/num_tokens") if at else {}
        assert outcome.ledger == expected.ledger[:at]
        if at is not None:
            (origin,) = part.folders()
            assert (origin / ROUND).exists() == bool(at % 3)
            if not lost:
                assert told == {step: n for step, n in whole.series("train/num_tokens").items() if step <= at}
                assert same(part.weights(), weights_after(at, bench, train, more))
    assert outcome.step == 9
    for (_, step), prompts in trained.items():
        wanted = sorted(row for row in expected.ledger[step] for _ in range(3))
        assert sorted(int(re.search(r"Say (\d+)\.", prompt)[1]) for prompt in prompts) == wanted, step


def weights_after(count, bench, train, more):
    """The weights after so many steps of a run that nobody cuts."""
    run = bench("rloo", name=f"whole{count}", train=train, **more)
    wish = run.engine.stepped
    run.engine.stepped = lambda step: replace(wish(step), end=step == count)
    run.engine.run()
    return run.weights()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "distill"])
def test_a_stop_is_heard_while_answers_are_written(method, bench):
    run = bench(method, eval=0.0)
    passes = []

    def count(*_):
        passes.append(run.engine.cursor.step)
        if len(passes) == 3:
            run.tell("stop")

    run.engine.net.causal.register_forward_pre_hook(count)
    assert run.engine.run().ended == "stopped"
    assert passes == [0, 0, 0]
    assert len(run.engine.net.causal._forward_pre_hooks) == 1


@pytest.mark.slow
def test_a_stop_is_heard_when_the_trainer_is_made(bench):
    """Before it evaluates or trains; a run that goes on from another's checkpoint leaves one of its own."""
    first = bench("rloo", name="first")
    first.tell_after(3)
    first.engine.run()
    second = bench("rloo", name="second", train={"eval_steps": 1})
    second.engine.resume(*first.folders())
    make = second.engine._make

    def making():
        made = make()
        second.tell("stop")
        return made

    second.engine._make = making
    second.engine.net.causal.register_forward_pre_hook(lambda *_: pytest.fail("It goes on."))
    assert second.engine.run().ended == "stopped"
    assert [folder.name for folder in second.folders()] == ["step-00000003"]


@pytest.mark.slow
def test_held_out_rows_without_a_reward_are_said_to_have_none(bench, tmp_path):
    """With nothing to judge by nothing is judged: the run goes to its end, and its last weights are delivered."""
    file = tmp_path / "seldom.py"
    file.write_text(
        "HELD = []\ndef seldom(answer, **_): return [None if one in HELD else float(one) for one in answer]\n"
    )
    train = {"early_stopping": 1, "eval_steps": 2, "max_steps": 4, "save_steps": 100}
    run = bench("rloo", train=train, grpo={"rewards": (f"{file}:seldom",)})
    held = run.engine.rewards.rewards[0].call.__globals__["HELD"]
    held.extend(str(number) for number in run.engine.rows.eval.numbers)
    outcome = run.engine.run()
    assert (outcome.ended, outcome.step, outcome.best_step) == ("finished", 4, None)
    said = [event.values["message"] for event in run.events(Kind.LOG)]
    assert [text for text in said if "reward" in text] == [
        f"No held-out row has a reward at step {step}." for step in (0, 2, 4)
    ]
    assert run.engine.restore_best() == 4
    assert not [event for event in run.events(Kind.ALERT) if event.values["code"].startswith("checkpoint.")]


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
    there = []  # of the checkpoints told of so far, two at least at any time: one goes when its successor is known
    run.reporter.listeners.append(
        lambda event: there.append(len(run.folders())) if event.kind is Kind.CHECKPOINT else None
    )
    assert run.engine.run().ended == "finished"
    assert [event.step for event in run.events(Kind.CHECKPOINT)] == [2, 4, 5, 6]
    assert [path.name for path in run.folders()] == ["step-00000005", "step-00000006"]
    assert there == [1, 2, 3, 3]


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
