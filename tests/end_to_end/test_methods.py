"""Every method from a sentence to its output, on the tiny model: planned, approved, trained, measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
HOW = "first 16 rows, 2 steps, batch size 2"

# What a person writes, and a figure that only this method reports.
SENTENCES = {
    "dpo": (f"DPO {{model}} on {EXAMPLES / 'preferences.jsonl'}, {HOW}", "train/rewards/margins"),
    "grpo": (
        f"GRPO {{model}} on {EXAMPLES / 'sums.jsonl'}, {HOW}, 4 generations, max completion length 16",
        "train/completions/mean_length",
    ),
    "kto": (f"KTO {{model}} on {EXAMPLES / 'ratings.jsonl'}, {HOW}", "train/kl"),
    "reward": (f"train a reward model {{model}} on {EXAMPLES / 'preferences.jsonl'}, {HOW}", "train/accuracy"),
}


@pytest.mark.parametrize("method", SENTENCES)
def test_a_sentence_trains_by_each_method(method: str, machine, tiny) -> None:
    sentence, figure = SENTENCES[method]
    done = machine.run("run", sentence.format(model=tiny), "--yes", "--json")
    assert done.returncode == 0, (done.stdout, done.stderr)
    document = json.loads(done.stdout)
    assert document["state"] == "succeeded"
    assert document["progress"]["total_steps"] == 2
    series = machine.document("metrics", document["id"])["series"]
    assert [point[0] for point in series["train/loss"]] == [1, 2]
    assert figure in series, sorted(series)
    (adapter,) = [Path(item["path"]) for item in document["artifacts"] if item["kind"] == "adapter"]
    assert (adapter / "adapter_model.safetensors").stat().st_size > 0
