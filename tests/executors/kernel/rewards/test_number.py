"""The final number of a text, against a table of right, wrong and hostile texts, and against GSM8K's own answers."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.executors.kernel.rewards.number import boxed, final_number, number_in


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("The answer is 72.", 72),
        ("It costs $1,234.50.", Fraction(2469, 2)),
        ("1,234,567", 1234567),
        ("1,23,456 rupees", 123456),
        ("so 5,", 5),
        ("12,34", 34),
        ("-5", -5),
        ("\u22125", -5),
        ("it is -$5", -5),
        ("it is $-5", -5),
        ("\u20ac-5", -5),
        ("8-5", 5),
        ("(3)-4", 4),
        ("2 - -3", -3),
        ("- 42", 42),
        ("+7", 7),
        ("3/4", Fraction(3, 4)),
        ("-1/2", Fraction(-1, 2)),
        ("on 5/6/2024", 2024),
        ("5/0", None),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"\dfrac12", Fraction(1, 2)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"x = 1{,}234", 1234),
        (r"1\,234", 1234),
        ("1\u202f234", 1234),
        ("1e3", 1000),
        ("1.5e-2", Fraction(3, 200)),
        (".5", Fraction(1, 2)),
        ("...42", 42),
        ("3.0", 3),
        ("50%", 50),
        ("\u662f5", 5),
        ("\u0664\u0662", 42),
        ("x2 and H2O", None),
        ("version 1.2.3", Fraction(6, 5)),
        ("none", None),
        ("", None),
        ("#### 72", 72),
        ("1 then 2\n#### 72\nbut perhaps 3", 72),
        ("#### the answer\n72 or 73", 72),
        ("#### 1/2", Fraction(1, 2)),
        ("#### none\nso 4", 4),
        (r"\boxed{72} of 100", 72),
        (r"\boxed{x = 3} or \boxed{\frac{1}{2}} 9", Fraction(1, 2)),
        ("<answer>5</answer> out of 6", 5),
        ("<think>3</think> 4", 4),
        ("<think>so 3", None),
        ("so 3</think>", None),
        ("9" * 5000, None),
        ("1e99999", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


def test_numbers_of_columns():
    assert number_in(72) == number_in(72.0) == number_in("72") == 72
    assert number_in(0.1) == Fraction(1, 10)
    assert number_in(10**400) == final_number("1" + "0" * 400) == 10**400
    for value in (True, None, [], {}, float("nan"), float("inf"), 1e305, 10**2000, -(10**2000)):
        assert number_in(value) is None


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed {1}", "1"),
        (r"\boxed{a{b}c} \boxed{\{x\}}", r"\{x\}"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1", None),
        (r"\boxed", None),
        ("boxed{1}", None),
    ],
)
def test_boxes(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize("text", ["1,22," * 50_000, "{" * 200_000, "\\boxed{" * 50_000, "-$" * 100_000, "1/" * 100_000])
def test_no_text_is_slow(text):
    """Quadratic time over these would be minutes, which pytest-timeout ends."""
    final_number(text)
    boxed(text)


@given(st.integers(-(10**12), 10**12), st.integers(0, 999), st.sampled_from(["{:,}", "{}", "${:,}", "{:,} dollars."]))
def test_any_number_is_read_back_as_people_write_it(whole, part, form):
    assert final_number(f"First 3, then {form.format(whole)}") == whole
    assert final_number(f"It is {abs(whole):,}.{part:03}.") == abs(whole) + Fraction(part, 1000)


@given(st.text(max_size=200))
def test_any_text_has_a_number_or_none(text):
    found = final_number(text)
    assert found is None or isinstance(found, Fraction)


def test_every_answer_of_gsm8k_has_its_number(real):
    with (real / "gsm8k_train.jsonl").open() as lines:
        answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 7473
    for answer in answers:
        assert final_number(answer) == Fraction(answer.rpartition("####")[2].strip().replace(",", ""))
