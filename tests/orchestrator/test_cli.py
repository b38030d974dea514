"""The command line as a program: exit codes, one document on stdout, and words that a person understands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.orchestrator import cli, commands
from tunesmith.orchestrator.home import Home

TICKETS = Path(__file__).parents[2] / "examples" / "tickets.jsonl"
SPEC = {"model": "smollm2-135m", "data": str(TICKETS)}


@dataclass(frozen=True)
class Done:
    """What a command line came to."""

    args: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    made = Home(tmp_path_factory.mktemp("cli") / "home")
    yield made
    commands.daemon_stop(made)


@pytest.fixture
def tunesmith(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: the same code as the program, without its start-up."""
    monkeypatch.setenv("TUNESMITH_HOME", str(home.path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Done:
        code = cli.run(list(args))
        said = capfd.readouterr()
        return Done(args, code, said.out, said.err)

    return run


def program(home: Home, cwd: Path, *args: str) -> Done:
    """The command line as the program it is."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tunesmith.orchestrator.cli", *args],
        cwd=cwd,
        env={**os.environ, "TUNESMITH_HOME": str(home.path), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return Done(args, done.returncode, done.stdout, done.stderr)


def document(done: Done) -> dict[str, Any]:
    """The one document on stdout."""
    doc = json.loads(done.stdout)
    assert isinstance(doc, dict)
    assert doc["schema_version"] == 1
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    return doc


def written(folder: Path, doc: Any, name: str = "spec.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(doc) if not isinstance(doc, str) else doc)
    return name


# --- without a daemon ------------------------------------------------------------------------------------------------


def test_alone_it_prints_help(tunesmith: Run) -> None:
    done = tunesmith()
    assert done.returncode == 0
    assert "Commands:" in done.stdout
    named = {line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()}
    jobs = {"jobs", "show", "watch", "logs", "metrics", "answer", "edit", "approve", "reject", "cancel", "retry", "ask"}
    assert named == {"run", "plan", "check", *jobs, "backends", "models", "doctor", "schema", "daemon"}
    assert tunesmith("--version").stdout.startswith("tunesmith ")


def test_models_are_listed(tunesmith: Run) -> None:
    done = tunesmith("models", "--json")
    listed = {item["id"]: item for item in document(done)["models"]}
    assert done.returncode == 0
    assert listed["Qwen/Qwen3-0.6B"]["params"] == 596_049_920
    assert listed["Qwen/Qwen3-0.6B"]["context"] > 0
    assert {type(item["at_hand"]) for item in listed.values()} == {bool}
    assert "Qwen/Qwen3-0.6B" in tunesmith("models").stdout


def test_without_a_run_there_is_nothing_to_compare(tunesmith: Run) -> None:
    done = tunesmith("models", "--accuracy")
    assert (done.returncode, done.stderr) == (0, "")
    assert "No run has ended in this home yet." in done.stdout
    found = document(tunesmith("models", "--accuracy", "--json"))
    assert found["runs"] == []
    assert found["memory"]["runs"] == 0


BAD_SPECS: list[tuple[Any, str, str, str]] = [
    ({**SPEC, "train": {"epochs": -1}}, "spec.value", "train.epochs", "must be a number above 0, not -1"),
    ({**SPEC, "train": {"epoch": 3}}, "spec.unknown_key", "train.epoch", "did you mean train.epochs?"),
    ({**SPEC, "tunesmith": 2}, "spec.version", "tunesmith", "version 2"),
    ({**SPEC, "stages": []}, "spec.stages", "stages", "pipeline"),
    ({"data": str(TICKETS)}, "spec.missing", "model", "names no model"),
    ("", "spec.empty", "", "is empty"),
    ("model: [x\n", "spec.syntax", "line 2", "not valid YAML at line 2"),
    ("- a\n- b\n", "spec.shape", "", "must be a mapping"),
    ({**SPEC, "storage": "https://me:hunter2@host/x"}, "spec.secret", "storage", "token or a password"),
]


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(("spec", "code", "where", "said"), BAD_SPECS, ids=[item[1] + item[2] for item in BAD_SPECS])
def test_a_bad_spec_is_one_error_document_and_exit_2(
    tunesmith: Run, tmp_path: Path, command: str, spec: Any, code: str, where: str, said: str
) -> None:
    done = tunesmith(command, written(tmp_path, spec), "--json")
    error = document(done)["error"]
    assert done.returncode == error["exit_code"] == 2
    assert (error["code"], error["where"]) == (code, where)
    assert said in error["message"]
    assert "hunter2" not in done.stdout + done.stderr


def test_the_program_prints_one_document_and_words_elsewhere(home: Home, tmp_path: Path) -> None:
    assert document(program(home, tmp_path, "plan", written(tmp_path, {**SPEC, "tunesmith": 2}), "--json"))["error"]
    done = program(home, tmp_path, "plan", written(tmp_path, {**SPEC, "train": {"epoch": 3}}))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: train.epoch is not a key of a spec: did you mean train.epochs?\n")


DATA: list[tuple[str, str | None, str, str]] = [
    ("none.jsonl", None, "data.missing_file", "none.jsonl"),
    ("empty.jsonl", "", "data.empty", "empty.jsonl"),
    ("broken.jsonl", '{"question": "a", "answer": "b"}\n{"question": "a", \n', "data.broken_json", "line 2"),
    ("wrong.jsonl", '{"x": 1, "y": 2}\n' * 3, "data.wrong_columns", "columns"),
]


@pytest.mark.parametrize(("name", "text", "code", "said"), DATA, ids=[item[2] for item in DATA])
def test_bad_data_is_told_by_check_and_by_plan(
    tunesmith: Run, tmp_path: Path, name: str, text: str | None, code: str, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    done = tunesmith("check", name, "--for", "sft", "--json")
    doc = document(done)
    found = [doc["error"]] if "error" in doc else [item for item in doc["problems"] if item["level"] == "error"]
    assert done.returncode == 2
    assert code in [item["code"] for item in found]
    assert said in json.dumps(found)
    done = tunesmith("plan", f"SFT smollm2-135m on {name}", "--json")
    doc = document(done)
    assert done.returncode == 2
    assert code in [item["code"] for item in commands.errors_of(doc)] or doc.get("error", {}).get("code") == code


def test_check_says_what_data_is_ready_for(tunesmith: Run) -> None:
    done = tunesmith("check", str(TICKETS), "--json")
    doc = document(done)
    assert done.returncode == 0
    assert doc["ready"]["sft"] is True
    assert doc["ready"]["dpo"] is False
    assert tunesmith("check", str(TICKETS), "--for", "dpo").returncode == 2
    assert tunesmith("check", str(TICKETS), "--for", "distill").returncode == 0
    assert document(tunesmith("check", str(TICKETS), "--for", "ppo", "--json"))["error"]["code"] == "spec.value"
    assert document(tunesmith("check", str(TICKETS), "--set", "train.epochs=3", "--json"))["error"]["code"] == "usage"
    limited = document(tunesmith("check", str(TICKETS), "--set", "data.limit=7", "--json"))
    assert 7 in (limited["rows"], limited["used_rows"])


@pytest.mark.parametrize(
    ("request_text", "code"),
    [
        (f"SFT smollm2-135m on {TICKETS}", 0),
        ("Fine-tune Qwen3-0.6B on the dataset open-r1/codeforces-cots", 0),
        (f"Fine-tune on {TICKETS}", 3),
        (f"Fine-tune Qwen99-77B on {TICKETS}", 2),
        ("colourless green ideas sleep furiously", 2),
        ("How's my training job doing?", 0),
        ("Check if my-org/conversation-data works for SFT training.", 0),
    ],
)
def test_plan_exits_by_what_it_found(tunesmith: Run, request_text: str, code: int) -> None:
    done = tunesmith("plan", request_text, "--json")
    assert done.returncode == code, done.stdout
    doc = document(done)
    assert bool(doc["questions"]) == (code == 3)
    assert bool(commands.errors_of(doc)) == (code == 2)


def test_a_plan_stores_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "never")
    assert program(home, tmp_path, "plan", f"SFT smollm2-135m on {TICKETS}").returncode == 0
    assert not home.path.exists()


def test_the_yaml_of_a_plan_is_a_spec_with_the_same_hash(tunesmith: Run, tmp_path: Path) -> None:
    done = tunesmith("plan", f"SFT smollm2-135m on {TICKETS}, 20 steps", "--yaml")
    assert done.returncode == 0
    again = document(tunesmith("plan", written(tmp_path, done.stdout), "--json"))
    spec = again["stages"][0]["spec"]
    assert spec == yaml.safe_load(done.stdout)
    assert spec["train"]["max_steps"] == 20
    assert again["command"] == ["tunesmith", "run", "spec.yaml"]
    refused = tunesmith("plan", "colourless green ideas", "--yaml")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "Error" in refused.stderr or "error" in refused.stderr


def test_settings_reach_the_plan(tunesmith: Run) -> None:
    done = tunesmith(
        "plan", f"SFT smollm2-135m on {TICKETS}", "--set", "train.epochs=2", "--set", "adapter.rank=4", "--json"
    )
    spec = document(done)["stages"][0]["spec"]
    assert (spec["train"]["epochs"], spec["adapter"]["rank"]) == (2, 4)


@pytest.mark.parametrize(
    "args",
    [
        ["plan"],
        ["plan", "--bogus"],
        ["plan", "x", "--set"],
        ["nonsense"],
        ["pln"],
        ["fine-tune x on y"],
        ["plan", "x", "--json", "--yaml"],
        ["plan", "x", "--set", "novalue"],
        ["plan", ""],
        ["schema", "bogus"],
        ["approve"],
        ["jobs", "--limit", "0"],
    ],
)
def test_wrong_usage_is_exit_2_with_one_document(tunesmith: Run, args: list[str]) -> None:
    done = tunesmith(*args, "--json") if "--json" not in args and args[0] != "schema" else tunesmith(*args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    if "--json" in done.args:
        assert document(done)["error"]["message"]
    else:
        assert done.stdout == ""
        assert done.stderr


def test_a_mistyped_command_is_met_with_the_nearest(tunesmith: Run) -> None:
    assert "Did you mean plan?" in tunesmith("pln").stderr
    assert "tunesmith run" in tunesmith("fine-tune x on y").stderr


def test_schemas_are_printed(tunesmith: Run) -> None:
    for name in ("spec", "plan", "event"):
        assert json.loads(tunesmith("schema", name).stdout)["$schema"]


def test_hostile_text_reaches_no_terminal(tunesmith: Run) -> None:
    hostile = "SFT \x1b]52;c;AAAA\x07 smollm2-135m on \u202e/x.jsonl [/red]"
    for args in (["plan", hostile], ["check", hostile], ["plan", hostile, "--json"], ["show", hostile], [hostile]):
        done = tunesmith(*args)
        assert done.returncode == 2, args
        assert "\x1b" not in done.stdout + done.stderr
        assert "\u202e" not in done.stderr


def test_a_closed_pipe_is_no_crash(home: Home, tmp_path: Path) -> None:
    command = f'"{sys.executable}" -P -m tunesmith.orchestrator.cli schema plan | head -c 10'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert len(done.stdout) == 10
    assert done.stderr == ""


def test_no_traceback_unless_asked_for(home: Home, tmp_path: Path) -> None:
    code = (
        "from tunesmith.orchestrator import cli, commands\n"
        "def boom(*a, **k): raise RuntimeError('\\x1b[31mhf_' + 'a1' * 20)\n"
        "commands.request = boom\n"
        "cli.main(['plan', 'x', '--json'])"
    )
    for debug in ("", "1"):
        env = {**os.environ, "TUNESMITH_DEBUG": debug}
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == bool(debug)
        if not debug:
            error = document(Done((), done.returncode, done.stdout, done.stderr))["error"]
            assert error["code"] == "internal"
            assert "RuntimeError" in error["message"]
            assert "a1a1a1" not in done.stdout
            assert "\x1b" not in done.stdout


def test_the_daemon_status_without_a_daemon_is_exit_5(tmp_path: Path) -> None:
    done = program(Home(tmp_path / "home"), tmp_path, "daemon", "status", "--json")
    assert done.returncode == 5
    assert document(done)["error"]["code"] == "daemon.none"
    assert program(Home(tmp_path / "home"), tmp_path, "daemon", "stop").returncode == 0


def test_a_home_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = program(Home(tmp_path / "file"), tmp_path, "jobs", "--json")
    assert done.returncode == 1
    assert document(done)["error"]["code"].startswith("storage.")


def test_the_doctor_answers(tunesmith: Run) -> None:
    done = tunesmith("doctor", "--json")
    doc = document(done)
    assert done.returncode == (0 if doc["ready"] else 2)
    assert {"name", "status", "message", "fix"} <= set(doc["checks"][0])


# --- with a daemon ---------------------------------------------------------------------------------------------------


def test_a_job_without_a_terminal_waits_for_approval(tunesmith: Run) -> None:
    done = tunesmith("run", f"SFT smollm2-135m on {TICKETS}, 2 steps", "--json")
    doc = document(done)
    job = doc["id"]
    assert (done.returncode, doc["state"]) == (3, "awaiting_approval")
    assert job in done.stderr

    stale = tunesmith("approve", job, "--plan", "0" * 64, "--json")
    assert stale.returncode == document(stale)["error"]["exit_code"] == 6
    edited = document(tunesmith("edit", job, "--set", "train.max_steps=3", "--json"))
    assert edited["id"] == job
    assert tunesmith("watch", job).returncode == 3
    shown = document(tunesmith("show", "last", "--json"))
    assert shown["spec"]["train"]["max_steps"] == 3
    assert shown["plan_hash"] != doc["plan_hash"]
    old = tunesmith("approve", job, "--plan", doc["plan_hash"])
    assert old.returncode == 6
    assert tunesmith("edit", job, "--set", "train.max_stps=3").returncode == 2
    listed = document(tunesmith("jobs", "--state", "awaiting_approval", "--json"))
    assert job in [row["id"] for row in listed["jobs"]]
    lines = [json.loads(line) for line in tunesmith("watch", job, "--json").stdout.splitlines()]
    assert next(line["values"]["state"] for line in lines if line["kind"] == "state") == "planning"
    assert document(tunesmith("reject", job, "--json"))["state"] == "rejected"
    assert tunesmith("cancel", job).returncode == 2


def test_a_question_is_exit_3_and_can_be_answered(tunesmith: Run) -> None:
    done = tunesmith("run", f"Fine-tune on {TICKETS}, 2 steps", "--json")
    doc = document(done)
    assert (done.returncode, doc["state"]) == (3, "awaiting_input")
    assert doc["questions"][0]["field"] == "model.id"
    wrong = tunesmith("answer", doc["id"], "colour=blue", "--json")
    assert document(wrong)["error"]["exit_code"] == wrong.returncode == 2
    assert document(tunesmith("answer", doc["id"], "model.id=smollm2-135m", "--json"))["state"] == "planning"
    assert tunesmith("watch", doc["id"]).returncode == 3
    assert document(tunesmith("show", doc["id"], "--json"))["state"] == "awaiting_approval"
    assert document(tunesmith("cancel", doc["id"], "--json"))["id"] == doc["id"]


def test_bad_input_in_run_is_exit_2_and_leaves_nothing_half_made(tunesmith: Run, tmp_path: Path) -> None:
    done = tunesmith("run", f"SFT smollm2-135m on {tmp_path}/none.jsonl", "--yes", "--json")
    doc = document(done)
    assert done.returncode == doc["error"]["exit_code"] == 2
    assert doc["error"]["code"] == "data.missing_file"
    assert document(tunesmith("show", doc["job"], "--json"))["state"] == "failed"
    before = document(tunesmith("jobs", "--json"))["jobs"]
    for bad in ("colourless green ideas", f"Fine-tune Qwen99-77B on {TICKETS}"):
        assert tunesmith("run", bad, "--yes").returncode == 2
    assert document(tunesmith("jobs", "--json"))["jobs"] == before


def test_run_does_nothing_else_silently(tunesmith: Run) -> None:
    asked = tunesmith("run", "How's my training job doing?", "--json")
    assert asked.returncode == 0
    assert document(asked)["answer"]
    other = tunesmith("run", "Check if my-org/conversation-data works for SFT training.", "--json")
    error = document(other)["error"]
    assert other.returncode == 2
    assert error["code"] == "request.not_training"
    assert "tunesmith check my-org/conversation-data" in error["fix"]


def test_what_is_not_there_is_exit_2(tunesmith: Run) -> None:
    for args in (["show"], ["watch"], ["logs"], ["metrics"], ["approve"], ["reject"], ["cancel"], ["retry"]):
        done = tunesmith(*args, "j-zzzzzz", "--json")
        assert done.returncode == 2, args
        assert document(done)["error"]["code"] == "job.unknown"
    assert document(tunesmith("jobs", "--state", "sleeping", "--json"))["error"]["code"] == "job.state"


def test_backends_and_the_daemon_answer(tunesmith: Run, home: Home) -> None:
    assert document(tunesmith("backends", "--json"))["backends"][0]["name"] == "local"
    status = document(tunesmith("daemon", "status", "--json"))
    assert status["running"] is True
    assert status["home"] == str(home.path)
    assert document(tunesmith("daemon", "start", "--json"))["started"] is False
