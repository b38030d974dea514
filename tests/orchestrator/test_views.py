"""Documents drawn for a terminal: what must be read there is there, and hostile text stays text."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console, RenderableType

from tunesmith.orchestrator import views, views_plan
from tunesmith.orchestrator.progress import Progress

HOSTILE = "[red]x[/red] [/foo] [lr=2e-4] \x1b]52;c;QUJD\x07\x1b[2J \u202egnp :smile: \r\n"


def drawn(view: RenderableType, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, markup=False, emoji=False, highlight=False, color_system=None).print(view)
    return file.getvalue()


def estimate(expected: float, unit: str) -> dict[str, Any]:
    return {"low": expected * 0.8, "expected": expected, "high": expected * 1.3, "unit": unit, "source": "formula"}


def plan_doc(text: str = "gsm8k") -> dict[str, Any]:
    return {
        "plan_hash": "0123456789abcdef" * 4,
        "intent": "train",
        "command": ["tunesmith", "run", text],
        "understood": [{"key": "model.id", "value": text, "why": "named"}],
        "unread": [text],
        "questions": [{"field": "model.id", "text": f"Which model? {text}", "choices": [text, "b"]}],
        "findings": [{"level": "warning", "code": "x", "message": f"careful {text}", "where": text, "fix": "do this"}],
        "stages": [
            {
                "spec": {
                    "model": {"id": text},
                    "data": [{"source": f"{text}.jsonl"}],
                    "method": "sft",
                    "adapter": {"kind": "lora"},
                    "train": {
                        "epochs": 1,
                        "learning_rate": 2e-4,
                        "scheduler": "cosine",
                        "effective_batch": 8,
                        "max_length": 512,
                    },
                },
                "resolved": [{"key": "train.max_length", "value": 512, "why": f"95 % of rows fit {text}"}],
                "data": {
                    "rows": 7473,
                    "used_rows": 200,
                    "eval_rows": 10,
                    "format": text,
                    "problems": [
                        {"level": "error", "code": "data.empty", "message": f"row 3 is empty {text}", "fix": ""}
                    ],
                    "tokens": {
                        "p50": 97,
                        "p95": 190,
                        "max": 470,
                        "total": estimate(20_000, "tokens"),
                        "method": "sample",
                    },
                },
                "size": {
                    "params": 134_515_008,
                    "trainable": 4_884_480,
                    "peak_bytes": estimate(2 * 1024**3, "bytes"),
                    "parts": {"weights": 538_000_000, text: 10_000_000},
                    "device_bytes": 16 * 1024**3,
                    "fits": True,
                    "rank": 16,
                },
                "time": {"seconds": estimate(120, "seconds"), "tokens_per_second": estimate(200, "tokens/s")},
                "offers": [
                    {
                        "backend": "local",
                        "hardware": text,
                        "fits": True,
                        "usd_per_hour": 0.0,
                        "seconds": estimate(120, "seconds"),
                    },
                    {"backend": text, "hardware": "t4", "fits": False, "usd_per_hour": 0.4, "why_not": text},
                ],
                "findings": [],
            }
        ],
    }


def show_doc(text: str = "ok") -> dict[str, Any]:
    return {
        "id": "j-abc234",
        "name": text,
        "state": "running",
        "backend": text,
        "spec": {"model": {"id": text}, "method": "sft", "data": [{"source": text}]},
        "progress": {"step": 12, "total_steps": 20, "eta_seconds": 41.0, "tokens_per_second": 210.0},
        "last": {"train/loss": 1.91, text: 3.0},
        "attempts": [{"number": 1, "backend": text, "state": "running", "exit_code": None, "resumed_from": text}],
        "artifacts": [{"kind": text, "path": f"/home/{text}", "bytes": 1024, "sha256": "x"}],
        "error": {"message": text, "why": text, "fix": text},
        "remedies": [{"id": "r1", "text": text}],
        "alerts": [{"message": text}, text],
        "findings": [{"level": "info", "message": text}],
        "questions": [{"field": text, "text": text, "choices": [text]}],
    }


def documents(text: str) -> list[tuple[Callable[[Any], RenderableType], Any]]:
    following = Progress(state=text, phase=text, done=1, of=2, alerts=[text], first_loss=2.0, last={"train/loss": 1.0})
    check = {
        "rows": 3,
        "format": text,
        "columns": [text],
        "ready": {"sft": True, text: False},
        "mapping": {"kind": text, "columns": {"prompt": text}},
        "preview": [{"before": {text: text}, "after": text}],
        "problems": [{"level": text, "message": text, "where": text, "fix": text}],
        "tokens": {"p50": 1, "p95": 2, "max": 3, "method": text, "histogram": [[64, 5], [128, 10]]},
    }
    device = {"hardware": text, "kind": "cpu", "memory_bytes": 1, "count": 2, "usd_per_hour": 0.4, "why_not": text}
    return [
        (views_plan.plan, plan_doc(text)),
        (views_plan.plan, {**plan_doc(text), "intent": "status", "stages": []}),
        (views_plan.check, check),
        (views.show, show_doc(text)),
        (
            views.jobs,
            {"jobs": [{"id": text, "name": text, "state": text, "model": text, "method": text}], "next": text},
        ),
        (views.metrics, {"series": {text: [[1, 2.0, "t"], [2, "NaN", "t"]]}}),
        (views.backends, {"backends": [{"name": text, "ready": False, "why_not": text, "devices": [device]}]}),
        (views.doctor, {"checks": [{"name": text, "status": "error", "message": text, "fix": text}]}),
        (views.error, {"message": text, "why": text, "fix": text}),
        (views.live, following),
    ]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_hostile_text_is_drawn_as_text(width: int) -> None:
    for view, doc in documents(HOSTILE):
        out = drawn(view(doc), width)
        assert not any(ord(char) < 32 and char != "\n" for char in out), view
        assert "\u202e" not in out
        assert "\x9b" not in out


def test_markup_is_not_interpreted() -> None:
    out = drawn(views.show(show_doc("[red]x[/red] [/foo] :smile:")))
    assert "[red]x[/red] [/foo] :smile:" in out


@pytest.mark.parametrize(
    "view", [views_plan.plan, views_plan.check, views.show, views.jobs, views.metrics, views.doctor]
)
def test_a_document_with_nothing_in_it_is_drawn(view: Callable[[Any], RenderableType]) -> None:
    assert drawn(view({})) is not None


def test_a_plan_says_what_a_person_decides_by() -> None:
    out = drawn(views_plan.plan(plan_doc()))
    for part in (
        "SFT  gsm8k  on  gsm8k.jsonl",
        "7,473 rows, 200 used, 10 held out",
        "median 97, 95 % 190, longest 470",
        "134.5 M parameters, 4.9 M trained (3.6 %)",
        "lora rank 16",
        "2.0 GiB (1.6 to 2.6, formula) of 16.0 GiB",
        "2 min (1 min 36 s to 2 min 36 s, formula)",
        "95 % of rows fit",
        "error: row 3 is empty",
        "warning: careful",
        "Not understood: gsm8k",
        "question: Which model?",
        "plan 0123456789ab",
    ):
        assert part in out, part
    assert out.index("error:") < out.index("warning:")


def test_a_plan_says_what_the_next_cards_would_do() -> None:
    doc = plan_doc()
    cards = [("RTX 4080", 16, True, 0.553), ("RTX 3060", 12, False, None)]
    doc["stages"][0]["size"]["elsewhere"] = [
        {"hardware": name, "memory_bytes": gib * 1024**3, "fits": fits, "speed": speed}
        for name, gib, fits, speed in cards
    ]
    out = drawn(views_plan.plan(doc))
    assert "RTX 4080 (16.0 GiB) fits, 0.55 times as fast" in out
    assert "RTX 3060 (12.0 GiB) does not fit" in out
    assert "Elsewhere" not in drawn(views_plan.plan(plan_doc()))


def test_a_plan_that_does_not_fit_says_so() -> None:
    doc = plan_doc()
    doc["stages"][0]["size"]["fits"] = False
    assert "does not fit" in drawn(views_plan.plan(doc))


def test_a_job_says_where_it_stands_and_what_comes_next() -> None:
    out = drawn(views.show({**show_doc(), "error": None}))
    for part in (
        "j-abc234",
        "running",
        "12/20",
        "210 tokens/s",
        "41 s left",
        "train/loss 1.91",
        "tunesmith watch j-abc234",
    ):
        assert part in out, part


def test_the_last_figures_are_about_learning() -> None:
    last = {"preflight/peak_bytes": 540_090_368.0, "memory/peak_bytes": 1.5e9, "time/tokens": 9.0, "train/loss": 0.25}
    out = drawn(views.show({**show_doc(), "last": last}))
    assert "train/loss 0.25" in out
    assert not any(name in out for name in ("preflight/", "memory/", "time/"))


def test_a_sparkline_shows_the_course() -> None:
    assert views.sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert views.sparkline([2.0, 2.0]) == "▄▄"
    assert views.sparkline([]) == ""
    assert len(views.sparkline([float(value) for value in range(1000)], 32)) == 32


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"method": "dpo", "dpo": {"loss": "ipo", "beta": 0.2}}, "loss ipo, beta 0.2"),
        ({"method": "dpo", "dpo": {"loss": "ipo", "beta": 0.2, "reference": "none"}}, "beta 0.2, no reference"),
        ({"method": "kto", "kto": {"beta": 0.1}}, "beta 0.1"),
        (
            {"method": "grpo", "grpo": {"num_generations": 8, "max_completion": 64, "rewards": ["number", HOSTILE]}},
            "8 answers of up to 64 tokens to each prompt, rewarded by number",
        ),
        (
            {"method": "rloo", "grpo": {"num_generations": 4, "max_completion": 9, "rewards": ["a"], "beta": 0.05}},
            "rewarded by a, KL weighted 0.05",
        ),
        ({"method": "distill", "distill": {"teacher": "owner/big", "max_completion": 64}}, "judged by owner/big"),
    ],
)
def test_a_plan_says_what_is_particular_to_its_method(spec: dict[str, Any], said: str) -> None:
    doc = plan_doc()
    doc["stages"][0]["spec"] |= spec
    text = drawn(views_plan.plan(doc), width=160)
    assert said in text
    assert "\x1b" not in text
    assert "Method" not in drawn(views_plan.plan(plan_doc()))
