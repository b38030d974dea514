"""The event file, read on from where the last look ended."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from tunesmith.executors.local.folder import Folder, storage
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.events import MAX_LINE_BYTES, Event, Kind, decode

EVENTS = "events.jsonl"
MOST_BYTES = 4 * 2**20
_CURSOR = re.compile(r"([0-9]{1,18}):([0-9]{1,18}):([a-z]{0,16})(\+?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the file has been read, in bytes; how many lines were passed over as torn, foreign or malformed; the
    state last heard of; and whether `offset` lies within a line too long to be an event."""

    offset: int = 0
    skipped: int = 0
    state: str = ""
    inside: bool = False

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The cursor that `str` wrote; "" is the beginning. Raises InputError for anything else."""
        if text == "":
            return cls()
        match = _CURSOR.fullmatch(text)
        if match is None:
            raise InputError("This cursor is not one of ours.", code="cursor", where=text[:40])
        return cls(int(match[1]), int(match[2]), match[3], bool(match[4]))

    def __str__(self) -> str:
        return f"{self.offset}:{self.skipped}:{self.state}{'+' if self.inside else ''}"


@dataclass(frozen=True, slots=True)
class Batch:
    """What one look found. `drained` says that nothing was left behind but, while the attempt lives, a torn line."""

    events: tuple[Event, ...]
    cursor: Cursor
    drained: bool


def read_on(folder: Folder, cursor: Cursor, number: int, *, ended: bool, most: int = MOST_BYTES) -> Batch:
    """Events after `cursor`, from at most `most` bytes. Lines of another attempt than `number` are foreign.

    `ended` says that nobody writes any more: the last line then counts even without its newline. Costs about 10 us an
    event.
    """
    data, at_end = _read(folder, cursor.offset, most)
    events: list[Event] = []
    position, skipped, state, inside = 0, cursor.skipped, cursor.state, cursor.inside

    def take(line: bytes) -> None:
        nonlocal skipped, state, inside
        event = None if inside or len(line) > MAX_LINE_BYTES else decode(line)
        if event is not None and event.attempt == number:
            events.append(event)
            state = state_of(event) or state
        elif inside or line.strip():
            skipped += 1
        inside = False

    while (newline := data.find(b"\n", position)) >= 0:
        take(data[position:newline])
        position = newline + 1
    rest = len(data) - position
    if ended and at_end and (rest or inside):
        take(data[position:])
        position = len(data)
    elif rest > MAX_LINE_BYTES or (inside and rest):
        inside, position = True, len(data)
    return Batch(tuple(events), Cursor(cursor.offset + position, skipped, state, inside), at_end)


def last_state(folder: Folder, number: int) -> Event | None:
    """The last state event of a file that nobody writes any more, looked for in its last 4 MiB."""
    with storage(folder.path / EVENTS):
        try:
            size = os.stat(EVENTS, dir_fd=folder.descriptor, follow_symlinks=False).st_size
        except FileNotFoundError:
            return None
    data, _ = _read(folder, max(0, size - MOST_BYTES), MOST_BYTES)
    for line in reversed(data.split(b"\n")):
        if b'"state"' in line and len(line) <= MAX_LINE_BYTES:
            event = decode(line)
            if event is not None and event.attempt == number and event.kind is Kind.STATE:
                return event
    return None


def state_of(event: Event) -> str:
    """The state that a state event tells of, or ""."""
    if event.kind is not Kind.STATE:
        return ""
    state = event.values.get("state")
    return state if isinstance(state, str) and re.fullmatch("[a-z]{1,16}", state, re.ASCII) else ""


def _read(folder: Folder, offset: int, most: int) -> tuple[bytes, bool]:
    """Bytes from `offset`, and whether they reach the end of the file."""
    with storage(folder.path / EVENTS):
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            file = os.open(EVENTS, flags, dir_fd=folder.descriptor)
        except FileNotFoundError:
            return b"", True
        try:
            data = os.pread(file, most, offset)
            return data, offset + len(data) >= os.fstat(file).st_size
        finally:
            os.close(file)
