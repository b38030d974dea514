"""Shapes are told from columns and values; each method gets its mapping, or an error that says what to write."""

import pytest

from tunesmith.executors.kernel.data import detect, understand
from tunesmith.executors.kernel.data.formats import KINDS_FOR, truth
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import Mapping

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}

SFT = [
    ({"messages": [USER, ANSWER]}, "messages", "messages", {"messages": "messages"}),
    ({"conversations": [HUMAN, GPT]}, "sharegpt", "messages", {"messages": "conversations"}),
    (
        {"system": "be", "conversations": [HUMAN, GPT]},
        "sharegpt",
        "messages",
        {"messages": "conversations", "system": "system"},
    ),
    (
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'},
        "messages",
        "messages",
        None,
    ),
    (
        {"instruction": "a", "input": "", "output": "b"},
        "alpaca",
        "prompt-completion",
        {"prompt": "instruction", "context": "input", "completion": "output"},
    ),
    (
        {"instruction": "a", "context": "c", "response": "b", "category": "x"},
        "alpaca",
        "prompt-completion",
        {"prompt": "instruction", "context": "context", "completion": "response"},
    ),
    (
        {"instruction": "a", "input": "", "output": "b", "text": "whole"},
        "alpaca",
        "prompt-completion",
        {"prompt": "instruction", "context": "input", "completion": "output"},
    ),
    ({"prompt": "a", "completion": "b"}, "prompt-completion", "prompt-completion", None),
    ({"prompt": [USER], "completion": [ANSWER]}, "prompt-completion", "prompt-completion", None),
    (
        {"Prompt": "a", "Response": "b"},
        "prompt-completion",
        "prompt-completion",
        {"prompt": "Prompt", "completion": "Response"},
    ),
    (
        {"question": "a", "answer": "b"},
        "question-answer",
        "prompt-completion",
        {"prompt": "question", "completion": "answer"},
    ),
    ({"question": "a", "answer": 72}, "question-answer", "prompt-completion", None),
    (
        {"problem": "a", "solution": "b", "answer": "c"},
        "problem-solution",
        "prompt-completion",
        {"prompt": "problem", "completion": "solution"},
    ),
    (
        {"input": "a", "output": "b"},
        "prompt-completion",
        "prompt-completion",
        {"prompt": "input", "completion": "output"},
    ),
    (
        {"query": "a", "reply": "b"},
        "prompt-completion",
        "prompt-completion",
        {"prompt": "query", "completion": "reply"},
    ),
    ({"text": "a"}, "text", "text", {"text": "text"}),
    ({"problem": "a", "solution": "b", "messages": [USER, ANSWER]}, "messages", "messages", None),
]


@pytest.mark.parametrize("row, name, kind, columns", SFT, ids=[" ".join(case[0]) for case in SFT])
def test_sft(row, name, kind, columns):
    found, mapping = detect([row, row])
    assert (found, mapping.kind) == (name, kind)
    if columns is not None:
        assert mapping.columns == columns


def test_sharegpt_names_its_roles():
    rows = [{"conversations": [{"from": "system", "value": "x"}, HUMAN, GPT]}]
    assert detect(rows)[1].roles == {"human": "user", "gpt": "assistant"}


PAIRS = [
    ("chosen", "rejected"),
    ("good_response", "bad_response"),
    ("Good Response", "Bad Response"),
    ("preferred", "dispreferred"),
    ("better", "worse"),
    ("response_j", "response_k"),
]


@pytest.mark.parametrize("good, bad", PAIRS)
def test_preference_names(good, bad):
    name, mapping = detect([{"question": "q", good: "a", bad: "b"}], method="dpo")
    assert (name, mapping.kind) == ("preference", "preference")
    assert mapping.columns == {"prompt": "question", "chosen": good, "rejected": bad}


