"""The trial before a device works: what would break after the first rollout breaks here, with reward and row."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from tunesmith.executors.kernel.rewards import dry_run
from tunesmith.orchestrator.errors import InputError


@dataclass(frozen=True)
class Row:
    """A prompt as `data.prompts` gives it."""

    row: int
    columns: dict[str, Any]
    prompt: Any = "How many?"
    ids: list[int] = field(default_factory=lambda: list(range(40)))


def rows(*answers, column="answer", **more):
    return [Row(10 + at, {column: answer, **more}) for at, answer in enumerate(answers)]


def chat(found):
    return [Row(one.row, one.columns, [{"role": "user", "content": "How many?"}]) for one in found]


GSM8K = ("Half of 144 is <<144/2=72>>72.\n#### 72", "#### 1,000", "#### -3", "#### 0", "#### 9")


@pytest.mark.parametrize(
    ("entry", "answers"),
    [
        ("number", GSM8K),
        ("number", (72, 3.5)),
        ("boxed", (r"\frac{1}{2}", "x^2", r"So \boxed{3}")),
        ("exact", ("Paris", ["Rome", "Roma"])),
        ("json:answer", ('{"a": 1}', "[1]")),
        ("json", ("x",)),
        ("think", ("x",)),
        ("think:reasoning,final", ("x",)),
        ("length:3", ("x y z",)),
    ],
)
def test_what_is_built_in_passes_on_rows_that_it_is_for(load, entry, answers):
    assert dry_run(load(entry), rows(*answers)) == ()
    assert dry_run(load(entry), chat(rows(*answers))) == ()


def test_nothing_is_tried_without_rows(load):
    assert dry_run(load("number"), []) == ()


def test_rows_from_every_part_of_the_data_are_tried(own, load):
    path = own(
        "seen = []\n"
        "def score(completions, answer, **kwargs):\n"
        "    seen.extend(answer)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    found = load(f"{path}:score")
    assert dry_run(found, rows(*map(str, range(100)))) == ()
    seen = found.rewards[0].call.__globals__["seen"]
    assert list(dict.fromkeys(seen)) == ["0", "25", "50", "75"]


def test_no_completion_is_without_tokens(own, load):
    """As no rollout gives one: functions look at the last token and divide by their number."""
    path = own(
        "def ended(completions, completion_ids, **kwargs):\n"
        "    return [(ids[-1] % 2) / len(ids) for ids in completion_ids]\n"
    )
    assert all(item.level == "warning" for item in dry_run(load(f"{path}:ended"), rows("1", "2 3")))


def test_whole_groups_are_tried(own, load):
    path = own(
        "def score(prompts, completions, **kwargs):\n"
        "    assert len(completions) % 4 == 0\n"
        "    return [float(len(set(completions[at // 4 * 4 : at // 4 * 4 + 4]))) for at in range(len(completions))]\n"
    )
    dry_run(load(f"{path}:score", num_generations=4), rows("1", "2", "3"))


@pytest.mark.parametrize(
    ("body", "said", "line"),
    [
        ("    return [1.0 / len(text) for text in completions]\n", "ZeroDivisionError", 2),
        ("    return [0.0]\n", "gave 1 rewards", None),
        ("    return ['good'] * len(completions)\n", "gave the text 'good'", None),
        ("    return [kwargs['missing']]\n", "KeyError: 'missing'", 2),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_function_that_fails_is_named_with_its_row(own, load, body, said, line, kind):
    path = own(f"{kind} score(completions, **kwargs):\n{body}")
    with pytest.raises(InputError) as caught:
        dry_run(load("number", f"{path}:score"), rows("1", "2"))
    error = caught.value
    assert error.code == "reward.dry_run"
    assert said in f"{error.message} {error.why}"
    assert error.where == (f"{path}:{line}" if line else str(path))
    if line and kind == "def":
        assert "completion 1 of" in error.message
        assert "(row 10)" in error.message


def test_a_reference_that_scores_no_better_than_a_wrong_answer_is_refused(load):
    with pytest.raises(InputError) as caught:
        dry_run(load("exact"), rows("Rome", " I do  not know. "))
    error = caught.value
    assert (error.code, error.where) == ("reward.dry_run", "row 11")
    assert "It gives 1 for" in error.why


def test_answers_that_a_reward_cannot_read_are_refused_where_they_are_all(load):
    with pytest.raises(InputError) as caught:
        dry_run(load("number"), rows("seven", "eight"))
    assert (caught.value.code, caught.value.where) == ("reward.dry_run", "row 10")
    assert "NAME:COLUMN" in caught.value.fix


def test_answers_that_a_reward_cannot_read_here_and_there_are_a_warning(load):
    (finding,) = dry_run(load("number"), rows("7", "eight", "9"))
    assert (finding.level, finding.code, finding.where) == ("warning", "reward.unreadable", "row 11")
    found = dry_run(load("number", "think"), rows("seven"))
    assert [item.code for item in found] == ["reward.never"]


def test_a_constant_reward_is_a_warning(own, load):
    path = own("def score(completions, **kwargs):\n    return [0.5] * len(completions)\n")
    (finding,) = dry_run(load(f"{path}:score"), rows("1", "2"))
    assert (finding.level, finding.code) == ("warning", "reward.constant")
    assert "0.5" in finding.message


def test_a_missing_column_is_what_it_is(load):
    with pytest.raises(InputError) as caught:
        dry_run(load("number"), [Row(1, {"topic": "x"})])
    assert caught.value.code == "reward.no_column"


def test_a_trial_leaves_no_trace_in_what_follows(load):
    found = load("number")
    dry_run(found, rows("7", "eight"))
    (alert,) = found.score(["q"], ["7"], [[1]], {"answer": ["eight"]}, 1).alerts
    assert alert.code == "reward.none"


@pytest.mark.parametrize("pattern", ["^(a+)+$", r"(\d+)*x", r"(?:.*)*=", "^(a|aa)*;$", "(x*)*y"])
def test_an_endless_pattern_is_refused_and_explained(load, monkeypatch, pattern):
    from tunesmith.executors.kernel.rewards import trial

    monkeypatch.setattr(trial, "ALARM", 0.3)
    found = load(f"regex:{pattern}")
    with pytest.raises(InputError) as caught:
        dry_run(found, rows("x"))
    assert caught.value.code == "reward.slow_pattern"
    assert "repeat" in caught.value.fix
    assert found.score(["q"], ["b"], [[1]], {}, 1).alerts == ()


@pytest.mark.parametrize("pattern", [r"^\d+$", r"<think>.*?</think>", r"(?s)^a.*b$", r"\bfoo\b|bar", "[^x]*x"])
def test_a_usual_pattern_passes(load, pattern):
    assert all(item.code != "reward.slow_pattern" for item in dry_run(load(f"regex:{pattern}"), rows("x")))


def test_a_schema_is_tried_too(load, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"type": "array"}))
    assert [item.code for item in dry_run(load(f"json:{path}"), rows("[1]"))] == ["reward.constant"]


@pytest.mark.slow
def test_reasoning_gym_rows_pass(load):
    from tunesmith.executors.kernel.data import read
    from tunesmith.orchestrator.nouns import DataSource

    found = [
        Row(row.number, {name: value for name, value in row.values.items() if name != "prompt"}, row.values["prompt"])
        for row in read([DataSource(source="reasoning-gym:chain_sum", limit=4)])
    ]
    assert dry_run(load("reasoning-gym"), found) == ()
