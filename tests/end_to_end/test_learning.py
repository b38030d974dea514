"""GRPO really learns: a Reasoning Gym task, the real 135M model, and held-out prompts before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_grpo_learns_to_add(machine, smollm2: Path, tmp_path: Path, capsys) -> None:
    """Sums of two numbers below 100: the mean reward of greedy answers to 40 prompts it never trained on rises."""
    spec = {
        "tunesmith": 1,
        "name": "sums",
        "model": {"id": "smollm2-135m"},
        "data": [
            {
                "source": "reasoning-gym:chain_sum",
                "config": json.dumps({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
                "limit": 400,
            }
        ],
        "eval": {"fraction": 0.1},
        "method": "grpo",
        "grpo": {"num_generations": 8, "max_completion": 24, "rewards": ["reasoning-gym"]},
        "train": {
            "max_steps": 30,
            "effective_batch": 8,
            "learning_rate": 1e-4,
            "scheduler": "constant",
            "eval_steps": 30,
            "save_steps": 30,
            "seed": 7,
        },
    }
    path = tmp_path / "sums.json"
    path.write_text(json.dumps(spec))
    machine.env.pop("OMP_NUM_THREADS")
    done = machine.run("run", str(path), "--yes", "--json", seconds=2300)
    assert done.returncode == 0, done.stderr
    series = machine.document("metrics", "last")["series"]
    held_out = {int(point[0]): point[1] for point in series["eval/reward"]}
    trained = [point[1] for point in series["train/reward"]]
    with capsys.disabled():
        print(f"\nmean reward of 40 held-out prompts: {held_out[0]:.3f} before, {held_out[30]:.3f} after 30 steps")
        print(f"while training: {sum(trained[:5]) / 5:.3f} in the first five, {sum(trained[-5:]) / 5:.3f} last")
    assert len(trained) == 30
    assert held_out[30] > held_out[0] + 0.1
    assert sum(trained[-5:]) / 5 > sum(trained[:5]) / 5 + 0.1
    assert max(point[1] for point in series["train/rollout_gap"]) < 1e-3
