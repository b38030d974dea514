"""The guard: nothing that a text does can hang, kill or rob the process that trains."""

import os
import signal
import threading

import pytest

from tunesmith.executors.kernel.rewards.guard import Guard, Outcome
from tunesmith.orchestrator.errors import InputError


@pytest.fixture
def guard():
    made = []

    def guard(kind, setup=None, children=1):
        made.append(Guard(kind, setup, children=children))
        return made[-1]

    yield guard
    for one in made:
        one.close()


def test_outcomes_stand_in_order_whatever_child_works(guard):
    many = guard("regex", {"pattern": "a"}, children=3)
    texts = ["a", "b"] * 20
    assert [outcome.value for outcome in many.map([{"text": text} for text in texts])] == [1.0, 0.0] * 20
    assert len(many._children) == 1  # only two items differ
    texts = [("a" if index % 3 else "b") * (index + 1) for index in range(40)]
    wanted = [float("a" in text) for text in texts]
    assert [outcome.value for outcome in many.map([{"text": text} for text in texts])] == wanted
    assert len(many._children) == 3


def test_an_endless_pattern_is_given_up_and_the_next_text_still_read(guard):
    slow = guard("regex", {"pattern": r"^(a+)+$"})
    found = slow.map([{"text": "aaa"}, {"text": "a" * 40 + "b", "alarm": 0.2}, {"text": "aa"}])
    assert found == [Outcome(1.0), Outcome(slow=True), Outcome(1.0)]
    assert slow.slow == 1


def test_a_child_that_cannot_be_interrupted_is_ended(guard):
    slow = guard("regex", {"pattern": r"^(a+)+$"})
    assert slow.map([{"text": "a"}])[0].value == 1.0
    first = slow._children[0]._process.pid
    assert slow.map([{"text": "a" * 40 + "b", "alarm": 60}], patience=0.3) == [Outcome(slow=True)]
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert slow.map([{"text": "a"}])[0].value == 1.0


def test_a_child_that_is_killed_is_replaced(guard):
    kept = guard("regex", {"pattern": "a"})
    kept.map([{"text": "a"}])
    os.kill(kept._children[0]._process.pid, signal.SIGKILL)
    kept._children[0]._process.wait()
    assert kept.map([{"text": "a"}, {"text": "ab"}]) == [Outcome(slow=True), Outcome(1.0)]


def test_a_guard_may_be_asked_from_any_thread(guard):
    shared = guard("boxed")
    found = []
    thread = threading.Thread(target=lambda: found.extend(shared.map([{"said": "1/2", "wanted": "0.5"}])))
    thread.start()
    thread.join()
    assert found == [Outcome(1.0)]


def test_huge_mathematics_ends_in_time_or_memory(guard):
    maths = guard("boxed")
    tower = "10^{" * 12 + "10" + "}" * 12
    found = maths.map([{"said": tower, "wanted": "3", "alarm": 0.5}, {"said": "2+1", "wanted": "3"}], patience=5)
    assert found[0].slow or found[0].value == 0.0
    assert found[1].value == 1.0


def test_a_child_has_no_secrets_and_writes_no_files(guard, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    one = guard("regex", {"pattern": "a"})
    one.map([{"text": "a"}])
    pid = one._children[0]._process.pid
    with open(f"/proc/{pid}/environ", "rb") as handle:
        assert b"hf_secret" not in handle.read()
    with open(f"/proc/{pid}/limits") as handle:
        limits = {line[:26].strip(): line[26:].split() for line in handle}
    assert limits["Max file size"][0] == "0"
    assert limits["Max core file size"][0] == "0"
    assert int(limits["Max address space"][0]) <= 6 * 2**30


def test_interrupts_of_the_training_process_do_not_end_a_child(guard):
    one = guard("regex", {"pattern": "a"})
    one.map([{"text": "a"}])
    pid = one._children[0]._process.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert one.map([{"text": "ab"}]) == [Outcome(1.0)]
    assert one._children[0]._process.pid == pid


def test_a_child_ends_with_the_process_that_asked(tmp_path):
    """Killed outright, that process says no goodbye: the end of its pipe is what the child hears."""
    import subprocess
    import sys

    program = (
        "import os, signal\n"
        "from tunesmith.executors.kernel.rewards.guard import Guard\n"
        "guard = Guard('regex', {'pattern': 'a'}, children=1)\n"
        "guard.map([{'text': 'a'}])\n"
        "print(guard._children[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    child = int(done.stdout)
    with open(f"/proc/{os.getpid()}/stat"):
        pass
    for _ in range(1000):
        try:
            with open(f"/proc/{child}/stat") as handle:
                if handle.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except (FileNotFoundError, ProcessLookupError):
            return
        threading.Event().wait(0.01)
    pytest.fail("the child lives on")


def test_a_child_that_went_by_itself_is_started_again(guard):
    """As after minutes in which nobody asked: its end is no fault of the next item."""
    one = guard("regex", {"pattern": "a"})
    one.map([{"text": "a"}])
    first = one._children[0]._process
    first.stdin.close()  # the end of its input is what it hears then, too
    assert first.wait() == 0
    assert one.map([{"text": "ab"}]) == [Outcome(1.0)]
    assert one._children[0]._process.pid != first.pid


def test_a_refused_setup_is_the_error_it_was(guard):
    with pytest.raises(InputError) as caught:
        guard("json", {"schema": {"type": 7}}).map([{"text": "{}"}])
    assert caught.value.code == "reward.schema"
    assert guard("regex", {"pattern": "a"}).map([]) == []
