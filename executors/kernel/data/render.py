"""Examples become token ids and labels: loss on the assistant's or the completion's tokens only.

What the labels promise, for rows that were not truncated:

- Ids are the tokenizer's own: `apply_chat_template` of the whole conversation, tokenised once.
- A token is supervised where it lies wholly inside an answer or its stop token. An answer begins where the template's
  rendering of all that comes before it, with the generation prompt, ends; that must be a prefix of the whole.
- The last supervised token of every answer is a stop token: one that ends generation. What a template writes after it
  (ChatML: a line break) stays in the ids, because the next turn follows it, and is not supervised.

Differences to TRL 1.16 on prompt/completion rows, all meant:

- TRL supervises everything after the prompt, also what follows the stop token. At inference nothing follows it.
- TRL finds the answer's first token as the end of the common prefix of two tokenisations; here it is the first token
  wholly inside the answer. They differ only where a token spans the boundary: TRL trains on it, though at inference
  it is never generated, and here it is left out.
- In conversations TRL by default trains on users' and system turns too; here only on the assistant's.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.data.convert import Example, Message
from tunesmith.executors.kernel.data.template import refused
from tunesmith.orchestrator.errors import InputError

IGNORED = -100
BATCH = 256

# Names of end-of-turn tokens; each counts only where the tokenizer has it as a special token.
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>", "<|return|>", "<|endofturn|>"),
    *(
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end_of_turn|>",
        "<|im_sep|>",
        "<|eom_id|>",
        "<|END_OF_TURN_TOKEN|>",
        "</s>",
    ),
    *("<｜end▁of▁sentence｜>", "[EOS]", "<eos>"),
)
_TRIES = 64


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the loops take it: `labels` are the ids, or -100 where a token is not trained on."""

    row: int
    ids: list[int]
    labels: list[int]
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class _Text:
    """A row as text. `special`: the tokenizer adds its own tokens. `answers`: where each begins, and what it says."""

    row: int
    text: str
    special: bool
    answers: list[tuple[int, str]] = field(default_factory=list)
    start: int = 0


def encode(example: Example, tokenizer: Any, max_length: int | None) -> Encoded:
    """Tokenise one example. Rows longer than `max_length` keep their start, if an answer's token is left in it.

    Raises InputError: data.no_supervised_tokens, data.no_stop_token, data.no_chat_template, data.template_not_prefix,
    data.template_refused, data.template_drops_turn, data.template_changes_text, data.nothing_to_train,
    data.slow_tokenizer.
    """
    for result in encode_many([example], tokenizer, max_length):
        if isinstance(result, Encoded):
            return result
        raise result
    raise AssertionError


def encode_many(examples: Iterable[Example], tokenizer: Any, max_length: int | None) -> Iterator[Encoded | InputError]:
    """Tokenise examples in batches on all cores, in order; an example that cannot be trained on gives its error.

    One answer costs two renderings (40 us each for ChatML) and one tokenisation.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"The tokenizer {type(tokenizer).__name__} does not tell where its tokens stand in the text.",
            why="Labels are placed by these positions; only tokenizers with a tokenizer.json know them.",
            fix="Use the fast tokenizer of the model.",
            code="data.slow_tokenizer",
        )
    stream = iter(examples)
    while batch := list(islice(stream, BATCH)):
        texts = [_rendered(example, tokenizer) for example in batch]
        encodings: dict[int, Any] = {}
        for special in (False, True):
            chosen = [
                number for number, text in enumerate(texts) if isinstance(text, _Text) and text.special is special
            ]
            if chosen:
                found = tokenizer(
                    [texts[number].text for number in chosen],  # type: ignore[union-attr]
                    add_special_tokens=special,
                    return_offsets_mapping=True,
                    return_attention_mask=False,
                    truncation=False,
                    padding=False,
                    verbose=False,
                )
                pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
                encodings |= dict(zip(chosen, pairs, strict=True))
        for number, text in enumerate(texts):
            if isinstance(text, InputError):
                yield text
                continue
            try:
                ids, offsets = encodings[number]
                yield _labelled(text, ids, offsets, tokenizer, max_length)
            except InputError as error:
                yield error


def stop_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids that end generation: eos, known end-of-turn tokens, and what the model's generation_config.json names."""
    try:
        return _STOPS[tokenizer]
    except KeyError:
        pass
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    stops = {special[name] for name in _ENDS if name in special}
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    stops |= _generation_stops(str(tokenizer.name_or_path))
    _STOPS[tokenizer] = frozenset(stops)
    return _STOPS[tokenizer]


_STOPS: weakref.WeakKeyDictionary[Any, frozenset[int]] = weakref.WeakKeyDictionary()


def _generation_stops(folder: str) -> set[int]:
    try:
        config = json.loads(Path(folder, "generation_config.json").read_text("utf-8"))
        found = config.get("eos_token_id")
    except (OSError, ValueError, RecursionError, AttributeError):
        return set()
    return {item for item in (found if isinstance(found, list) else [found]) if type(item) is int}


# --- text ----------------------------------------------------------------------------------------------------------


