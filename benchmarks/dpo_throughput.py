"""Real tokens a second of LoRA DPO on preference pairs: ours, TRL as it comes, and TRL at its best settings.

All train the same token ids from the same weights, one optimizer step each in turn. Every pair is new to both, so our
cache of the reference's opinion is cold: its forward pass is inside what is timed. `trl default` is DPOConfig as it
comes, `trl tuned` leaves activation checkpointing out. Both compute in bfloat16 where the processor multiplies it
fast, else in float32; TRL's own default, bfloat16 whatever the processor, is measured beside it with --as-is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

import measure
import sides

BATCH, LIMIT = 4, 512


def pairs(tokenizer: Any, count: int) -> list[Any]:
    """Preference pairs as our own data package encodes them."""
    from tunesmith.executors.kernel import data
    from tunesmith.orchestrator.nouns import DataSource

    source = DataSource(source=str(sides.DATA / "dpo_en_demo.json"))
    examples = [item for _, item in data.Conversion([source], method="dpo") if isinstance(item, data.Example)]
    found = [pair for pair in data.encode_pairs(examples, tokenizer, LIMIT) if isinstance(pair, data.Pair)]
    return found[:count]


def ours(found: list[Any], steps: int, folder: Any, kept: dict[str, Any]) -> sides.Side:
    """Our loop, prompts shared."""
    from tunesmith.executors.kernel.loops.dpo import Dpo
    from tunesmith.executors.kernel.loops.forks import Tree
    from tunesmith.orchestrator.nouns import DpoSpec

    spec = sides.spec_of(
        folder, method="dpo", train={"max_steps": steps, "effective_batch": BATCH, "max_length": LIMIT}
    )
    trees = [Tree(pair.row, pair.prompt, (pair.chosen, pair.rejected), pair.unscored) for pair in found]

    def method(net: Any, reporter: Any) -> Any:
        return Dpo(net, trees, DpoSpec(), micro_batch=2, max_length=LIMIT, packing=True, pad_id=0)

    return sides.our_side("ours", method, spec, folder, kept)


def trl(name: str, found: list[Any], steps: int, folder: Any, kept: dict[str, Any], **settings: Any) -> sides.Side:
    """TRL's trainer on the same token ids, in their order."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):
        """Takes ids as they are: what is compared is training, not tokenising."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    def make(turns: Any) -> Any:
        columns = [
            {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in found
        ]
        with tempfile.TemporaryDirectory() as place:
            return Given(
                model=str(folder),
                args=DPOConfig(
                    **{
                        **sides.common(folder, steps, place),
                        "per_device_train_batch_size": BATCH,
                        "train_sampling_strategy": "sequential",
                        **settings,
                    }
                ),
                train_dataset=Dataset.from_list(columns),
                processing_class=AutoTokenizer.from_pretrained(folder),
                peft_config=sides.lora(),
                callbacks=[turns],
            )

    return sides.trl_side(name, make, kept)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each side, the first as a warm-up")
    parser.add_argument("--as-is", action="store_true", help="also a step of TRL's default in bfloat16, however slow")
    asked = parser.parse_args()
    steps = asked.steps
    sides.quiet()
    folder, tokenizer = sides.smollm2()
    found = pairs(tokenizer, steps * BATCH)
    kept: dict[str, Any] = {}
    types = {
        "float32": {"bf16": False, "model_init_kwargs": {"dtype": "float32"}},
        "bfloat16": {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}},
    }
    lean = {"gradient_checkpointing": False}
    best = sides.faster_type()
    usual = {} if best == "bfloat16" else {"bf16": False}
    everyone = [
        ours(found, steps, folder, kept),
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
    sizes = [
        sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in found[at : at + BATCH])
        for at in range(BATCH, steps * BATCH, BATCH)
    ]

    def speed(side: sides.Side) -> list[float]:
        return [count / took for count, took in zip(sizes, side.seconds, strict=True)]

    ends = {
        name: [log["loss"] for log in kept[side.name] if "loss" in log][-1]
        for name, side in (("trl_default", default), ("trl_tuned", tuned))
    }
    ours_end = [event.values["train/loss"] for event in kept["ours"] if "train/loss" in event.values][-1]
    measure.close(
        "dpo_throughput",
        {
            "ratio_vs_trl_default": round(measure.ratio(speed(mine), speed(default)), 2),
            "ratio_vs_trl_tuned": round(measure.ratio(speed(mine), speed(tuned)), 2),
            "tokens_per_second": round(statistics.median(speed(mine)), 1),
            "tokens_per_second_trl_default": round(statistics.median(speed(default)), 1),
            "tokens_per_second_trl_tuned": round(statistics.median(speed(tuned)), 1),
            "ratio_vs_trl_default_as_it_is": as_is,
            "trl_dtype": best,
            "last_loss": {"ours": round(ours_end, 4), **{name: round(float(value), 4) for name, value in ends.items()}},
            "tokens_counted": "prompt with each side, as TRL feeds them",
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
