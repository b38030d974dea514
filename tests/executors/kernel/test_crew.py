"""The other processes of an attempt: how many, on what, what ended them, and that none outlives rank 0."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from tunesmith.executors.kernel import crew
from tunesmith.executors.kernel.crew import Crew, Seat
from tunesmith.executors.kernel.sizing.rows import processes
from tunesmith.orchestrator.errors import InputError, JobFailed, Stopped
from tunesmith.orchestrator.events import Kind

# A rank that says again and again in a file that it lives, or does what else its environment tells.
RANK = """
import json, os, sys, time
from pathlib import Path
from tunesmith.executors.kernel import crew
from tunesmith.orchestrator.errors import InputError

folder, given = Path(sys.argv[1]), dict(zip(sys.argv[2::2], sys.argv[3::2]))
crew.bound(int(given["--parent"]))
rank = given["--rank"]
deed = os.environ.get("DEED_" + rank, "wait")
if deed == "tell":
    seat = crew.Seat(int(rank), int(given["--world"]))
    crew.Crew(folder, seat, print).tell(InputError("No such column.", code="data.column", where="row 3"))
    os._exit(2)
while deed == "wait":
    (folder / ("bound" + rank)).touch()
    time.sleep(0.01)
os._exit(int(deed))
"""

RANK_0 = """
import sys, time
from pathlib import Path
from tunesmith.executors.kernel.crew import Crew, Seat
from tunesmith.executors.kernel.sizing.rows import processes

