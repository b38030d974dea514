"""The rewards that only look at the text, each against right, wrong and hostile completions."""

import pytest

from tunesmith.orchestrator.errors import InputError

THOUGHT = "<think>\nBecause.\n</think>\n"


def say(text):
    return [{"role": "assistant", "content": text}]


def test_number_compares_with_the_answer_column(score):
    done = ["#### 72", "so 72.0", "$72.", "73", "", "seventy-two", THOUGHT + "72", "<think>72", "9" * 100_000, "\0 72"]
    wanted = [1, 1, 1, 0, 0, 0, 1, 0, 0, 1]
    assert score("number", done, answer="Half of 144 is <<144/2=72>>72\n#### 72") == wanted
    assert score("number", [say(text) for text in done], answer=72) == wanted


def test_number_takes_any_of_several_and_leaves_rows_without_one_out(score):
    assert score("number", ["1", "2", "3"], answers=([1, 2], ["2", "x"], ["none"])) == [1, 1, None]
    assert score("number", ["1", "1"], answer=(None, True)) == [None, None]
    assert score("number:n", ["7", "7"], n=7, answer=8) == [1, 1]


def test_a_missing_column_is_named_with_what_there_is(score):
    with pytest.raises(InputError) as caught:
        score("number", ["7"], difficulty="hard")
    assert (caught.value.code, caught.value.where) == ("reward.no_column", "grpo.rewards")
    assert "they have: difficulty." in caught.value.why
    with pytest.raises(InputError) as caught:
        score("exact:label", ["7"], answer="7")
    assert "'label'" in caught.value.message


def test_exact_forgives_white_space_and_thoughts_alone(score):
    done = ["Paris", " Paris \n", "Pa ris", "paris", THOUGHT + "Paris", "<answer>Paris</answer>", "", "It is Paris"]
    assert score("exact", done, answer="Paris") == [1, 1, 0, 0, 1, 1, 0, 0]
    assert score("exact", ["New   York", "new york"], answer=(["New York", "NYC"],) * 2) == [1, 0]
    assert score("exact", ["cafe\u0301"], answer="caf\u00e9") == [1]
    assert score("exact", ["3", '{"a": 1}', "x"], answer=(3, {"a": 1}, None)) == [1, 1, None]
    assert score("exact", ["<answer></answer>", ""], answer="<answer></answer>") == [1, 0]


def test_a_blank_answer_is_none(score):
    done = ["", " ", "<think>and so", "Paris"]
    for blank in ("", " \n", [], [""], None):
        assert score("exact", done, answer=(blank,) * 4) == [None] * 4
    assert score("exact", done, answer=(["", "Paris"],) * 4) == [0, 0, 0, 1]


def test_json_is_one_value_and_nothing_else(score):
    good = ['{"a": 1}', " [1]\n", "3", '"x"', "null", '```json\n{"a": 1}\n```', THOUGHT + "{}", "<answer>{}</answer>"]
    bad = ["", "{a: 1}", "{} {}", "Here: {}", "NaN", "[Infinity]", "{'a': 1}", '```json\n{"a": 1}', "[" * 100_000]
    bad += ["9" * 10_000, '"\n"', "\ufeff{}"]
    assert score("json", good + bad) == [1.0] * len(good) + [0.0] * len(bad)


def test_json_of_a_column_is_equal_whatever_its_order(score):
    wanted = '{"a": [1, 2.0], "b": {"c": true}}'
    done = ['{"b":{"c":true},"a":[1.0,2]}', '{"b":{"c":1},"a":[1,2]}', '{"a":[2,1],"b":{"c":true}}', "{}", "", wanted]
    assert score("json:answer", done, answer=wanted) == [1, 0, 0, 0, 0, 1]
    assert score("json:answer", ["{}", "{}", "[]"], answer=({}, "no json", None)) == [1, None, None]
    assert score("json:a", ["[" * 50_000 + "]" * 50_000], a="[]") == [0]


def test_length_falls_off_smoothly_on_both_sides(score):
    words = [" ".join("x" * count) for count in (0, 1, 2, 4, 8, 16)]
    assert score("length:4", words) == [0, 0.25, 0.5, 1, 0.5, 0.25]
    assert score("length:<=4", words) == [1, 1, 1, 1, 0.5, 0.25]
    assert score("length:>=4 tokens", words) == [0, 0.25, 0.5, 1, 1, 1]
    assert score("length:4 characters", ["", "ab", "abcd", "\U0001f600" * 4]) == [0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think>b", 1),
        ("\n <think>a\nb</think>\n\n b \n", 1),
        ("<think></think>b", 0),
        ("<think> \n</think>b", 0),
        ("<think>a</think>", 0),
        ("<think>a</think> \n", 0),
        ("a</think>b", 0),
        ("<think>a b", 0),
        ("b <think>a</think>b", 0),
        ("<think>a<think>b</think>c</think>d", 0),
        ("<think>a</think>b<think>c</think>d", 0),
        ("<THINK>a</THINK>b", 0),
        ("", 0),
        ("<think>" * 50_000, 0),
    ],
)
def test_think_wants_one_thought_and_then_an_answer(score, text, value):
    assert score("think", [text, say(text)]) == [value, value]


def test_think_with_other_tags_and_a_thought_begun_by_the_prompt(score):
    assert score("think:reasoning", ["<reasoning>a</reasoning>b", "<think>a</think>b"]) == [1, 0]
    tagged = ["<think>a</think><answer>b</answer>", "<think>a</think>b", "<think>a</think>x<answer>b</answer>"]
    tagged += ["<think>a</think>\n<answer> b </answer>\n", "<think>a</think><answer></answer>"]
    assert score("think:think,answer", tagged) == [1, 0, 0, 1, 0]
    assert score("think", ["a</think>b", "<think>a</think>b", "a"], prompt="Q\n<think>\n") == [1, 1, 0]


def test_completions_of_several_messages_and_of_parts_are_read(score):
    turns = [{"role": "assistant", "content": "1"}, {"role": "tool", "content": "x"}, *say("72")]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "7"}, {"type": "text", "text": "2"}]}]
    empty = [{"role": "assistant", "content": None}]
    assert score("number", [turns, parts, empty, []], answer=72) == [1, 1, 0, 0]
