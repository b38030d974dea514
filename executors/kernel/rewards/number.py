"""The final number of a text, exactly: commas, currency, signs, fractions, exponents, trailing dots.

A marked number comes first: GSM8K's `#### 72`, then \\boxed{72}, then <answer>72</answer>; else the last one counts.
Cost: linear in the length of the text, some microseconds for a usual completion.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from tunesmith.executors.kernel.rewards.texts import answer_in, tagged

MARK = "####"
MOST_DIGITS = 1000
MOST_POWER = 3  # digits of an exponent: larger numbers are nobody's answer, and fill memory
_CURRENCY = "$\u00a2\u00a3\u00a5" + "".join(map(chr, range(0x20A0, 0x20C1)))  # cent, pound, yen, and all of that block
_MINUS = "-\u2212\u2013"

# What LaTeX and typesetting put inside numbers: 1{,}234, 1\,234, \$5, and thin spaces between groups of three.
_NOISE = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;])(?=\d)|(?<=\d)[\u00a0\u202f\u2009](?=\d{3}(?!\d))|\\(?=[$%])")
_FRACTION = re.compile(r"\\[dt]?frac\s?(?:\{\s?(-?[\d,]{1,40})\s?\}|(\d))\s?(?:\{\s?([\d,]{1,40})\s?\}|(\d))")
# A run of digits that is no part of a word ("x2", "H2O") or of a version ("1.2.3"). Every repeat is bounded or greedy
# over digits alone, so that no text makes it slow.
_NUMBER = re.compile(
    r"(?:(?<![A-Za-z_\d])(?<!\d\.)(?:\d{1,3}(?:,\d{2,3}){0,8},\d{3}(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE][-+]?\d+)?"
)


def final_number(text: str) -> Fraction | None:
    """The number that a completion or a reference ends in, or None."""
    text = answer_in(text)
    _, mark, after = text.rpartition(MARK)
    if mark:
        first = _first(_clean(after))
        if first is not None:
            return first
    inside = boxed(text)
    if inside is None:
        inside = tagged(text)
    return _last(_clean(text if inside is None else inside))


def number_in(value: Any) -> Fraction | None:
    """The number of a reference: a number as it is, a text by `final_number`, anything else None."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return Fraction(value) if abs(value) < 10**MOST_DIGITS else None
    if isinstance(value, float):
        return Fraction(str(value)) if math.isfinite(value) and abs(value) < 1e300 else None
    return final_number(value) if isinstance(value, str) else None


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, its braces balanced, or None."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    at = start + len("\\boxed")
    while at < len(text) and text[at] == " ":
        at += 1
    if at >= len(text) or text[at] != "{":
        return None
    depth = 0
    for place in range(at, len(text)):
        one = text[place]
        if one == "{" and text[place - 1] != "\\":
            depth += 1
        elif one == "}" and text[place - 1] != "\\":
            depth -= 1
            if depth == 0:
                return text[at + 1 : place]
    return None


def _clean(text: str) -> str:
    if "frac" in text:
        text = _FRACTION.sub(lambda hit: f"{hit[1] or hit[2]}/{hit[3] or hit[4]}", text)
    return _NOISE.sub("", text)


def _first(text: str) -> Fraction | None:
    found = list(_upto(text, 3))
    return _value(text, found, 1 if len(found) > 1 and _joined(text, found[0], found[1]) else 0) if found else None


def _last(text: str) -> Fraction | None:
    found = list(_NUMBER.finditer(text))[-3:]
    return _value(text, found, len(found) - 1) if found else None


def _upto(text: str, most: int) -> list[re.Match[str]]:
    found = []
    for match in _NUMBER.finditer(text):
        found.append(match)
        if len(found) == most:
            break
    return found


def _joined(text: str, left: re.Match[str], right: re.Match[str]) -> bool:
    """Whether two numbers are a fraction: 3/4."""
    return right.start() == left.end() + 1 and text[left.end()] == "/"


def _value(text: str, found: list[re.Match[str]], at: int) -> Fraction | None:
    """The number at a place of those found: with the one before it where they are a fraction and no date."""
    match = found[at]
    below: Fraction | None = None
    if at > 0 and _joined(text, found[at - 1], match):
        dated = at > 1 and _joined(text, found[at - 2], found[at - 1])
        dated = dated or (at + 1 < len(found) and _joined(text, match, found[at + 1]))
        if not dated:
            below, match = _plain(match[0]), found[at - 1]
            if not below:
                return None
    number = _plain(match[0])
    if number is None:
        return None
    if _is_negative(text, match.start()):
        number = -number
    return number / below if below is not None else number


def _plain(text: str) -> Fraction | None:
    power = text.lower().partition("e")[2].lstrip("+-")
    return Fraction(text.replace(",", "")) if len(text) <= MOST_DIGITS and len(power) <= MOST_POWER else None


def _is_negative(text: str, start: int) -> bool:
    """Whether a sign stands right before a number, or before or behind its currency: -5, -$5, $-5; not 8-5."""
    at = start - 1
    if at >= 0 and text[at] in _CURRENCY:
        at -= 1
    if at < 0 or text[at] not in _MINUS:
        return False
    before = text[at - 1] if at > 0 else " "
    return not (before.isalnum() or before in ")]}")
