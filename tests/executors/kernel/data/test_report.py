"""What a plan says of data, without a model; and that importing and running it loads nothing heavy."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from tunesmith.executors.kernel.data import encode_many, inspect, prepare
from tunesmith.orchestrator.nouns import DataSource


@dataclass
class Facts:
    bytes_per_token: float = 4.1


def rows(count):
    return [
        {"question": f"what is {number}?", "answer": f"it is {number} " * (number % 9 + 1)} for number in range(count)
    ]


def test_rows_and_shares(write, make_spec):
    source = DataSource(source=write("r.jsonl", [*rows(100), {"question": "q", "answer": ""}]), limit=50)
    report = inspect(make_spec(source))
    assert (report.rows, report.used_rows, report.eval_rows) == (101, 50, 2)
    assert (report.format, report.mapping.columns) == (
        "question-answer",
        {"prompt": "question", "completion": "answer"},
    )
    assert report.fingerprint.startswith("sha256:")
    assert report.problems == ()


def test_problems_have_codes_counts_and_places(write, make_spec):
    bad = [{"question": "q", "answer": ""}] * 5 + [{"question": "hi {{name}}", "answer": "x"}] * 2
    report = inspect(make_spec(write("r.jsonl", rows(10) + bad)))
    found = {item.code: item for item in report.problems}
    assert set(found) == {"data.row.empty_answer", "data.placeholders", "data.duplicates"}
    assert found["data.row.empty_answer"].message == "5 of 17 rows have an empty or null answer."
    assert found["data.row.empty_answer"].where == "r.jsonl:11, r.jsonl:12, r.jsonl:13 and 2 more"
    assert found["data.duplicates"].where == "r.jsonl:17"
    assert all(item.fix and item.level == "warning" for item in found.values())
    assert report.used_rows == 12


@pytest.mark.parametrize(
    "content, code",
    [
        ("", "data.empty"),
        ('{"question": "a"\n', "data.broken_json"),
        ('{"n": 1}\n', "data.wrong_columns"),
        ('{"question": "a", "answer": ""}\n', "data.no_usable_rows"),
    ],
)
def test_what_stops_a_run_is_an_error_finding(write, make_spec, content, code):
    report = inspect(make_spec(write("r.jsonl", content)))
    assert report.problems[0].code == code
    assert report.problems[0].level == "error"
    assert not report.used_rows


def test_data_out_of_reach_is_a_warning(make_spec):
    report = inspect(make_spec("open-r1/codeforces-cots"), offline=True)
    assert (report.rows, report.used_rows, report.eval_rows, report.tokens) == (None, None, None, None)
    (finding,) = report.problems
    assert (finding.level, finding.code) == ("warning", "data.unreachable")
    assert "out of reach" in finding.message


def test_labels_that_sft_ignores(write, make_spec):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write("r.jsonl", [{"messages": talk, "label": True}])
    assert "data.label_ignored" in [item.code for item in inspect(make_spec(path)).problems]
    assert "data.label_ignored" not in [item.code for item in inspect(make_spec(path, method="kto")).problems]


def test_lengths_are_exact_for_few_rows(write, make_spec, small, tmp_path):
    tokenizer = small()
    tokenizer.save_pretrained(tmp_path / "t")
    spec = make_spec(write("r.jsonl", rows(120)), fraction=0, max_length=60)
    lengths = sorted(len(item.ids) for item in encode_many(prepare(spec).train, tokenizer, None))
    tokens = inspect(spec, tokenizer_folder=tmp_path / "t").tokens
    assert (tokens.p50, tokens.p95, tokens.max) == (lengths[59], lengths[113], lengths[-1])
    assert tokens.total.expected == sum(lengths)
    assert tokens.truncated_rows == sum(length > 60 for length in lengths) > 0
    assert (tokens.exact, tokens.method) == (True, "tokenizer")


def test_lengths_of_a_sample_are_near_and_inside_their_range(real, make_spec, smollm2_folder, smollm2):
    spec = make_spec(str(real / "gsm8k_test.jsonl"), fraction=0)
    encoded = list(encode_many(prepare(spec).train, smollm2, None))
    whole = sum(len(item.ids) for item in encoded)
    ordered = sorted(len(item.ids) for item in encoded)
    share = sum(label != -100 for item in encoded for label in item.labels) / whole
    sample = inspect(spec, tokenizer_folder=smollm2_folder).tokens
    assert (sample.method, sample.exact) == ("sample", False)
    assert sample.total.low <= whole <= sample.total.high
    assert abs(sample.total.expected / whole - 1) < 0.02
    assert abs(sample.p95 / ordered[int(0.95 * len(ordered))] - 1) < 0.1
    assert sample.max == ordered[-1]
    assert abs(sample.supervised_share - share) < 0.03
    guess = inspect(spec, facts=Facts()).tokens
    assert guess.method == "bytes-per-token"
    assert guess.total.low <= whole <= guess.total.high
    assert abs(guess.total.expected / whole - 1) < 0.2


def test_a_broken_tokenizer_is_said_and_bytes_are_counted(write, make_spec, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    report = inspect(make_spec(write("r.jsonl", rows(3))), tokenizer_folder=tmp_path)
    assert report.tokens.method == "bytes-per-token"
    assert [item.code for item in report.problems] == ["data.tokenizer"]


def test_a_look_at_the_first_rows_extrapolates_and_says_so(write, make_spec):
    path = write("r.jsonl", rows(30))
    whole, part = inspect(make_spec(path)), inspect(make_spec(path), limit_rows=10)
    assert (part.rows, part.used_rows, part.eval_rows) == (30, 30, whole.eval_rows)
    assert [item.code for item in part.problems] == ["data.sampled"]
    assert abs(part.tokens.total.expected / whole.tokens.total.expected - 1) < 0.2
    assert part.fingerprint == whole.fingerprint
    few = inspect(make_spec(DataSource(source=path, limit=8, fraction=0.5)), limit_rows=10)
    assert (few.rows, few.used_rows, few.problems) == (30, 4, ())


def test_sources_that_differ_are_mixed(write, make_spec):
    report = inspect(make_spec(write("a.jsonl", rows(3)), write("b.jsonl", [{"text": "x"}])))
    assert (report.format, report.mapping, report.rows) == ("mixed", None, 4)


def test_nothing_heavy_is_loaded(real):
    code = f"""
import sys
from tunesmith.executors.kernel.data import inspect
from tunesmith.orchestrator.nouns import DataSource, JobSpec, ModelRef
source = DataSource(source={str(real / "gsm8k_train.jsonl")!r})
report = inspect(JobSpec(model=ModelRef(id="m"), data=(source,)))
assert report.used_rows == 7473
heavy = {{"torch", "transformers", "tokenizers", "datasets", "pyarrow", "jinja2", "numpy", "pydantic", "httpx"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
