"""A decoder layer of our kernel as a tape of storages: each function takes and frees what its operations do in torch.

The order is that of transformers 5.23's modules with the layers of `loops` in them, on torch 2.13, read off the
profiler's allocator events; tests/executors/kernel/sizing/test_saved_bytes.py compares the two again, to the byte for
Llama and Qwen3. Left out are scratch of a product and numbers of a row, small whatever the model. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.executors.kernel.sizing.tape import GRADIENTS, Held, Made, Slot, Tape, Var, Weight

_DORA = {4: (16, 16, 8, 16), 2: (14, 8, 4, 8)}  # kept beside what LoRA keeps: (hidden, inner, query, key) a token
_DORA_WEIGHTS = {4: 6.5, 2: 3.7}  # and for each parameter of the block; both measured, for peft's own forward is used
_EAGER = {"gemma2": 8}  # attention that holds its scores: bytes for each head and pair of positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a micro-batch and its layers are.

    width     bytes of the type computed in; weights in float32 are cast to it as they are used, where all train
    rank      of the adapters on `targets`; 0 where all weights train. `narrow`: the base lies in 4 bits; `dora`: DoRA
    length    tokens of the longest sequence; in a `packed` batch it is one of several documents
    branched, looked, trees   answers' tokens, keys that they see of their prompts, and prompts, in a forked batch
    answer, ahead   tokens of the longest answer, and prompts of the step's other batches, which are laid out with it
    window    how far back attention looks, 0 without a limit
    fused     whether one kernel attends all documents, as on CUDA in half precision; elsewhere each has its own call
    raised    whether packed attention is computed in float32 whatever the type, as on a CPU
    alone     whether a step is this micro-batch only, so that no gradients are there before it
    """

    facts: ModelFacts
    tokens: int
    length: int
    width: int
    rank: int
    targets: frozenset[str] = frozenset()
    narrow: bool = False
    dora: bool = False
    packed: bool = False
    fused: bool = False
    raised: bool = False
    branched: int = 0
    looked: int = 0
    trees: int = 1
    answer: int = 0
    ahead: int = 0
    window: int = 0
    alone: bool = False

    @property
    def full(self) -> bool:
        """Whether all weights train."""
        return self.rank == 0

    @property
    def cast(self) -> bool:
        """Whether float32 weights are cast as they are used."""
        return self.full and self.width == 2

    @property
    def masks(self) -> int:
        """Bytes of the masks that come with a forked batch: an answer's tokens against all of its sequence."""
        return 4 * (self.trees + self.ahead) * self.answer * self.length if self.branched else 0

    @property
    def states(self) -> int:
        """Bytes of an element of the residual stream."""
        return 4 if self.full else self.width


