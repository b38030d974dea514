"""The golden plans: sentences on devices, what was decided for each, and a way to write the table anew.

    python tests/executors/kernel/sizing/golden_plans.py --write

writes golden_plans.json. Whoever runs it reads the difference line by line before it is kept: the test beside this file
asks for the same decisions, and for figures that are alike.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.sizing import cards
from tunesmith.graph.planning import plan
from tunesmith.orchestrator.nouns import Device, Plan, Request

TABLE = Path(__file__).with_name("golden_plans.json")
GIB = 2**30

CASES: tuple[tuple[str, str], ...] = (
    ("QLoRA Llama-3.1-8B on gsm8k.jsonl in 12 GB", "RTX 4090"),
    ("QLoRA Llama-3.1-8B on gsm8k.jsonl in 12 GB", "cpu 32"),
    ("LoRA Llama-3.1-8B on gsm8k.jsonl in 12 GB", "RTX 4090"),
    ("Fine-tune Llama-3.1-8B on gsm8k.jsonl in 8 GB", "RTX 4090"),
    ("Fine-tune Llama-3.1-8B on gsm8k.jsonl on my 3060", "RTX 3060"),
    ("Fine-tune Llama-3.1-8B on gsm8k.jsonl on an RTX 4090", "RTX 4090"),
    ("Fine-tune Llama-3.1-8B on gsm8k.jsonl on a T4", "T4"),
    ("Fine-tune Llama-3.1-8B on gsm8k.jsonl on an H100", "H100"),
    ("Fine-tune Llama-3.1-8B on gsm8k.jsonl on a 24 GB card", "A10G"),
    ("Fine-tune Mistral-7B-v0.3 on gsm8k.jsonl on my 16 GB GPU", "RTX 4080"),
    ("Fine-tune gemma-3-4b-it on gsm8k.jsonl on my T4", "T4"),
    ("Fine-tune Qwen3-4B on gsm8k.jsonl with sequences of 16384 tokens on my 4090", "RTX 4090"),
    ("Fine-tune Qwen3-30B-A3B on gsm8k.jsonl on an H100", "H100"),
    ("LoRA Llama-3.1-8B on gsm8k.jsonl with rank 256 on my 4090", "RTX 4090"),
    ("DoRA Llama-3.1-8B on gsm8k.jsonl on my 4090", "RTX 4090"),
    ("LoRA Llama-3.1-8B on gsm8k.jsonl, micro batch 16, no gradient checkpointing, on my 4090", "RTX 4090"),
    ("LoRA Qwen3-32B on gsm8k.jsonl on an H100", "H100"),
    ("QLoRA Qwen3-32B on gsm8k.jsonl on my 4090", "RTX 4090"),
    ("QLoRA Qwen3-32B on gsm8k.jsonl on my 5090", "RTX 5090"),
    ("QLoRA Llama-3.3-70B-Instruct on gsm8k.jsonl on an L40S", "L40S"),
    ("QLoRA Llama-3.3-70B-Instruct on gsm8k.jsonl on an H100", "H100"),
    ("Full fine-tuning of Qwen3-0.6B on gsm8k.jsonl on a 24 GB card", "RTX 3090"),
    ("Full fine-tuning of Qwen3-1.7B on gsm8k.jsonl on a 24 GB card", "RTX 4090"),
    ("Full fine-tuning of Qwen3-1.7B on gsm8k.jsonl on my 5090", "RTX 5090"),
    ("Full fine-tuning of Llama-3.1-8B on gsm8k.jsonl on an H100", "H100"),
    ("Full fine-tuning of Llama-3.1-8B on gsm8k.jsonl on an H200", "H200"),
    ("DPO Qwen3-4B on prefs.jsonl on my 4090", "RTX 4090"),
    ("DPO Qwen3-8B on prefs.jsonl in 12 GB", "RTX 4090"),
    ("GRPO Qwen3-1.7B on gsm8k.jsonl on my 4090, 8 generations of 256 tokens", "RTX 4090"),
    ("GRPO Qwen3-4B on gsm8k.jsonl on my 4090, 8 generations of 256 tokens", "RTX 4090"),
    ("Distil Qwen3-0.6B from Qwen3-8B on gsm8k.jsonl on my 4090", "RTX 4090"),
    ("Fine-tune smollm2-135m on gsm8k.jsonl in 2 GB", "cpu 8"),
    ("Fine-tune smollm2-135m on gsm8k.jsonl in 0.5 GB", "cpu 8"),
    ("Fine-tune Qwen3-0.6B on gsm8k.jsonl", "cpu 8"),
    ("Fine-tune Qwen3-8B on gsm8k.jsonl", "cpu 8"),
    ("Fine-tune Llama-3.1-8B on gsm8k.jsonl on a 16 GB card", "cpu 8"),
)  # the last: a card that is not there


def write_data(folder: Path) -> None:
    """The data that the sentences name: rows about as long as GSM8K's."""
    with (folder / "gsm8k.jsonl").open("w", encoding="utf-8") as out:
        for number in range(3500):
            question = f"Anna has {number} apples and buys some more. " * (3 + number % 11)
            answer = f"We add {number} and one. " * (6 + number % 41) + f"\n#### {number + 1}"
            out.write(json.dumps({"question": question, "answer": answer}) + "\n")
    with (folder / "prefs.jsonl").open("w", encoding="utf-8") as out:
        for number in range(2000):
            prompt = f"What comes after {number}? " * (3 + number % 5)
            chosen, rejected = f"It is {number + 1}. " * (9 + number % 9), f"It is {number}. " * (6 + number % 9)
            out.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def device(name: str) -> Device:
    """A card by its name, or "cpu 16" with 16 GiB: of no machine in particular, so that none's packages matter."""
    kind, _, gib = name.partition(" ")
    if kind == "cpu":
        memory = int(gib) * GIB
        return Device(backend="box", hardware="cpu", kind="cpu", memory_bytes=memory, peak_flops=3e11, bandwidth=2e10)
    card = cards.named(name)
    assert card is not None
    return card.device("box")


