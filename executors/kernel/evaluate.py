"""Base against tuned on the rows that were held out: greedy answers side by side, and how many came out right.

    python -P -m tunesmith.executors.kernel.evaluate ATTEMPT_DIR [--rows N]

prints one JSON line per held-out row, `{"row", "prompt", "reference", "base", "tuned", "base_right", "tuned_right"}`,
and at the end `{"rows", "metric", "base_right", "tuned_right"}`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel import data
from tunesmith.executors.kernel.explain import explained
from tunesmith.executors.kernel.place import home_of
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import Attempt
from tunesmith.orchestrator.plain import build

BATCH = 16
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out row, answered by both."""

    row: int
    prompt: str
    reference: str
    base: str
    tuned: str
    base_right: bool
    tuned_right: bool


def metric(references: Sequence[str]) -> str:
    """What is compared: "json" (every reference is an object or list), "number" (GSM8K's `#### n`), or "exact"."""
    if references and all(isinstance(_parsed(text), (dict, list)) for text in references):
        return "json"
    if references and all("####" in text for text in references):
        return "number"
    return "exact"


def right(kind: str, reference: str, answer: str) -> bool:
    """Whether an answer counts: equal JSON values and nothing around them, an equal final number, or equal words."""
    if kind == "json":
        parsed = _parsed(answer)
        return parsed is not None and parsed == _parsed(reference)
    if kind == "number":
        wanted, given = _final_number(reference), _final_number(answer)
        return wanted is not None and wanted == given
    return reference.split() == answer.split()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _final_number(text: str) -> float | None:
    found = _NUMBER.findall(text.rsplit("####", 1)[-1])
    return float(found[-1 if "####" not in text else 0].replace(",", "")) if found else None


def held_out(attempt: Attempt) -> list[tuple[int, list[dict[str, str]], str]]:
    """The rows an attempt never trained on, as (row, the messages before the last answer, that answer).

    Raises InputError where the data has no answer to compare with, as plain text has not.
    """
    found = []
    for example in data.prepare(attempt.spec).eval:
        if example.messages and example.messages[-1].role == "assistant":
            turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
            found.append((example.row, turns[:-1], turns[-1]["content"]))
        elif example.prompt is not None and example.completion is not None:
            found.append((example.row, [{"role": "user", "content": example.prompt}], example.completion))
    if not found:
        raise InputError(
            "There is nothing to compare answers on.",
            why="No held-out row has a prompt and an answer.",
            fix="Hold out rows with eval.fraction, and use data with questions and answers.",
            code="evaluate.no_rows",
        )
    return found


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to rendered prompts, batched with left padding; special tokens and outer space are left out."""
    import torch

    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    with torch.inference_mode():
        made = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    fresh = made[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(fresh, skip_special_tokens=True)]


def side_by_side(folder: Path, rows: int) -> Iterator[Answer]:
    """Answers of base and tuned to at most `rows` held-out rows of an ended attempt, longest wait one batch.

    The adapter is loaded by plain peft onto plain transformers, as a user would. Raises InputError for `rows` below 1.
    """
    if rows < 1:
        raise InputError("There is no row to answer.", code="evaluate.rows", where="--rows", fix="Set --rows above 0.")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.executors.kernel import weights

    attempt = build(Attempt, json.loads((folder / "attempt.json").read_text(encoding="utf-8")))
    chosen = list(islice(held_out(attempt), rows))
    kind = metric([reference for _, _, reference in chosen])
    base_folder = weights.locate(attempt.spec.model, home_of(folder.resolve()) / "cache")
    tokenizer = AutoTokenizer.from_pretrained(base_folder, trust_remote_code=False)
    dtype = torch.bfloat16 if attempt.spec.train.dtype == "bfloat16" else torch.float32

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True
        ).eval()

    base = load(base_folder)
    adapter = folder / "output" / "adapter"
    tuned = PeftModel.from_pretrained(base, adapter).eval() if adapter.is_dir() else load(folder / "output" / "model")
    longest = max(len(tokenizer(reference)["input_ids"]) for _, _, reference in chosen) + 8
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        prompts = [
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            if tokenizer.chat_template
            else turns[-1]["content"]
            for _, turns, _ in part
        ]
        off = tuned.disable_adapter() if adapter.is_dir() else contextlib.nullcontext()
        with off:
            before = generate(base if not adapter.is_dir() else tuned, tokenizer, prompts, longest)
        after = generate(tuned, tokenizer, prompts, longest)
        for (row, turns, reference), old, new in zip(part, before, after, strict=True):
            yield Answer(
                row=row,
                prompt=turns[-1]["content"],
                reference=reference,
                base=old,
                tuned=new,
                base_right=right(kind, reference, old),
                tuned_right=right(kind, reference, new),
            )


def main() -> int:
    """The program: JSON lines on stdout, an error document on the last line where it fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("attempt", type=Path, help="the folder of an ended attempt")
    parser.add_argument("--rows", type=int, default=24, help="at most so many held-out rows")
    arguments = parser.parse_args()
    found: list[Answer] = []
    try:
        for answer in side_by_side(arguments.attempt, arguments.rows):
            print(json.dumps(asdict(answer), ensure_ascii=False), flush=True)
            found.append(answer)
    except Exception as error:
        known = explained(error)
        print(json.dumps({"error": known.to_doc()}), flush=True)
        return known.exit_code
    summary = {
        "rows": len(found),
        "metric": metric([answer.reference for answer in found]),
        "base_right": sum(answer.base_right for answer in found),
        "tuned_right": sum(answer.tuned_right for answer in found),
    }
    print(json.dumps(summary), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
