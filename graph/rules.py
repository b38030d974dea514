"""How the vocabulary is written down: small templates over marked text, and what a hit is worth.

In a template a space is one to three spaces, `_` is an optional space, hyphen or underscore ("max_steps" also reads
"max steps"), and {N} {P} {F} {A} {R} stand for a number, a percentage, a share, any of the three, and a reference.
{IS} joins a name and its value ("rank 16", "rank of 16", "rank=16"); {W} is a reference or a bare word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tunesmith.graph.numbers import Number
from tunesmith.graph.sentence import NUM, PART, PCT, REF, Ref, Sentence

_SPACE = " {1,3}"
_WORD = rf"(?:{REF}++|[a-z0-9{NUM}][\w.+{NUM}-]{{0,80}})"
_NAMED = {
    "N": f"{NUM}++",
    "P": f"{PCT}++",
    "F": f"{PART}++",
    "A": f"(?:{NUM}++|{PCT}++|{PART}++)",
    "R": f"{REF}++",
    "W": _WORD,
}
_SLOT = re.compile(r"\{(IS|[NPFARW])(\d?)\}")
_IS = rf"(?:{_SPACE}(?:of|to|is|are|at|be|by|as|equals?|about|around))?[ -]{{0,3}}"


@dataclass(frozen=True, slots=True)
class Hit:
    """A rule that fits at a place of a sentence."""

    sentence: Sentence
    match: re.Match[str]

    @property
    def words(self) -> str:
        """The user's own words."""
        return self.sentence.words(self.match.start(), self.match.end())

    @property
    def low(self) -> str:
        """The same in lower case, with references and numbers marked."""
        return self.match[0]

    def group(self, name: str) -> str | None:
        """The user's own words for a named part, or None where that part is absent."""
        if name not in self.match.re.groupindex or self.match[name] is None:
            return None
        start, end = self.match.span(name)
        ref = self.sentence.refs.get(start)
        return ref.text if ref is not None and ref.end == end else self.sentence.words(start, end).rstrip(".-")

    def number(self, name: str = "N") -> Number:
        """The number in a slot."""
        return self.sentence.numbers[self.match.start(name)]

    def has(self, name: str) -> bool:
        """Whether a slot is filled."""
        return name in self.match.re.groupindex and self.match[name] is not None

    @property
    def refs(self) -> tuple[Ref, ...]:
        """Every reference inside the hit, in order."""
        start, end = self.match.span()
        return tuple(ref for at, ref in sorted(self.sentence.refs.items()) if start <= at < end)


@dataclass(frozen=True, slots=True)
class Rule:
    """Words that mean `key`. `value` is constant, or made from the hit; None from it means: this was not meant.

    Where `key` is "" the value is a mapping of several keys.
    """

    key: str
    value: Any
    template: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """The template as a pattern that ends with a whole word."""
        return compiled(self.template)

    def facts(self, hit: Hit) -> dict[str, Any]:
        """What the hit says: key -> value; empty where the rule declines."""
        value = self.value(hit) if callable(self.value) else self.value
        if value is None:
            return {}
        return dict(value) if self.key == "" else {self.key: value}


def lead(words: str, most: int = 6) -> str:
    """Up to `most` of these words, each with its space, before something."""
    return f"(?:(?:{'|'.join(words.split())}) ){{0,{most}}}"


def tail(words: str, most: int = 6) -> str:
    """Up to `most` of these words, each with its space, after something."""
    return f"(?: (?:{'|'.join(words.split())})){{0,{most}}}"


def say(key: str, value: Any | Callable[[Hit], Any], *templates: str) -> tuple[Rule, ...]:
    """One rule for each template."""
    return tuple(Rule(key, value, template) for template in templates)


@cache
def compiled(template: str) -> re.Pattern[str]:
    """A template as a pattern. A slot is a group of its own name: {N}, {N2}, {R} ..."""

    def slot(match: re.Match[str]) -> str:
        if match[1] == "IS":
            return "\x01"
        return f"(?P<{match[1]}{match[2]}>{_NAMED[match[1]]})"

    pieces = _SLOT.sub(slot, template.replace("_", "[\x02\x03-]?").replace(" ?", "\x04").replace(" ", _SPACE))
    pattern = pieces.replace("\x01", _IS).replace("\x02", " ").replace("\x03", "_").replace("\x04", " {0,3}")
    return re.compile(pattern + rf"(?![\w{REF}{NUM}{PCT}{PART}])")


def value(hit: Hit) -> int | float:
    """The number as it stands; percentages and shares as fractions."""
    name = next(name for name in ("N", "P", "F", "A") if hit.has(name))
    return hit.number(name).plain


def fraction(hit: Hit) -> float:
    """A share of something: "10 %" and "0.1" are the same, and so is "hold out 10" where a share is meant."""
    name = next(name for name in ("P", "F", "A", "N") if hit.has(name))
    number = hit.number(name)
    return round(number.value / 100 if number.kind == "number" and number.value >= 1 else number.value, 9)


def tokens(hit: Hit) -> int | float:
    """A length in tokens, where "2k" is 2,048."""
    number = hit.number()
    return round(number.value / 1000 * 1024) if number.kilo and number.value <= 1_024_000 else number.plain
