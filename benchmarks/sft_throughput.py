"""Real tokens a second of LoRA SFT on GSM8K rows: ours, TRL as it comes, and TRL at its best settings.

All train the same token ids and labels from the same weights, one optimizer step each in turn. `trl default` is
SFTConfig as it comes: padded batches of 8, activation checkpointing. `trl tuned` packs without checkpointing. Both
compute in bfloat16 where the processor multiplies it fast, else in float32: TRL's own default, bfloat16 whatever the
processor, would be many times slower there, and is measured beside it with --as-is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from itertools import pairwise
from typing import Any

import measure
import sides

BATCH, HELD_OUT = 8, 24


def gsm8k(tokenizer: Any, count: int) -> list[Any]:
    """Rows of GSM8K as our own data package encodes them."""
    from tunesmith.executors.kernel import data

    path = sides.DATA / "gsm8k_train.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[: count + HELD_OUT]]
    rows = [data.Example(at, prompt=row["question"], completion=row["answer"]) for at, row in enumerate(lines)]
    return [data.encode(row, tokenizer, 1024) for row in rows]


def ours(rows: list[Any], steps: int, folder: Any, kept: dict[str, Any]) -> sides.Side:
    """Our loop, packed."""
    from tunesmith.executors.kernel.loops.sft import Sft

    spec = sides.spec_of(folder, train={"max_steps": steps, "effective_batch": BATCH})

    def method(net: Any, reporter: Any) -> Any:
        return Sft(net, rows, micro_batch=2, max_length=1024, packing=True, pad_id=0)

    return sides.our_side("ours", method, spec, folder, kept)


def trl(name: str, rows: list[Any], steps: int, folder: Any, kept: dict[str, Any], **settings: Any) -> sides.Side:
    """TRL's trainer on the same ids and labels, in their order."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def make(turns: Any) -> Any:
        with tempfile.TemporaryDirectory() as place:
            return SFTTrainer(
                model=str(folder),
                args=SFTConfig(
                    **{
                        **sides.common(folder, steps, place),
                        "per_device_train_batch_size": BATCH,
                        "train_sampling_strategy": "sequential",
                        **settings,
                    }
                ),
                train_dataset=Dataset.from_list([{"input_ids": row.ids, "labels": row.labels} for row in rows]),
                processing_class=AutoTokenizer.from_pretrained(folder),
                peft_config=sides.lora(),
                callbacks=[turns],
            )

    return sides.trl_side(name, make, kept)


def held_out_loss(model: Any, rows: list[Any]) -> float:
    """Mean loss over the supervised tokens of rows that nobody trained on, by the model's own forward in float32."""
    import torch

    total = count = 0.0
    model.eval()
    getattr(model, "get_base_model", lambda: model)().set_attn_implementation("sdpa")
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
            logits = model(input_ids=ids.to(model.device)).logits.float().cpu()
            total += float(
                torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
            )
            count += int((labels[0, 1:] != -100).sum())
    return total / count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each side, the first as a warm-up")
    parser.add_argument("--as-is", action="store_true", help="also a step of TRL's default in bfloat16, however slow")
    asked = parser.parse_args()
    steps = asked.steps
    sides.quiet()
    folder, tokenizer = sides.smollm2()
    encoded = gsm8k(tokenizer, steps * BATCH)
    rows, held_out = encoded[: steps * BATCH], encoded[steps * BATCH :]
    kept: dict[str, Any] = {}
    packed = {"packing": True, "per_device_train_batch_size": 1, "max_length": 1024, "gradient_checkpointing": False}
    types = {
        "float32": {"bf16": False, "model_init_kwargs": {"dtype": "float32"}},
        "bfloat16": {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}},
    }
    best = sides.faster_type()
    usual = {} if best == "bfloat16" else {"bf16": False}
    everyone = [
        ours(rows, steps, folder, kept),
        trl("trl default", rows, steps, folder, kept, **usual),
        trl(f"trl tuned ({best})", rows, steps, folder, kept, **packed, **types[best]),
    ]
    sides.take_turns(everyone, steps)
    for side in everyone:
        side.end()
    mine, default, tuned = everyone
    as_is = None
    if asked.as_is and usual:
        side = trl("trl default as is", rows, 1, folder, kept)
        as_is = round(side.take() / statistics.median(mine.seconds), 2)
        side.end()
        print(f"trl default in bfloat16    {side.seconds[0]:8.2f} s", flush=True)
    sizes = [sum(len(row.ids) for row in rows[at : at + BATCH]) for at in range(BATCH, steps * BATCH, BATCH)]
    packs = [log["num_tokens"] for log in kept[tuned.name] if "loss" in log]
    packs = [after - before for before, after in pairwise(packs)]

    def speed(tokens: list[int], seconds: list[float]) -> list[float]:
        return [count / took for count, took in zip(tokens, seconds, strict=True)]

    fast, slow, best_of_trl = (
        speed(sizes, mine.seconds),
        speed(sizes, default.seconds),
        speed(packs, tuned.seconds),
    )
    losses = {
        "ours": held_out_loss(kept["ours net"].outer, held_out),
        "trl_default": held_out_loss(kept["trl default model"], held_out),
        "trl_tuned": held_out_loss(kept[f"{tuned.name} model"].float(), held_out),
    }
    measure.close(
        "sft_throughput",
        {
            "ratio_vs_trl_default": round(measure.ratio(fast, slow), 2),
            "ratio_vs_trl_tuned": round(measure.ratio(fast, best_of_trl), 2),
            "tokens_per_second": round(statistics.median(fast), 1),
            "tokens_per_second_trl_default": round(statistics.median(slow), 1),
            "tokens_per_second_trl_tuned": round(statistics.median(best_of_trl), 1),
            "ratio_vs_trl_default_as_it_is": as_is,
            "trl_dtype": best,
            "held_out_loss": {name: round(value, 4) for name, value in losses.items()},
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
