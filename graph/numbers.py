"""Numbers in English, as digits and as words: where they stand in a sentence and what they are worth.

Three kinds: a `number` ("3", "1e-4", "10k", "twenty-five"), a `percent` ("5 %", "five percent", worth 0.05) and a
`share` ("half", "two thirds", "1/2"). Every pattern is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["number", "percent", "share"]

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
UNITS = {word: value for value, word in enumerate(f"{_SMALL} seventeen eighteen nineteen".split())} | {"single": 1}
TENS = {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000, "dozen": 12, "couple": 2}
PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fifth": 5, "tenth": 10}
PARTS |= {f"{word}s": value for word, value in PARTS.items() if word not in ("half", "halves")}

_WORD = re.compile(r"[a-z]+")
_DIGITS = re.compile(
    r"(?<![a-z0-9_.])"
    r"(?P<body>\d{1,3}(?:[,_]\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:e(?P<exp>[+-]?\d{1,3})|\s?[x*]\s?10\^?(?P<ten>[+-]?\d{1,2}))?"
    r"(?P<k>k(?![a-z]))?(?![0-9])"
)
_DECIMAL_COMMA = re.compile(r"(?<![a-z0-9_.])0,(\d+)(?![\d,])")
_SCALE_AFTER = re.compile(r" (hundred|thousand|million)\b")
_PERCENT = re.compile(r" ?(?:%|percent\b|per cent\b|pct\b)")
_SLASH = re.compile(r"(?<![\w./-])(\d{1,3})/(\d{1,3})(?:th|rd)?(?= of| the|\s?$|,)")
_SIGN = re.compile(r"(?:(?<![\w)])-|\b(?:minus|negative) )$")


@dataclass(frozen=True, slots=True)
class Number:
    """A number at text[start:end]. `kilo` is True for "2k", which means 2,048 where a length in tokens is meant."""

    start: int
    end: int
    value: float
    kind: Kind = "number"
    kilo: bool = False

    @property
    def plain(self) -> int | float:
        """The value, as an integer where it is a whole number."""
        return int(self.value) if abs(self.value) < 1e15 and self.value == int(self.value) else self.value


def numbers(low: str) -> tuple[Number, ...]:
    """Every number of a lower-case text, in order, without overlaps. Linear in its length."""
    found: list[Number] = []
    taken = 0
    for one in sorted((*_slashes(low), *_digits(low), *_words(low)), key=lambda item: (item.start, -item.end)):
        if one.start >= taken:
            found.append(one)
            taken = one.end
    return tuple(found)


def _slashes(low: str) -> Iterator[Number]:
    for match in _SLASH.finditer(low):
        top, bottom = int(match[1]), int(match[2])
        if 0 < top < bottom:
            yield Number(match.start(), match.end(), top / bottom, "share")


def _digits(low: str) -> Iterator[Number]:
    for match in _DECIMAL_COMMA.finditer(low):
        yield _signed(low, match.start(), match.end(), float(f"0.{match[1]}"))
    for match in _DIGITS.finditer(low):
        value = float(match["body"].replace(",", "").replace("_", ""))
        power = match["exp"] or match["ten"]
        if power:
            value = float(f"{value}e{power}")
        end = match.end()
        if match["k"]:
            value *= 1000
        elif scale := _SCALE_AFTER.match(low, end):
            value, end = value * SCALES[scale[1]], scale.end()
        yield _signed(low, match.start(), end, value, kilo=bool(match["k"]))


def _signed(low: str, start: int, end: int, value: float, *, kilo: bool = False) -> Number:
    """The number with its sign and its percent sign, where it has them."""
    value = round(value, 12) if value > 1 else value
    if sign := _SIGN.search(low, max(0, start - 9), start):
        start, value = sign.start(), -value
    if percent := _PERCENT.match(low, end):
        return Number(start, percent.end(), value / 100, "percent")
    return Number(start, end, value, "number", kilo)


def _words(low: str) -> Iterator[Number]:
    """Number words: "three", "twenty-five", "a hundred and ten", "two and a half", "half", "two thirds"."""
    run: list[re.Match[str]] = []
    previous: re.Match[str] | None = None
    article: re.Match[str] | None = None
    for match in _WORD.finditer(low):
        word = match[0]
        joined = run and previous is not None and low[previous.end() : match.start()] in (" ", "-")
        if run and not joined:
            yield _worded(low, run)
            run = []
        if word in UNITS or word in TENS or word in SCALES:
            opens = not run and word in SCALES
            if opens and (article is None or article.end() + 1 != match.start()):
                previous, article = match, None
                continue
            if opens and article is not None:
                run = [article]
            run.append(match)
        elif word in PARTS and (run or word == "half" or (article is not None and article.end() + 1 == match.start())):
            yield _part(low, run, match)
            run = []
        elif run and word not in ("and", "a", "of"):
            yield _worded(low, run)
            run = []
        article = match if word in ("a", "an", "one") and not (word == "one" and len(run) > 1) else None
        previous = match
    if run:
        yield _worded(low, run)


def _count(words: list[str]) -> float:
    total = current = 0.0
    for word in words:
        if word in SCALES:
            current = max(current, 1.0) * SCALES[word]
            if SCALES[word] >= 1000:
                total, current = total + current, 0.0
        else:
            current += UNITS.get(word, TENS.get(word, 0))
    return total + current


def _worded(low: str, run: list[re.Match[str]]) -> Number:
    return _signed(low, run[0].start(), run[-1].end(), _count([match[0] for match in run]))


def _part(low: str, run: list[re.Match[str]], part: re.Match[str]) -> Number:
    """A share: "half", "a third", "two thirds"; after "and a" it is added: "two and a half" is the number 2.5."""
    if not run:
        return Number(part.start(), part.end(), 1 / PARTS[part[0]], "share")
    count = _count([match[0] for match in run])
    between = low[run[-1].end() : part.start()]
    if between.strip().startswith("and"):
        return Number(run[0].start(), part.end(), count + 1 / PARTS[part[0]])
    return Number(run[0].start(), part.end(), count / PARTS[part[0]], "share")
