"""From a spec to the rows of a run: nothing is lost without being counted, and held-out rows never train."""

import pytest

from tunesmith.executors.kernel.data import prepare
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataSource, EvalSpec, JobSpec, ModelRef


def rows(count, start=0):
    return [{"question": f"q{number}", "answer": f"a{number}"} for number in range(start, start + count)]


def test_split_and_dropped_rows(write, make_spec):
    path = write(
        "r.jsonl", [*rows(50), {"question": "q", "answer": ""}, *rows(50, 50), {"question": None, "answer": "a"}]
    )
    prepared = prepare(make_spec(path, fraction=0.1))
    assert prepared.rows == 102
    assert len(prepared.eval) == 10
    assert len(prepared.train) == 90
    assert [(error.code, error.where) for error in prepared.dropped] == [
        ("data.row.empty_answer", "r.jsonl:51"),
        ("data.row.empty_turn", "r.jsonl:102"),
    ]
    numbers = [example.row for example in prepared.train + prepared.eval]
    assert sorted(numbers) == [number for number in range(102) if number not in (50, 101)]
    assert prepare(make_spec(path, fraction=0.1)).eval == prepared.eval
    assert prepare(make_spec(path, fraction=0.1, seed=7)).eval != prepared.eval


def test_sources_of_different_formats_are_mixed_by_weight(write, make_spec):
    other = [
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": f"b{n}"}]} for n in range(10)
    ]
    one = DataSource(source=write("one.jsonl", rows(10)), weight=0.5)
    two = DataSource(source=write("two.jsonl", other), weight=2)
    prepared = prepare(make_spec(one, two, fraction=0))
    assert len(prepared.train) == 5 + 20
    assert sum(example.messages is not None for example in prepared.train) == 20
    mixed = prepare(make_spec(one, two, fraction=0.2))
    assert not {example.row for example in mixed.train} & {example.row for example in mixed.eval}


def test_a_source_for_evaluation(write, make_spec):
    path, other = write("r.jsonl", rows(10)), write("e.jsonl", rows(3, 100))
    spec = JobSpec(model=ModelRef(id="m"), data=(DataSource(source=path),), eval=EvalSpec(source=other))
    prepared = prepare(spec)
    assert len(prepared.train) == 10
    assert [example.prompt for example in prepared.eval] == ["q100", "q101", "q102"]
    assert len({example.row for example in prepared.train + prepared.eval}) == 13


def test_nothing_left_to_train_on(write, make_spec):
    with pytest.raises(InputError) as caught:
        prepare(make_spec(write("r.jsonl", [{"question": "q", "answer": ""}] * 3)))
    assert caught.value.code == "data.no_usable_rows"
    assert "r.jsonl:1" in caught.value.why


def test_an_error_of_a_source_names_it(write, make_spec):
    with pytest.raises(InputError) as caught:
        prepare(make_spec(write("r.jsonl", [{"n": 1}])))
    assert caught.value.code == "data.wrong_columns"
    assert "r.jsonl" in caught.value.where
