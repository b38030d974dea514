"""The `check` document: golden verdicts for the real files, and what it says of bad ones."""

import json

import pytest

from tunesmith.executors.kernel.data import check
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import METHODS, DataSource, Mapping


def ready(*methods):
    return {method: method in methods for method in METHODS}


NONE = ready()
ANSWERS = ready("sft", "grpo", "rloo", "distill")
GOLDEN = {
    "gsm8k_train.jsonl": ("question-answer", 7473, ANSWERS, {}),
    "gsm8k_test.jsonl": ("question-answer", 1319, ANSWERS, {}),
    "alpaca_en_demo.json": ("alpaca", 999, ANSWERS, {"data.duplicates": 14}),
    "identity.json": ("alpaca", 91, ANSWERS, {"data.placeholders": 85}),
    "dpo_en_demo.json": (
        "preference",
        299,
        ready("dpo", "reward"),
        {"data.duplicates": 5, "data.control_characters": 1},
    ),
    "kto_en_demo.json": (
        "unpaired",
        300,
        ready("sft", "grpo", "kto", "rloo", "distill"),
        {"data.placeholders": 2, "data.template_tokens": 2, "data.label_ignored": None},
    ),
    "peft_metamathqa_l40s.json": (
        None,
        9,
        NONE,
        {"data.wrong_columns": None},
    ),
}


def look(path, **options):
    document = check([DataSource(source=str(path))], **options)
    json.dumps(document, allow_nan=False)
    return document


def codes(document):
    return [item["code"] for item in document["problems"]]


@pytest.mark.parametrize("name", GOLDEN)
def test_real_files(real, name):
    form, rows, verdicts, problems = GOLDEN[name]
    document = look(real / name)
    assert (document["format"], document["rows"], document["ready"]) == (form, rows, verdicts)
    assert set(codes(document)) == set(problems)
    for item in document["problems"]:
        if problems[item["code"]] is not None:
            assert item["message"].startswith(f"{problems[item['code']]} of {rows} rows ")
    assert (document["mapping"] is None) == (form is None)
    assert len(document["preview"]) == (0 if form is None else 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GOLDEN)
def test_real_files_for_each_method(real, name, method):
    document = look(real / name, method=method)
    assert document["ready"] == GOLDEN[name][2]
    assert document["method"] == method
    if document["ready"][method]:
        assert document["used_rows"] == document["rows"]
        assert ("data.label_ignored" in codes(document)) == (name == "kto_en_demo.json" and method == "sft")
        assert ("data.no_answers" in codes(document)) == (name == "kto_en_demo.json" and method in ("grpo", "rloo"))
    else:
        assert document["problems"][0]["level"] == "error"
        assert document["problems"][0]["fix"]


def test_gsm8k_answers_survive_into_rewards(real):
    document = look(real / "gsm8k_train.jsonl", method="grpo")
    assert document["mapping"]["keep"] == ["answer"]
    assert "####" in document["preview"][0]["after"]["extra"]["answer"]


def test_a_preview_shows_before_and_after(write):
    document = look(write("r.jsonl", [{"instruction": "sum", "input": "1 2", "output": "x" * 5000}]))
    (shown,) = document["preview"]
    assert shown["where"] == "r.jsonl:1"
    assert shown["before"]["input"] == "1 2"
    assert shown["after"]["prompt"] == "sum\n1 2"
    assert shown["after"]["completion"].endswith("(3,000 characters more)")


def test_good_and_bad_responses_are_mapped(write):
    document = look(write("r.jsonl", [{"prompt": "q", "good_response": "a", "bad_response": "b"}]))
    assert document["ready"]["dpo"]
    assert document["mapping"]["columns"] == {"prompt": "prompt", "chosen": "good_response", "rejected": "bad_response"}
    assert document["preview"][0]["after"]["extra"] == {"chosen": "a", "rejected": "b"}


def test_a_mapping_of_the_spec_decides(write):
    path = write("r.jsonl", [{"q": "a", "r": "b"}])
    mapping = Mapping(kind="prompt-completion", columns={"prompt": "q", "completion": "r"})
    document = check([DataSource(source=path, mapping=mapping)])
    assert document["ready"] == ready("sft")
    assert not any(look(path)["ready"].values())


def test_rows_that_cannot_be_used(write):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = [
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "alien", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": "words"},
        {"other": 1},
    ]
    document = look(write("r.jsonl", [good, *bad]))
    assert (document["rows"], document["used_rows"]) == (7, 1)
    assert set(codes(document)) == {
        f"data.row.{code}"
        for code in ("empty_turn", "empty_answer", "roles_order", "unknown_role", "wrong_type", "missing_column")
    }
    nothing = look(write("n.jsonl", bad[:2]))
    assert not nothing["ready"]["sft"]
    assert codes(nothing)[0] == "data.no_usable_rows"


def test_what_is_odd_in_usable_rows(write):
    pair = {"prompt": "q", "chosen": "same", "rejected": "same"}
    assert "data.identical_pair" in codes(look(write("p.jsonl", [pair])))
    odd = [
        {"prompt": "a\0b", "completion": "x"},
        {"prompt": "a", "completion": "<|im_end|>"},
        {"prompt": "\u202eabc", "completion": "x"},
    ]
    found = look(write("r.jsonl", odd))
    assert set(codes(found)) == {"data.control_characters", "data.template_tokens", "data.bidi"}
    asked = look(write("g.jsonl", [{"prompt": "q", "answer": "1"}, {"prompt": "r", "answer": ""}]), method="grpo")
    assert codes(asked) == ["data.answer_missing"]


def test_tokens_with_a_tokenizer(write, small, tmp_path):
    small().save_pretrained(tmp_path / "t")
    path = write("r.jsonl", [{"prompt": "two", "completion": "four"}] * 3)
    assert look(path)["tokens"] is None
    tokens = look(path, tokenizer_folder=tmp_path / "t")["tokens"]
    assert tokens["exact"]
    assert tokens["max"] > 5


def test_files_that_cannot_be_read_are_errors(write):
    for content, code in (("", "data.empty"), ("{broken", "data.broken_json")):
        with pytest.raises(InputError) as caught:
            look(write("r.jsonl", content))
        assert caught.value.code == code
    with pytest.raises(InputError) as caught:
        check([DataSource(source="org/set")], offline=True)
    assert caught.value.code == "data.unreachable"
