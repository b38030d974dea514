"""Tokenised rows from disk are the rows of a fresh run, or they are made anew; a damaged file is never believed."""

import fcntl
import json
import multiprocessing
import os
import random
import resource
import signal
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.executors.kernel.data import (
    Encoded,
    Example,
    Message,
    Pair,
    Prompt,
    cached,
    encode_many,
    encode_pairs,
    encode_prompts,
    prepare,
)
from tunesmith.executors.kernel.data.cached import key_of
from tunesmith.executors.kernel.data.shelf import Shelf
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataSource

FRESH = {Encoded: encode_many, Pair: encode_pairs, Prompt: encode_prompts}
LIMIT = 32
WORDS = ("and", "two", "four", "the answer", "because", "é \N{GRINNING FACE}")


def some(kind, count=40):
    """Examples of a kind: of several turns, too long, and of no use, among plain ones."""
    draw = random.Random(7)

    def text(most=4):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    def turns(first="user", more=2):
        roles = ("user", "assistant") if first == "user" else ("assistant", "user")
        return tuple(Message(roles[at % 2], text()) for at in range(2 * draw.randint(0, more) + (first == "user") + 1))

    made = []
    for row in range(count):
        if row % 5 == 0 and kind is Encoded:
            made.append(Example(row, messages=turns()))
        elif row % 5 == 0:
            before = (Message("system", text()), Message("user", text()))
            sides = {"chosen": turns("assistant"), "rejected": turns("assistant", 0)}
            extra = sides if kind is Pair else {"answer": row, "tests": [text()]}
            made.append(Example(row, messages=before, extra=extra, context=2))
        elif row % 7 == 3:
            made.append(Example(row))
        elif kind is Encoded:
            made.append(Example(row, prompt=text(), completion=text(30 if row % 4 == 0 else 3)))
        elif kind is Pair:
            made.append(Example(row, prompt=text(), extra={"chosen": text(30), "rejected": text(3)}))
        else:
            made.append(Example(row, prompt=text(30 if row % 4 == 0 else 3), extra={"answer": text()}))
    return made


def fresh(kind, examples, tokenizer, limit=LIMIT):
    """The rows and the errors of a run without a cache."""
    found = list(FRESH[kind](examples, tokenizer, limit))
    rows = [item for item in found if not isinstance(item, InputError)]
    return rows, [item.to_doc() for item in found if isinstance(item, InputError)]


def same(tokens, kind, examples, tokenizer, limit=LIMIT):
    """Whether rows, errors and truncation are those of a run without a cache."""
    rows, errors = fresh(kind, examples, tokenizer, limit)
    assert list(tokens) == rows
    assert [error.to_doc() for error in tokens.errors] == errors
    assert all(isinstance(error, InputError) for error in tokens.errors)
    assert tokens.truncated == sum(getattr(row, "truncated", False) for row in rows)
    return True


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", [Encoded, Pair, Prompt], ids=lambda kind: kind.__name__)
def test_a_second_run_gets_what_a_fresh_one_does(small, tmp_path, kind):
    tokenizer, examples = small(), some(kind)
    first = cached(kind, examples, tokenizer, LIMIT, folder=tmp_path / "tokens")
    second = cached(kind, examples, tokenizer, LIMIT, folder=tmp_path / "tokens")
    assert (first.cached, second.cached, first.note, second.note) == (False, True, "", "")
    assert same(first, kind, examples, tokenizer)
    assert same(second, kind, examples, tokenizer)
    assert second.errors
    assert second.truncated or kind is Prompt, "there is something to remember"
    assert {type(token) for row in second for token in getattr(row, "ids", ()) or row.chosen} == {int}
    assert len(files(tmp_path / "tokens")) == 1, "one table, and no lock or part left"


def test_rows_are_a_sequence(small, tmp_path):
    tokenizer, examples = small(), some(Encoded)
    tokens = cached(Encoded, examples, tokenizer, LIMIT, folder=tmp_path)
    rows, _ = fresh(Encoded, examples, tokenizer)
    assert len(tokens) == len(rows)
    assert (tokens[0], tokens[-1], tokens[3:5], tokens[::-1]) == (rows[0], rows[-1], rows[3:5], rows[::-1])
    assert rows[2] in tokens
    for place in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            tokens[place]


