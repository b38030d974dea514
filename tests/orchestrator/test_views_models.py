"""Models and the accuracy of estimates, drawn: what a person reads there, and hostile text that stays text."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from tunesmith.orchestrator import views_models

HOSTILE = "[red]x[/red] [/foo] \x1b]52;c;QUJD\x07\x1b[2J \u202egnp :smile: \r\n"


def drawn(view: RenderableType, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, markup=False, emoji=False, highlight=False, color_system=None).print(view)
    return file.getvalue()


def run(text: str = "j-aaaaaa", **memory: Any) -> dict[str, Any]:
    return {
        "job": text,
        "model": text,
        "method": text,
        "stack": {"device": text, "driver": text, "torch": text, "transformers": text},
        "memory": {
            "predicted": {"low": 2**30, "expected": 2**31, "high": 2**32},
            "actual": 1.6 * 2**30,
            "error_percent": 25.0,
            "inside": True,
            "exceeded": False,
            **memory,
        },
        "seconds": {
            "predicted": {"low": 60, "expected": 90, "high": 200},
            "actual": 240,
            "error_percent": -62.5,
            "inside": False,
        },
    }


def accuracy(*runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "runs": list(runs),
        "memory": {"runs": 12, "mean_abs_error_percent": 1.234, "inside_percent": 91.67},
        "seconds": {"runs": 0, "mean_abs_error_percent": None, "inside_percent": None},
    }


def models(text: str = "owner/model") -> dict[str, Any]:
    return {"models": [{"id": text, "params": 596e6, "context": 40960, "licence": text, "at_hand": True}]}


def test_a_run_reads_as_foretold_against_what_came() -> None:
    out = drawn(views_models.accuracy(accuracy(run())))
    for said in ("1.6 GiB", "2.0 GiB", "+25.0 %", "4 min", "1 min to 3 min 20 s", "no"):
        assert said in out
    assert "memory: mean error 1.2 %, 91.7 % inside the range, over 12 runs" in out
    assert "time: no run to compare with yet" in out


def test_a_run_that_wanted_more_says_over() -> None:
    assert "over 8.0 GiB" in drawn(views_models.accuracy(accuracy(run(actual=2**33, exceeded=True))))


def test_runs_stand_under_what_they_ran_on() -> None:
    other = run() | {"stack": {"device": "L40S", "driver": "580.1", "torch": "2.13", "transformers": "5.23"}}
    out = drawn(views_models.accuracy(accuracy(run(), other, run(), run() | {"stack": {}})))
    assert "L40S, driver 580.1, torch 2.13, transformers 5.23" in out
    assert out.count("torch") == 2
    assert "was not told" in out


def test_models_read_with_size_context_and_where_they_are() -> None:
    out = drawn(views_models.models(models()))
    for said in ("owner/model", "596.0 M", "40,960", "here"):
        assert said in out


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize(
    "view",
    [views_models.accuracy(accuracy(run(HOSTILE))), views_models.models(models(HOSTILE))],
    ids=["runs", "models"],
)
def test_hostile_text_is_drawn_as_text(view: RenderableType, width: int) -> None:
    out = drawn(view, width)
    assert not any(ord(char) < 32 and char != "\n" for char in out)
    assert "\u202e" not in out
    assert "\x9b" not in out


@pytest.mark.parametrize("view", [views_models.accuracy, views_models.models])
def test_a_document_with_nothing_in_it_is_drawn(view) -> None:
    assert drawn(view({}))
    assert drawn(view({"runs": [{}], "models": [{}]}))
