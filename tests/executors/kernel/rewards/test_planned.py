"""What a plan says of rewards: what auto becomes, what the files are, what is missing."""

import hashlib
import json

import pytest

from tunesmith.executors.kernel.rewards import auto, check, make
from tunesmith.orchestrator.nouns import DataSource, GrpoSpec, JobSpec, ModelRef


def job(*entries, backend="local", **grpo):
    data = (DataSource(source="rows.jsonl"),)
    spec = GrpoSpec(rewards=entries, **grpo)
    return JobSpec(model=ModelRef(id="m"), data=data, method="grpo", grpo=spec, backend=backend)


def rows(*answers, column="answer"):
    return [{column: answer} for answer in answers]


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        (["Half is 2\n#### 2", "#### -1,000"], "number"),
        (["2", "-1,000", "$3.50", "3/4"], "number"),
        ([2, 3.5], "number"),
        ([r"So \boxed{2}", r"\boxed{\frac{1}{2}}"], "boxed"),
        (["5", r"\frac{1}{2}", "(1, 2)"], "boxed"),
        (['{"a": 1}', '{"b": 2}'], "json:answer"),
        ([{"a": 1}], "json:answer"),
        (['["a", "b"]'], "json:answer"),
        (["Paris", "Rome", "x = 2"], "exact"),
        (["A", "B", None, ""], "exact"),
        ([["Paris", "paris"], ["Rome"]], "exact"),
        (["#### two", "#### 2"], "exact"),
        (["x" * 500, "Paris"], None),
        (["a\nb"], None),
        ([True, False], None),
        ([None, ""], None),
        ([[["a"]]], None),
        ([], None),
    ],
)
def test_auto_is_told_by_the_answers(answers, wanted):
    found = auto(rows(*answers), ["answer"])
    assert (found and found.rewards) == (wanted and (wanted,))
    assert found is None or found.why


def test_auto_takes_the_most_telling_column_and_no_other():
    both = [{"solution": "long " * 50, "answer": "72"}]
    assert auto(both, ["solution", "answer"]).rewards == ("number",)
    assert auto(both, ["solution"]) is None
    assert auto(both, []) is None
    assert auto([{"Final Answer": "72"}], ["Final Answer"]).rewards == ("number",)
    assert auto([{"topic": "72"}], ["topic"]) is None


def test_auto_knows_rows_of_reasoning_gym():
    row = {"answer": "3", "metadata": {"source_dataset": "chain_sum"}}
    assert auto([row], ["answer", "metadata"]).rewards == ("reasoning-gym",)
    assert auto([row, {"answer": "3", "metadata": {}}], ["answer", "metadata"]).rewards == ("number",)


def test_gsm8k_is_told_by_its_rows(real):
    with (real / "gsm8k_train.jsonl").open() as lines:
        found = [json.loads(line) for line, _ in zip(lines, range(100), strict=False)]
    assert auto(found, ["answer"]).rewards == ("number",)


def test_every_file_is_shown_with_function_and_hash(own, tmp_path):
    path = own("def a(**k): ...\ndef b(**k): ...\n")
    schema = tmp_path / "s.json"
    schema.write_text("{}")
    checked = check(job("number", f"0.5*{path}:b", f"json:{schema}"), ["answer"])
    hashes = [hashlib.sha256(one.read_bytes()).hexdigest() for one in (path, schema)]
    assert list(checked.hashes) == hashes
    assert [(item.level, item.code, item.where) for item in checked.findings] == [
        ("info", "reward.file", "grpo.rewards.1"),
        ("info", "reward.file", "grpo.rewards.2"),
    ]
    assert f"{path}: function b, 32 bytes, SHA-256 {hashes[0]}" in checked.findings[0].message
    assert hashes[1] in checked.findings[1].message


def test_every_mistake_is_told_at_its_place(own, tmp_path):
    path = own("def a(**k): ...\n")
    entries = ("nmber", f"{path}:b", "regex:(", f"json:{tmp_path / 'none.json'}", "number:topic", "reasoning-gym")
    found = check(job(*entries), ["answer"]).findings
    assert [(item.code, item.where) for item in found if item.level == "error"] == [
        ("reward.unknown", "grpo.rewards.0"),
        ("reward.function", "grpo.rewards.1"),
        ("reward.pattern", "grpo.rewards.2"),
        ("reward.file", "grpo.rewards.3"),
        ("reward.no_column", "grpo.rewards.4"),
        ("reward.no_column", "grpo.rewards.5"),
    ]
    assert check(job("number", "think", reward_weights=(1.0,)), None).findings[0].code == "reward.weights"


@pytest.mark.parametrize("entry", ["number", "boxed", "exact", "json:answer"])
def test_rewards_that_compare_need_a_column(entry):
    (finding,) = check(job(entry), ["difficulty"]).findings
    assert (finding.code, "difficulty" in finding.message) == ("reward.no_column", True)
    assert check(job(entry), ["answer"]).findings == ()
    assert check(job(entry), None).findings == ()


@pytest.mark.parametrize("entry", ["think", "length:5", "json", "regex:a"])
def test_rewards_that_compare_with_nothing_need_none(entry):
    assert check(job(entry), []).findings == ()


def test_packages_are_asked_for_where_the_job_runs_here(monkeypatch):
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda name: None)
    (finding,) = check(job("boxed"), ["answer"]).findings
    assert (finding.code, "pip install math-verify" in finding.fix) == ("reward.package", True)
    assert check(job("boxed", backend="hf-jobs"), ["answer"]).findings == ()
    assert check(job("json"), ["answer"]).findings == ()