def test_no_rows_at_all(small, tmp_path):
    for _ in range(2):
        tokens = cached(Encoded, [], small(), LIMIT, folder=tmp_path)
        assert (len(tokens), list(tokens), tokens.errors, tokens.truncated) == (0, [], [], 0)
    assert tokens.cached
    none = [Example(number) for number in range(3)]
    for _ in range(2):
        tokens = cached(Pair, none, small(), LIMIT, folder=tmp_path)
        assert [error.where for error in tokens.errors] == ["row 0", "row 1", "row 2"]
        assert not tokens


def test_repeated_rows(small, tmp_path):
    """A source's weight lists rows more than once."""
    tokenizer, examples = small(), some(Prompt, 6)
    for _ in range(2):
        assert same(cached(Prompt, examples * 2, tokenizer, LIMIT, folder=tmp_path), Prompt, examples * 2, tokenizer)


def test_a_prompt_tells_rewards_of_the_row_it_was_given(small, tmp_path):
    """Columns are not kept on disk: they are the example's own, whatever type they have."""
    tokenizer = small()
    one = Example(0, prompt="two", extra={"answer": {1, 2}, "score": float("nan")})
    cached(Prompt, [one], tokenizer, LIMIT, folder=tmp_path)
    other = replace(one, extra={"answer": b"4"})
    tokens = cached(Prompt, [other], tokenizer, LIMIT, folder=tmp_path)
    assert tokens.cached
    assert tokens[0].columns == {"answer": b"4"}


# --- the key -------------------------------------------------------------------------------------------------------

BASE = Example(1, messages=(Message("user", "q"), Message("assistant", "a")), extra={"chosen": "c", "rejected": "r"})


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, row=2),
        replace(BASE, context=1),
        replace(BASE, prompt="p"),
        replace(BASE, completion="c"),
        replace(BASE, text="t"),
        replace(BASE, messages=(Message("user", "q"), Message("assistant", "b"))),
        replace(BASE, messages=(Message("user", "q"), Message("tool", "a"))),
        replace(BASE, messages=None),
        replace(BASE, extra={"chosen": "r", "rejected": "c"}),
        replace(BASE, extra={"chosen": (Message("assistant", "c"),), "rejected": "r"}),
    ],
    ids=["row", "context", "prompt", "completion", "text", "content", "role", "no turns", "sides", "turns"],
)
def test_another_example_is_another_key(small, other):
    tokenizer = small()
    assert key_of(Pair, [other], tokenizer, 8) != key_of(Pair, [BASE], tokenizer, 8)


def test_texts_do_not_run_into_each_other(small):
    tokenizer = small()
    keys = {
        key_of(Encoded, rows, tokenizer, 8)
        for rows in (
            [Example(0, prompt="ab", completion="c")],
            [Example(0, prompt="a", completion="bc")],
            [Example(0, prompt="abc")],
            [Example(0, prompt="a', 'b")],
            [Example(0, prompt="a"), Example(0, prompt="b")],
            [Example(0, prompt="b"), Example(0, prompt="a")],
            [],
        )
    }
    assert len(keys) == 7


def test_whatever_changes_the_result_changes_the_key(small, tmp_path):
    def built(change=None, **more):
        tokenizer = small(**more)
        if change:
            change(tokenizer)
        return key_of(Encoded, [BASE], tokenizer, 8)

    def stops(tokenizer):
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5]}')
        tokenizer.name_or_path = str(tmp_path)

    changed = {
        "": built(),
        "kind": key_of(Prompt, [BASE], small(), 8),
        "limit": key_of(Encoded, [BASE], small(), 9),
        "no limit": key_of(Encoded, [BASE], small(), None),
        "template": built(template="{{ messages[0].content }}"),
        "no template": built(template=None),
        "eos": built(eos="<|endoftext|>"),
        "vocabulary": built(special=("<s>",)),
        "added": built(lambda tokenizer: tokenizer.add_tokens(["because of"])),
        "special": built(lambda tokenizer: setattr(tokenizer, "pad_token", "a")),
        "stops": built(stops),
    }
    assert len(set(changed.values())) == len(changed)
    assert built() == changed[""]


def test_what_leaves_the_result_alone_leaves_the_key_alone(small, tmp_path):
    import transformers

    tokenizer = small()
    key = key_of(Encoded, [BASE], tokenizer, 8)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3)
    tokenizer.pad_token = None
    assert key_of(Encoded, [BASE], tokenizer, 8) == key
    assert key_of(Encoded, [replace(BASE, extra={"label": True})], tokenizer, 8) == key
    tokenizer.save_pretrained(tmp_path)
    loaded = [transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False) for _ in range(2)]
    first, second = (key_of(Encoded, [BASE], each, 8) for each in loaded)
    assert first == second


