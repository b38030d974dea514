"""A user's file: read and looked at when a job is planned, run in the job's process alone, from what was approved."""

import sys

import pytest

from tunesmith.executors.kernel import rewards
from tunesmith.executors.kernel.rewards import files
from tunesmith.orchestrator.errors import InputError

GOOD = """
from __future__ import annotations
import functools
from dataclasses import dataclass

@dataclass
class Scaled:
    factor: float

    def __call__(self, completions, **kwargs):
        return [self.factor * len(text) for text in completions]

def score(completions, **kwargs):
    return [1.0 for _ in completions]

def _hidden(completions, **kwargs):
    return [2.0 for _ in completions]

scaled = Scaled(0.5)
partial = functools.partial(Scaled(1.0), extra=1)
if True:
    from math import fsum as borrowed
NUMBER = 3
"""


def named(path, name=""):
    entry = rewards.parse(f"{path}:{name}" if name else str(path))
    return files.named(entry, files.content(entry.path))


def test_the_only_public_function_need_not_be_named(own):
    assert named(own(GOOD)) == "score"
    assert named(own(GOOD), "_hidden") == "_hidden"


@pytest.mark.parametrize("name", ["scaled", "partial", "borrowed", "Scaled"])
def test_whatever_a_file_binds_may_be_named(own, name):
    assert named(own(GOOD), name) == name


@pytest.mark.parametrize(
    ("text", "name", "code", "said"),
    [
        ("def a(**k): ...\ndef b(**k): ...\n", "", "reward.function", "It defines a, b."),
        ("x = 1\n", "", "reward.function", "no public function"),
        ("def score(**k): ...\n", "scores", "reward.function", "'score'"),
        ("def score(:\n", "score", "reward.file", "line 1"),
        ("\0", "score", "reward.file", "no Python"),
        ("(" * 500, "score", "reward.file", "no Python"),
    ],
)
def test_what_cannot_be_a_reward_is_refused_without_running_it(own, text, name, code, said):
    with pytest.raises(InputError) as caught:
        named(own(text), name)
    assert caught.value.code == code
    assert said in str(caught.value)


def test_a_star_import_may_bind_any_name(own):
    assert named(own("from os.path import *\n"), "join") == "join"


def test_missing_and_huge_files_are_refused(own, tmp_path):
    own("", "rewards.py")
    with pytest.raises(InputError) as caught:
        files.content(str(tmp_path / "reward.py"))
    assert (caught.value.code, "'rewards.py'" in caught.value.fix) == ("reward.file", True)
    with pytest.raises(InputError, match="larger than 4 MiB"):
        files.content(str(own("#" * (files.MOST_BYTES + 1))))
    with pytest.raises(InputError):
        files.content(str(tmp_path))


def test_planning_never_runs_a_file(own, tmp_path):
    mark = tmp_path / "ran"
    path = own(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef score(completions, **k): return [0.0]\n")
    job = _spec(f"{path}:score")
    rewards.hashes(job)
    checked = rewards.check(job, [])
    assert [item.code for item in checked.findings] == ["reward.file"]
    assert not mark.exists()
    rewards.load(job, checked.hashes).close()
    assert mark.exists()


def _spec(*entries, **grpo):
    from tunesmith.orchestrator.nouns import DataSource, GrpoSpec, JobSpec, ModelRef

    return JobSpec(
        model=ModelRef(id="m"), data=(DataSource(source="r"),), method="grpo", grpo=GrpoSpec(rewards=entries, **grpo)
    )


def test_a_file_changed_since_the_plan_is_refused(own, tmp_path, load):
    schema = tmp_path / "s.json"
    schema.write_text("{}")
    path = own("def score(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    entries = ("number", f"{path}:score", f"json:{schema}")
    approved = rewards.hashes(_spec(*entries))
    assert len(approved) == 2
    assert load(*entries, approved=approved).names == ("number", "score", "json")
    schema.write_text('{"type": "object"}')
    with pytest.raises(InputError) as caught:
        load(*entries, approved=approved)
    assert (caught.value.code, caught.value.where) == ("reward.changed", str(schema))
    schema.write_text("{}")
    path.write_text(path.read_text() + "\n")
    with pytest.raises(InputError, match=r"own\.py has changed") as caught:
        load(*entries, approved=approved)
    assert caught.value.code == "reward.changed"
    with pytest.raises(InputError, match="approved 0 reward files, and the spec names 2") as caught:
        load(*entries, approved=[])
    assert caught.value.code == "reward.changed"


def test_what_runs_is_what_was_hashed(own):
    """The bytes are read once: a file swapped between hash and run cannot slip in."""
    path = own("def score(completions, **kwargs):\n    return [1.0]\n")
    entry = rewards.parse(f"{path}:score")
    data = files.content(entry.path)
    path.write_text("raise SystemExit\n")
    assert files.function(entry, data)(completions=["x"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("import no_such_module\ndef score(**k): ...\n", "ModuleNotFoundError", 1),
        ("def score(**k): ...\n\nraise ValueError('bad\\nlines')\n", "ValueError: bad", 3),
        ("def score(**k): ...\nimport sys\nsys.exit(3)\n", "SystemExit: 3", 3),
    ],
)
def test_a_file_that_does_not_load_says_where(own, load, text, said, line):
    path = own(text)
    with pytest.raises(InputError) as caught:
        load(f"{path}:score")
    assert (caught.value.code, caught.value.where) == ("reward.load", f"{path}:{line}")
    assert said in caught.value.why


def test_neighbours_of_a_file_are_not_imported(own, load):
    own("VALUE = 1\n", "neighbour.py")
    path = own("import neighbour\ndef score(**k): ...\n")
    with pytest.raises(InputError) as caught:
        load(f"{path}:score")
    assert "cannot be imported" in caught.value.fix
    assert "neighbour" not in sys.modules


@pytest.mark.parametrize("name", ["NUMBER", "Scaled"])
def test_only_functions_are_rewards(own, load, name):
    with pytest.raises(InputError) as caught:
        load(f"{own(GOOD)}:{name}")
    assert caught.value.code == "reward.function"


def test_every_form_of_a_function_works(own, load):
    path = own(GOOD)
    found = load(str(path), f"0.1*{path}:_hidden", f"{path}:scaled", f"{path}:partial")
    assert found.names == ("score", "_hidden", "scaled", "partial")
    scores = found.score(["q"], ["abcd"], [[1]], {}, 1)
    assert scores.values == [[1.0, 2.0, 2.0, 4.0]]
    assert scores.totals == pytest.approx([7.2])


def test_two_rewards_of_one_name_are_told_apart(own, load):
    path = own(GOOD)
    assert load("regex:a", f"{path}:score", "regex:b", f"2*{path}:score").names == (
        "regex",
        "score",
        "regex-2",
        "score-2",
    )
