"""docs/guide/rewards.md: its functions, its entries and its specs work as they stand there."""

import re
from pathlib import Path

import pytest

from tunesmith.executors.kernel.rewards import BUILT_IN, parse
from tunesmith.orchestrator.wire import read_spec

GUIDE = (Path(__file__).parents[4] / "docs" / "guide" / "rewards.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_its_functions_run(own, load):
    (code,) = blocks("python")
    path = own(code, "rewards.py")
    names = ("concise", "near", "judged")
    found = load("number", *(f"{path}:{name}" for name in names))
    done = ["It is 72.", "about 70", "", "no"]
    answers = ["#### 72", "#### 72", "#### 72", "none"]
    for completions in (done, [[{"role": "assistant", "content": text}] for text in done]):
        scores = found.score(["q"] * 4, completions, [[1]] * 4, {"answer": answers}, 3)
        assert scores.values == [
            [1.0, 0.25, 1.0, 0.5],
            [0.0, pytest.approx(1 / 3), pytest.approx(1 / 3), 0.5],
            [0.0, 1.0, 0.0, 0.0],
            [None, 0.5, None, 0.5],
        ]
        assert scores.told["judge/step"] == 3.0


def test_its_specs_can_be_read():
    specs = [read_spec(text) for text in blocks("yaml")]
    assert [spec.method for spec in specs] == ["grpo", "grpo"]
    for spec in specs:
        for text in spec.grpo.rewards:
            parse(text)


def test_its_entries_are_the_grammar():
    rows = re.findall(r"^\| (`.*?) \|", GUIDE, re.MULTILINE)
    entries = [entry for row in rows for entry in re.findall(r"`([^`]+)`", row)]
    kinds = {parse(entry.replace("N", "9").replace("PATTER9", "a")).kind for entry in entries}
    assert kinds == set(BUILT_IN)
