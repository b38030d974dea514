"""Rows become examples, or a typed error that names the row."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.data import Example, Message, Row, convert, detect
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import Mapping

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
MESSAGES = Mapping(kind="messages", columns={"messages": "messages"})
PAIR = Mapping(kind="prompt-completion", columns={"prompt": "p", "completion": "c"})
ALPACA = Mapping(
    kind="prompt-completion",
    columns={
        "prompt": "instruction",
        "context": "input",
        "completion": "output",
        "system": "system",
        "history": "history",
    },
)


def row(**values):
    return Row(7, "r.jsonl:9", values)


def turns(*pairs):
    return tuple(Message(role, content) for role, content in pairs)


def fails(code, mapping, **values):
    with pytest.raises(InputError) as caught:
        convert(row(**values), mapping)
    assert caught.value.code == f"data.row.{code}"
    assert caught.value.where == "r.jsonl:9"
    assert "r.jsonl:9" in caught.value.message


def test_messages():
    example = convert(row(messages=[{"role": "system", "content": "be"}, USER, ANSWER]), MESSAGES)
    assert example == Example(7, turns(("system", "be"), ("user", "hi"), ("assistant", "hello")))


def test_sharegpt_with_tools():
    said = [("human", "a"), ("function_call", "f()"), ("observation", "3"), ("gpt", "three")]
    values = [{"from": name, "value": text} for name, text in said]
    found = convert(row(messages=values), MESSAGES).messages
    assert [message.role for message in found] == ["user", "assistant", "tool", "assistant"]


def test_text_parts_and_json_in_a_cell():
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert convert(row(messages=[parts, ANSWER]), MESSAGES).messages[0].content == "ab"
    assert convert(row(messages=json.dumps([USER, ANSWER])), MESSAGES).messages[1].content == "hello"


def test_roles_of_the_mapping_come_first():
    mapping = Mapping(kind="messages", columns={"messages": "messages"}, roles={"visitor": "user", "user": "system"})
    said = [{"role": "user", "content": "s"}, {"role": "visitor", "content": "q"}, ANSWER]
    assert [message.role for message in convert(row(messages=said), mapping).messages] == [
        "system",
        "user",
        "assistant",
    ]


@pytest.mark.parametrize(
    "code, messages",
    [
        ("no_answer", []),
        ("no_answer", None),
        ("no_answer", [USER]),
        ("wrong_type", "words"),
        ("wrong_type", [USER, "words"]),
        ("wrong_type", [USER, {"role": "assistant", "content": {"a": 1}}]),
        ("empty_answer", [USER, {"role": "assistant", "content": " \n"}]),
        ("empty_turn", [{"role": "user", "content": None}, ANSWER]),
        ("tool_calls", [USER, {"role": "assistant", "content": None, "tool_calls": []}]),
        ("unknown_role", [{"role": "visitor", "content": "a"}, ANSWER]),
        ("unknown_role", [{"role": 3, "content": "a"}, ANSWER]),
        ("roles_order", [ANSWER, USER]),
        ("roles_order", [USER, USER, ANSWER]),
        ("roles_order", [USER, ANSWER, ANSWER]),
        ("roles_order", [USER, {"role": "system", "content": "late"}, ANSWER]),
        ("roles_order", [USER, {"role": "tool", "content": "x"}, ANSWER]),
        ("not_text", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]),
        ("encoding", [{"role": "user", "content": "\ud800"}, ANSWER]),
    ],
)
def test_broken_messages(code, messages):
    fails(code, MESSAGES, messages=messages)


def test_a_missing_column():
    fails("missing_column", MESSAGES, other=1)


def test_prompt_and_completion():
    assert convert(row(p="q", c="a"), PAIR) == Example(7, prompt="q", completion="a")
    assert convert(row(p="q", c=72), PAIR).completion == "72"
    for code, values in {
        "empty_answer": {"p": "q", "c": ""},
        "empty_turn": {"p": " ", "c": "a"},
        "wrong_type": {"p": "q", "c": True},
        "missing_column": {"p": "q"},
    }.items():
        fails(code, PAIR, **values)
    fails("empty_answer", PAIR, p="q", c=None)
    fails("wrong_type", PAIR, p="q", c=float("nan"))


def test_a_prompt_of_turns_is_context_and_its_answers_are_not_trained_on():
    example = convert(row(p=[USER, ANSWER, USER], c=[ANSWER]), PAIR)
    assert len(example.messages) == 4
    assert example.context == 3
    assert convert(row(p=[USER], c="yes"), PAIR).messages == turns(("user", "hi"), ("assistant", "yes"))


def test_alpaca():
    values = {"instruction": "sum", "input": "1 2", "output": "3", "system": None, "history": []}
    example = convert(row(**values), ALPACA)
    assert (example.prompt, example.completion, example.messages) == ("sum\n1 2", "3", None)
    values |= {"system": "be", "history": [["a", "b"]], "input": ""}
    example = convert(row(**values), ALPACA)
    assert example.messages == turns(
        ("system", "be"), ("user", "a"), ("assistant", "b"), ("user", "sum"), ("assistant", "3")
    )
    assert example.context == 0, "earlier rounds of a row are answers too"
    fails("wrong_type", ALPACA, **{**values, "history": [["a"]]})


def test_templates_fill_in_values_once():
    mapping = Mapping(kind="prompt-completion", columns={"completion": "c"}, template="{{{p}}} {p.q}: {p}")
    example = convert(Row(0, "r:1", {"p": "{c}", "p.q": "x", "c": "a"}), mapping)
    assert example.prompt == "{{c}} x: {c}"
    text = Mapping(kind="text", template="{p}|{c}")
    assert convert(row(p="a", c=None), text).text == "a|"


def test_text():
    mapping = Mapping(kind="text", columns={"text": "t"})
    assert convert(row(t="words"), mapping) == Example(7, text="words")
    fails("empty_turn", mapping, t="")


def test_preference_in_all_its_shapes():
    mapping = Mapping(kind="preference", columns={"prompt": "p", "chosen": "c", "rejected": "r"})
    example = convert(row(p="q", c="a", r="b"), mapping)
    assert (example.prompt, example.extra) == ("q", {"chosen": "a", "rejected": "b"})
    example = convert(row(p=[USER], c=ANSWER, r=[ANSWER]), mapping)
    assert example.messages == turns(("user", "hi"))
    assert example.extra["chosen"] == turns(("assistant", "hello"))
    implicit = Mapping(kind="preference", columns={"chosen": "c", "rejected": "r"})
    other = {"role": "assistant", "content": "no"}
    example = convert(row(c=[USER, ANSWER], r=[USER, other]), implicit)
    assert example.messages == turns(("user", "hi"))
    assert example.extra["rejected"] == turns(("assistant", "no"))
    said = "\n\nHuman: hi\n\nAssistant: "
    example = convert(row(c=said + "yes", r=said + "no"), implicit)
    assert (example.messages, example.extra["chosen"]) == (turns(("user", "hi")), turns(("assistant", "yes")))
    fails("wrong_type", mapping, p="q", c="a", r=[ANSWER])
    fails("empty_answer", mapping, p="q", c="a", r="")


def test_unpaired():
    mapping = Mapping(kind="unpaired", columns={"messages": "m", "label": "l"})
    assert convert(row(m=[USER, ANSWER], l="thumbs_down"), mapping).extra == {"label": False}
    fails("bad_label", mapping, m=[USER, ANSWER], l="perhaps")


def test_prompts_keep_what_rewards_need():
    mapping = Mapping(kind="prompt-only", columns={"prompt": "q"}, keep=("answer",))
    assert convert(row(q="1+1", answer="#### 2"), mapping) == Example(7, prompt="1+1", extra={"answer": "#### 2"})
    mapping = Mapping(kind="prompt-only", columns={"messages": "m"})
    assert convert(row(m=[USER, ANSWER]), mapping).messages == turns(("user", "hi"))
    fails("empty_turn", mapping, m=[{"role": "system", "content": "x"}])


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "gpt"])
)
turn = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "text", "tool_calls", "x"]),
    scalars | st.lists(scalars, max_size=2),
    max_size=4,
)
values = st.recursive(
    scalars | turn,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
columns = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "question",
        "answer",
        "text",
        "chosen",
        "rejected",
        "label",
        "system",
        "history",
        "input",
    ]
)
rows = st.dictionaries(columns, values | st.lists(turn, max_size=4), max_size=5)


def outcome(item, mapping):
    try:
        return convert(item, mapping)
    except InputError as error:
        return error


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(rows, min_size=1, max_size=4), st.sampled_from(["sft", "dpo", "grpo", "kto"]))
def test_nothing_but_the_typed_error_is_ever_raised(found, method):
    try:
        _, mapping = detect(found, method=method)
    except InputError:
        return
    for number, item in enumerate(found):
        result = outcome(Row(number, f"r:{number}", item), mapping)
        assert result.row == number if isinstance(result, Example) else result.code.startswith("data.row.")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows, st.sampled_from(["messages", "prompt-completion", "text", "preference", "unpaired", "prompt-only"]))
def test_any_mapping_on_any_row(item, kind):
    roles = {"messages": "messages", "prompt": "prompt", "completion": "completion", "text": "text"}
    roles |= {"chosen": "chosen", "rejected": "rejected", "label": "label", "system": "system", "history": "history"}
    if kind == "prompt-only":
        roles.pop("messages")
    result = outcome(Row(0, "r:1", item), Mapping(kind=kind, columns=roles, keep=("answer",)))
    assert isinstance(result, Example) or result.code.startswith("data.row.")
