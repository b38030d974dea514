"""Event lines: what is written can be read, and nothing else is taken."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.orchestrator.events import Event, Kind, decode, encode, finite, now, number

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=8), plain_values, max_size=4), st.sampled_from(Kind), st.none() | st.integers(0)
)
def test_a_line_is_one_line_of_strict_json_and_comes_back(values, kind, step) -> None:
    line = encode(Event(attempt=2, line=7, time=now(), kind=kind, values=values, step=step))
    assert "\n" not in line
    json.loads(line, parse_constant=pytest.fail)
    back = decode(line.encode("utf-8"))
    assert back is not None
    assert (back.attempt, back.line, back.kind, back.step) == (2, 7, kind, step)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "null",
        '{"attempt":1}',
        "[" * 100_000,
        '{"attempt":1,"line":1,"time":"","kind":"odd","values":{}}',
    ],
)
def test_a_torn_or_foreign_line_is_passed_over(line: str) -> None:
    assert decode(line) is None


@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_numbers_that_json_lacks_travel_as_strings(value: float, text: str) -> None:
    assert finite({"a": [value]}) == {"a": [text]}
    back = number(text)
    assert back is not None
    assert math.isnan(back) if math.isnan(value) else back == value


def test_what_is_no_number_is_none() -> None:
    assert [number(value) for value in (True, None, "1", {})] == [None] * 4
    assert number(3) == 3.0
