"""Seconds of a GRPO step: write 8 answers of up to 64 tokens to each of some GSM8K prompts, score them, and learn.

Ours, TRL as it comes, and TRL at its best settings, from the same weights on the same prompts, one step each in turn.
The reward is a number drawn from the answer's tokens: unequal within every group, so that no answer is left out of
anybody's training pass. `trl default` is GRPOConfig as it comes but for the sizes named, `trl tuned` leaves activation
checkpointing out. Both compute in bfloat16 where the processor multiplies it fast, else in float32; TRL's own default,
bfloat16 whatever the processor, is measured beside it with --as-is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import measure
import sides

PROMPTS, COUNT, LONGEST = 2, 8, 64


def noise(ids: Sequence[int]) -> float:
    """A number between 0 and 1 that any other answer would not get."""
    return hashlib.blake2b(repr(list(ids)).encode(), digest_size=2).digest()[0] / 255


def prompts(tokenizer: Any, count: int) -> list[Any]:
    """Prompts of GSM8K as our own data package encodes them: a user's turn in the model's chat template."""
    from tunesmith.executors.kernel import data

    path = sides.DATA / "gsm8k_train.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    examples = [data.Example(at, prompt=row["question"]) for at, row in enumerate(lines)]
    return [item for item in data.encode_prompts(examples, tokenizer, 512) if isinstance(item, data.Prompt)]


class Scorer:
    """The reward as our loop asks for it."""

    names = ("noise",)

    def score(self, prompts: Any, completions: Any, completion_ids: Any, columns: Any, step: int) -> Any:
        """One value for each completion."""
        from tunesmith.executors.kernel.rewards import Scores

        values = [noise(ids) for ids in completion_ids]
        return Scores([[value] for value in values], values, {})


def ours(found: list[Any], steps: int, folder: Any, tokenizer: Any, kept: dict[str, Any]) -> sides.Side:
    """Our loop and rollout."""
    from tunesmith.executors.kernel import data
    from tunesmith.executors.kernel.loops.grpo import Grpo, Judge
    from tunesmith.executors.kernel.loops.rollout import Rollout
    from tunesmith.orchestrator.nouns import GrpoSpec

    spec = sides.spec_of(
        folder,
        method="grpo",
        grpo=GrpoSpec(num_generations=COUNT, max_completion=LONGEST),
        train={"max_steps": steps, "effective_batch": PROMPTS, "max_length": 512, "learning_rate": 1e-6},
    )

    def method(net: Any, reporter: Any) -> Any:
        stops = data.stop_tokens(tokenizer)
        rollout = Rollout(net, stops=stops, max_completion=LONGEST, temperature=1.0, slots=PROMPTS * COUNT)
        print("rollout:", "; ".join(rollout.problems) or "no fallback", flush=True)
        judge = Judge(lambda ids: str(tokenizer.decode(ids)), Scorer())
        return Grpo(
            net, found, spec.grpo, rollout=rollout, judge=judge, reporter=reporter, seed=sides.SEED, micro_batch=2,
            max_length=512, packing=True, pad_id=0,
        )  # fmt: skip

    return sides.our_side("ours", method, spec, folder, kept)


def trl(name: str, found: list[Any], steps: int, folder: Any, kept: dict[str, Any], **settings: Any) -> sides.Side:
    """TRL's trainer on the same prompts, in their order."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids: Any, **columns: Any) -> list[float]:
        return [noise(ids) for ids in completion_ids]

    def make(turns: Any) -> Any:
        with tempfile.TemporaryDirectory() as place:
            return GRPOTrainer(
                model=str(folder),
                reward_funcs=reward,
                args=GRPOConfig(
                    **{
                        **sides.common(folder, steps, place),
                        "learning_rate": 1e-6,
                        "per_device_train_batch_size": PROMPTS * COUNT,
                        "num_generations": COUNT,
                        "max_completion_length": LONGEST,
                        "shuffle_dataset": False,
                        **settings,
                    }
                ),
                train_dataset=Dataset.from_list([{"prompt": item.prompt} for item in found]),
                processing_class=AutoTokenizer.from_pretrained(folder),
                peft_config=sides.lora(),
                callbacks=[turns],
            )

    return sides.trl_side(name, make, kept)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each side, the first as a warm-up")
    parser.add_argument("--as-is", action="store_true", help="also a step of TRL's default in bfloat16, however slow")
    asked = parser.parse_args()
    steps = asked.steps
    sides.quiet()
    folder, tokenizer = sides.smollm2()
    found = prompts(tokenizer, steps * PROMPTS)
    kept: dict[str, Any] = {}
    types = {
        "float32": {"bf16": False, "model_init_kwargs": {"dtype": "float32"}},
        "bfloat16": {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}},
    }
    lean = {"gradient_checkpointing": False}
    best = sides.faster_type()
    usual = {} if best == "bfloat16" else {"bf16": False}
    everyone = [
        ours(found, steps, folder, tokenizer, kept),
        trl("trl default", found, steps, folder, kept, **usual),
        trl(f"trl tuned ({best})", found, steps, folder, kept, **lean, **types[best]),
    ]
    sides.take_turns(everyone, steps)
    for side in everyone:
        side.end()
    mine, default, tuned = everyone
    as_is = None
    if asked.as_is and usual:
        side = trl("trl default as is", found, 1, folder, kept)
        as_is = round(side.take() / statistics.median(mine.seconds), 2)
        side.end()
        print(f"trl default in bfloat16    {side.seconds[0]:8.2f} s", flush=True)
    logs = [event.values for event in kept["ours"] if "train/loss" in event.values]
    lengths = {
        "ours": statistics.mean(log["train/completions/mean_length"] for log in logs[1:]),
        "trl_default": statistics.mean(
            log["completions/mean_length"] for log in kept["trl default"][1:] if "completions/mean_length" in log
        ),
    }
    measure.close(
        "grpo_step",
        {
            "ratio_vs_trl_default": round(measure.ratio(default.seconds, mine.seconds), 2),
            "ratio_vs_trl_tuned": round(measure.ratio(tuned.seconds, mine.seconds), 2),
            "seconds": round(statistics.median(mine.seconds), 2),
            "seconds_trl_default": round(statistics.median(default.seconds), 2),
            "seconds_trl_tuned": round(statistics.median(tuned.seconds), 2),
            "rollout_seconds": round(statistics.median(log["train/rollout_seconds"] for log in logs[1:]), 2),
            "rollout_gap_nats": max(log["train/rollout_gap"] for log in logs),
            "mean_answer_tokens": {name: round(value, 1) for name, value in lengths.items()},
            "ratio_vs_trl_default_as_it_is": as_is,
            "trl_dtype": best,
            "prompts": PROMPTS,
            "answers_each": COUNT,
            "steps": steps - 1,
            "model": "SmolLM2-135M-Instruct",
            "hardware": sides.device(),
        },
        "torch",
        "transformers",
        "trl",
        "peft",
    )


if __name__ == "__main__":
    main()
