"""An attempt with GRPO: rounds of answers, a user's rewards and what they say beside their numbers, a second life."""

import hashlib
import json

import pytest

from tests.executors.kernel.test_run import alerts, events, last_error, series, states
from tunesmith.executors.kernel import run as runs
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import DataSource, GrpoSpec

FUNCTION = '''
def even(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
    """The share of even tokens; nothing for the second answer."""
    log_metric("even/step", float(trainer_state.global_step))
    log_metric("even/steps", float(trainer_state.max_steps))
    log_metric("even/logged", float(len(trainer_state.log_history)))
    log_extra("length", [len(ids) for ids in completion_ids])
    shares = [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]
    return [None if at == 1 else share for at, share in enumerate(shares)]
'''


@pytest.fixture
def grpo(attempt, tmp_path):
    """Makes an attempt with GRPO on eight prompts, rewarded by a file of the user's."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} plus {n}?"}) + "\n" for n in range(8)))
    rewards = tmp_path / "rewards.py"
    rewards.write_text(FUNCTION)

    def make(number=1, *, train=None, **more):
        spec = GrpoSpec(**{"num_generations": 4, "max_completion": 6, "rewards": (f"{rewards}:even",), **more})
        usual = {"effective_batch": 2, "max_steps": 4, "save_steps": 2, "eval_steps": 4}
        folder = attempt(
            number, method="grpo", grpo=spec, data=(DataSource(source=str(prompts)),), train={**usual, **(train or {})}
        )
        noun = json.loads((folder / "attempt.json").read_text())
        noun["reward_hashes"] = [hashlib.sha256(FUNCTION.encode()).hexdigest()]
        (folder / "attempt.json").write_text(json.dumps(noun))
        return folder

    return make


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_what_rewards_say_reaches_the_people(grpo):
    folder = grpo()
    assert runs.run(folder) == 0, last_error(folder)
    assert states(folder) == ["starting", "running", "finishing", "succeeded"]
    assert sorted(series(folder, "train/loss")) == sorted(series(folder, "train/reward")) == [1, 2, 3, 4]
    assert series(folder, "train/even/step") == {step: step - 1.0 for step in (1, 2, 3, 4)}
    assert set(series(folder, "train/even/steps").values()) == {4.0}
    logged = series(folder, "train/even/logged")
    assert sorted(logged.values()) == list(logged.values())
    assert logged[4] > logged[1]
    assert sorted(series(folder, "eval/reward")) == sorted(series(folder, "eval/rewards/even")) == [0, 4]
    assert series(folder, "eval/even/step") == {0: 0.0, 4: 4.0}
    assert "to 1 of" in alerts(folder)["reward.none"]["message"]
    samples = [event.values for event in events(folder, Kind.SAMPLE)]
    assert {tuple(sample["rewards"]) for sample in samples} == {("even",)}
    assert all(sample["extra"]["length"].isdigit() for sample in samples)
    assert (folder / "output" / "adapter" / "adapter_model.safetensors").exists()


def test_a_reward_file_that_was_not_approved_does_not_run(grpo, tmp_path):
    folder = grpo()
    (tmp_path / "rewards.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{FUNCTION}")
    assert runs.run(folder) == 2
    assert last_error(folder)["code"] == "reward.changed"
    assert not (tmp_path / "ran").exists()


def test_a_reward_that_raises_is_found_before_the_first_step(grpo, tmp_path):
    source = "def even(completions, **kwargs):\n    raise ValueError('no such key')\n"
    folder = grpo()
    (tmp_path / "rewards.py").write_text(source)
    noun = json.loads((folder / "attempt.json").read_text())
    noun["reward_hashes"] = [hashlib.sha256(source.encode()).hexdigest()]
    (folder / "attempt.json").write_text(json.dumps(noun))
    assert runs.run(folder) != 0
    error = last_error(folder)
    assert error["code"] == "reward.dry_run"
    assert "no such key" in error["message"] + error["why"]
    assert series(folder, "train/loss") == {}