def test_a_template_that_writes_the_date_is_of_today(small, monkeypatch):
    class Tomorrow:
        @staticmethod
        def today():
            return Tomorrow()

        def isoformat(self):
            return "2999-01-01"

    dated = small("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")
    plain = small()
    before = [key_of(Prompt, [BASE], tokenizer, 8) for tokenizer in (dated, plain)]
    monkeypatch.setitem(key_of.__globals__, "date", Tomorrow)
    after = [key_of(Prompt, [BASE], tokenizer, 8) for tokenizer in (dated, plain)]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_tokenizer_that_cannot_be_written_down_is_not_cached(small, tmp_path):
    from tokenizers import pre_tokenizers

    class Own:
        def pre_tokenize(self, text):
            text.split(lambda _, piece: [piece])

    tokenizer = small(template=None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Own())
    examples = [Example(0, prompt="and")]
    assert key_of(Prompt, examples, tokenizer, 8) is None
    for _ in range(2):
        tokens = cached(Prompt, examples, tokenizer, 8, folder=tmp_path / "tokens")
        assert not tokens.cached
        assert same(tokens, Prompt, examples, tokenizer, 8)
    assert not (tmp_path / "tokens").exists()


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(small, tmp_path):
    """A tokenizer, examples, the folder, and the one file in it."""
    tokenizer, examples = small(), some(Pair, 12)
    cached(Pair, examples, tokenizer, LIMIT, folder=tmp_path)
    (name,) = files(tmp_path)
    return tokenizer, examples, tmp_path, tmp_path / name


def damages(whole):
    """Every way that a file's bytes may be wrong."""
    head = 8 + int.from_bytes(whole[:8], "little")
    yield from (whole[:size] for size in (0, 1, 7, 8, 9, head - 1, head, head + 1, len(whole) - 1))
    yield from (whole + b"\0", whole + whole, b"\0" * len(whole), b"\xff" * len(whole), b"{}", whole[::-1])
    yield (2**63).to_bytes(8, "little") + whole[8:]
    draw = random.Random(3)
    for place in (*range(8), *(draw.randrange(len(whole)) for _ in range(60))):
        yield whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]


def test_a_damaged_file_is_never_believed(kept):
    tokenizer, examples, folder, path = kept
    whole = path.read_bytes()
    for damaged in damages(whole):
        path.write_bytes(damaged)
        tokens = cached(Pair, examples, tokenizer, LIMIT, folder=folder)
        assert same(tokens, Pair, examples, tokenizer)
        assert not tokens.cached
        assert f"{path.name} was damaged" in tokens.note
        assert path.read_bytes() == whole, "and is whole again"
        assert cached(Pair, examples, tokenizer, LIMIT, folder=folder).cached


def test_any_flipped_byte_leaves_the_rows_right(kept):
    tokenizer, examples, folder, path = kept
    whole = path.read_bytes()

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(st.integers(0, len(whole) - 1), st.integers(1, 255))
    def hold(place, bits):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
        assert same(cached(Pair, examples, tokenizer, LIMIT, folder=folder), Pair, examples, tokenizer)

    hold()


def test_the_file_of_another_key_is_not_believed(kept):
    tokenizer, examples, folder, path = kept
    path.rename(folder / f"{key_of(Pair, examples[:5], tokenizer, LIMIT)}.safetensors")
    tokens = cached(Pair, examples[:5], tokenizer, LIMIT, folder=folder)
    assert not tokens.cached
    assert same(tokens, Pair, examples[:5], tokenizer)


def test_a_folder_in_the_place_of_the_file(kept):
    tokenizer, examples, folder, path = kept
    path.unlink()
    path.mkdir()
    tokens = cached(Pair, examples, tokenizer, LIMIT, folder=folder)
    assert same(tokens, Pair, examples, tokenizer)
    assert "was damaged" in tokens.note
    assert "cannot be written" in tokens.note


# --- room, and disks that refuse -----------------------------------------------------------------------------------


def rows(number, count=30):
    return [Example(at, prompt=f"two {number}", completion="and four") for at in range(count)]


