"""A micro-batch on a tape, forward, loss and backward: the peak of live bytes, and what it is made of.

The heads are those of loops/loss.py and TRL's fused one. One layer stands for all: it is the last, whose backward pass
comes when most is held, and what the others keep is as much again for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.executors.kernel.sizing.block import Block, Shape
from tunesmith.executors.kernel.sizing.tape import GRADIENTS, LOGITS, Held, Made, Slot, Tape, Var, Weight

RANDOM = 5056  # bytes of the random generator's state that each checkpointed layer keeps, on a CPU

Score = Literal["loss", "logps", "tiled", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What is made of the last states.

    scored    positions that are scored, `rows` of them at a time
    tile      for TRL's head ("tiled"): bytes of its tile and of what is made of it
    asked     whether the model without its adapter is asked for the same, while the graph is held
    """

    kind: Score
    scored: int
    rows: int
    tile: int = 0
    asked: bool = False


def micro_batch(shape: Shape, head: Head, *, checkpointing: bool) -> Tape:
    """The tape of a micro-batch. Gradients that are there before it are not on it."""
    tape, facts = Tape(), shape.facts
    block = Block(tape, shape)
    size, words = shape.tokens * facts.hidden, facts.vocabulary * facts.hidden
    beside = [tape.take(2 * shape.states * shape.tokens * facts.head_dim), tape.take(shape.masks)]
    embedding = block.weight(2 if facts.tied and head.kind != "none" else 1) if shape.full else None
    first = Slot()
    if embedding is not None:
        tape.node(first, lambda _: ((embedding, tape.take(4 * words, GRADIENTS)),))
    x = _layers(block, [Var(tape.take(shape.states * size), first, shape.states)], checkpointing)
    x = block.norm(x, facts.hidden)
    picked = tape.take(x.width * head.scored * facts.hidden)
    start, to, width = Slot(), x.slot, x.width
    tape.node(start, lambda _: ((to, tape.take(width * size)),))
    del x
    weight = embedding if facts.tied else block.weight() if shape.full else None
    if head.kind == "none":
        tape.backward(start, picked)
    else:
        loss = _loss(block, head, picked, width, start, weight)
        del picked
        if head.asked:
            _asked(block, head)
        block.casts.clear()
        del beside[2:]
        tape.backward(loss, tape.take(4))
    beside.clear()
    return tape


def _layers(block: Block, given: list[Var], checkpointing: bool) -> Var:
    """All layers: the last one by itself, before it what the others keep.

    Where gradients come to be in this pass, the end of the backward pass may be the peak: then the first one is gone
    through too, whose gradients are the last.
    """
    tape, shape = block.tape, block.shape
    others, less = shape.facts.layers - 1, 0
    if shape.alone and others:
        if not shape.full:
            given[0].slot = None
        given = [_layer(block, given, checkpointing)]
        others -= 1
    elif not checkpointing and not shape.full:  # the first one's input needs no gradient: its norm keeps nothing
        less = 4 * shape.tokens * (shape.facts.hidden + 1)
    between: list[Held] = []
    start, inner = given[0].slot, Slot()
    given[0].slot = inner

    def back_between(grad: Held) -> Made:
        between.clear()
        if shape.alone:
            block.kept.append(tape.take(others * block.trained, GRADIENTS))
        return ((start, grad),)

    tape.node(inner, back_between)
    before, mark, cast = tape.live, tape.mark(), len(block.casts)
    x = _layer(block, given, checkpointing)
    cached = sum(held.size for held in block.casts[cast:]) if checkpointing else 0
    each = tape.live - before - cached
    if others > 0:
        between.append(tape.lift(others * each - less, mark))
        block.casts.append(tape.take(others * cached))
    else:
        tape.lift(0, mark)
    return x


def _layer(block: Block, given: list[Var], checkpointing: bool) -> Var:
    if not checkpointing:
        return block(given)
    tape, to, width = block.tape, given[0].slot, given[0].width
    saved = [given[0].held, tape.take(RANDOM)]
    tape.recording = False
    out = block(given)
    tape.recording = True
    out.slot = Slot()

    def back(grad: Held) -> Made:
        since, inner = len(tape.nodes), Slot()
        block.again = True
        made = block([Var(saved[0], inner, width)])
        block.again = False
        slot = made.slot
        del made
        block.casts.clear()
        tape.backward(slot, grad, since)
        through, inner.grad = inner.grad, None
        if through is None:
            return ()
        through.shares -= 1
        return ((to, through),)

    tape.node(out.slot, back)
    return out


def _asked(block: Block, head: Head) -> None:
    """The same batch through the model without gradients."""
    tape, shape = block.tape, block.shape
    size = shape.tokens * shape.facts.hidden
    tape.recording = False
    x = block([Var(tape.take(shape.states * size), None, shape.states)])
    x = block.norm(x, shape.facts.hidden)
    picked = tape.take(x.width * head.scored * shape.facts.hidden)
    width = x.width
    del x
    _log_probs(block, head, picked, width, trained=False)
    tape.recording = True


# --- heads ----------------------------------------------------------------------------------------------------------


