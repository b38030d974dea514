"""A request as it is read: its own letters, with paths, ids and numbers lifted out so that rules see only short words.

`marked` has as many characters as `raw`: a reference (path, hub id, quoted text, job) is overwritten with REF marks and
a number with NUM, PCT or PART marks. So every rule is a small pattern, and every hit points back at the user's words.
Nothing in a request is ever executed, and every pattern is linear in its length.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from tunesmith.graph.numbers import Number, numbers

REF, NUM, PCT, PART = "\ue000", "\ue001", "\ue002", "\ue003"
_MARKS = {"number": NUM, "percent": PCT, "share": PART}

RefKind = Literal["file", "weights", "code", "path", "hub", "url", "job", "quoted"]

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".text", ".md")
PACKED = (".gz", ".bz2", ".xz", ".zst")
WEIGHT_SUFFIXES = (".gguf", ".safetensors")

_PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201a": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u201e": '"',
        "\u00ab": '"',
        "\u00bb": '"',
    }
    | {"\u2010": "-", "\u2011": "-", "\u2212": "-", "\u2013": "-", "\u2014": " ", "\u00d7": "x"}
)
_QUOTED = re.compile(r"(?<![\w])([\"'`])([^\"'`]{1,300})\1(?!\w)")
_TOKEN = re.compile(r"[^\s,;\"'`()<>|={}]+")
_JOB = re.compile(r"(?:job:)?j-[a-z2-7]{6}(?:\.\d+)?|job:[\w.-]+|stage:\d+", re.IGNORECASE)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(?:@[\w.-]+)?")
_CODE = re.compile(r".+\.py(?::[^\W\d]\w*)?")
_GYM = re.compile(r"reasoning[-_]gym:\w+")
_URL = re.compile(r"(?:https?|hf|s3|gs|az|file)://|(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(datasets/)?([\w.-]+/[\w.-]+)(?:/.*)?|"
    r"hf://(datasets/)?([\w.-]+/[\w.-]+)",
    re.IGNORECASE,
)
_COMMON = """and or yes no on off w n a y h s sec step steps hour hours token tokens input inputs output outputs prompt
    prompts completion completions question questions answer answers instruction instructions response responses
    user assistant system train training test eval validation dev chosen rejected good bad sft dpo grpo kto lora
    qlora dora full cpu gpu base tuned before after with without he she his her either merge push export save load
    model data dataset adapter usd eur dollars day week i o"""
_ORDINARY = frozenset(_COMMON.split())


@dataclass(frozen=True, slots=True)
class Ref:
    """A path, id or quoted text at raw[start:end]; `text` is it without quotes. `hint` is what a URL says it is."""

    start: int
    end: int
    text: str
    kind: RefKind
    hint: Literal["model", "data"] | None = None


@dataclass(frozen=True, slots=True)
class Sentence:
    """The request with what was lifted out of it, by where it starts. `low` is `raw` in lower case."""

    raw: str
    low: str
    marked: str
    refs: dict[int, Ref]
    numbers: dict[int, Number]

    def words(self, start: int, end: int) -> str:
        """The user's own words at a place, without the space around them."""
        return self.raw[start:end].strip()


def sentence(text: str) -> Sentence:
    """Read the letters of a request. Cost: a few linear passes."""
    visible = (" " if unicodedata.category(one)[0] == "C" else one for one in unicodedata.normalize("NFKC", text))
    raw = " ".join("".join(visible).translate(_PLAIN).split())
    low = "".join(lowered if len(lowered := one.lower()) == 1 else one for one in raw)
    refs = {ref.start: ref for ref in _refs(raw)}
    veiled = list(low)
    for ref in refs.values():
        veiled[ref.start : ref.end] = REF * (ref.end - ref.start)
    plainly = "".join(veiled)
    lifted = {number.start: number for number in numbers(plainly)}
    for number in lifted.values():
        veiled[number.start : number.end] = _MARKS[number.kind] * (number.end - number.start)
    marked = "".join(veiled).replace("=", " ").replace(":", " ").replace("--", "  ")
    return Sentence(raw, low, marked, refs, lifted)


def _refs(raw: str) -> list[Ref]:
    found = []
    rest = list(raw)
    for match in _QUOTED.finditer(raw):
        inner = match[2].strip()
        ref = classify(inner, match.start(), match.end()) if inner else None
        found.append(ref or Ref(match.start(), match.end(), inner, "quoted"))
        rest[match.start() : match.end()] = " " * (match.end() - match.start())
    for match in _TOKEN.finditer("".join(rest)):
        token = match[0].lstrip("[").rstrip(".:!?]") if not match[0].endswith(("/..", "/.")) else match[0]
        start = match.start() + match[0].find(token) if token else 0
        ref = classify(token, start, start + len(token)) if token else None
        if ref is not None:
            found.append(ref)
    return found


def classify(token: str, start: int, end: int) -> Ref | None:
    """What a word is a reference to, or None for an ordinary word."""
    page = _PAGE.fullmatch(token)
    if page:
        data = page[1] or page[3]
        return Ref(start, end, page[2] or page[4], "hub", "data" if data else "model")
    if _URL.match(token):
        return Ref(start, end, token, "url", "data")
    if _JOB.fullmatch(token):
        return Ref(start, end, token, "job")
    bare = token.lower()
    for suffix in PACKED:
        bare = bare.removesuffix(suffix)
    if len(bare) > 5 and bare.endswith(WEIGHT_SUFFIXES):
        return Ref(start, end, token, "weights", "model")
    if bare.endswith(DATA_SUFFIXES) and bare not in DATA_SUFFIXES:
        return Ref(start, end, token, "file", "data")
    if _CODE.fullmatch(bare):
        return Ref(start, end, token, "code")
    if _GYM.fullmatch(bare):
        return Ref(start, end, token, "file", "data")
    if token.startswith(("./", "../", "~/", "/")) and len(token) > 1 and not token.startswith("//"):
        return Ref(start, end, token, "path")
    if re.match(r"[A-Za-z]:\\", token):
        return Ref(start, end, token, "path")
    if "*" in token and "/" in token:
        return Ref(start, end, token, "file", "data")
    if "/" in token and not _is_ordinary(token):
        if _HUB.fullmatch(token):
            return Ref(start, end, token, "hub")
        if re.fullmatch(r"[\w.@-]+(?:/[\w.@-]+){1,30}/?", token):
            return Ref(start, end, token, "path")
    return None


def _is_ordinary(token: str) -> bool:
    """Whether a word with a slash is plain English or arithmetic: "and/or", "input/output", "1/2", "$5/hour"."""
    parts = token.lower().split("/")
    return all(part in _ORDINARY or not part or not re.search(r"[a-z]", part) for part in parts)
