"""Reading events on: whole lines, each once, whatever is between them and however the reads fall."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.executors.local import tail
from tunesmith.executors.local.folder import Folder
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.states import AttemptState


def line(number, kind="metric", values=None, attempt=1) -> bytes:
    event = {"attempt": attempt, "line": number, "time": "t", "kind": kind, "values": values or {"train/loss": 1.0}}
    return json.dumps(event).encode()


@pytest.fixture
def folder(tmp_path):
    with Folder.make(tmp_path, "j-abc234", 1) as folder:
        yield folder


def read_all(folder, most, ended=True):
    cursor, events = tail.Cursor(), []
    while True:
        batch = tail.read_on(folder, tail.Cursor.parse(str(cursor)), 1, ended=ended, most=most)
        events += batch.events
        assert batch.drained or batch.cursor.offset > cursor.offset
        cursor = batch.cursor
        if batch.drained:
            return events, cursor


PIECES = st.one_of(
    st.integers(1, 99).map(lambda number: (line(number), number, 0)),
    st.sampled_from([b"{", b"null", b"\xff\xfe", b"\0\0", b'{"attempt":1}', line(7, attempt=2), line(7, kind="x")]).map(
        lambda junk: (junk, None, 1)
    ),
    st.integers(301, 2000).map(lambda length: (b"z" * length, None, 1)),
    st.just((b"", None, 0)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, max_size=12), most=st.integers(301, 900), torn=st.booleans())
def test_any_mixture_read_in_any_pieces_gives_the_same_events(folder, monkeypatch, pieces, most, torn):
    monkeypatch.setattr(tail, "MAX_LINE_BYTES", 300)
    content = b"".join(piece[0] + b"\n" for piece in pieces) + (b'{"attempt": 1, "li' if torn else b"")
    (folder.path / tail.EVENTS).write_bytes(content)
    events, cursor = read_all(folder, most)
    assert [event.line for event in events] == [number for _, number, _ in pieces if number]
    assert cursor.skipped == sum(skipped for _, _, skipped in pieces) + torn
    assert cursor.offset == len(content)
    again = tail.read_on(folder, cursor, 1, ended=True)
    assert (again.events, again.cursor, again.drained) == ((), cursor, True)


def test_a_torn_line_is_waited_for_while_the_attempt_lives(folder):
    whole = line(1) + b"\n" + line(2)
    file = folder.path / tail.EVENTS
    file.write_bytes(whole[:-10])
    first = tail.read_on(folder, tail.Cursor(), 1, ended=False)
    assert [event.line for event in first.events] == [1]
    assert first.cursor.skipped == 0
    file.write_bytes(whole + b"\n")
    second = tail.read_on(folder, first.cursor, 1, ended=False)
    assert [event.line for event in second.events] == [2]


def test_a_last_line_without_its_newline_counts_once_nobody_writes(folder):
    (folder.path / tail.EVENTS).write_bytes(line(1) + b"\n" + line(2))
    batch = tail.read_on(folder, tail.Cursor(), 1, ended=True)
    assert [event.line for event in batch.events] == [1, 2]
    assert batch.cursor.skipped == 0


def test_an_endless_line_is_passed_over_in_bounded_pieces(folder, monkeypatch):
    monkeypatch.setattr(tail, "MAX_LINE_BYTES", 300)
    tricky = b"x" * 400 + line(666) + b"\n" + line(1) + b"\n"
    (folder.path / tail.EVENTS).write_bytes(tricky)
    for most in (301, 400, 401, 450):
        events, cursor = read_all(folder, most)
        assert [event.line for event in events] == [1]
        assert cursor.skipped == 1


def test_the_state_travels_in_the_cursor(folder):
    states = ["starting", "running", "finishing"]
    lines = [line(number, "state", {"state": name}) for number, name in enumerate(states, 1)]
    (folder.path / tail.EVENTS).write_bytes(b"\n".join(lines) + b"\n" + line(4, "state", {"state": "A:B\n"}) + b"\n")
    batch = tail.read_on(folder, tail.Cursor(), 1, ended=False)
    assert str(batch.cursor).split(":")[1:] == ["0", "finishing"]
    assert tail.Cursor.parse(str(batch.cursor)) == batch.cursor


@pytest.mark.parametrize("text", ["x", "-1:0:", "1", "1:1:running:", "1:1:RUNNING", "1:1:running\n", "1" * 19 + ":0:"])
def test_a_cursor_that_is_not_ours_is_refused(text):
    with pytest.raises(InputError):
        tail.Cursor.parse(text)


def test_a_missing_file_is_an_empty_one(folder):
    assert tail.read_on(folder, tail.Cursor(), 1, ended=False).drained
    assert tail.last_state(folder, 1) is None


def test_the_last_state_is_found_behind_much_else(folder):
    error = {"code": "data.row"}
    lines = [line(1, "state", {"state": "failed", "error": error})] + [line(number) for number in range(2, 20000)]
    (folder.path / tail.EVENTS).write_bytes(b"\n".join(lines) + b"\n{torn")
    event = tail.last_state(folder, 1)
    assert event.kind is Kind.STATE
    assert event.values["error"] == error


def test_a_kernel_that_writes_rubbish_is_read_to_its_end(yard):
    handle = yard.submit("torn")
    cursor, events = "", []
    while True:
        seen = yard.executor.observe(handle, cursor)
        events, cursor = [*events, *seen.events], seen.cursor
        if seen.state is AttemptState.SUCCEEDED:
            break
        assert seen.exit_code is None
    assert [event.step for event in events if event.kind is Kind.METRIC] == [1, 2]
    assert tail.Cursor.parse(cursor).skipped == 7
    assert [event.line for event in events] == list(range(1, 7))
