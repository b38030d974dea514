"""The kernel on one GPU, with random weights from the catalogue's shapes: LoRA SFT in tokens a second, and rollouts.

    python benchmarks/kernel_gpu.py [--models 0.6B,1.7B,4B,8B] [--parts sft,rollout] [--tiny]

SFT: rank 16 on all linear layers, bfloat16 base, packed to 2,048 tokens a row, no activation checkpointing where it
fits; tokens/s, MFU by the 4N convention (4 operations for each parameter of the products and token, causal attention
beside), peak memory, and TRL's trainer with packing, bfloat16 and no checkpointing in the same run. Rollouts: 64 at
once of Qwen3-0.6B, against `generate` as TRL calls it. Each part prints a JSON line as soon as it is done, so that
what was measured survives a run cut short. `--tiny` runs every line of it on a CPU with a toy shape.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
import sides

GOALS = {"Qwen/Qwen3-0.6B": 90_000, "Qwen/Qwen3-1.7B": 48_000, "Qwen/Qwen3-4B": 22_000, "Qwen/Qwen3-8B": 13_500}
ROLLOUT_GOAL = 20_000
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
LENGTH = 2048


@dataclass(frozen=True)
class Row:
    """Random tokens, all of them supervised."""

    row: int
    ids: list[int]
    labels: list[int]


def facts_of(size: str, tiny: bool) -> Any:
    """The catalogue's entry of a Qwen3 of this size, or a toy of the same family."""
    from tunesmith.executors.kernel import catalogue

    facts = catalogue.find(f"Qwen/Qwen3-{size}")
    assert facts is not None
    if tiny:
        shape = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 96}
        facts = replace(facts, **shape, vocabulary=512, params=0)
    return facts


def build(facts: Any, folder: Path, device: Any, dtype: Any) -> Any:
    """A Qwen3 of these shapes with random weights, on the device; its config is saved in `folder` for TRL."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=facts.vocabulary,
        hidden_size=facts.hidden,
        intermediate_size=facts.intermediate,
        num_hidden_layers=facts.layers,
        num_attention_heads=facts.heads,
        num_key_value_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        tie_word_embeddings=facts.tied,
        max_position_embeddings=facts.context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(dtype)


def rows(facts: Any, count: int) -> list[Row]:
    """Documents of 128 to 1,024 tokens."""
    import random

    draw = random.Random(0)
    top = 64 if facts.hidden < 100 else 1024
    made = []
    for number in range(count):
        ids = [draw.randrange(3, facts.vocabulary) for _ in range(draw.randint(top // 8, top))]
        made.append(Row(number, ids, ids))
    return made


def flops(facts: Any, tokens: int, mean: float) -> float:
    """4N for LoRA: forward, and the gradients of activations; causal attention at the mean length beside."""
    products = facts.matmul_params + facts.vocabulary * facts.hidden
    return tokens * (4.0 * products + 4.0 * facts.layers * facts.heads * facts.head_dim * mean)


def memory() -> float | None:
    """Peak memory in GiB since it was last asked."""
    import torch

    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


def clear() -> None:
    """Give memory back between parts."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def sft(size: str, steps: int, tiny: bool) -> dict[str, Any]:
    """Our loop on one model."""
    import torch

    from tunesmith.executors.kernel.control import Control
    from tunesmith.executors.kernel.loops import model as models
    from tunesmith.executors.kernel.loops import selftest
    from tunesmith.executors.kernel.loops.engine import Engine
    from tunesmith.executors.kernel.loops.sft import Sft
    from tunesmith.executors.kernel.reporter import Reporter

    facts, device = facts_of(size, tiny), torch.device("cpu" if tiny else "cuda")
    micro = {"0.6B": 8, "1.7B": 8, "4B": 4, "8B": 2}[size]  # rows of 2,048 tokens at once
    length = 128 if tiny else LENGTH
    every = rows(facts, 64 * steps)
    spec = sides.spec_of(
        Path("random"),
        train={"effective_batch": 32, "micro_batch": micro, "max_length": length, "max_steps": steps,
               "dtype": "float32" if tiny else "bfloat16"},
    )  # fmt: skip
    clear()
    with tempfile.TemporaryDirectory() as place, Reporter(Path(place), 1) as reporter:
        net = models.ready(build(facts, Path(place), device, torch.float32 if tiny else torch.bfloat16), spec, device)
        verdict = selftest.check(net, every, pad_id=0)
        print(f"{size}: self-test {verdict}", flush=True)
        method = Sft(net, every, micro_batch=micro, max_length=length, packing=True, pad_id=0)
        engine = Engine(
            net, method, spec.train, reporter=reporter, control=Control(Path(place) / "control"),
            checkpoints=Path(place) / "checkpoints", facts={"attempt": 1, "spec_hash": "0"},
        )  # fmt: skip
        taken, counts = [], []
        step = engine._step

        def timed() -> None:
            before, begun = engine.cursor.tokens, time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
            counts.append(engine.cursor.tokens - before)

        engine._step = timed  # type: ignore[method-assign]
        engine.run()
    speeds = [count / took for count, took in zip(counts[2:], taken[2:], strict=True)]
    speed = statistics.median(speeds)
    mean = statistics.mean(len(row.ids) for row in every)
    peak = next((value for name, value in PEAK.items() if name in sides.device()), None)
    found = {
        "part": "sft",
        "model": facts.id,
        "tokens_per_second": round(speed, 1),
        "goal": GOALS[facts.id],
        "mfu_4n": None if peak is None else round(flops(facts, 1, mean) * speed / peak, 4),
        "peak_gib": memory(),
        "micro_tokens": micro * length,
        "packed": net.packed,
        "checkpointing": False,
    }
    return found


