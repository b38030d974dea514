"""Hostile text made harmless."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.orchestrator.inert import has_secret, inert, mask


def test_control_characters_are_shown_and_bidi_is_gone() -> None:
    assert inert("a\x1b[31mred\x07\x9b") == "a\\x1b[31mred\\x07\\x9b"
    assert inert("\u202egnp.exe\u2066\u200b\ufeff") == "gnp.exe"
    assert inert("a\nb\tc\r") == "a\\nb\\tc\\r"
    assert inert("a\nb\tc\r", lines=True) == "a\nb\tc\\r"
    assert inert("\udc80") == "\\udc80"
    assert inert("x" * 50, limit=10) == "xxxxxxx..."
    assert inert(17) == "17"


def test_secrets_are_masked_wherever_they_stand() -> None:
    token = "hf_" + "a1B2" * 8
    text = f"curl -H 'Bearer {token}' https://me:pw@host/x?token=abcdefgh&y=1"
    assert has_secret(text)
    assert mask(text) == "curl -H 'Bearer ***' https://***@host/x?***&y=1"
    assert token not in inert(text)


@given(st.text(max_size=200))
def test_nothing_that_moves_a_cursor_comes_through(text: str) -> None:
    shown = inert(text)
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in shown)
    assert not any(char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" for char in shown)
    shown.encode()
