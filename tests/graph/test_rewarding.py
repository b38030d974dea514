"""Rewards in plans: chosen from the rows, asked for where nobody can know, and bound to the plan by their hashes."""

import hashlib
import json
import subprocess
import sys

import pytest

from tunesmith.graph.decisions import next_attempt
from tunesmith.graph.draft import StageDraft
from tunesmith.graph.planning import plan
from tunesmith.graph.rewarding import rewarded
from tunesmith.graph.settings import absolute, spelled_out
from tunesmith.orchestrator.nouns import (
    Approval,
    Attempt,
    DataReport,
    DataSource,
    Device,
    Finding,
    GrpoSpec,
    JobSpec,
    Mapping,
    ModelRef,
    Plan,
    Request,
)
from tunesmith.orchestrator.plain import build, plain
from tunesmith.orchestrator.states import JobState

CPU = Device(backend="local", hardware="cpu", kind="cpu", memory_bytes=24 * 2**30, peak_flops=3e11, bandwidth=2e10)
SCORE = "def score(completions, **kwargs):\n    return [0.0] * len(completions)\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No Hub, and no models in a cache of the machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def make(tmp_path):
    """Plans a sentence or a spec in the test's folder."""

    def made(text=None, answers=None, **request):
        wanted = Request(text=text, cwd=str(tmp_path), **request)
        return plan(wanted, devices=lambda backend: (CPU,), answers=answers, cache=tmp_path / "cache")

    return made


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines, or a text as it is."""

    def write(name, content):
        lines = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(lines)
        return tmp_path / name

    return write


def codes(found):
    return [item.code for item in found.errors]


def sums(count=30):
    return [{"question": f"{at} + 1 = ?", "answer": f"#### {at + 1}", "level": "easy"} for at in range(count)]


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_auto_becomes_what_the_rows_call_for(make, write, method):
    write("sums.jsonl", sums())
    found = make(f"{method} smollm2-135m on sums.jsonl")
    (stage,) = found.stages
    assert (codes(found), found.questions) == ([], ())
    assert stage.spec.grpo.rewards == ("number",)
    assert stage.spec.data[0].mapping.keep == ("answer", "level")
    chosen = {item.key: item for item in stage.resolved}
    assert chosen["grpo.rewards"].value == ["number"]
    assert "####" in chosen["grpo.rewards"].why
    assert stage.reward_hashes == ()


def test_where_no_row_tells_the_plan_asks_and_the_answer_settles_it(make, write):
    write("prompts.jsonl", [{"prompt": f"Write about {at}."} for at in range(30)])
    asked = make("GRPO smollm2-135m on prompts.jsonl")
    (question,) = asked.questions
    assert question.field == "grpo.rewards"
    assert "FILE.py:FUNCTION" in question.text
    assert "number" in question.choices
    for answer in ("length:200", ["length:200", "0.2*think"]):
        found = make("GRPO smollm2-135m on prompts.jsonl", answers={"grpo.rewards": answer})
        assert (found.questions, codes(found)) == ((), [])
        assert found.stages[0].spec.grpo.rewards == tuple([answer] if isinstance(answer, str) else answer)
        assert found.plan_hash != asked.plan_hash


def test_sources_that_call_for_different_rewards_are_asked_about(make, write):
    write("a.jsonl", sums())
    write("b.jsonl", [{"question": f"Capital {at}?", "answer": "Paris"} for at in range(30)])
    spec = {"model": {"id": "smollm2-135m"}, "method": "grpo", "data": [{"source": "a.jsonl"}, {"source": "b.jsonl"}]}
    assert [item.field for item in make(spec=spec).questions] == ["grpo.rewards"]
    spec["data"][1]["source"] = "a.jsonl"
    assert make(spec=spec).questions == ()


def test_data_that_cannot_be_used_asks_nothing(make):
    found = make("GRPO smollm2-135m on nothing.jsonl")
    assert (codes(found), found.questions) == (["data.missing_file"], ())


def test_data_out_of_reach_is_asked_about(make):
    found = make("GRPO smollm2-135m on the dataset openai/gsm8k")
    assert [item.field for item in found.questions] == ["grpo.rewards"]


@pytest.mark.parametrize("said", ["rewards.py", "rewards.py:score", "./rewards.py:score"])
def test_a_file_named_in_a_sentence_is_shown_with_its_hash(make, write, said):
    write("sums.jsonl", sums())
    path = write("rewards.py", SCORE)
    found = make(f"GRPO smollm2-135m on sums.jsonl with {said} as the reward")
    (stage,) = found.stages
    mark = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (codes(found), found.unread) == ([], ())
    assert stage.spec.grpo.rewards == (str(path) + said.partition(".py")[2],)
    assert stage.reward_hashes == (mark,)
    (shown,) = [item for item in stage.findings if item.code == "reward.file"]
    assert (shown.level, shown.where) == ("info", "grpo.rewards.0")
    assert all(part in shown.message for part in (str(path), "function score", mark))


def test_the_hash_of_a_file_is_in_the_plans_hash(make, write):
    write("sums.jsonl", sums())
    write("rewards.py", SCORE)
    spec = {
        "model": {"id": "smollm2-135m"},
        "method": "grpo",
        "data": [{"source": "sums.jsonl"}],
        "grpo": {"rewards": ["0.5*rewards.py:score", "number"]},
    }
    first, again = make(spec=spec), make(spec=spec)
    write("rewards.py", SCORE + "\n")
    assert first.plan_hash == again.plan_hash != make(spec=spec).plan_hash


def test_mistakes_stand_in_the_plan(make, write):
    write("sums.jsonl", sums())
    write("rewards.py", SCORE)
    spec = {
        "model": {"id": "smollm2-135m"},
        "method": "grpo",
        "data": [{"source": "sums.jsonl"}],
        "grpo": {"rewards": ["rewards.py:scores", "nmber", "number:points"]},
    }
    found = [item for item in make(spec=spec).errors if item.code.startswith("reward.")]
    assert [(item.code, item.where) for item in found] == [
        ("reward.function", "grpo.rewards.0"),
        ("reward.unknown", "grpo.rewards.1"),
        ("reward.no_column", "grpo.rewards.2"),
    ]


def test_rewards_of_other_methods_are_left_alone(make, write):
    write("sums.jsonl", sums())
    found = make("SFT smollm2-135m on sums.jsonl")
    assert found.questions == ()
    assert found.stages[0].spec.grpo.rewards == ("auto",)


def test_stages_are_asked_about_by_their_number():
    source = DataSource(source="x", mapping=Mapping(kind="prompt-only", columns={"prompt": "p"}))
    spec = JobSpec(model=ModelRef(id="m"), data=(source,), method="grpo")
    stages, questions = rewarded([StageDraft(spec=JobSpec(model=ModelRef(id="m"), data=())), StageDraft(spec=spec)])
    assert [item.field for item in questions] == ["stages.1.grpo.rewards"]
    assert [stage.spec.method for stage in stages] == ["sft", "grpo"]


def test_an_error_that_was_said_is_not_said_again():
    spec = JobSpec(
        model=ModelRef(id="m"),
        data=(DataSource(source="x"),),
        method="grpo",
        grpo=GrpoSpec(rewards=("number", "think"), reward_weights=(1.0,)),
    )
    said = Finding(level="error", code="x", message="x", where="grpo.reward_weights")
    report = DataReport(rows=1, used_rows=1, eval_rows=0, format=None, mapping=None, fingerprint=None)
    ((once,), _) = rewarded([StageDraft(spec=spec, data=report, findings=(said,))])
    assert once.findings == (said,)
    ((fresh,), _) = rewarded([StageDraft(spec=spec, data=report)])
    assert [item.code for item in fresh.findings] == ["reward.weights"]


def test_an_attempt_carries_the_hashes_of_the_approved_plan(make, write):
    write("sums.jsonl", sums())
    path = write("rewards.py", SCORE)
    found = make("GRPO smollm2-135m on sums.jsonl with rewards.py:score as the reward")
    mark = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text("changed = True\n")  # after the plan: the attempt must not look again

    class View:
        id, plan, state, attempts = "j-aaaaaa", build(Plan, json.loads(json.dumps(plain(found)))), JobState.QUEUED, ()
        approval = Approval(plan_hash=found.plan_hash, by="me")

    attempt = next_attempt(View)
    assert attempt.reward_hashes == (mark,)
    assert build(Attempt, json.loads(json.dumps(plain(attempt)))).reward_hashes == (mark,)
    assert build(Attempt, {**plain(attempt), "reward_hashes": []}).reward_hashes == ()


def test_a_task_of_reasoning_gym_is_planned_from_a_sentence(make):
    found = make("GRPO smollm2-135m on reasoning-gym:leg_counting, 20 rows")
    (stage,) = found.stages
    assert (codes(found), found.questions, found.unread) == ([], (), ())
    assert stage.spec.data[0].source == "reasoning-gym:leg_counting"
    assert stage.spec.grpo.rewards == ("reasoning-gym",)
    assert stage.data.used_rows == 20
    assert stage.data.fingerprint.startswith("sha256:")


def test_an_unknown_task_names_the_nearest(make):
    found = make("GRPO smollm2-135m on reasoning-gym:leg_count")
    (error,) = found.errors
    assert (error.code, "leg_counting" in error.fix) == ("data.gym", True)


def test_short_forms_and_paths_of_rewards():
    doc = spelled_out({"grpo": {"rewards": "0.5*rewards.py:score"}})
    absolute(doc, "/home/me")
    assert doc["grpo"]["rewards"] == ["0.5*/home/me/rewards.py:score"]
    doc = {"grpo": {"rewards": ["number", "json:s.json", 3]}}
    absolute(doc, "/home/me")
    assert doc["grpo"]["rewards"] == ["number", "json:/home/me/s.json", 3]


def test_a_plan_loads_no_scoring_library_and_runs_no_users_code(write, tmp_path):
    write("sums.jsonl", sums())
    mark = tmp_path / "ran"
    write("rewards.py", f"open({str(mark)!r}, 'w').close()\n{SCORE}")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tunesmith.graph.planning import plan\n"
        "from tunesmith.orchestrator.nouns import Device, Request\n"
        "device = Device(backend='local', hardware='cpu', kind='cpu', memory_bytes=2**35)\n"
        "text = 'GRPO smollm2-135m on sums.jsonl with rewards.py:score as the reward'\n"
        f"request = Request(text=text, cwd={str(tmp_path)!r})\n"
        f"found = plan(request, devices=lambda backend: (device,), cache=Path({str(tmp_path / 'cache')!r}))\n"
        "assert found.stages[0].reward_hashes\n"
        "heavy = ('torch', 'transformers', 'sympy', 'numpy', 'math_verify', 'jsonschema', 'reasoning_gym', 'asyncio')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
    assert not mark.exists()