def _loss(block: Block, head: Head, picked: Held, width: int, start: Slot, weight: Weight | None) -> Slot:
    tape, facts, loss = block.tape, block.shape.facts, Slot()
    states, words = width * head.scored * facts.hidden, 4 * facts.vocabulary * facts.hidden
    trained = weight is not None
    if head.kind == "loss":
        kept = _cross_entropy(block, head, width, trained=trained)
    elif head.kind == "logps":
        kept = _log_probs(block, head, picked, width, trained=trained)
    else:
        kept = _tiled(block, head, width, trained=trained)

    def back(_: Held) -> Made:
        made: list[tuple[Slot | None, Held]] = []
        if weight is not None:
            made.append((weight, tape.take(words, GRADIENTS)))
        if weight is not None and head.kind == "logps":
            logits = None
            for rows in _chunks(head):  # once more; the last ones stay until there are others
                logits = tape.take(4 * rows * facts.vocabulary, LOGITS)
                product = tape.take(words, GRADIENTS)
                del product
            del logits
        made.append((start, tape.take(states)))
        kept.clear()
        return made

    tape.node(loss, back)
    return loss


def _tiled(block: Block, head: Head, width: int, *, trained: bool) -> list[Held]:
    tape, facts = block.tape, block.shape.facts
    kept = [tape.take(width * head.scored * facts.hidden)]
    if trained:
        kept.append(tape.take(4 * facts.vocabulary * facts.hidden, GRADIENTS))
    tile = tape.take(head.tile, LOGITS)
    del tile
    return kept


def _cross_entropy(block: Block, head: Head, width: int, *, trained: bool) -> list[Held]:
    """ChunkedCrossEntropy: the gradients it keeps. A chunk's tensors stay until the next one has its own."""
    tape, hidden, words = block.tape, block.shape.facts.hidden, block.shape.facts.vocabulary
    low = 2 if block.shape.cast else width
    kept = [tape.take(width * head.scored * hidden)]
    if trained:
        kept.append(tape.take(4 * words * hidden, GRADIENTS))
    logps = slope = cached = None
    for rows in _chunks(head):
        logits = _onto_words(block, rows, low)
        logps = tape.take(4 * rows * words, LOGITS)
        del logits
        slope = tape.take(2 * rows * words, LOGITS) if width == 2 else logps
        cached = _through_words(block, rows, low, cached)
        if trained and low == 4:
            product = tape.take(4 * words * hidden, GRADIENTS)
            del product
        elif trained:
            lowered = tape.take(2 * rows * (words + hidden), LOGITS)
            product = tape.take(2 * words * hidden, GRADIENTS)
            del lowered
            raised = tape.take(4 * words * hidden, GRADIENTS)
            del product, raised
    del logps, slope
    return kept


def _log_probs(block: Block, head: Head, picked: Held, width: int, *, trained: bool) -> list[Held]:
    """ChunkedLogProbs: what it keeps. Autocast lowers the product in the entropy."""
    tape, hidden, words = block.tape, block.shape.facts.hidden, block.shape.facts.vocabulary
    low = 2 if block.shape.cast else width
    kept = [tape.take(16 * head.scored)]  # log-probabilities, entropies, and two more numbers of each
    if tape.recording:
        kept += [tape.take(width * head.scored * hidden), *([picked] if trained else [])]
    logits = chances = cached = None
    for rows in _chunks(head):
        logits = _onto_words(block, rows, low)
        apart = tape.take(4 * rows * words, LOGITS)  # in the log-sum-exp
        del apart
        chances = tape.take(4 * rows * words, LOGITS)
        lowered = tape.take(4 * rows * words, LOGITS) if block.shape.cast else None
        product = tape.take((low if block.shape.cast else 4) * rows * words, LOGITS)
        del product, lowered
        if tape.recording:
            slope = tape.take(2 * rows * words, LOGITS) if width == 2 else None
            cached = _through_words(block, rows, low, cached)
            del slope
    del logits, chances
    return kept


def _onto_words(block: Block, rows: int, low: int) -> Held:
    """Logits of some rows in float32; a weight that is cast for them goes at once, since it comes transposed."""
    tape, hidden, words = block.tape, block.shape.facts.hidden, block.shape.facts.vocabulary
    lowered = [tape.take(2 * rows * hidden), tape.take(2 * words * hidden, LOGITS)] if block.shape.cast else []
    logits = tape.take(low * rows * words, LOGITS)
    lowered.clear()
    return logits if low == 4 else tape.take(4 * rows * words, LOGITS)


def _through_words(block: Block, rows: int, low: int, cached: Held | None) -> Held | None:
    """The gradient of some rows of states. Here the cast weight is as it lies, and autocast keeps it."""
    tape, hidden, words = block.tape, block.shape.facts.hidden, block.shape.facts.vocabulary
    lowered = None
    if block.shape.cast:
        if cached is None:
            cached = tape.take(2 * words * hidden, LOGITS)
            block.casts.append(cached)
        lowered = tape.take(2 * rows * words, LOGITS)
    part = tape.take(low * rows * hidden)
    del part, lowered
    return cached


def _chunks(head: Head) -> tuple[int, ...]:
    """Rows of the first two chunks: no later one holds more."""
    first = min(head.rows, head.scored)
    return (first, min(head.rows, head.scored - first)) if head.scored > first else (first,)
