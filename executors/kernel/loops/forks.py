"""Answers that continue one prompt, laid out so that the prompt is computed once.

A tree is a prompt and its answers: the two sides of a preference pair, the samples of a GRPO prompt. In a forked batch
each prompt stands once, followed by its answers; an answer's tokens see the prompt and themselves, and their positions
go on where the prompt ends. That is the arithmetic of as many separate sequences, without repeating the prompt. An
answer's last token is never fed: nothing comes after it that it could predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops.batches import Batch, best_fit


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and the answers that continue it. `row` is the source row.

    Every token of an answer is scored but for those at its `silent` places, which are read only: what others say in
    it. There is one list of places for each answer, or none at all.
    """

    row: int
    prompt: Sequence[int]
    answers: tuple[Sequence[int], ...]
    silent: tuple[Sequence[int], ...] = ()

    @property
    def fed(self) -> int:
        """Tokens that go through the model in a forked batch."""
        return len(self.prompt) + sum(max(0, len(answer) - 1) for answer in self.answers)

    @property
    def tokens(self) -> int:
        """Real tokens, the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.answers))

    def scored(self, number: int) -> Sequence[int]:
        """Places of an answer's tokens that are scored; a sequence's very first is not, for nothing predicts it."""
        places = range(0 if self.prompt else 1, len(self.answers[number]))
        silent = set(self.silent[number]) if self.silent else set()
        return [place for place in places if place not in silent] if silent else places


@dataclass(frozen=True, slots=True)
class Fork:
    """One tree's place in a forked batch, for attention without varlen kernels.

    start, prompt   first token of the prompt and its length; the answers follow
    count, width    how many answers are fed, and the longest of them
    index           int64 [count * width], their tokens in the batch; shorter ones are filled up with their last token
    real            int64, places in `index` that are no filling, in the order of the batch
    mask            float32 [width, prompt + width], 0 where an answer's token may look and -inf elsewhere
    """

    start: int
    prompt: int
    count: int
    width: int
    index: Tensor
    real: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Fork:
        """The same on a device."""
        return replace(
            self,
            index=self.index.to(device, non_blocking=True),
            real=self.real.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class Forks:
    """All trees of a forked batch.

    each                the trees in order
    bounds              int32 [segments + 1], cumulative lengths of prompts and answers as queries
    keys, key_bounds    int64 and int32: the tokens each segment looks at, a prompt itself, an answer the prompt too
    longest             the most tokens that a segment looks at
    """

    each: tuple[Fork, ...]
    bounds: Tensor
    keys: Tensor
    key_bounds: Tensor
    longest: int

    def to(self, device: torch.device) -> Forks:
        """The same on a device, for either kind of attention: which it is shows with the type of the queries."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("bounds", "keys", "key_bounds")}
        return replace(self, **moved, each=tuple(fork.to(device) for fork in self.each))


def forked(trees: Sequence[Tree], budget: int) -> list[Batch]:
    """Trees in micro-batches of up to `budget` fed tokens; a tree is never split. One Batch has B = 1.

    `members` of a batch names (tree, answer) for each of its answers; `owners` says to which of them a pick belongs.
    """
    return [_forked(trees, sorted(group)) for group in best_fit([tree.fed for tree in trees], budget)]


def _forked(trees: Sequence[Tree], group: Sequence[int]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    picks: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    members: list[tuple[int, int]] = []
    keys: list[int] = []
    queries, seen = [0], [0]
    each = []
    for at in group:
        tree = trees[at]
        start, prompt = len(ids), len(tree.prompt)
        ids += tree.prompt
        positions += range(prompt)
        spans = []
        if prompt:
            queries.append(queries[-1] + prompt)
            keys += range(start, start + prompt)
            seen.append(len(keys))
        for number, answer in enumerate(tree.answers):
            first, fed = len(ids), max(0, len(answer) - 1)
            ids += answer[:fed]
            positions += range(prompt, prompt + fed)
            scored = tree.scored(number)
            picks += [first + place - 1 if place else start + prompt - 1 for place in scored]
            targets += [answer[place] for place in scored]
            owners += [len(members)] * len(scored)
            members.append((at, number))
            if fed:
                spans.append((first, fed))
                queries.append(queries[-1] + fed)
                keys += [*range(start, start + prompt), *range(first, first + fed)]
                seen.append(len(keys))
        each.append(_fork(start, prompt, spans))
    longest = max(high - low for low, high in pairwise(seen))
    return Batch(
        ids=torch.tensor([ids], dtype=torch.int64),
        positions=torch.tensor([positions], dtype=torch.int64),
        picks=torch.tensor(picks, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        rows=tuple(trees[at].row for at in group),
        tokens=sum(trees[at].tokens for at in group),
        documents=tuple(high - low for low, high in pairwise(queries)),
        forks=Forks(
            each=tuple(each),
            bounds=torch.tensor(queries, dtype=torch.int32),
            keys=torch.tensor(keys, dtype=torch.int64),
            key_bounds=torch.tensor(seen, dtype=torch.int32),
            longest=longest,
        ),
        owners=torch.tensor(owners, dtype=torch.int64),
        members=tuple(members),
    )


def _fork(start: int, prompt: int, spans: Sequence[tuple[int, int]]) -> Fork:
    width = max((length for _, length in spans), default=0)
    index = [first + min(place, length - 1) for first, length in spans for place in range(width)]
    real = [at * width + place for at, (_, length) in enumerate(spans) for place in range(length)]
    mask = torch.full((width, prompt + width), float("-inf")).triu(prompt + 1)
    return Fork(
        start=start,
        prompt=prompt,
        count=len(spans),
        width=width,
        index=torch.tensor(index, dtype=torch.int64),
        real=torch.tensor(real, dtype=torch.int64),
        mask=mask,
    )


def spread(trees: Sequence[Tree], rows: int, pad_id: int) -> list[Batch]:
    """The same trees for models that cannot be forked: every answer in a padded sequence with its own prompt.

    `rows` trees go into a micro-batch, those of like length together.
    """
    order = sorted(range(len(trees)), key=lambda at: -max(map(len, trees[at].answers)) - len(trees[at].prompt))
    return [_spread(trees, order[start : start + rows], pad_id) for start in range(0, len(order), rows)]


def _spread(trees: Sequence[Tree], group: Sequence[int], pad_id: int) -> Batch:
    members = [(at, number) for at in group for number in range(len(trees[at].answers))]
    whole = [[*trees[at].prompt, *trees[at].answers[number]] for at, number in members]
    width = max(map(len, whole))
    ids = torch.full((len(whole), width), pad_id, dtype=torch.int64)
    picks: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for place, ((at, number), sequence) in enumerate(zip(members, whole, strict=True)):
        ids[place, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        scored = [len(trees[at].prompt) + token for token in trees[at].scored(number)]
        picks += [place * width + token - 1 for token in scored]
        targets += [sequence[token] for token in scored]
        owners += [place] * len(scored)
    return Batch(
        ids=ids,
        positions=torch.arange(width).expand(len(whole), width),
        picks=torch.tensor(picks, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        rows=tuple(trees[at].row for at in group),
        tokens=sum(trees[at].tokens for at in group),
        owners=torch.tensor(owners, dtype=torch.int64),
        members=tuple(members),
    )
