"""Prompts become token ids that end where the model shall go on, and what reward functions are told of a row.

Differences to TRL 1.16's GRPOTrainer, all meant. Where none of them applies, ids, prompt and columns are its own:

1. A text prompt meets a chat model as a user's turn, here and where answers are trained on, so a reward function sees a
   list with that turn; TRL gives the model plain text, which no chat model has learnt to answer.
2. A prompt that is too long is an error. TRL has no limit; cutting would change the question.
3. A conversation that the template leaves a turn out of, or that ends with an answer, is an error; TRL would ask on.
4. Only the columns that the mapping keeps are passed on; TRL passes all of the data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tunesmith.executors.kernel.data.convert import Example, Message
from tunesmith.executors.kernel.data.render import BATCH, as_text, check_shown, row_error
from tunesmith.orchestrator.errors import InputError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model reads it (`ids`), and as reward functions see it: turns of a chat, or a text.

    `columns` are the row's kept columns under their own names.
    """

    row: int
    ids: list[int]
    prompt: str | list[dict[str, str]]
    columns: dict[str, Any]


def encode_prompts(
    examples: Iterable[Example], tokenizer: Any, max_prompt: int | None
) -> Iterator[Prompt | InputError]:
    """Tokenise prompts in batches on all cores, in order; a prompt that cannot be used gives its error.

    Codes: data.prompt_too_long, data.no_prompt, data.no_chat_template, data.template_refused,
    data.template_drops_turn.
    """
    stream = iter(examples)
    while batch := list(islice(stream, BATCH)):
        texts = [_text(example, tokenizer) for example in batch]
        ids: dict[int, list[int]] = {}
        for special in (False, True):  # a chat template writes special tokens itself
            chosen = [at for at, text in enumerate(texts) if isinstance(text, _Text) and text.special is special]
            if chosen:
                found = tokenizer(
                    [texts[at].text for at in chosen],  # type: ignore[union-attr]
                    add_special_tokens=special,
                    return_attention_mask=False,
                    truncation=False,
                    padding=False,
                    verbose=False,
                )
                ids |= zip(chosen, found["input_ids"], strict=True)
        for at, (example, text) in enumerate(zip(batch, texts, strict=True)):
            if isinstance(text, InputError):
                yield text
            else:
                yield _checked(Prompt(example.row, ids[at], text.prompt, dict(example.extra)), max_prompt)


def prompt_of(example: Example, chat: bool) -> str | list[dict[str, str]]:
    """What reward functions see of an example; `chat`: the model has a chat template.

    Raises InputError data.no_prompt where there is none, or where it ends with an answer.
    """
    messages = example.messages
    if messages is None and example.prompt and example.completion is None and example.text is None:
        if not chat:
            return example.prompt
        messages = (Message("user", example.prompt),)
    if not messages or messages[-1].role in ("assistant", "system"):
        what = "ends with an answer" if messages and messages[-1].role == "assistant" else "holds no prompt"
        fix = "Map the data as prompt-only; what follows the last question is left out then."
        raise row_error(example.row, "no_prompt", what, fix=fix)
    return [{"role": message.role, "content": message.content} for message in messages]


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt as people and as the tokenizer see it; `special`: the tokenizer adds its own tokens."""

    prompt: str | list[dict[str, str]]
    text: str
    special: bool


def _text(example: Example, tokenizer: Any) -> _Text | InputError:
    try:
        prompt = prompt_of(example, bool(tokenizer.chat_template))
        if isinstance(prompt, str):
            return _Text(prompt, prompt, special=True)
        if not tokenizer.chat_template:
            why = "The model has no chat template, so nobody knows how it should read turns."
            fix = "Choose an instruct model, or map the data to a prompt of plain text."
            raise row_error(example.row, "no_chat_template", "is a conversation", why, fix)
        whole = as_text(prompt, tokenizer, True)
        for turn in prompt:
            if turn["role"] != "assistant":  # templates may rewrite earlier answers: reasoning is often left out
                check_shown(example, Message(**turn), whole)
        return _Text(prompt, whole, special=False)
    except InputError as error:
        error.where = error.where or f"row {example.row}"
        return error


def _checked(prompt: Prompt, max_prompt: int | None) -> Prompt | InputError:
    if not prompt.ids:
        return row_error(prompt.row, "no_prompt", "holds a prompt without a single token")
    if max_prompt is None or len(prompt.ids) <= max_prompt:
        return prompt
    why = f"Its prompt has {len(prompt.ids):,} tokens, and {max_prompt:,} leave room for an answer."
    fix = "Raise train.max_length, lower grpo.max_completion, or shorten or remove the row."
    return row_error(prompt.row, "prompt_too_long", "is dropped", why, fix)
