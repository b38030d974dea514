"""Tokenised rows kept on disk by content, so that a second run or a resume does not tokenise again.

The key is made of all that the result follows from: every example, the kind of row, the length, the tokenizer as it is
in memory with its chat template and stop tokens, the source of the code that encodes, and the libraries it calls. The
errors of dropped rows and what was cut are kept with the rows, so a run from the cache reports what a fresh one does.

Rows are held in flat arrays and made when asked for: 5 bytes a token on GSM8K, where lists of ids and labels take 34.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from tunesmith.executors.kernel.data import pairs, prompts, render, template
from tunesmith.executors.kernel.data.convert import Example
from tunesmith.executors.kernel.data.pairs import Pair, encode_pairs
from tunesmith.executors.kernel.data.prompts import Prompt, encode_prompts, prompt_of
from tunesmith.executors.kernel.data.render import IGNORED, Encoded, encode_many, stop_tokens
from tunesmith.executors.kernel.data.shelf import Shelf
from tunesmith.orchestrator.errors import InputError, from_doc

if TYPE_CHECKING:
    from tunesmith.executors.kernel.data.shelf import Table

ROOM = 8 << 30
_OFTEN = 64  # rows between calls of `progress` and `pause`

T = TypeVar("T", bound=Encoded | Pair | Prompt)


class Tokens(Sequence[T]):
    """Rows that were tokenised, in order; each is made from flat arrays when it is asked for, about 10 us.

    errors      of the examples that could not be used, in order
    truncated   how many of the rows lost their end
    cached      whether they come from disk
    note        what was wrong with the cache, or ""
    """

    def __init__(
        self, shape: _Shape[T], table: Table, examples: Sequence[Example], chat: bool, *, cached: bool, note: str
    ) -> None:
        self.cached = cached
        self.note = note
        self.truncated = int(table["cut"].sum())
        self.errors = [_error(doc) for doc in json.loads(table["errors"].tobytes())]
        self._shape: _Shape[T] = shape
        self._chat = chat
        self._cut = table["cut"]
        self._columns = [(table[name], table[f"{name}.ends"]) for name in shape.columns]
        places = table["places"].tolist()
        # Only prompts need more of an example than its number; the texts of others may be let go.
        self._examples = [examples[at] for at in places] if shape.texts else None
        self._rows = array("q", [examples[at].row for at in places])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        place = at + len(self) if at < 0 else at
        if not 0 <= place < len(self):
            raise IndexError(at)
        example = self._examples[place] if self._examples is not None else Example(self._rows[place])
        parts = [flat[ends[place] : ends[place + 1]].tolist() for flat, ends in self._columns]
        return self._shape.make(example, parts, bool(self._cut[place]), self._chat)


def cached(
    kind: type[T],
    examples: Sequence[Example],
    tokenizer: Any,
    limit: int | None,
    *,
    folder: Path,
    progress: Callable[[int], None] | None = None,
    pause: Callable[[], None] | None = None,
    room: int = ROOM,
) -> Tokens[T]:
    """The examples as rows of a kind (Encoded, Pair or Prompt), from `folder` where it holds them, else tokenised now.

    `limit` is max_length, for prompts max_prompt. `progress` hears how many examples are done; `pause` is called now
    and then, and what it raises ends the work with nothing kept. Of several processes that want the same rows, one
    tokenises and the others wait for it. `folder` holds `room` bytes at most. A cache that cannot be read or written
    costs time and never the run. Raises InputError data.slow_tokenizer.
    """
    shape: _Shape[T] = _SHAPES[kind]
    tell, wait = progress or _silent, pause or _idle
    chat = bool(tokenizer.chat_template)
    key = key_of(kind, examples, tokenizer, limit)
    if key is None:
        table, note = _tokenised(shape, examples, tokenizer, limit, tell, wait), ""
        return Tokens(shape, table, examples, chat, cached=False, note=note)
    shelf = Shelf(folder, room)
    found, note = shelf.get(key)
    if found is None:
        with shelf.alone(key, wait):
            found, _ = shelf.get(key)  # another process may have been first
            if found is None:
                table = _tokenised(shape, examples, tokenizer, limit, tell, wait)
                note = "; ".join(filter(None, (note, shelf.put(key, table))))
                return Tokens(shape, table, examples, chat, cached=False, note=note)
    tell(len(examples))
    return Tokens(shape, found, examples, chat, cached=True, note=note)


def key_of(kind: type[Any], examples: Iterable[Example], tokenizer: Any, limit: int | None) -> str | None:
    """The name of tokenised rows: a SHA-256 of all they follow from. None where a tokenizer cannot be written down.

    Costs about 3 us a row, and 20 ms for a tokenizer of 50,000 tokens.
    """
    try:
        sha = hashlib.sha256(repr((kind.__name__, limit)).encode())
        for part in _circumstances(tokenizer):
            sha.update(part)
    except Exception:  # tokenizers raises a bare Exception for parts that are written in Python
        return None
    for example in examples:
        sides = [_plain(example.extra.get(name)) for name in ("chosen", "rejected")] if kind is Pair else ()
        texts = (example.prompt, example.completion, example.text, _plain(example.messages), sides)
        sha.update(repr((example.row, example.context, texts)).encode())
    return sha.hexdigest()


def _circumstances(tokenizer: Any) -> Iterator[bytes]:
    """What encoding depends on beside the examples."""
    from importlib.metadata import version  # slow to import

    inner = tokenizer.backend_tokenizer
    inner.no_padding()  # as encoding sets them, so that what another call left there makes no difference
    inner.no_truncation()
    yield inner.to_str().encode()
    chat_template = repr(tokenizer.chat_template)
    # Some templates write today's date.
    today = date.today().isoformat() if "strftime_now" in chat_template else ""
    special = (sorted(tokenizer.special_tokens_map.items()), tokenizer.split_special_tokens)
    libraries = [version(name) for name in ("tokenizers", "transformers", "jinja2")]
    about = (type(tokenizer).__name__, chat_template, today, special, sorted(stop_tokens(tokenizer)), libraries)
    yield repr(about).encode()
    for file in (render.__file__, pairs.__file__, prompts.__file__, template.__file__, __file__):
        yield Path(file).read_bytes()


def _plain(value: Any) -> Any:
    return [(turn.role, turn.content) for turn in value] if isinstance(value, tuple) else value


def _tokenised(
    shape: _Shape[T],
    examples: Sequence[Example],
    tokenizer: Any,
    limit: int | None,
    progress: Callable[[int], None],
    pause: Callable[[], None],
) -> Table:
    import numpy as np

    flat = {name: array("i") for name in shape.columns}
    ends = {f"{name}.ends": array("q", [0]) for name in shape.columns}
    places, cut = array("q"), array("B")
    errors = []
    for place, result in enumerate(shape.encode(examples, tokenizer, limit)):
        if isinstance(result, InputError):
            errors.append(result.to_doc())
        else:
            places.append(place)
            cut.append(getattr(result, "truncated", False))
            for (column, stops), part in zip(
                zip(flat.values(), ends.values(), strict=True), shape.parts(result), strict=True
            ):
                column.extend(part)
                stops.append(len(column))
        if place % _OFTEN == 0:
            progress(place)
            pause()
    progress(len(examples))
    errors_text = np.frombuffer(json.dumps(errors).encode(), np.uint8)
    numbers = {name: np.asarray(values) for name, values in {**flat, **ends, "places": places, "cut": cut}.items()}
    return {**numbers, "errors": errors_text}


def _error(doc: dict[str, Any]) -> InputError:
    error = from_doc(doc)
    assert isinstance(error, InputError)
    return error


def _silent(done: int) -> None:
    """Progress that nobody looks at."""


def _idle() -> None:
    """A pause that nobody wants."""


# --- how rows lie in flat arrays -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shape(Generic[T]):
    """`columns` of numbers, what `parts` of a row go into them, and how to `make` it again.

    make(example, parts, truncated, chat); the example has its texts where `texts` says so, else its row number alone.
    """

    columns: tuple[str, ...]
    encode: Callable[[Iterable[Example], Any, int | None], Iterator[T | InputError]]
    parts: Callable[[T], Sequence[Sequence[int]]]
    make: Callable[[Example, list[list[int]], bool, bool], T]
    texts: bool = False


def _parts_of_row(row: Encoded) -> Sequence[Sequence[int]]:
    """The ids, and where runs of labels begin and end: labels are the ids or IGNORED."""
    kept = [label != IGNORED for label in row.labels]
    turns = [at for at, (before, now) in enumerate(pairwise((False, *kept, False))) if before is not now]
    return row.ids, turns


def _row(example: Example, parts: list[list[int]], truncated: bool, chat: bool) -> Encoded:
    ids, turns = parts
    labels = [IGNORED] * len(ids)
    for start, stop in zip(turns[::2], turns[1::2], strict=True):
        labels[start:stop] = ids[start:stop]
    return Encoded(example.row, ids, labels, truncated)


def _parts_of_pair(row: Pair) -> Sequence[Sequence[int]]:
    return row.prompt, row.chosen, row.rejected, *row.unscored


def _pair(example: Example, parts: list[list[int]], truncated: bool, chat: bool) -> Pair:
    prompt, chosen, rejected, first, second = parts
    return Pair(example.row, prompt, chosen, rejected, truncated, (tuple(first), tuple(second)))


def _parts_of_prompt(row: Prompt) -> Sequence[Sequence[int]]:
    return (row.ids,)


def _prompt(example: Example, parts: list[list[int]], truncated: bool, chat: bool) -> Prompt:
    return Prompt(example.row, parts[0], prompt_of(example, chat), dict(example.extra))


_SHAPES: dict[type, _Shape[Any]] = {
    Encoded: _Shape(("ids", "turns"), encode_many, _parts_of_row, _row),
    Pair: _Shape(
        ("prompt", "chosen", "rejected", "unscored_chosen", "unscored_rejected"), encode_pairs, _parts_of_pair, _pair
    ),
    Prompt: _Shape(("ids",), encode_prompts, _parts_of_prompt, _prompt, texts=True),
}
