"""Causes come from recorded facts: state, exit code, error document. Nothing else is guessed."""

import pytest

from tunesmith.graph.diagnose import _WORDS, MAX_TEXT, diagnose, error_doc, resume_point
from tunesmith.orchestrator.errors import InputError, StorageError
from tunesmith.orchestrator.nouns import DataSource, JobSpec, ModelRef, Request, TrainSpec
from tunesmith.orchestrator.ports import AttemptView, JobView
from tunesmith.orchestrator.states import ATTEMPT_ENDS, AttemptState, JobState

A = AttemptState
SPEC = JobSpec(model=ModelRef(id="m"), data=(DataSource(source="d"),), train=TrainSpec(micro_batch=8, max_length=512))


def job(*attempts, wanted=None):
    return JobView(
        id="j-aaaaaa",
        state=JobState.RUNNING,
        request=Request(),
        answers={},
        plan=None,
        plan_stale=False,
        approval=None,
        attempts=attempts,
        remedies=(),
        repairs_left=0,
        wanted=wanted,
    )


def ended(state=A.FAILED, exit_code=None, error=None, **facts):
    return AttemptView(number=1, backend="local", state=state, exit_code=exit_code, error=error, **facts)


def said(message, code="internal", kind="TunesmithError"):
    return {"type": kind, "code": code, "message": message}


CASES = [
    (ended(A.SUCCEEDED, 0), "succeeded"),
    (ended(A.LOST), "lost"),
    (ended(A.CANCELLED, 143), "cancelled"),
    (ended(A.CANCELLED, 75), "stopped"),
    (ended(A.CANCELLED, 75, said("x", "attempt.cancelled")), "cancelled"),
    (ended(A.FAILED, 75, said("told to", "stopped", "Stopped")), "stopped"),
    (ended(A.CANCELLED, 143, said("too late", "attempt.deadline")), "timeout"),
    (ended(A.FAILED, 137, said("too late", "deadline")), "timeout"),
    (ended(A.FAILED, 137), "oom.host"),
    (ended(A.FAILED, 1, said("MemoryError: ", kind="MemoryError")), "oom.host"),
    (ended(A.FAILED, 1, said("DefaultCPUAllocator: can't allocate memory: 99 bytes")), "oom.host"),
    (ended(A.FAILED, 1, said("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")), "oom.cuda"),
    (ended(A.FAILED, 1, said("no room", "oom.cuda")), "oom.cuda"),
    (ended(A.FAILED, 1, said("no room", "oom.host")), "oom.host"),
    (ended(A.FAILED, 1, said("The loss is NaN at step 3.", "train.nan")), "nan"),
    (ended(A.FAILED, 1, said("The loss is not finite at step 3.")), "nan"),
    (ended(A.FAILED, 1, StorageError("The disk is full.").to_doc()), "storage"),
    (ended(A.FAILED, 1, said("OSError: [Errno 28] No space left on device: 'x'")), "storage"),
    (ended(A.FAILED, 2, InputError("Row 3 is empty.", code="data.row.empty").to_doc()), "data"),
    (ended(A.FAILED, 2, InputError("No such model.", code="model.unknown").to_doc()), "input"),
    (ended(A.FAILED, 2), "input"),
    (ended(A.FAILED, 4, said("gone", "backend.unavailable", "BackendUnavailable")), "backend"),
    (ended(A.FAILED, 139), "killed"),
    (ended(A.FAILED, 143), "killed"),
    (ended(A.FAILED, 137, said("The kernel was killed.", "killed")), "killed"),
    (ended(A.FAILED, 137, said("The kernel was killed, memory ran out.", "memory.host")), "oom.host"),
    (ended(A.FAILED, 139, said("The kernel ended with exit code 139 and did not say why.", "kernel.exit")), "killed"),
    (ended(A.FAILED, 3, said("The kernel ended with exit code 3 and did not say why.", "kernel.exit")), "code"),
    (ended(A.FAILED, None, said("The attempt could not be started.", "backend.submit")), "backend"),
    (ended(A.FAILED, 1, said("ZeroDivisionError: division by zero")), "code"),
    (ended(A.FAILED, 1), "code"),
    (ended(A.FAILED), "code"),
    (ended(A.FAILED, 1, {"message": None, "code": 7}), "code"),
    (ended(A.FAILED, 1, said("banana is not a number of epochs")), "code"),
]  # fmt: skip


