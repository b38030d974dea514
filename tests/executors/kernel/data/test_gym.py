"""Tasks of Reasoning Gym as data: the same rows wherever they are made, refused by name where there are none."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from tunesmith.executors.kernel.data import check, fingerprint, inspect, mapping_of, prepare, read, rows_in
from tunesmith.executors.kernel.data.gym import _asked, is_gym
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataSource, EvalSpec, JobSpec, ModelRef


def source(task="chain_sum", **more):
    return DataSource(source=f"reasoning-gym:{task}", **{"limit": 12, **more})


def test_what_names_a_task():
    assert is_gym("reasoning-gym:chain_sum")
    assert is_gym("reasoning_gym:chain_sum")
    assert not is_gym("reasoning-gym/chain_sum")
    assert not is_gym("chain_sum.jsonl")


@pytest.mark.slow
def test_rows_are_the_librarys_own():
    import reasoning_gym

    found = list(read([source(config='{"max_terms": 2}')]))
    wanted = list(reasoning_gym.create_dataset("chain_sum", max_terms=2, seed=0, size=12))
    assert [row.values["prompt"] for row in found] == [entry["question"] for entry in wanted]
    assert [row.values["answer"] for row in found] == [entry["answer"] for entry in wanted]
    assert [row.values["metadata"]["expression"] for row in found] == [one["metadata"]["expression"] for one in wanted]


def test_rows_hold_prompt_answer_and_metadata():
    row = list(read([source(config='{"max_terms": 2}')]))[3]
    assert row.where == "reasoning-gym:chain_sum row 4"
    assert set(row.values) == {"prompt", "answer", "metadata"}
    metadata = row.values["metadata"]
    assert metadata["source_dataset"] == "chain_sum"
    assert metadata["source_index"] == 3
    assert metadata["source_config"] == {"max_terms": 2, "seed": 0, "size": 12}


def test_limit_size_and_fraction_say_how_many():
    assert len(list(read([source(limit=5)]))) == rows_in(source(limit=5)) == 5
    assert len(list(read([source(limit=5, config='{"size": 9}')]))) == 5
    assert rows_in(source(limit=5, config='{"size": 9}')) == 9
    assert rows_in(source(limit=None)) == 500
    assert len(list(read([source(limit=10, fraction=0.5)]))) == 5


def test_rows_follow_from_the_seed_and_no_split_shares_them():
    def prompts(**more):
        return [row.values["prompt"] for row in read([source(**more)])]

    assert prompts() == prompts()
    assert not set(prompts()) & set(prompts(config='{"seed": 1000}'))
    assert not set(prompts()) & set(prompts(split="test"))
    assert not set(prompts(split="validation")) & set(prompts(split="test"))
    assert not set(prompts()) & set(prompts(split="val"))
    assert prompts(split="validation") == prompts(split="val") == prompts(split="valid") == prompts(split="Dev")


def test_near_seeds_share_no_rows():
    """Entries are made from seed + place: the seeds that the library sees must lie further apart than rows."""
    made = sorted(
        json.loads(_asked(source(config=json.dumps({"seed": seed}), split=split))[1])["seed"]
        for seed in (*range(500), 1337, 2024, 9999)
        for split in ("train", "test", "validation")
    )
    assert made[0] == 0
    assert made[-1] < 2**32 - 80_000
    assert min(after - before for before, after in itertools.pairwise(made)) > 80_000
    first, second = (
        [row.values["metadata"]["expression"] for row in read([source(config=json.dumps({"seed": seed}))])]
        for seed in (0, 1)
    )
    assert not set(first) & set(second)


def test_the_fingerprint_is_of_the_rows():
    marks = [
        fingerprint([source()]),
        fingerprint([source(config='{"seed": 1}')]),
        fingerprint([source(config='{"max_terms": 3}')]),
        fingerprint([source(split="test")]),
        fingerprint([source("leg_counting")]),
    ]
    assert len(set(marks)) == len(marks)
    assert fingerprint([source()]) == marks[0]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["word_ladder", "isomorphic_strings"])
def test_rows_are_the_same_in_processes_of_other_hash_seeds(task):
    """These tasks walk through sets of texts, whose order is another in each process."""
    program = (
        "from tunesmith.executors.kernel.data import fingerprint\n"
        "from tunesmith.orchestrator.nouns import DataSource\n"
        f"print(fingerprint([DataSource(source='reasoning-gym:{task}', limit=6)]))\n"
    )
    marks = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-P", "-c", program]
        env = {**os.environ, "PYTHONHASHSEED": seed}
        marks.add(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert len(marks) == 1


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (source("chain_sums"), "data.gym", "Did you mean chain_sum"),
        (source("zzzzzz"), "data.gym", "It has ab, acre"),
        (source(""), "data.gym", "no task ''"),
        (source("composite"), "data.gym_config", "at least one dataset"),
        (source(config="max_terms=2"), "data.gym_config", "no JSON"),
        (source(config="[2]"), "data.gym_config", "no mapping"),
        (source(config='{"max_term": 2}'), "data.gym_config", "its settings are min_terms, max_terms"),
        (source(config='{"max_terms": 1}'), "data.gym_config", "max_terms must be >= min_terms"),
        (source(config='{"max_terms": "many"}'), "data.gym_config", "TypeError"),
        (source(config='{"seed": "x"}'), "data.gym_config", "seed must be a whole number"),
        (source(config='{"size": -1}'), "data.gym_config", "size must be a whole number"),
        (source(split="tets"), "data.gym_config", "no split 'tets'"),
        (source(split="train[:10]"), "data.gym_config", "train, test, validation"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(given, code, said):
    with pytest.raises(InputError) as caught:
        list(read([given]))
    assert caught.value.code == code
    assert said in str(caught.value)


def test_a_missing_library_comes_with_its_command(tmp_path):
    """In a child that cannot import it: the library is really asked for, and only there."""
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('not here')\n")
    program = (
        "from tunesmith.executors.kernel.data import read\n"
        "from tunesmith.orchestrator.errors import InputError\n"
        "from tunesmith.orchestrator.nouns import DataSource\n"
        "try:\n"
        "    list(read([DataSource(source='reasoning-gym:chain_sum')]))\n"
        "except InputError as error:\n"
        "    print(error.code, error.fix)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("reward.package pip install reasoning-gym")


def test_a_task_is_mapped_checked_and_split_like_any_data():
    assert mapping_of(source(), method="grpo").keep == ("answer", "metadata")
    assert mapping_of(source(), method="sft").kind == "prompt-completion"
    document = check([source()], method="grpo")
    assert document["ready"]["grpo"]
    assert (document["rows"], document["used_rows"]) == (12, 12)
    spec = JobSpec(
        model=ModelRef(id="m"),
        data=(source(),),
        method="grpo",
        eval=EvalSpec(source="reasoning-gym:chain_sum"),
    )
    report = inspect(spec)
    assert (report.rows, report.used_rows, report.eval_rows) == (12, 12, 500)
    assert report.fingerprint == fingerprint([source()])
    prepared = prepare(spec)
    assert len(prepared.train) == 12
    assert not {row.prompt for row in prepared.train} & {row.prompt for row in prepared.eval}
    assert set(prepared.train[0].extra) == {"answer", "metadata"}
