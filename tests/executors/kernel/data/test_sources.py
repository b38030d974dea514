"""Rows of several sources, limits and shares, and a fingerprint of the content."""

import shutil
from pathlib import Path

import pytest

from tunesmith.executors.kernel.data import fingerprint, read, rows_in
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataSource


def rows(count, start=0):
    return [{"text": f"row {number}"} for number in range(start, start + count)]


def texts(*sources):
    return [row.values["text"] for row in read(sources)]


def test_rows_are_numbered_over_all_sources(write):
    one, two = write("one.jsonl", rows(2)), write("two.jsonl", rows(2, 2))
    found = list(read([DataSource(source=one), DataSource(source=two)]))
    assert [(row.number, row.where, row.source) for row in found] == [
        (0, "one.jsonl:1", 0),
        (1, "one.jsonl:2", 0),
        (2, "two.jsonl:1", 1),
        (3, "two.jsonl:2", 1),
    ]


def test_limit_takes_the_first_rows_without_reading_on(write):
    path = write("r.jsonl", '{"text": "row 0"}\n{"text": "row 1"}\nbroken\n')
    assert texts(DataSource(source=path, limit=2)) == ["row 0", "row 1"]


@pytest.mark.parametrize("count, fraction, expected", [(2500, 0.1, 250), (10, 0.25, 3), (3, 0.01, 1), (10, 1, 10)])
def test_fraction_takes_an_exact_seeded_share_in_order(write, count, fraction, expected):
    source = DataSource(source=write("r.jsonl", rows(count)), fraction=fraction)
    taken = texts(source)
    assert len(taken) == expected
    assert taken == texts(source)
    numbers = [int(text.split()[1]) for text in taken]
    assert numbers == sorted(set(numbers))
    assert rows_in(source) == count


def test_a_share_is_spread_over_the_file(write):
    taken = texts(DataSource(source=write("r.jsonl", rows(5000)), fraction=0.2))
    for start in range(0, 5000, 1000):
        assert sum(start <= int(text.split()[1]) < start + 1000 for text in taken) == 200


def test_limit_comes_before_fraction(write):
    taken = texts(DataSource(source=write("r.jsonl", rows(100)), limit=10, fraction=0.5))
    assert len(taken) == 5
    assert set(taken) <= {f"row {number}" for number in range(10)}


def test_the_fingerprint_knows_content_and_choice_and_not_the_path(write, tmp_path):
    path = write("r.jsonl", rows(3))
    first = fingerprint([DataSource(source=path)])
    assert first.startswith("sha256:")
    assert len(first) == 7 + 64
    shutil.copy(path, tmp_path / "copy.jsonl")
    assert fingerprint([DataSource(source=str(tmp_path / "copy.jsonl"))]) == first
    others = [
        fingerprint([DataSource(source=path, limit=2)]),
        fingerprint([DataSource(source=path, fraction=0.5)]),
        fingerprint([DataSource(source=path, split="test")]),
        fingerprint([DataSource(source=path, config="c")]),
        fingerprint([DataSource(source=path), DataSource(source=path)]),
    ]
    with Path(path).open("a") as handle:
        handle.write(" ")
    others.append(fingerprint([DataSource(source=path)]))
    assert len({first, *others}) == 7


def test_a_hub_id_offline_says_why():
    with pytest.raises(InputError) as caught:
        list(read([DataSource(source="open-r1/codeforces-cots")]))
    assert caught.value.code == "data.unreachable"
    assert "out of reach" in caught.value.why