with Crew(Path(sys.argv[1]), Seat(0, 3), print, command=(sys.executable, "-P", sys.argv[2])) as one:
    print(*(child.pid for child in one._children), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def make_crew(tmp_path, monkeypatch):
    """A crew of small ranks; `deeds` are exit codes, "wait" or "tell", for the ranks from 1 on."""

    def make(*deeds, abandon=None, **more):
        for rank, deed in enumerate(deeds, 1):
            monkeypatch.setenv(f"DEED_{rank}", str(deed))
        program = tmp_path / "rank.py"
        program.write_text(RANK)
        command = (sys.executable, "-P", str(program))
        return Crew(tmp_path, Seat(0, len(deeds) + 1), abandon or pytest.fail, command=command, **more)

    return make


def until(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def cause(one):
    """What the crew finds to have ended a rank, as soon as one ended."""
    return until(one.cause)


@pytest.mark.parametrize(
    "hardware, count",
    [
        (None, 1),
        ("cpu", 1),
        ("NVIDIA L4", 1),
        ({"gpus": 1}, 1),
        ({"gpus": 4}, 4),
        ({"gpus": 0}, 1),
        ({"processes": 3}, 3),
        ({"gpus": "2"}, 1),
        ({"gpus": -1}, 1),
        ({}, 1),
    ],
)
def test_how_many_processes_a_spec_asks_for(hardware, count):
    assert processes(hardware) == count


@pytest.mark.parametrize("hardware", ["cpu", {"processes": 2}, {"gpus": 0}])
def test_processes_on_a_cpu(hardware):
    assert [device.type for device in crew.devices(hardware)] == ["cpu"] * processes(hardware)


@pytest.fixture
def put_in(monkeypatch):
    """Puts cards of these names into the machine, as torch sees it."""
    import torch

    def put(cards, current=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "get_device_name", cards.__getitem__)

    return put


@pytest.mark.parametrize(
    "hardware, cards, current, chosen",
    [
        ({"gpus": 2}, ["H100", "H100", "H100"], 0, [0, 1]),
        ({"gpus": 2}, ["T4", "H100", "T4", "T4"], 0, [0, 2]),
        ({"gpus": 2}, ["T4", "H100", "T4"], 2, [2, 0]),
        ({"gpus": 2}, ["T4", "H100", "H100"], 0, [1, 2]),
        ({"gpus": 1}, ["T4", "H100"], 1, [1]),
        ("H100", ["T4", "H100", "H100"], 0, [1]),
        ("H100", ["T4", "H100", "H100"], 2, [2]),
        ("cuda", ["T4", "H100"], 0, [0]),
        (None, ["T4", "H100"], 1, [1]),
        ({}, ["T4"], 0, [0]),
    ],
)
def test_the_gpus_asked_for_are_taken_and_several_are_of_one_kind(hardware, cards, current, chosen, put_in):
    import torch

    put_in(cards, current)
    assert crew.devices(hardware) == [torch.device("cuda", index) for index in chosen]


@pytest.mark.parametrize(
    "hardware, cards, words",
    [
        ({"gpus": 2}, ["T4", "H100"], "asks for 2 GPUs, and this machine has 1 T4, 1 H100."),
        ({"gpus": 2}, [], "asks for 2 GPUs, and this machine has none."),
        ({"gpus": 1}, [], "asks for a GPU, and this machine has none."),
        ("NVIDIA L4", [], "asks for the GPU 'NVIDIA L4', and this machine has none."),
        ("NVIDIA L4", ["Tesla T4", "Tesla T4"], "asks for the GPU 'NVIDIA L4', and this machine has 2 Tesla T4."),
    ],
)
def test_a_gpu_that_is_not_there_is_missed_and_no_cpu_steps_in(hardware, cards, words, put_in):
    put_in(cards)
    with pytest.raises(InputError) as caught:
        crew.devices(hardware)
    assert caught.value.code == "hardware.gpus"
    assert words in caught.value.message
    assert caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize("hardware", [None, "auto", {}])
def test_where_nothing_is_asked_for_a_cpu_will_do(hardware, put_in):
    put_in([])
    assert [device.type for device in crew.devices(hardware)] == ["cpu"]


def test_a_stop_ends_the_wait_for_the_others_before_training_and_not_after_it(tmp_path, monkeypatch):
    """What a rank has trained is not thrown away for a stop that comes while it waits for the others to finish."""
    import torch

    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    one = Crew(tmp_path, Seat(0, 2), pytest.fail)
    one.place.mkdir()
    store = torch.distributed.FileStore(str(one.place / "meet"))
    looks = []

    def check():
        looks.append(None)
        if len(looks) == 3:
            store.set("leave/1", "here")

    def stop():
        raise Stopped("The attempt was told to end.")

    monkeypatch.setattr(one, "check", check)
    with pytest.raises(Stopped):
        one.join(torch.device("cpu"), stop)
    store.set("join/1", "here")
    ranks = one.join(torch.device("cpu"), stop)
    looks.clear()
    one.part(ranks)
    assert len(looks) == 3


def test_a_process_alone_starts_nobody(tmp_path):
    from tunesmith.executors.kernel.loops.ranks import ALONE

    with Crew(tmp_path, Seat(), pytest.fail) as one:
        ranks = one.join(None, pytest.fail)
        assert ranks is ALONE
        one.check()
        one.part(ranks)
    assert list(tmp_path.iterdir()) == []


def test_what_ended_a_rank_is_told(make_crew):
    with make_crew("wait", "tell") as one:
        error = cause(one)
        assert (type(error), error.code, error.message) == (InputError, "data.column", "No such column.")
        assert error.where == "row 3, rank 2"
        with pytest.raises(InputError):
            one.check()
    assert not (one.folder / "ranks").exists()


@pytest.mark.parametrize("code, why", [(7, "Rank 1 of 2 ended with exit code 7."), (3, "ended with exit code 3")])
def test_a_rank_that_ends_without_a_word_is_lost(code, why, make_crew):
    with make_crew(code) as one:
        error = cause(one)
    assert (type(error), error.code) == (JobFailed, "ranks.lost")
    assert why in error.why


def test_the_rank_that_ended_by_itself_is_named_and_not_those_that_lost_it(make_crew):
    with make_crew(crew.LOST, "wait") as one:
        first, second = one._children
        until(lambda: first.poll() is not None)
        assert one.cause() is None
        second.kill()
        error = one.lost(RuntimeError("Connection closed by peer"))
    assert error.why == ("Rank 2 of 3 was ended by SIGKILL: somebody killed it, or the machine ran out of memory.")


def test_no_signal_but_kill_ends_a_rank_and_leaving_ends_all(make_crew):
    with make_crew("wait", "wait") as one:
        until(lambda: len(list(one.folder.glob("bound*"))) == 2)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            for rank, child in enumerate(one._children, 1):
                child.send_signal(number)
                (one.folder / f"bound{rank}").unlink()
            until(lambda: len(list(one.folder.glob("bound*"))) == 2)
        one.check()
        pids = [child.pid for child in one._children]
        assert all(map(alive, pids))
    assert not any(map(alive, pids))


def test_a_crew_dies_with_rank_0(tmp_path, make_crew):
    """Rank 0 is killed the hard way, so that nothing of it can run any more."""
    make_crew()
    command = [sys.executable, "-P", "-c", RANK_0, str(tmp_path), str(tmp_path / "rank.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        pids = [int(pid) for pid in first.stdout.readline().split()]
        until(lambda: len(list(tmp_path.glob("bound*"))) == 2)
        assert all(map(alive, pids))
        first.kill()
    until(lambda: not any(map(alive, pids)))


def test_a_rank_whose_parent_is_already_gone_ends(tmp_path, make_crew):
    make_crew()
    command = [sys.executable, "-P", str(tmp_path / "rank.py"), str(tmp_path), "--rank", "1", "--world", "2"]
    done = subprocess.run([*command, "--parent", "1"], timeout=60)
    assert done.returncode == crew.LOST
    assert not (tmp_path / "bound1").exists()


def test_where_rank_0_hangs_it_is_given_up_and_where_it_does_not_it_is_left_in_peace(make_crew):
    told, given_up = [], threading.Event()

    def abandon(error):
        told.append(error)
        given_up.set()

    with make_crew(9, abandon=abandon, held_seconds=0.0):
        assert given_up.wait(60)
    assert [error.code for error in told] == ["ranks.lost"]
    with make_crew(9) as one:  # as patient as usual; abandoning fails the test
        cause(one)


def test_stale_words_of_an_earlier_life_are_not_believed(make_crew):
    stale = make_crew(7)
    (stale.folder / "ranks").mkdir()
    (stale.folder / "ranks" / "1").write_text(json.dumps(InputError("Old.", code="old").to_doc()))
    with stale as one:
        assert cause(one).code == "ranks.lost"


def test_a_silent_reporter_writes_nothing(tmp_path):
    from tunesmith.executors.kernel.silent import Silent

    with Silent(tmp_path, 1) as reporter:
        reporter.listeners.append(pytest.fail)
        reporter.state("running")
        reporter.metric({"train/loss": 1.0}, 1)
        reporter.log("word")
        reporter.alert("code", "word", rows=1)
        reporter.progress("training", 0, 1, unit="steps", eta_seconds=1.0, tokens_per_second=1.0, step=1)
        reporter.emit(Kind.SAMPLE, {})
    assert list(tmp_path.iterdir()) == []
