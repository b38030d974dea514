"""Where a sentence names a model: the catalogue model that is meant, or those that may be."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunesmith.executors.kernel import catalogue
from tunesmith.graph.sentence import Sentence

_FAMILY = re.compile(
    r"(?:qwen|qwq|(?:meta-?|code-?|tiny-?)?llama|smollm|gemma|mistral|mixtral|ministral|codestral|deepseek|falcon|"
    r"chatgpt|gpt|olmo|granite|pythia|stablelm|starcoder|zephyr|vicuna|claude|gemini|nemotron|minicpm|internlm|tulu|"
    r"(?:phi|yi|opt|bloom|glm|mpt|lfm|t5|command-?r)(?=-?\d|$))(?=$|[\d.-]|chat|coder|math|moe)"
)
_SHY = re.compile(r"(?:opt|bloom|yi|command-?r|mpt|lfm)$")
_SIZED = re.compile(r"[a-z][\w.]*(?:-[\w.]+)*-\d+(?:\.\d+)?[bm](?:-[\w.-]+)?$")
_TOKEN = re.compile(r"[a-z0-9][\w.+-]*")
_PART = re.compile(
    r"v?\d+(?:\.\d+)*|\d+(?:\.\d+)?[bm]|\d+x\d+b|a\d+b|base|instruct|it|chat|pt|mini|small|medium|tiny|large|nano|"
    r"coder|math|nemo|next|moe|distill|r1|\d+k"
)
_UNIT = re.compile(
    r"(?:full |training |more )?(?:epochs?|steps?|rows?|examples?|samples?|hours?|h|minutes?|mins?|days?|gb|gib|times|"
    r"passes|%|percent|dollars?|usd|iterations?)\b"
)


@dataclass(frozen=True, slots=True)
class Mention:
    """Words at raw[start:end] that name a model: one catalogue id, or `choices` where several fit, or neither."""

    start: int
    end: int
    words: str
    id: str | None
    choices: tuple[str, ...] = ()


def mention(sentence: Sentence, start: int) -> Mention | None:
    """The model named from `start` on, or None. Cost: one pattern for most words, a few look-ups for a name."""
    tokens = _tokens(sentence, start)
    if not tokens:
        return None
    first = tokens[0][0]
    if not (_FAMILY.match(first) or _SIZED.fullmatch(first)) or (_SHY.fullmatch(first) and len(tokens) < 2):
        return None
    found: tuple[str, int] | None = None
    for count in range(1, len(tokens) + 1):
        name, end = sentence.low[start : tokens[count - 1][1]], tokens[count - 1][1]
        if count > 1 and _is_count(sentence, tokens, count - 1):
            break
        facts = catalogue.find(name)
        if facts is not None and (found is None or found[0] != facts.id):
            found = facts.id, end
    if found is not None:
        return Mention(start, found[1], sentence.words(start, found[1]), found[0])
    end = tokens[0][1]
    for index in range(1, len(tokens)):
        if not _PART.fullmatch(tokens[index][0]) or _is_count(sentence, tokens, index):
            break
        end = tokens[index][1]
    words = sentence.words(start, end)
    return Mention(start, end, words, None, tuple(choices(words)))


def _tokens(sentence: Sentence, start: int, most: int = 6) -> list[tuple[str, int]]:
    """Up to `most` words from `start`, each with its end, up to the first comma or reference."""
    found: list[tuple[str, int]] = []
    while len(found) < most:
        match = _TOKEN.match(sentence.low, start)
        if match is None or start in sentence.refs:
            break
        word = match[0].rstrip(".-+")
        found.append((word, start + len(word)))
        start += len(word)
        if sentence.low[start : start + 1] != " ":
            break
        start += 1
    return found


def _is_count(sentence: Sentence, tokens: list[tuple[str, int]], index: int) -> bool:
    """Whether a number after a name counts something else: "qwen3-0.6b 3 epochs", "phi 4 epochs"."""
    word, end = tokens[index]
    return (
        word[0].isdigit()
        and _UNIT.match(sentence.low, end + 1 if sentence.low[end : end + 1] == " " else end) is not None
    )


def choices(words: str, most: int = 6) -> list[str]:
    """Catalogue ids that a loose name may mean ("llama", "qwen 3", "a 7B model"): new ones first, then small ones."""
    names = set(re.findall(r"[a-z]{3,}", words.lower())) - {"model", "models", "instruct", "base", "chat"}
    sizes = {
        float(size) * (1 if unit == "b" else 0.001)
        for size, unit in re.findall(r"(\d+(?:\.\d+)?)([bm])\b", words.lower())
    }
    versions = re.findall(r"(?<![\d.])(\d(?:\.\d)?)(?![\d.]*[bmk\d])", words.lower())
    fitting = []
    for facts in catalogue.known():
        name = facts.id.split("/")[-1].lower()
        if not names <= set(re.findall(r"[a-z]+", name)):
            continue
        if sizes and not any(abs(_named_size(name) - size) < 0.051 * size for size in sizes):
            continue
        if not all(re.search(rf"(?<![\d.]){re.escape(version)}(?!\d)", name) for version in versions):
            continue
        special = bool(re.search(r"coder|math|code|distill", name))
        fitting.append((special, -_generation(name), facts.params, not facts.instruct, facts.id))
    return [id for *_, id in sorted(fitting)[:most]]


def _generation(name: str) -> int:
    """The generation in a model's name: 3 for Llama-3.2-1B; 0 where there is none."""
    match = re.search(r"(?<![\d.])(\d)(?:\.\d)?(?![\d.]*[bmk\d])", name)
    return int(match[1]) if match else 0


def _named_size(name: str) -> float:
    """The size in a model's name, in billions; 0 where it has none."""
    match = re.search(r"(?<![\dx.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name)
    return float(match[1]) * (1 if match[2] == "b" else 0.001) if match else 0.0


def looks_like_model(id: str) -> bool:
    """Whether a hub id or a path names a model by its looks: known, sized, or of a known family."""
    name = id.rsplit("/", 1)[-1].lower()
    if catalogue.find(id) is not None:
        return True
    worded = set(re.findall(r"[a-z]+", name))
    if worded & {
        "data",
        "dataset",
        "datasets",
        "preference",
        "preferences",
        "conversations",
        "cots",
        "pairs",
        "prompts",
    }:
        return False
    return bool(
        _FAMILY.match(name)
        or re.search(r"(?:^|[-_])\d+(?:\.\d+)?[bm](?:$|[-_.])", name)
        or worded & {"model", "models", "llm", "checkpoint", "gguf"}
    )