def test_what_was_used_longest_ago_goes_first(small, tmp_path):
    tokenizer = small()
    sets = [rows(number) for number in range(5)]

    def ask(number, room=1 << 30):
        return cached(Encoded, sets[number], tokenizer, LIMIT, folder=tmp_path, room=room).cached

    for number in range(4):
        assert not ask(number)
        path = tmp_path / f"{key_of(Encoded, sets[number], tokenizer, LIMIT)}.safetensors"
        os.utime(path, (1000 + number, 1000 + number))
    size = path.stat().st_size
    assert ask(0), "read now, so it is no longer the oldest"
    room = 3 * size + size // 2
    assert not ask(4, room)
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) <= room
    assert [ask(number, room) for number in (0, 3, 4)] == [True, True, True]
    assert not ask(1, room)


def test_what_is_larger_than_the_room_is_not_kept(small, tmp_path):
    tokens = cached(Encoded, rows(0), small(), LIMIT, folder=tmp_path, room=100)
    assert "more than the 100" in tokens.note
    assert same(tokens, Encoded, rows(0), small())
    assert files(tmp_path) == []


def test_what_killed_writers_left_is_removed(small, tmp_path):
    old, young, lock = (tmp_path / name for name in (".a.1.new", ".b.2.new", ".c.lock"))
    for path in (old, young, lock):
        path.write_bytes(b"half")
    for path in (old, lock):
        os.utime(path, (1000, 1000))
    cached(Encoded, rows(0), small(), LIMIT, folder=tmp_path)
    assert files(tmp_path)[0] == ".b.2.new", "its writer may be at work"
    assert len(files(tmp_path)) == 2


def test_a_folder_that_cannot_be_made(small, tmp_path):
    (tmp_path / "tokens").write_text("a file")
    tokens = cached(Encoded, rows(0), small(), LIMIT, folder=tmp_path / "tokens")
    assert "cannot be written" in tokens.note
    assert same(tokens, Encoded, rows(0), small())