@dataclass(slots=True)
class Block:
    """Layers on a tape. `casts` are cast weights in autocast's cache, which lives until a forward pass ends."""

    tape: Tape
    shape: Shape
    casts: list[Held] = field(default_factory=list)
    kept: list[Held] = field(default_factory=list)  # gradients that stay
    again: bool = False  # recomputed for the backward pass: ends with the last tensor that is kept
    _linears: dict[str, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        facts = self.shape.facts
        self._linears = dict(facts.linears)
        if facts.experts:  # of one token, as if they were one wide MLP
            inner = facts.intermediate * max(1, facts.experts_used)
            self._linears |= dict.fromkeys(("gate_proj", "up_proj"), (facts.hidden, inner))
            self._linears["down_proj"] = inner, facts.hidden

    def weight(self, uses: int = 1) -> Weight:
        """A trained tensor, used so often in a pass."""
        return Weight(uses, self.kept if self.shape.alone else None)

    @property
    def trained(self) -> int:
        """Bytes of a layer's gradients."""
        shape, facts = self.shape, self.shape.facts
        if not shape.full:
            return 4 * shape.rank * sum(sum(size) for name, size in self._linears.items() if name in shape.targets)
        return 4 * (sum(inputs * outputs for inputs, outputs in self._linears.values()) + facts.norms * facts.hidden)

    def __call__(self, given: list[Var]) -> Var:
        """One decoder layer; takes its input out of `given`, so that nobody else holds it."""
        x, facts = given.pop(), self.shape.facts
        apart = self._beside(x)
        y = self.norm(x, facts.hidden)
        query, key, value = self._projected(y)
        del y
        turned = self._rotated(query, facts.heads * facts.head_dim)
        key = self._rotated(key, facts.kv_heads * facts.head_dim)
        query = turned
        del turned
        y = self.linear(self._attention(query, key, value), "o_proj")
        del query, key, value
        if facts.norms > 2:
            y = self.norm(y, facts.hidden)
        x = self._added(x, y)
        y = self.norm(x, facts.hidden)
        y = self._mlp(y)
        if facts.norms > 2:
            y = self.norm(y, facts.hidden)
        out = self._added(x, y, skipped=self.again)
        del apart
        return out

    def _beside(self, x: Var) -> Held | None:
        """What rarer kinds keep in every layer: DoRA's norms and products, scores of eager attention."""
        shape, facts, tape = self.shape, self.shape.facts, self.tape
        size = _EAGER.get(facts.model_type, 0) * facts.heads * shape.tokens * shape.length
        if shape.dora:
            hidden, inner, query, key = _DORA[shape.width]
            each = hidden * facts.hidden + inner * facts.intermediate * max(1, facts.experts_used)
            if facts.model_type == "phi3" and shape.width == 2:  # its input is cast twice, not five times
                each -= 6 * facts.hidden + 2 * facts.heads * facts.head_dim + 2 * facts.kv_heads * facts.head_dim
            each += query * facts.heads * facts.head_dim + key * facts.kv_heads * facts.head_dim
            blocks = sum(inputs * outputs for inputs, outputs in facts.linears.values())
            size += each * shape.tokens + round(_DORA_WEIGHTS[shape.width] * blocks)
        if not size:
            return None
        held = tape.take(size)
        if tape.recording:
            saved = [held]

            def back(grad: Held) -> Made:
                saved.clear()
                return ()

            tape.last(back)
        return held

    # --- linear layers ---

    def linear(self, x: Var, name: str) -> Var:
        """A linear layer: frozen, with an adapter, or trained."""
        shape = self.shape
        inputs, outputs = self._linears[name]
        skipped = self.again and name == "down_proj"  # what it keeps is known before its product
        if shape.full:
            trained = self._cast if shape.cast else self._trained
            return trained(x, inputs, outputs, skipped)
        if name in shape.targets:
            return self._adapted(x, inputs, outputs)
        tape, tokens, width = self.tape, shape.tokens, shape.width
        read = self._read(inputs * outputs)
        out = Var(tape.take(width * tokens * outputs), None, width)
        del read
        if tape.recording and x.slot is not None:
            out.slot, to = Slot(), x.slot

            def back(_: Held) -> Made:
                read = self._read(inputs * outputs)
                made = tape.take(width * tokens * inputs, view=True)
                del read
                return ((to, made),)

            tape.node(out.slot, back)
        return out

    def _read(self, count: int) -> Held | None:
        """A weight unpacked from 4 bits."""
        return self.tape.take(self.shape.width * count) if self.shape.narrow else None

    def _trained(self, x: Var, inputs: int, outputs: int, skipped: bool) -> Var:
        tape, tokens = self.tape, self.shape.tokens
        out = Var(tape.take(0 if skipped else 4 * tokens * outputs), None, 4)
        if tape.recording:
            out.slot, to, saved, weight = Slot(), x.slot, [x.held], self.weight()

            def back(_: Held) -> Made:
                own = tape.take(4 * inputs * outputs, GRADIENTS)
                through = tape.take(4 * tokens * inputs, view=True)
                saved.clear()
                return (to, through), (weight, own)

            tape.node(out.slot, back)
        return out

    def _cast(self, x: Var, inputs: int, outputs: int, skipped: bool) -> Var:
        tape, tokens = self.tape, self.shape.tokens
        weight = tape.take(2 * inputs * outputs)
        self.casts.append(weight)
        lowered, to = x.held, x.slot
        if tape.recording:
            own, cast_back = self.weight(), Slot()
            tape.node(cast_back, lambda _: ((own, tape.take(4 * inputs * outputs, GRADIENTS)),))
        if x.width == 4:
            lowered = tape.take(2 * tokens * inputs)
            if tape.recording and x.slot is not None:
                to, wide = Slot(), x.slot
                tape.node(to, lambda _: ((wide, tape.take(4 * tokens * inputs)),))
        out = Var(tape.take(0 if skipped else 2 * tokens * outputs), None, 2)
        if tape.recording:
            out.slot, saved = Slot(), [lowered, weight]

            def back(_: Held) -> Made:
                grad = tape.take(2 * inputs * outputs, GRADIENTS)
                through = tape.take(2 * tokens * inputs)
                saved.clear()
                return (to, through), (cast_back, grad)

            tape.node(out.slot, back)
        return out

    def _adapted(self, x: Var, inputs: int, outputs: int) -> Var:
        """LoraProduct of loops/products.py: keeps x and x @ A.T."""
        tape, tokens, width, rank = self.tape, self.shape.tokens, self.shape.width, self.shape.rank
        read = self._read(inputs * outputs)
        small = tape.take(width * tokens * rank)
        out = Var(tape.take(width * tokens * outputs), None, width)
        del read
        if tape.recording:
            out.slot, to, saved = Slot(), x.slot, [x.held, small]
            into, out_of = self.weight(), self.weight()

            def back(_: Held) -> Made:
                through = tape.take(width * tokens * rank)
                made: list[tuple[Slot | None, Held]] = []
                if to is not None:
                    read = self._read(inputs * outputs)
                    made.append((to, tape.take(width * tokens * inputs, view=True)))
                    del read
                first = tape.take(4 * rank * inputs, GRADIENTS)
                product = tape.take(width * rank * outputs, GRADIENTS)
                second = tape.take(4 * rank * outputs, GRADIENTS)
                del product, through
                saved.clear()
                return (into, first), (out_of, second), *made

            tape.node(out.slot, back)
        return out

    # --- norms, types, positions ---

    def norm(self, x: Var, wide: int, heads: int = 1) -> Var:
        """A root-mean-square norm of `heads` vectors of `wide` numbers for each token, in float32; then as x was."""
        tape, rows = self.tape, self.shape.tokens * heads
        size, before = rows * wide, x.width
        x = self.to(x, size, 4)
        squares = tape.take(4 * size)
        del squares
        scale = tape.take(4 * rows)
        normed = Var(tape.take(4 * size), None, 4)
        if tape.recording and x.slot is not None:
            normed.slot, root, to = Slot(), Slot(), x.slot
            squared, saved = [x.held], [x.held, scale]

            def back_root(_: Held) -> Made:
                spread = tape.take(4 * size)
                power = tape.take(4 * size)
                doubled = tape.take(4 * size)
                made = tape.take(4 * size)
                del power, doubled, spread
                squared.clear()
                return ((to, made),)

            def back_product(_: Held) -> Made:
                made = tape.take(4 * size)
                summed = tape.take(4 * size)
                del summed
                saved.clear()
                return (to, made), (root, tape.take(4 * rows))

            tape.node(root, back_root)
            tape.node(normed.slot, back_product)
        del x, scale
        if self.shape.facts.model_type.startswith("gemma"):  # which scales before it goes back to the type
            return self.to(self._scaled(normed, size, wide), size, before)
        return self._scaled(self.to(normed, size, before), size, wide)

    def _scaled(self, x: Var, size: int, wide: int) -> Var:
        """By the norm's own weight, which is in float32 where it trains."""
        tape, full, low = self.tape, self.shape.full, x.width
        width = 4 if full else low
        raised = tape.take(width * size) if low != width else None
        out = Var(tape.take(width * size), None, width)
        del raised
        if tape.recording and (x.slot is not None or full):
            out.slot, to = Slot(), x.slot
            saved = [x.held] if full else []
            weight = self.weight() if full else None

            def back(_: Held) -> Made:
                grad = tape.take(width * size)
                if low != width:
                    grad = tape.take(low * size)
                made: list[tuple[Slot | None, Held]] = [(to, grad)]
                if weight is not None:
                    summed = tape.take(width * size)
                    made.insert(0, (weight, tape.take(4 * wide, GRADIENTS)))
                    del summed
                saved.clear()
                return made

            tape.node(out.slot, back)
        return out

    def to(self, x: Var, size: int, width: int) -> Var:
        """A copy in another type, where it is another."""
        if x.width == width:
            return x
        tape, before = self.tape, x.width
        out = Var(tape.take(width * size), None, width)
        if tape.recording and x.slot is not None:
            out.slot, to = Slot(), x.slot
            tape.node(out.slot, lambda _: ((to, tape.take(before * size)),))
        return out

    def _whole(self, x: Var, size: int) -> Var:
        """The same tensor; its gradient comes transposed, and is copied into order for the product before."""
        if not self.tape.recording or x.slot is None:
            return x
        slot, to, tape, width = Slot(), x.slot, self.tape, x.width
        tape.node(slot, lambda _: ((to, tape.take(width * size)),))
        return Var(x.held, slot, width)

    def _projected(self, x: Var) -> tuple[Var, Var, Var]:
        """Queries, keys and values before their positions are turned in."""
        facts, tokens, dim = self.shape.facts, self.shape.tokens, self.shape.facts.head_dim
        whole = None
        if facts.model_type == "phi3":  # three views of one product
            whole = self.linear(x, "qkv_proj")
        made = []
        for name, heads in (("q_proj", facts.heads), ("k_proj", facts.kv_heads), ("v_proj", facts.kv_heads)):
            y = self._slice(whole, tokens * heads * dim) if whole is not None else self.linear(x, name)
            if name != "v_proj" or self.shape.packed:
                y = self._whole(y, tokens * heads * dim)
            if facts.qk_norm and name != "v_proj":
                y = self.norm(y, dim, heads)
            made.append(y)
        return made[0], made[1], made[2]

    def _slice(self, x: Var, size: int) -> Var:
        """A part of a tensor, whose gradient is laid into zeros of the whole."""
        tape, to, width = self.tape, x.slot, x.width
        if not tape.recording or to is None:
            return Var(x.held, None, width)
        slot, whole = Slot(), x.held.size
        tape.node(slot, lambda _: ((to, tape.take(whole)),))
        return Var(x.held, slot, width)

    def _rotated(self, x: Var, wide: int) -> Var:
        """Rotary positions; their angles are in float32 under autocast, and so is the result."""
        tape, size, width = self.tape, self.shape.tokens * wide, x.width
        high = 4 if self.shape.cast else width
        turned = self._product(size, width, high)
        half = tape.take(width * size // 2)
        swapped = tape.take(width * size)
        del half
        other = self._product(size, width, high)
        del swapped
        out = Var(tape.take(high * size), None, high)
        del turned, other
        if tape.recording and x.slot is not None:
            out.slot, to = Slot(), x.slot

            def back(_: Held) -> Made:
                sine = tape.take(high * size)
                if high != width:
                    sine = tape.take(width * size)
                negative = tape.take(width * size // 2)
                made = tape.take(width * size)
                del negative
                other = tape.take(width * size)
                del other, sine
                cosine = tape.take(high * size)
                if high != width:
                    cosine = tape.take(width * size)
                del cosine
                return ((to, made),)

            tape.node(out.slot, back)
        return out

    def _product(self, size: int, width: int, high: int) -> Held:
        """Of two tensors of which the narrower is raised first."""
        raised = self.tape.take(high * size) if high != width else None
        out = self.tape.take(high * size)
        del raised
        return out

    # --- attention ---

    def _attention(self, query: Var, key: Var, value: Var) -> Var:
        """Attention inside each sequence, its result as the output layer takes it."""
        shape, facts, tape, tokens = self.shape, self.shape.facts, self.tape, self.shape.tokens
        wide, thin = tokens * facts.heads * facts.head_dim, tokens * facts.kv_heads * facts.head_dim
        before = query.width
        if shape.packed and shape.raised:
            query, key, value = self.to(query, wide, 4), self.to(key, thin, 4), self.to(value, thin, 4)
        if shape.branched:
            return self._forked(query, key, value, before)
        if shape.cast:  # autocast lowers what attention is given
            query, key, value = self.to(query, wide, 2), self.to(key, thin, 2), self.to(value, thin, 2)
        width = query.width
        windowed = bool(shape.window and shape.length > shape.window and not (shape.packed and shape.fused))
        masks = tape.take(width * tokens * shape.length) if windowed else None
        repeats = windowed and not shape.packed and wide != thin  # transformers repeats heads where it gives a mask
        if repeats:
            key, value = (self._repeated(item, wide, thin) for item in (key, value))
            thin = wide
        pieces = shape.packed and not shape.fused
        share = min(1.0, shape.length / tokens) if pieces else 1.0
        places = tape.take(10 * shape.length**2) if windowed and pieces else None
        outs = [tape.take(width * round(wide * part)) for part in ((share, 1 - share) if share < 1 else (1.0,))]
        totals = tape.take(4 * tokens * facts.heads)
        slot = None
        if tape.recording and query.slot is not None:
            slot = Slot()
            targets = [item.slot for item in (query, key, value)]
            sizes = (width * wide, width * thin, width * thin)
            if pieces:
                targets = [self._joined(target, size) for target, size in zip(targets, sizes, strict=True)]
            saved = [query.held, key.held, value.held, totals, masks]
            kept = list(outs)

            def back(_: Held) -> Made:
                made = [tape.take(size) for size in sizes]
                del kept[1:]  # what went back before is free by then
                scratch = tape.take(4 * wide if shape.fused else width * round(thin * share))
                del scratch
                saved.clear()
                kept.clear()
                return tuple(zip(targets, made, strict=True))

            tape.node(slot, back)
        if not pieces:
            return Var(outs[0], slot, width)
        joined = Var(tape.take(width * wide), slot, width)
        outs.clear()
        del totals, masks, places
        result = self.to(joined, wide, before)
        del joined
        return Var(tape.take(result.width * wide), result.slot, result.width)

    def _joined(self, target: Slot | None, size: int) -> Slot:
        """The gradient of a tensor out of those of its pieces."""
        slot, tape = Slot(), self.tape
        tape.node(slot, lambda _: ((target, tape.take(size)),))
        return slot

    def _repeated(self, x: Var, wide: int, thin: int) -> Var:
        tape, width = self.tape, x.width
        out = Var(tape.take(width * wide), None, width)
        if tape.recording and x.slot is not None:
            out.slot, to = Slot(), x.slot
            tape.node(out.slot, lambda _: ((to, tape.take(width * thin)),))
        return out

    def _forked(self, query: Var, key: Var, value: Var, before: int) -> Var:
        """Prompts, and answers that see a copy of their prompt's keys beside their own.

        Without one kernel for all, an answer's rows are cut out of the batch, and what they see is put together.
        """
        shape, facts, tape, tokens = self.shape, self.shape.facts, self.tape, self.shape.tokens
        wide, thin = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
        width, rows, seen = (2 if shape.cast else query.width), shape.branched, shape.looked + shape.branched
        outs = tape.take(width * tokens * wide)
        saved = [outs, tape.take(4 * tokens * facts.heads)]
        if shape.fused:
            if shape.cast:
                query = self.to(query, tokens * wide, 2)
            saved += [query.held, tape.take(2 * width * (tokens + shape.looked) * thin)]
            joined = Var(outs, None, width)
        else:
            saved += [tape.take(width * rows * wide), tape.take(2 * width * seen * thin)]
            if shape.cast:  # what prompts have is lowered, and kept so
                saved.append(tape.take(width * (tokens - rows) * (wide + 2 * thin)))
            else:
                saved += [query.held, key.held, value.held]
            if shape.window and shape.length > shape.window:
                saved.append(tape.take(width * shape.trees * shape.length**2))
            fresh = tape.take((rows * 2 * thin * query.width) // shape.trees)  # of the last tree
            if shape.cast:
                fresh = tape.take(4 * (rows * wide + 2 * seen * thin) // shape.trees)
            pieces = tape.take(width * tokens * wide)
            joined = Var(tape.take(width * tokens * wide), None, width)
            del pieces, fresh
        del outs
        if tape.recording and query.slot is not None:
            joined.slot = Slot()
            targets, full = [item.slot for item in (query, key, value)], query.width

            def back(_: Held) -> Made:
                made = [tape.take(full * tokens * size) for size in (wide, thin, thin)]
                scratch = tape.take(full * tokens * wide)
                del scratch
                saved.clear()
                return tuple(zip(targets, made, strict=True))

            tape.node(joined.slot, back)
        else:
            saved.clear()
        if shape.fused:
            return joined
        result = self.to(joined, tokens * wide, before)
        del joined
        return Var(tape.take(result.width * tokens * wide), result.slot, result.width)

    # --- the residual stream and the MLP ---

    def _added(self, x: Var, y: Var, *, skipped: bool = False) -> Var:
        """The stream with one more part; where that is `skipped`, gradients still go both ways."""
        tape, size = self.tape, self.shape.tokens * self.shape.facts.hidden
        width, narrow = max(x.width, y.width), y.width
        raised = tape.take(width * size) if narrow != width and not skipped else None
        out = Var(tape.take(0 if skipped else width * size), None, width)
        del raised
        if tape.recording and y.slot is not None:
            out.slot, here, there = Slot(), x.slot, y.slot
            tape.node(
                out.slot, lambda grad: ((here, grad), (there, grad if narrow == width else tape.take(narrow * size)))
            )
        return out

    def _mlp(self, x: Var) -> Var:
        """down(act(gate(x)) * up(x))."""
        tape, facts, width = self.tape, self.shape.facts, self.shape.width
        size = self.shape.tokens * facts.intermediate * max(1, facts.experts_used)
        both = self.linear(x, "gate_up_proj") if facts.model_type == "phi3" else None
        gate = self.linear(x, "gate_proj") if both is None else self._slice(both, size)
        active = Var(tape.take(width * size), None, width)
        if tape.recording and gate.slot is not None:
            active.slot, to_gate, saved_gate = Slot(), gate.slot, [gate.held]

            def back_active(_: Held) -> Made:
                made = tape.take(width * size)
                saved_gate.clear()
                return ((to_gate, made),)

            tape.node(active.slot, back_active)
        del gate
        up = self.linear(x, "up_proj") if both is None else self._slice(both, size)
        product = Var(tape.take(width * size), None, width)
        if tape.recording and up.slot is not None:
            product.slot, to_active, to_up, saved = Slot(), active.slot, up.slot, [active.held, up.held]

            def back(_: Held) -> Made:
                first, second = tape.take(width * size), tape.take(width * size)
                saved.clear()
                return (to_active, first), (to_up, second)

            tape.node(product.slot, back)
        del active, up, x, both
        return self.linear(product, "down_proj")