def sft_by_trl(size: str, steps: int, tiny: bool) -> dict[str, Any]:
    """TRL's trainer at its best settings on the same model and rows."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        return {"trl": None, "trl_why_not": str(error)}
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    facts = facts_of(size, tiny)
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(facts.vocabulary)}, unk_token="t3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")
    stamps: list[tuple[float, int]] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in logs:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                stamps.append((time.perf_counter(), logs["num_tokens"]))

    clear()
    with tempfile.TemporaryDirectory() as place:
        dtype = torch.float32 if tiny else torch.bfloat16
        trainer = SFTTrainer(
            model=build(facts, Path(place), "cpu" if tiny else "cuda", dtype),
            args=SFTConfig(
                **{
                    **sides.common(Path(place), steps, place),
                    "per_device_train_batch_size": 2 if tiny else 8,
                    "packing": True,
                    "max_length": 128 if tiny else LENGTH,
                    "gradient_checkpointing": False,
                    "bf16": not tiny,
                }
            ),
            train_dataset=Dataset.from_list(
                [{"input_ids": row.ids, "labels": row.labels} for row in rows(facts, 64 * steps)]
            ),
            processing_class=tokenizer,
            peft_config=sides.lora(),
            callbacks=[Watch()],
        )
        trainer.train()
    speeds = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(stamps[1:])]
    return {"trl_tokens_per_second": round(statistics.median(speeds), 1), "trl_peak_gib": memory()}


def rollout(tiny: bool) -> dict[str, Any]:
    """64 answers at once of Qwen3-0.6B: ours, and `generate` of the model with its adapter unmerged."""
    import torch

    from tunesmith.executors.kernel.loops import model as models
    from tunesmith.executors.kernel.loops.rollout import Ask, Rollout

    facts, device = facts_of("0.6B", tiny), torch.device("cpu" if tiny else "cuda")
    longest, width = (12, 16) if tiny else (512, 128)
    clear()
    spec = sides.spec_of(Path("random"), train={"dtype": "float32" if tiny else "bfloat16"})
    with tempfile.TemporaryDirectory() as place:
        net = models.ready(build(facts, Path(place), device, torch.float32 if tiny else torch.bfloat16), spec, device)
    made = Rollout(net, stops=frozenset(), max_completion=longest, temperature=1.0, slots=64)
    print("rollout:", "; ".join(made.problems) or "no fallback", flush=True)
    asks = [Ask(row.row, row.ids[:width], range(8)) for row in rows(facts, 8)]
    net.outer.eval()

    def ours() -> float:
        begun = time.perf_counter()
        found = made.generate(asks, key="0:0")
        assert found is not None
        return sum(len(sample.ids) for sample in found) / (time.perf_counter() - begun)

    prompts = torch.tensor([ask.ids[: min(len(ask.ids) for ask in asks)] for ask in asks for _ in range(8)]).to(device)

    def theirs() -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            out = net.outer.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0,
                max_new_tokens=longest, min_new_tokens=longest, pad_token_id=0,
            )  # fmt: skip
        return (out.shape[1] - prompts.shape[1]) * out.shape[0] / (time.perf_counter() - begun)

    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(3)]
    return {
        "part": "rollout",
        "model": facts.id,
        "tokens_per_second": round(statistics.median(one for one, _ in pairs), 1),
        "goal": ROLLOUT_GOAL,
        "ratio_vs_generate": round(statistics.median(one / other for one, other in pairs), 2),
        "peak_gib": memory(),
        "at_once": 64,
        "new_tokens": longest,
    }


def main() -> None:
    """Measure what was asked for, a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="0.6B,1.7B,4B,8B")
    parser.add_argument("--parts", default="sft,rollout")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    if not torch.cuda.is_available() and not asked.tiny:
        raise SystemExit("There is no GPU here. --tiny shows that every part runs.")
    sides.quiet()
    found: list[dict[str, Any]] = []
    parts = asked.parts.split(",")
    for size in asked.models.split(",") if "sft" in parts else ():
        part = sft(size, asked.steps, asked.tiny)
        part |= sft_by_trl(size, asked.steps, asked.tiny)
        found.append(part)
        print(json.dumps(part), flush=True)
    if "rollout" in parts:
        found.append(rollout(asked.tiny))
        print(json.dumps(found[-1]), flush=True)
    measure.close(
        "kernel_gpu", {"parts": found, "tiny": asked.tiny, "hardware": sides.device()}, "torch", "transformers", "peft"
    )


if __name__ == "__main__":
    main()
