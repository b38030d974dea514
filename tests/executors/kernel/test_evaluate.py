"""What counts as a right answer, and that only held-out rows are asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tunesmith.executors.kernel import data, evaluate, weights
from tunesmith.executors.kernel.evaluate import generate, held_out, metric, right
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import Attempt, DataSource, EvalSpec, JobSpec, ModelRef
from tunesmith.orchestrator.plain import plain


@pytest.mark.parametrize(
    ("references", "kind"),
    [
        (['{"a": 1}', "[1]"], "json"),
        (["so it is\n#### 4", "#### 5"], "number"),
        (['{"a": 1}', "words"], "exact"),
        (["4", "5"], "exact"),
        ([], "exact"),
    ],
)
def test_metric_follows_the_references(references: list[str], kind: str) -> None:
    assert metric(references) == kind


@pytest.mark.parametrize(
    ("kind", "reference", "answer", "expected"),
    [
        ("json", '{"a": 1, "b": 2}', '{"b":2,"a":1}', True),
        ("json", '{"a": 1}', 'Sure! {"a": 1}', False),
        ("json", '{"a": 1}', '{"a": 2}', False),
        ("json", "null", "no json", False),
        ("number", "steps\n#### 1,200", "it is\n#### 1200", True),
        ("number", "#### 7", "first 3, then 7", True),
        ("number", "#### 7", "#### 8 and not 7", False),
        ("number", "#### -2.5", "#### -2.5", True),
        ("number", "#### 7", "no number", False),
        ("exact", "The  answer", "The answer ", True),
        ("exact", "The answer", "the answer", False),
    ],
)
def test_right(kind: str, reference: str, answer: str, expected: bool) -> None:
    assert right(kind, reference, answer) is expected


def attempt(path: Path) -> Attempt:
    spec = JobSpec(model=ModelRef(id="x"), data=(DataSource(source=str(path)),), eval=EvalSpec(fraction=0.25))
    return Attempt(job="j-aaaaaa", number=1, spec=spec, plan_hash="p")


def test_held_out_rows_are_those_that_training_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) + "\n" for n in range(20)))
    rows = held_out(attempt(path))
    trained = {example.row for example in data.prepare(attempt(path).spec).train}
    assert len(rows) == 5
    assert trained.isdisjoint(row for row, _, _ in rows)
    row, turns, reference = rows[0]
    assert turns == [{"role": "user", "content": f"p{row}"}]
    assert reference == f"c{row}"


def test_plain_text_has_nothing_to_compare(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(20)))
    with pytest.raises(InputError) as caught:
        held_out(attempt(path))
    assert caught.value.code == "evaluate.no_rows"


def test_without_a_token_for_padding_the_end_of_text_pads(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompts = ["a long prompt", "short"]
    usual = generate(model, tokenizer, prompts, 4)
    tokenizer.pad_token = None
    assert generate(model, tokenizer, prompts, 4) == usual


@pytest.mark.parametrize(("rows", "code"), [("0", "evaluate.rows"), ("-1", "evaluate.rows"), ("2", "internal")])
def test_whatever_goes_wrong_is_told_as_an_error(
    tmp_path: Path, rows: str, code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "nowhere"), "--rows", rows])
    assert evaluate.main() != 0
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == code


def test_the_home_is_known_from_the_attempts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESMITH_HOME", raising=False)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": "p", "completion": "c"}) + "\n" for _ in range(9))
    )
    folder = tmp_path / "jobs" / "j-aaaaaa" / "attempts" / "1"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text(json.dumps(plain(attempt(tmp_path / "rows.jsonl"))))
    asked: list[Path] = []

    class Found(Exception):
        pass

    def locate(ref: ModelRef, cache: Path) -> Path:
        asked.append(cache)
        raise Found

    monkeypatch.setattr(weights, "locate", locate)
    with pytest.raises(Found):
        list(evaluate.side_by_side(folder, 1))
    assert asked == [tmp_path / "cache"]
