"""What is held while operations follow each other, by torch's rules but without tensors: storages are sizes.

A `Held` is a storage: it counts from when it is taken until nothing refers to it any more, as in torch, where the
interpreter's reference counts decide the same. Operations leave nodes behind; `backward` works them off from the newest
to the oldest, as autograd does on a CPU, and adds gradients up in place where autograd would. In this way the peak of a
pass, and what it is made of, follows from the order of the operations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

ACTIVATIONS, LOGITS, GRADIENTS, ROLLOUT = range(4)


class Held:
    """A storage of some bytes. `view`: seen through a view whose base lives on, so nothing is added to in place."""

    __slots__ = ("kind", "shares", "size", "tape", "view")

    def __init__(self, tape: Tape, size: int, kind: int, view: bool) -> None:
        self.tape = tape
        self.size = size
        self.kind = kind
        self.view = view
        self.shares = 0

    def __del__(self) -> None:
        self.tape.give_back(self.size, self.kind)


class Slot:
    """Where gradients of one tensor are gathered."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: Held | None = None

    def add(self, tape: Tape, held: Held) -> None:
        """One more gradient; summed in place where one of both is nobody else's."""
        old = self.grad
        if old is None:
            held.shares += 1
            self.grad = held
        elif old.view or old.shares > 1:
            if held.view or held.shares:
                held = tape.take(old.size, old.kind)
            held.shares += 1
            old.shares -= 1
            self.grad = held


class Weight(Slot):
    """A trained tensor used `uses` times in a pass. Its gradient goes to those `kept`, or into one that is there."""

    __slots__ = ("kept", "left", "uses")

    def __init__(self, uses: int = 1, kept: list[Held] | None = None) -> None:
        super().__init__()
        self.uses = self.left = uses
        self.kept = kept

    def add(self, tape: Tape, held: Held) -> None:
        """One more gradient; the last of a pass settles it."""
        super().add(tape, held)
        self.left -= 1
        if not self.left:
            if self.kept is not None and self.grad is not None:
                self.kept.append(self.grad)
            self.grad, self.left = None, self.uses


class Var:
    """A tensor: its storage, bytes of an element, and where its gradients go, None where it needs none."""

    __slots__ = ("held", "slot", "width")

    def __init__(self, held: Held, slot: Slot | None, width: int) -> None:
        self.held = held
        self.slot = slot
        self.width = width


_ALWAYS = Slot()
Made = Sequence[tuple[Slot | None, Held]]
Back = Callable[[Held], Made]


class Tape:
    """The ledger and the graph. `most` is the peak, `at` what it was made of, by kind."""

    def __init__(self) -> None:
        self.live = 0
        self.by = [0, 0, 0, 0]
        self.most = 0
        self.at = (0, 0, 0, 0)
        self.recording = True
        self.nodes: list[tuple[Slot, Back]] = []

    def take(self, size: int, kind: int = ACTIVATIONS, *, view: bool = False) -> Held:
        """A new storage."""
        self.live += size
        self.by[kind] += size
        if self.live > self.most:
            self.most = self.live
            one, two, three, four = self.by
            self.at = (one, two, three, four)
        return Held(self, size, kind, view)

    def give_back(self, size: int, kind: int) -> None:
        """A storage that nothing refers to any more."""
        self.live -= size
        self.by[kind] -= size

    def mark(self) -> tuple[int, tuple[int, int, int, int]]:
        """The peak so far; it is sought anew from here, until `lift`."""
        mark = self.most, self.at
        self.most, self.at = 0, (0, 0, 0, 0)
        return mark

    def lift(self, size: int, mark: tuple[int, tuple[int, int, int, int]]) -> Held:
        """Activations that are found out to have been there ever since `mark`."""
        self.most += size
        self.at = (self.at[0] + size, *self.at[1:])
        if mark[0] > self.most:
            self.most, self.at = mark
        self.live += size
        self.by[ACTIVATIONS] += size
        return Held(self, size, ACTIVATIONS, False)

    def node(self, out: Slot, back: Back) -> None:
        """Remember how a gradient goes back through an operation: `back` lists whose gradients it makes."""
        self.nodes.append((out, back))

    def last(self, back: Back) -> None:
        """Let something go when gradients have come back through all that is remembered after it."""
        self.nodes.append((_ALWAYS, back))

    def backward(self, slot: Slot | None, grad: Held, since: int = 0) -> None:
        """Work off the nodes that came after the first `since`, the newest first."""
        if slot is not None:
            slot.add(self, grad)
        del grad
        while len(self.nodes) > since:
            out, back = self.nodes.pop()
            came = out.grad
            if came is None:
                if out is _ALWAYS:
                    back(self.take(0))
                continue
            out.grad = None
            made = list(back(came))
            del back  # and with it all that the operation had saved
            came.shares -= 1
            del came
            made.reverse()
            while made:
                to, held = made.pop()
                if to is not None:
                    to.add(self, held)
                del held
