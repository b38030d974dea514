"""Preference pairs become token ids: one prompt, and the two answers that continue it.

Each side is rendered, tokenised and labelled as `render.py` does it for training on answers, by the same rules and with
the same errors. What both sides begin with is the pair's prompt, and so the prompt is a real prefix of both, whatever
the tokenizer does at the boundary. What is scored of a side is what would be trained on: tokens wholly inside an answer
of the assistant, its stop token among them, and never a token of the prompt.

Differences to TRL 1.16's DPOTrainer, all meant. Where none applies, prompt, chosen and rejected are its own ids:

1. What a template writes after the last stop token (ChatML: a line break) is left out. TRL scores it on both sides.
   The two do not cancel, for their contexts differ: on real pairs SmolLM2's log-probabilities of it lie 0.002 apart in
   the mean and 0.013 at most (beside 140 for whole answers), more where a model does not know the template. Generation
   has ended before it, and losses that take means over tokens would count it as one.
2. A token that spans the boundary (prompt "an", answer "d so": "and", " so") is read and not scored, nor is the rest of
   such a prompt on the other side; TRL scores them all. `unscored` names these places.
3. Where answers have several turns, TRL scores the users' and tools' turns in them too. Here they are read and
   `unscored`: the policy did not write them.
4. A text prompt meets a chat model as a user's turn, as everywhere else here; TRL tokenises it as plain text.
5. Texts without a prompt are plain texts in both. TRL ends their prompt where their characters first differ, here it
   ends where their tokens do. What only one of the two counts to the prompt has the same context on both sides, so its
   scores cancel.
6. Pairs with nothing to learn are errors: equal answers, also where truncation makes them equal; TRL trains on them.
   Conversations that the template cannot show faithfully are errors as in `render.py`; TRL warns and trains on them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeGuard

from tunesmith.executors.kernel.data.convert import Example, Message
from tunesmith.executors.kernel.data.render import BATCH, IGNORED, Encoded, encode_many, row_error
from tunesmith.orchestrator.errors import InputError


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt: the model reads prompt + chosen and prompt + rejected.

    Every token of both sides is scored but for the places in `unscored` (of chosen, of rejected), which are hardly ever
    any. A side's last token is always scored, and a stop token unless it was cut.
    """

    row: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: bool = False
    unscored: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def encode_pairs(examples: Iterable[Example], tokenizer: Any, max_length: int | None) -> Iterator[Pair | InputError]:
    """Tokenise preference pairs in batches on all cores, in order; a pair that cannot be used gives its error.

    Each side keeps its first `max_length` tokens, prompt included; a pair of which a side would lose its whole answer
    is dropped. Codes: those of `render.encode`, and data.row.identical_pair.
    """
    stream = iter(examples)
    while batch := list(islice(stream, BATCH // 2)):
        sides = [_sides(example) for example in batch]
        usable = chain.from_iterable(each for each in sides if not isinstance(each, InputError))
        encoded = encode_many(usable, tokenizer, None)
        for each in sides:
            if isinstance(each, InputError):
                yield each
            else:
                whole = each[0].text is not None
                yield _pair(next(encoded), next(encoded), whole, max_length)


def _sides(example: Example) -> tuple[Example, Example] | InputError:
    """Both answers as examples of their own."""
    row, answers = example.row, (example.extra.get("chosen"), example.extra.get("rejected"))
    made = []
    for answer in answers:
        if isinstance(answer, str) and example.prompt:
            made.append(Example(row, prompt=example.prompt, completion=answer))
        elif isinstance(answer, str) and example.prompt is not None:
            made.append(Example(row, text=answer))
        elif _is_turns(answer) and example.messages is not None:
            made.append(Example(row, messages=(*example.messages, *answer), context=len(example.messages)))
        else:
            fix = "Map the data as preference: a prompt, and a chosen and a rejected answer."
            return row_error(row, "nothing_to_train", "holds no two answers to compare", fix=fix)
    return made[0], made[1]


def _is_turns(answer: Any) -> TypeGuard[tuple[Message, ...]]:
    return isinstance(answer, tuple) and all(isinstance(turn, Message) for turn in answer)


def _pair(
    chosen: Encoded | InputError, rejected: Encoded | InputError, whole: bool, max_length: int | None
) -> Pair | InputError:
    """`whole`: there is no prompt, and all of both texts is scored that they do not share."""
    if isinstance(chosen, InputError):
        return chosen
    if isinstance(rejected, InputError):
        return rejected
    limit = sys.maxsize if max_length is None else max_length
    first, second = _side(chosen, limit), _side(rejected, limit)
    if first.whole == second.whole:
        fix = "Remove the row: there is nothing to prefer in it."
        return row_error(chosen.row, "row.identical_pair", "has the same chosen and rejected answer", fix=fix)
    fix = "Raise train.max_length, or shorten or remove the row."
    for name, side in (("chosen", first), ("rejected", second)):
        if not side.scored:
            why = f"It has {len(side.whole):,} tokens, and the first {limit:,} hold none of its {name} answer."
            return row_error(chosen.row, "no_supervised_tokens", "is dropped", why, fix)
    if first.ids == second.ids:
        why = f"Its answers differ only after the first {limit:,} tokens, where they are cut."
        return row_error(chosen.row, "row.identical_pair", "is dropped", why, fix)
    ends = (len(first.ids) - 1, len(second.ids) - 1) if whole else (first.scored[0], second.scored[0])
    shared = 0
    while shared < min(ends) and first.ids[shared] == second.ids[shared]:
        shared += 1
    return Pair(
        chosen.row,
        first.ids[:shared],
        first.ids[shared:],
        second.ids[shared:],
        truncated=len(first.whole) > limit or len(second.whole) > limit,
        unscored=(_unscored(first, shared), _unscored(second, shared)),
    )


@dataclass(frozen=True, slots=True)
class _Side:
    """One side up to its last scored token: `whole`, and `ids` and the `scored` places within the length allowed."""

    whole: list[int]
    ids: list[int]
    scored: list[int]


def _side(encoded: Encoded, limit: int) -> _Side:
    # A sequence's first token is predicted from nothing, so it is never scored.
    places = [place for place, label in enumerate(encoded.labels) if label != IGNORED and place]
    whole = encoded.ids[: places[-1] + 1] if places else encoded.ids
    scored = places if len(whole) <= limit else [place for place in places if place < limit]
    return _Side(whole, whole[: scored[-1] + 1] if scored else [], scored)


def _unscored(side: _Side, shared: int) -> tuple[int, ...]:
    """Places after the `shared` tokens, counted from there, that are not scored."""
    if side.scored[0] == shared and len(side.scored) == len(side.ids) - shared:
        return ()
    scored = set(side.scored)
    return tuple(place - shared for place in range(shared, len(side.ids)) if place not in scored)
