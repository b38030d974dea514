"""GRPO really learns: a Reasoning Gym task, the real 135M model, and held-out prompts before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TASK, SETTINGS = "course_schedule", {"min_num_courses": 3, "max_num_courses": 5}
STEPS, HELD_OUT, ANSWERS, LONGEST = 24, 40, 4, 8


def earned(model: Any, tokenizer: Any, tasks: Any, entries: list[Any]) -> float:
    """Mean reward of what plain transformers samples, scored by Reasoning Gym itself."""
    import torch

    torch.manual_seed(7)
    rewards = []
    for entry in entries:
        chat = [{"role": "user", "content": entry["question"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=ANSWERS, max_new_tokens=LONGEST, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        rewards += [tasks.score_answer(answer=text, entry=entry) for text in texts]
    return sum(rewards) / len(rewards)


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.timeout(2400)
def test_grpo_learns_to_answer(machine, smollm2: Path, tmp_path: Path, capsys) -> None:
    """Can these courses be taken? Prompts never trained on earn more afterwards, from plain transformers and peft."""
    import reasoning_gym
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = {
        "tunesmith": 1,
        "name": "courses",
        "model": {"id": "smollm2-135m"},
        "data": [{"source": f"reasoning-gym:{TASK}", "config": json.dumps(SETTINGS), "limit": 400}],
        "eval": {"fraction": 0.1},
        "method": "grpo",
        "grpo": {"num_generations": 8, "max_completion": LONGEST, "rewards": ["reasoning-gym"]},
        "train": {
            "max_steps": STEPS,
            "effective_batch": 8,
            "learning_rate": 1e-4,
            "scheduler": "constant",
            "eval_steps": STEPS,
            "save_steps": STEPS,
            "seed": 7,
        },
    }
    path = tmp_path / "courses.json"
    path.write_text(json.dumps(spec))
    machine.env.pop("OMP_NUM_THREADS", None)
    done = machine.run("run", str(path), "--yes", "--json", seconds=2300)
    assert done.returncode == 0, done.stderr
    document = machine.document("show", "last")
    (adapter,) = [item["path"] for item in document["artifacts"] if item["kind"] == "adapter"]
    series = machine.document("metrics", "last")["series"]
    trained = [point[1] for point in series["train/reward"]]
    greedy = {int(point[0]): point[1] for point in series["eval/reward"]}

    taught = reasoning_gym.create_dataset(TASK, **SETTINGS, seed=0, size=400)  # as the run makes its rows
    tasks = reasoning_gym.create_dataset(TASK, **SETTINGS, seed=10_000, size=5 * HELD_OUT)
    known = {entry["question"] for entry in taught}
    unseen = [entry for entry in tasks if entry["question"] not in known][:HELD_OUT]
    assert len(unseen) == HELD_OUT
    tokenizer = AutoTokenizer.from_pretrained(smollm2, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32", trust_remote_code=False)
    before = earned(model.eval(), tokenizer, tasks, unseen)
    after = earned(PeftModel.from_pretrained(model, adapter).eval(), tokenizer, tasks, unseen)
    with capsys.disabled():
        print(
            f"\n{HELD_OUT} held-out prompts, {ANSWERS} answers each: mean reward {before:.3f} before, {after:.3f} after"
        )
        print(f"while training: {sum(trained[:5]) / 5:.3f} in the first five steps, {sum(trained[-5:]) / 5:.3f} last")
        print(f"greedy answers to the run's own held-out rows: {greedy[0]:.3f} before, {greedy[STEPS]:.3f} after")
    assert len(trained) == STEPS
    assert after > before + 0.15
    assert sum(trained[-5:]) / 5 > sum(trained[:5]) / 5 + 0.15