def test_a_disk_that_is_full(small, tmp_path):
    """No file may grow beyond 4 KiB: the rows are right, the reason is said, and no half of a file is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        tokens = cached(Encoded, rows(0, 300), small(), LIMIT, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in tokens.note
    assert same(tokens, Encoded, rows(0, 300), small())
    assert files(tmp_path) == []


# --- while it works ------------------------------------------------------------------------------------------------


def test_progress_ends_with_all(small, tmp_path):
    heard = []
    for _ in range(2):
        heard.append([])
        cached(Encoded, rows(0, 300), small(), LIMIT, folder=tmp_path, progress=heard[-1].append)
    assert heard[0] == sorted(heard[0])
    assert len(heard[0]) > 3
    assert heard[0][-1] == 300
    assert heard[1] == [300]


def test_a_stop_leaves_nothing_behind(small, tmp_path):
    class Stop(Exception):
        pass

    def pause():
        raise Stop

    with pytest.raises(Stop):
        cached(Encoded, rows(0), small(), LIMIT, folder=tmp_path, pause=pause)
    assert files(tmp_path) == []
    assert not cached(Encoded, rows(0), small(), LIMIT, folder=tmp_path).cached


def test_a_slow_tokenizer_is_refused(tmp_path):
    class Slow:
        is_fast = False
        chat_template = None

    with pytest.raises(InputError) as caught:
        cached(Encoded, rows(0), Slow(), LIMIT, folder=tmp_path)
    assert caught.value.code == "data.slow_tokenizer"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_two_processes_one_waits_for_the_other(small, tmp_path):
    """The second finds the first at work, waits, and reads what it made."""
    tokenizer, examples = small(), rows(0, 300)
    context = multiprocessing.get_context("fork")
    waiting, answers = context.Event(), context.SimpleQueue()

    def second():
        tokens = cached(Encoded, examples, tokenizer, LIMIT, folder=tmp_path, pause=waiting.set)
        answers.put((tokens.cached, list(tokens)))

    other = context.Process(target=second)

    def pause():
        if other.pid is None:
            other.start()
            assert waiting.wait(60)

    mine = cached(Encoded, examples, tokenizer, LIMIT, folder=tmp_path, pause=pause)
    found, theirs = answers.get()
    other.join()
    assert (mine.cached, found) == (False, True)
    assert theirs == list(mine)
    assert len(files(tmp_path)) == 1


def test_a_lock_is_let_go_where_its_file_is_gone(tmp_path, monkeypatch):
    """A child forked meanwhile has the open file too, so that closing ours lets nobody in."""
    inherited, flock = [], fcntl.flock

    def watched(file, how):
        inherited.append(os.dup(file.fileno()))  # as a fork would leave it
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", watched)
    with Shelf(tmp_path, 1).alone("key", _never):
        (lock,) = tmp_path.iterdir()
        waiting = lock.open("ab")
        lock.unlink()
    with waiting:
        flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for handle in inherited:
        os.close(handle)


def test_a_lock_of_another_process_is_left_alone(tmp_path):
    with Shelf(tmp_path, 1).alone("key", _never):
        (lock,) = tmp_path.iterdir()
        lock.unlink()
        lock.touch()
    assert lock.exists()
    with Shelf(tmp_path, 1).alone("key", _never):
        assert lock.exists()
    assert not lock.exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_taken_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.executors.kernel.data.shelf._POLL", 0)
    lock = tmp_path / ".key.lock"
    first = lock.open("ab")
    fcntl.flock(first, fcntl.LOCK_EX)

    def pause():
        lock.unlink()
        lock.touch()
        first.close()

    with Shelf(tmp_path, 1).alone("key", pause), lock.open("ab") as third, pytest.raises(BlockingIOError):
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _never():
    pytest.fail("nobody else holds the lock")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_killed_at_work_holds_nobody_up(small, tmp_path):
    tokenizer, examples = small(), rows(0, 300)
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def pause():
        started.set()
        signal.pause()

    other = context.Process(
        target=cached, args=(Encoded, examples, tokenizer, LIMIT), kwargs={"folder": tmp_path, "pause": pause}
    )
    other.start()
    assert started.wait(60)
    waited = []

    def kill():
        if other.is_alive():
            waited.append(True)
            other.kill()
            other.join()

    tokens = cached(Encoded, examples, tokenizer, LIMIT, folder=tmp_path, pause=kill)
    assert waited
    assert not tokens.cached
    assert same(tokens, Encoded, examples, tokenizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_writers_killed_at_any_moment_leave_whole_files(small, tmp_path):
    """SIGKILL while a table is written, again and again: what is there afterwards is whole, or not there."""
    tokenizer = small()
    sets = [rows(number, 2000) for number in range(6)]
    context = multiprocessing.get_context("fork")
    draw = random.Random(11)
    shelf = Shelf(tmp_path, 1 << 30)
    keys = [key_of(Encoded, each, tokenizer, LIMIT) for each in sets]
    tables = []
    for key, each in zip(keys, sets, strict=True):
        cached(Encoded, each, tokenizer, LIMIT, folder=tmp_path)
        tables.append(shelf.get(key)[0])

    def writer(at, begun):
        begun.set()
        while True:
            shelf.put(keys[at], tables[at])

    for _ in range(30):
        at = draw.randrange(len(keys))
        begun = context.Event()
        other = context.Process(target=writer, args=(at, begun))
        other.start()
        begun.wait(60)
        for _ in range(draw.randrange(1, 40)):
            found, note = shelf.get(keys[at])
            assert (found is None, note) == (False, ""), "a reader beside the writer sees it whole"
        other.kill()
        other.join()
        tokens = cached(Encoded, sets[at], tokenizer, LIMIT, folder=tmp_path)
        assert (tokens.cached, tokens.note) == (True, "")


# --- real rows -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "name"),
    [(Encoded, "sft", "gsm8k_train.jsonl"), (Prompt, "grpo", "gsm8k_train.jsonl"), (Pair, "dpo", "dpo_en_demo.json")],
)
def test_real_rows(real, smollm2, make_spec, tmp_path, kind, method, name):
    source = DataSource(source=str(real / name), limit=1000)
    examples = prepare(make_spec(source, method=method, fraction=0)).train
    for found in (False, True):
        tokens = cached(kind, examples, smollm2, 160, folder=tmp_path)
        assert tokens.cached == found
        assert same(tokens, kind, examples, smollm2, 160)
    (path,) = tmp_path.iterdir()
    count = sum(len(row.ids) if kind is not Pair else len(row.prompt + row.chosen + row.rejected) for row in tokens)
    errors = len(json.dumps([error.to_doc() for error in tokens.errors]))
    assert path.stat().st_size < 4 * count + 60 * len(tokens) + errors + 2000, "4 bytes a token and little else"