def _rendered(example: Example, tokenizer: Any) -> _Text | InputError:
    try:
        if example.text is not None:
            return _Text(example.row, _ended(example, example.text, tokenizer), special=True)
        messages = example.messages
        if messages is None and example.prompt is not None and example.completion is not None:
            if not tokenizer.chat_template:
                text = _ended(example, example.prompt + example.completion, tokenizer)
                return _Text(example.row, text, special=True, start=len(example.prompt))
            messages = (Message("user", example.prompt), Message("assistant", example.completion))
        if messages is None:
            raise row_error(example.row, "nothing_to_train", "holds a prompt and no answer")
        return _conversation(example, messages, tokenizer)
    except InputError as error:
        error.where = error.where or f"row {example.row}"
        return error


def _ended(example: Example, text: str, tokenizer: Any) -> str:
    eos = tokenizer.eos_token
    if not eos:
        why = "The tokenizer has no end-of-sequence token, so the model would never learn to stop."
        raise row_error(example.row, "no_stop_token", "cannot be ended", why)
    return text if text.endswith(eos) else text + eos


def _conversation(example: Example, messages: Sequence[Message], tokenizer: Any) -> _Text:
    if not tokenizer.chat_template:
        why = "The model has no chat template, so nobody knows how it should read turns."
        fix = "Choose an instruct model, or map the data to prompt and completion, or to text."
        raise row_error(example.row, "no_chat_template", "is a conversation", why, fix)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    whole = as_text(turns, tokenizer, False)
    answers = []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            check_shown(example, message, whole)
        elif number >= example.context:
            before = as_text(turns[:number], tokenizer, True)
            if not whole.startswith(before):
                why = "Its rendering of the turns before an answer is not how the whole conversation begins."
                raise row_error(example.row, "template_not_prefix", "cannot be labelled with this chat template", why)
            answers.append((len(before), message.content))
    if not answers:
        raise row_error(example.row, "nothing_to_train", "holds no answer to train on")
    return _Text(example.row, whole, special=False, answers=answers)


def as_text(turns: list[dict[str, str]], tokenizer: Any, add_generation_prompt: bool) -> str:
    """Turns as the chat template writes them. Raises InputError data.template_refused."""
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # a template is a program of strangers: it may raise anything
        raise refused(error) from error


def check_shown(example: Example, message: Message, whole: str) -> None:
    """Raise InputError data.template_drops_turn where a turn does not stand in the rendered text."""
    text = message.content.strip()
    if text not in whole and json.dumps(text, ensure_ascii=False)[1:-1] not in whole:
        why = f"The chat template leaves out or rewrites a turn of the {message.role}."
        fix = "Map the role to one that the model knows, or choose another model."
        raise row_error(example.row, "template_drops_turn", "would be trained on without one of its turns", why, fix)


# --- labels --------------------------------------------------------------------------------------------------------


def _labelled(
    text: _Text, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Any, max_length: int | None
) -> Encoded:
    stops = stop_tokens(tokenizer)
    if text.answers:
        labels = [IGNORED] * len(ids)
        ends = {start: number for number, (start, _) in enumerate(offsets) if ids[number] in stops}
        first = 0
        for start, content in text.answers:
            last = _stop_after(text, start, content, ends)
            while offsets[first][0] < start:
                first += 1
            labels[first : last + 1] = ids[first : last + 1]
            first = last + 1
    elif text.start == 0:
        labels = list(ids)
    else:
        inside = [start >= text.start and end > start for start, end in offsets]
        labels = [token if kept else IGNORED for token, kept in zip(ids, inside, strict=True)]
    last_label = next((label for label in reversed(labels) if label != IGNORED), None)
    if last_label not in stops:
        raise _no_stop(text.row)
    if max_length is None or len(ids) <= max_length:
        return Encoded(text.row, ids, labels)
    if all(label == IGNORED for label in labels[:max_length]):
        why = f"It has {len(ids):,} tokens, and the first {max_length:,} hold none of its answer."
        fix = "Raise train.max_length, or shorten or remove the row."
        raise row_error(text.row, "no_supervised_tokens", "is dropped", why, fix)
    return Encoded(text.row, ids[:max_length], labels[:max_length], truncated=True)


def _stop_after(text: _Text, start: int, content: str, ends: dict[int, int]) -> int:
    """The position of the stop token that follows an answer directly; only white space may stand between."""
    spoken = content.rpartition("</think>")[2].strip()
    found = False
    for needle in dict.fromkeys((content, content.strip(), spoken)):
        if not needle:
            continue
        at, tries = text.text.find(needle, start), 0
        while at >= 0 and tries < _TRIES:
            found = True
            end = at + len(needle)
            while end < len(text.text) and text.text[end].isspace() and end not in ends:
                end += 1
            if end in ends:
                return ends[end]
            at, tries = text.text.find(needle, at + 1), tries + 1
    if found:
        raise _no_stop(text.row)
    why = "The chat template rewrites an answer, so its end cannot be found."
    raise row_error(text.row, "template_changes_text", "cannot be labelled with this chat template", why)


def _no_stop(row: int) -> InputError:
    why = "No stop token follows an answer: a model trained on it would never learn to stop."
    fix = "Use a chat template that ends the assistant's turn with a special token named in generation_config.json."
    return row_error(row, "no_stop_token", "has an answer without an end", why, fix)


def row_error(row: int, code: str, what: str, why: str = "", fix: str = "") -> InputError:
    """The error of one row: "Row 7 `what`.", with the code data.`code`."""
    return InputError(f"Row {row} {what}.", why=why, fix=fix, code=f"data.{code}", where=f"row {row}")
