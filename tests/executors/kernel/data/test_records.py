"""Rows of every file type with their lines, and one typed error with its place for everything that is broken."""

import gzip
import json
from pathlib import Path

import pytest

from tunesmith.executors.kernel.data import records
from tunesmith.orchestrator.errors import InputError

ROWS = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]


def read(path):
    return list(records.records(Path(path)))


def fails(path, code):
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.code == code
    return caught.value


def test_json_lines_count_lines_from_one_and_pass_over_blank_ones(write):
    path = write("r.jsonl", "\n".join([json.dumps(ROWS[0]), "", json.dumps(ROWS[1]), ""]))
    assert read(path) == [("r.jsonl:1", ROWS[0]), ("r.jsonl:3", ROWS[1])]
    assert records.count(Path(path)) == 2


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_an_array_gives_the_line_of_each_row(write, name):
    path = write(name, json.dumps(ROWS, indent=1))
    assert read(path) == [(f"{name}:2", ROWS[0]), (f"{name}:6", ROWS[1])]
    assert records.count(Path(path)) == 2


def test_json_lines_named_json(write):
    assert [row for _, row in read(write("r.json", ROWS))] == ROWS


def test_an_object_with_one_list(write):
    assert [row for _, row in read(write("r.json", json.dumps({"version": 1, "rows": ROWS})))] == ROWS


def test_one_conversation_in_a_file_is_one_row(write):
    row = {"messages": [{"role": "user", "content": "x"}]}
    assert [values for _, values in read(write("r.json", json.dumps(row)))] == [row]


def test_tables(write):
    assert read(write("r.csv", 'q,a\n"one, ""x""\nthen",1\ntwo,2\n')) == [
        ("r.csv:2", {"q": 'one, "x"\nthen', "a": "1"}),
        ("r.csv:4", {"q": "two", "a": "2"}),
    ]
    assert [row for _, row in read(write("r.tsv", "q\ta\none\t1\n"))] == ROWS[:1]
    assert [row for _, row in read(write("semi.csv", "q;a\none;1\n"))] == ROWS[:1]
    assert [row for _, row in read(write("bom.csv", b"\xef\xbb\xbfq,a\none,1\n"))] == ROWS[:1]


def test_text_lines(write):
    assert read(write("r.txt", "one\n\n two\r\n")) == [("r.txt:1", {"text": "one"}), ("r.txt:3", {"text": " two"})]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "x"}], "n": number} for number in range(3)]
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [(f"r.parquet row {number + 1}", row) for number, row in enumerate(rows)]
    assert records.count(path) == 3
    path.write_bytes(b"PAR1" + b"\0" * 64)
    fails(path, "data.broken_file")


def test_gzip(tmp_path):
    path = tmp_path / "r.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS * 500).encode())
    path.write_bytes(whole)
    assert len(read(path)) == records.count(path) == 1000
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, "data.broken_file")
    path.write_bytes(b"not gzip at all")
    fails(path, "data.broken_file")


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.csv", "r.tsv", "r.txt"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(write, name, content):
    fails(write(name, content), "data.empty")


def test_broken_json_names_the_line(write):
    good = json.dumps(ROWS[0])
    assert fails(write("r.jsonl", f'{good}\n{good}\n{{"q": \n'), "data.broken_json").where == "r.jsonl:3"
    assert fails(write("a.json", f'[{good},\n{good}\n{{"q": 1}}]'), "data.broken_json").where == "a.json:3"
    assert fails(write("b.json", f"[{good},\n{good},\n"), "data.broken_json").where == "b.json:3"
    assert fails(write("c.json", f"[{good}]\n{good}"), "data.broken_json").where == "c.json:2"
    assert fails(write("d.json", '{"a": [}'), "data.broken_json").where == "d.json:1"


def test_what_is_no_row(write):
    assert fails(write("r.jsonl", '{"q": 1}\n[1]\n'), "data.not_rows").where == "r.jsonl:2"
    assert fails(write("r.json", '["a", "b"]'), "data.not_rows").where == "r.json:1"
    fails(write("s.json", "17"), "data.not_rows")


def test_what_is_not_utf8(write):
    error = fails(write("r.jsonl", b'{"q": "one"}\n{"q": "caf\xe9"}\n'), "data.encoding")
    assert error.where == "r.jsonl:2"
    assert "iconv" in error.fix
    assert "UTF-16" in fails(write("u.csv", "q,a\n1,2\n".encode("utf-16")), "data.encoding").why
    assert fails(write("a.json", b'[\n{"q": "caf\xe9"}]'), "data.encoding").where == "a.json:2"


@pytest.mark.parametrize("levels", [200, 100_000])
@pytest.mark.parametrize("name", ["r.jsonl", "r.json"])
def test_deep_nesting_is_refused(write, levels, name):
    row = '{"q": ' + "[" * levels + "]" * levels + "}"
    text = row + "\n" if name == "r.jsonl" else f"[{row}]"
    assert fails(write(name, text), "data.too_deep").where == f"{name}:1"


def test_nesting_counts_levels():
    assert [records.nesting(value) for value in ("a", [], [[1], {"b": []}], {"a": 1})] == [0, 1, 3, 1]


def test_many_brackets_that_do_not_nest_are_fine(write):
    assert len(read(write("r.jsonl", [{"q": "[[[{{{" * 100, "list": [[1]] * 100}]))) == 1


def test_long_lines_and_large_arrays_are_refused(write, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    monkeypatch.setattr(records, "MAX_ARRAY", 1000)
    big = {"q": "x" * 2000}
    assert fails(write("r.jsonl", [{"q": "x"}, big]), "data.line_too_long").where == "r.jsonl:2"
    fails(write("r.json", json.dumps([big])), "data.too_large")


def test_a_number_with_thousands_of_digits(write):
    fails(write("r.jsonl", '{"q": ' + "9" * 5000 + "}\n"), "data.broken_json")


def test_broken_tables(write):
    assert fails(write("r.csv", "q,a\none,1\ntwo,2,3\n"), "data.broken_csv").where == "r.csv:3"
    assert fails(write("s.csv", "q,a\none\n"), "data.broken_csv").where == "s.csv:2"
    assert fails(write("t.csv", "q,q\none,1\n"), "data.broken_csv").where == "t.csv:1"
    fails(write("u.csv", 'q,a\n"one,1\n'), "data.broken_csv")


def test_other_types_are_refused(write):
    error = fails(write("r.xlsx", "x"), "data.unknown_type")
    assert "Parquet" in error.why


def test_a_file_that_may_not_be_read(write):
    path = Path(write("r.jsonl", ROWS))
    path.unlink()
    fails(path, "data.unreadable")