def test_preference_shapes():
    rows = [{"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}]
    assert detect(rows, method="dpo")[1].columns["prompt"] == "conversations"
    assert detect([{"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}], method="dpo")[1].columns == {
        "chosen": "chosen",
        "rejected": "rejected",
    }


def test_a_preference_set_is_not_read_as_something_else_but_says_how_it_could_be():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    for method in ("sft", "grpo", "kto"):
        with pytest.raises(InputError) as caught:
            detect(rows, method=method)
        assert caught.value.code == "data.wrong_columns"
    with pytest.raises(InputError) as caught:
        detect(rows)
    assert 'completion: "chosen"' in caught.value.fix


def test_a_preference_set_with_messages_serves_sft_too():
    rows = [{"prompt": "p", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER], "messages": [USER, ANSWER]}]
    assert detect(rows)[1].columns == {"messages": "messages"}
    assert detect(rows, method="dpo")[1].kind == "preference"


@pytest.mark.parametrize("label", [True, 1, 0, "true", "thumbs_up", "\N{THUMBS DOWN SIGN}"])
def test_unpaired(label):
    name, mapping = detect([{"messages": [USER, ANSWER], "label": label}], method="kto")
    assert (name, mapping.kind) == ("unpaired", "unpaired")
    assert mapping.columns == {"messages": "messages", "label": "label"}
    assert detect([{"prompt": "a", "completion": "b", "label": label}])[1].kind == "prompt-completion"


def test_grpo_keeps_the_answers_for_rewards():
    name, mapping = detect([{"question": "q", "answer": "a"}], method="grpo")
    assert (name, mapping.kind, mapping.keep) == ("question-answer", "prompt-only", ("answer",))
    assert mapping.columns == {"prompt": "question"}
    assert detect([{"prompt": "q", "ground_truth": "a"}], method="grpo")[1].keep == ("ground_truth",)
    assert detect([{"problem": "q", "solution": "s", "answer": "a"}], method="grpo")[1].keep == ("solution", "answer")
    assert detect([{"messages": [USER, ANSWER]}], method="grpo")[1].columns == {"messages": "messages"}


def test_prompts_alone_are_for_grpo():
    assert detect([{"prompt": "q"}], method="grpo")[1].kind == "prompt-only"
    with pytest.raises(InputError):
        detect([{"prompt": "q"}])


def test_wrong_columns_lists_them_and_the_nearest_mapping():
    with pytest.raises(InputError) as caught:
        detect([{"promt": "a", "completon": "b", "n": 1}])
    error = caught.value
    assert error.code == "data.wrong_columns"
    assert "promt (text), completon (text), n (number)" in error.message
    assert 'mapping: {kind: prompt-completion, columns: {prompt: "promt", completion: "completon"}}' in error.fix


def test_a_classification_table_says_so():
    with pytest.raises(InputError, match="classification"):
        detect([{"text": "nice", "label": 2}, {"text": "bad", "label": 0}])


def test_squad_answers_are_no_text():
    with pytest.raises(InputError):
        detect([{"question": "q", "answers": {"text": ["a"], "answer_start": [1]}}])


def test_a_mapping_of_the_spec_is_kept_and_checked():
    rows = [{"q": "a", "r": "b"}]
    mapping = Mapping(kind="prompt-completion", columns={"prompt": "q", "completion": "r"})
    assert understand(rows, mapping) == ("prompt-completion", mapping)
    cases = [
        ({"prompt": "q"}, "data.mapping", "completion"),
        ({"prompt": "q", "completion": "s"}, "data.wrong_columns", "'s'"),
        ({"promt": "q", "completion": "r"}, "data.mapping", "promt"),
    ]
    for columns, code, named in cases:
        with pytest.raises(InputError, match=named) as caught:
            understand(rows, Mapping(kind="prompt-completion", columns=columns))
        assert caught.value.code == code


def test_a_kind_alone_is_completed():
    rows = [{"messages": [USER, ANSWER], "label": True}]
    unpaired = understand(rows, Mapping(kind="unpaired"), method="kto")[1]
    assert unpaired.columns == {"messages": "messages", "label": "label"}
    assert understand(rows, Mapping(kind="messages", roles={"visitor": "user"}))[1].roles == {"visitor": "user"}
    with pytest.raises(InputError):
        understand(rows, Mapping(kind="preference"), method="dpo")


@pytest.mark.parametrize(
    ("method", "kind"),
    [("sft", "preference"), ("dpo", "messages"), ("grpo", "prompt-completion"), ("kto", "preference"),
     ("reward", "unpaired"), ("distill", "text")],
)  # fmt: skip
def test_a_kind_that_does_not_serve_the_method_is_refused(method, kind):
    rows = [{"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b", "text": "t", "label": True}]
    with pytest.raises(InputError, match=f"does not serve {method}") as caught:
        understand(rows, Mapping(kind=kind), method=method)
    assert (caught.value.code, caught.value.where) == ("data.mapping", "mapping.kind")
    assert KINDS_FOR[method][0] in caught.value.fix


def test_a_template_names_columns():
    rows = [{"city": "Rome", "fact": "old"}]
    good = Mapping(kind="prompt-completion", columns={"completion": "fact"}, template="What of {city}? {{x}}")
    assert understand(rows, good)[1] == good
    with pytest.raises(InputError, match="town"):
        understand(rows, Mapping(kind="prompt-completion", columns={"completion": "fact"}, template="{town}"))


@pytest.mark.parametrize("value", [None, 2, -1, "maybe", [], 0.5, {}])
def test_what_is_no_truth(value):
    assert truth(value) is None
