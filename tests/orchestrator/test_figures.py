"""Numbers as people read them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.orchestrator import figures


@pytest.mark.parametrize(
    ("call", "value", "said"),
    [
        (figures.amount, 1.23456, "1.235"),
        (figures.amount, 2e-5, "2e-05"),
        (figures.amount, 12000.0, "12,000"),
        (figures.amount, 2100.4, "2,100"),
        (figures.amount, "NaN", "NaN"),
        (figures.amount, float("-inf"), "-infinity"),
        (figures.amount, "auto", "auto"),
        (figures.amount, None, "unknown"),
        (figures.count, 7473, "7,473"),
        (figures.count, 134_515_008, "134.5 M"),
        (figures.size, 25_757_220_864, "24.0 GiB"),
        (figures.size, 512, "512 B"),
        (figures.duration, 0.2, "less than 1 s"),
        (figures.duration, 59.7, "1 min"),
        (figures.duration, 125, "2 min 5 s"),
        (figures.duration, 3599.6, "1 h"),
        (figures.duration, 187_200, "2 d 4 h"),
        (figures.duration, "NaN", "unknown"),
        (figures.money, 0, "$0"),
        (figures.money, 0.4, "$0.40"),
        (figures.money, 0.0003, "$0.0003"),
    ],
)
def test_figures(call: Any, value: Any, said: str) -> None:
    assert call(value) == said


def test_an_estimate_names_its_range_and_source() -> None:
    doc = {"low": 60, "expected": 125, "high": 200, "unit": "seconds", "source": "formula"}
    assert figures.estimate(doc) == "2 min 5 s (1 min to 3 min 20 s, formula)"
    assert figures.estimate({**doc, "low": 125, "high": 125, "source": "measured"}) == "2 min 5 s (measured)"
    speed = {"low": 50.98, "expected": 153.2, "high": 382.4, "unit": "tokens/s", "source": "formula"}
    assert figures.estimate(speed) == "153 tokens/s (51 to 382, formula)"
    memory = {"low": 900 * 2**20, "expected": 2**30, "high": 2**31, "unit": "bytes", "source": "measured"}
    assert figures.estimate(memory) == "1.0 GiB (900.0 MiB to 2.0 GiB, measured)"
    assert figures.estimate(None) == "unknown"
    assert figures.share(3, 100) == "3 %"
    assert figures.share(1, 0) == ""


@given(st.floats() | st.integers() | st.none() | st.text(max_size=5) | st.booleans())
def test_any_value_can_be_said(value: Any) -> None:
    for call in (figures.amount, figures.count, figures.size, figures.duration, figures.money):
        assert isinstance(call(value), str)