def planned(sentence: str, name: str, folder: Path) -> Plan:
    """The plan of a sentence on a backend with one device, whichever backend the sentence thinks of."""
    request = Request(text=sentence, cwd=str(folder), sets={"backend": "box"})
    return plan(request, devices=lambda backend: [device(name)], cache=folder / "cache")


def decisions(found: Plan) -> dict[str, Any]:
    """What is decided, in few words: what a person reads in the table."""
    (stage,) = found.stages
    size = stage.size
    assert size is not None
    train = stage.spec.train
    errors = [item for item in (*found.findings, *stage.findings) if item.level == "error"]
    said: dict[str, Any] = {
        "fits": size.fits,
        "adapter": stage.spec.adapter.kind if size.rank is None else f"{stage.spec.adapter.kind} {size.rank}",
        "step": train.effective_batch,
        "length": size.max_length,
        "packing": train.packing,
        "checkpointing": size.activation_checkpointing,
        "dtype": train.dtype,
        "optimizer": train.optimizer,
        "errors": [item.code for item in errors],
        "would_fit": _ways(next((item.fix for item in errors if item.code == "size.does_not_fit"), "")),
        "elsewhere": {item.hardware: item.fits for item in size.elsewhere},
    }
    return {key: value for key, value in said.items() if value not in ([], {})}


def _ways(fix: str) -> list[str]:
    """The ways out, without what a few percent of memory would change: their figures."""
    plain = re.sub(r" \([^()]*\)", "", fix.removeprefix("This would fit: ").rstrip("."))
    ways = [way for way in plain.split("; ") if way and not way.startswith("a device with")]
    return [re.sub(r"(rank|max_\w+|micro_batch|effective_batch)=\d+", r"\1=N", way) for way in ways]


def figures(found: Plan) -> dict[str, Any]:
    """What may move a little with the formulas: rows of a micro-batch, the expected peak, what would fit in full."""
    (stage,) = found.stages
    size = stage.size
    assert size is not None
    fix = next((item.fix for item in stage.findings if item.code == "size.does_not_fit"), "")
    return {"rows": size.micro_batch, "peak_gib": round(size.peak_bytes.expected / GIB, 2)} | (
        {"fix": fix} if fix else {}
    )


def main() -> None:
    """Write the table, or say which plans are not as they stand in it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    before = {(row["says"], row["on"]): row for row in json.loads(TABLE.read_text())} if TABLE.exists() else {}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HUB_CACHE"] = str(folder / "hub")
        write_data(folder)
        for sentence, on in CASES:
            found = planned(sentence, on, folder)
            rows.append({"says": sentence, "on": on, "plan": decisions(found), "about": figures(found)})
            old = before.get((sentence, on))
            if old is None or old["plan"] != rows[-1]["plan"]:
                print(f"{'new' if old is None else 'changed'}: {sentence!r} on {on}")
    if "--write" in sys.argv[1:]:
        TABLE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