@pytest.mark.parametrize(("attempt", "cause"), CASES)
def test_the_cause(attempt, cause):
    found = diagnose(attempt, SPEC, job(attempt))
    assert found.cause == cause
    assert "{" not in found.message + found.fix


def test_every_cause_is_reached_and_worded():
    assert {cause for _, cause in CASES} == set(_WORDS)


def test_what_a_person_cancelled_is_cancelled_however_it_died():
    for code in (75, 137, 143, 1):
        attempt = ended(A.FAILED, code)
        assert diagnose(attempt, SPEC, job(attempt, wanted="cancel")).cause == "cancelled"


def test_only_an_ended_attempt_can_be_diagnosed():
    for state in set(A) - ATTEMPT_ENDS:
        with pytest.raises(ValueError, match="has not ended"):
            diagnose(ended(state), SPEC, job())


def test_the_evidence_names_code_signal_error_and_checkpoint():
    attempt = ended(A.FAILED, 139, said("it broke"), checkpoint="attempts/1/checkpoints/step-00000010")
    messages = " ".join(item.message for item in diagnose(attempt, SPEC, job(attempt)).evidence)
    assert "139 (SIGSEGV)" in messages
    assert "it broke" in messages
    assert "step-00000010" in messages


def test_a_kill_for_memory_is_named_as_likely_not_as_certain():
    found = diagnose(ended(A.FAILED, 137), SPEC, job())
    assert "most likely" in found.message
    assert "kill -9" in found.evidence[0].message
    assert "micro-batch 8 and length 512" in found.message


def test_a_lost_attempt_says_that_no_trace_was_left():
    assert [item.code for item in diagnose(ended(A.LOST), SPEC, job()).evidence] == ["attempt.lost"]


def test_hostile_texts_are_bounded():
    attempt = ended(A.FAILED, 1, {"type": "X", "code": "x", "message": "{number} " * 10_000, "fix": "y" * 9999})
    found = diagnose(attempt, SPEC, job(attempt))
    doc = error_doc(attempt, found)
    assert all(len(str(value)) <= MAX_TEXT for value in doc.values())
    assert all(len(item.message) <= MAX_TEXT for item in found.evidence)


def test_the_error_of_the_job_is_the_attempts_own_or_the_diagnosis():
    attempt = ended(
        A.FAILED, 2, InputError("Row 3 is empty.", code="data.row.empty", fix="Fill it.", where="a:3").to_doc()
    )
    doc = error_doc(attempt, diagnose(attempt, SPEC, job(attempt)))
    assert (doc["code"], doc["message"], doc["fix"], doc["where"]) == (
        "data.row.empty",
        "Row 3 is empty.",
        "Fill it.",
        "a:3",
    )
    attempt = ended(A.FAILED, 137)
    doc = error_doc(attempt, diagnose(attempt, SPEC, job(attempt)))
    assert doc["code"] == "attempt.oom.host"
    assert doc["message"]
    assert doc["fix"]


def test_the_newest_attempt_says_where_to_resume():
    def one(number, checkpoint=None, resumed_from=None):
        return AttemptView(
            number=number, backend="local", state=A.FAILED, checkpoint=checkpoint, resumed_from=resumed_from
        )

    assert resume_point(job()) is None
    assert resume_point(job(one(1))) is None
    assert resume_point(job(one(1, "a"))) == "a"
    assert resume_point(job(one(1, "a"), one(2))) is None  # the second began another plan, and saved nothing
    assert resume_point(job(one(1, "a"), one(2), one(3, "c"))) == "c"
    assert resume_point(job(one(2, "b", "a"), one(1, "a"))) == "b"
    assert resume_point(job(one(1, "a"), one(2, "b", "a"), one(3, None, "b"))) == "b"
    assert resume_point(job(one(1, "a"), one(2, None, "a"), one(3, None, "a"))) == "a"
