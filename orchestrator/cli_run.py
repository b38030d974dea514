"""The `run` command: submit, show the plan, ask, follow to the end; and following a job with live progress."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from tunesmith.orchestrator.cli_output import console, draw, emit, fail, json_option, print_json, say
from tunesmith.orchestrator.errors import InputError, TunesmithError, Waiting

if TYPE_CHECKING:
    from tunesmith.orchestrator.client import Client
    from tunesmith.orchestrator.nouns import Request
    from tunesmith.orchestrator.progress import Progress

LINE_SECONDS = 2.0  # between two lines of progress where there is no terminal
DETACHED = 130


def add_to(group: click.Group, spec_options: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Register `run`, with the options it shares with `plan`."""
    command = click.pass_obj(run)
    for option in (
        json_option,
        click.option("--detach", is_flag=True, help="Return once it is queued."),
        click.option("-y", "--yes", is_flag=True, help="Approve the plan, within the limits given."),
        spec_options,
    ):
        command = option(command)
    group.add_command(click.command()(command))


def run(
    parts: Any,
    target: str,
    backend: str | None,
    sets: Sequence[str],
    quick: bool,
    yes: bool,
    detach: bool,
    as_json: bool,
) -> int:
    """Train what a sentence or a spec says: plan, ask, follow.

    Shows the plan and asks; then follows the job to its end. Ctrl-C detaches, and the job goes on.
    """
    from tunesmith.orchestrator import commands
    from tunesmith.orchestrator.client import Client, ensure_daemon

    wanted = commands.request(target, backend=backend, sets=sets, quick=quick)
    intent = parts.intent(wanted)
    if intent not in ("train", "status"):
        raise not_training(intent, commands.plan(wanted, parts.plan))
    home = parts.home()
    ensure_daemon(home)
    with Client(home) as client:
        if intent == "status":
            from tunesmith.orchestrator.cli_jobs import answered

            emit(commands.ask(client, wanted.text or ""), as_json, answered)
            return 0
        return _train(client, wanted, yes=yes, detach=detach, as_json=as_json)


def not_training(intent: str, plan: Mapping[str, Any]) -> InputError:
    """The error for a sentence that asks for something else than training."""
    from tunesmith.orchestrator.views_plan import command

    word = {"check": "a data check", "advice": "advice", "export": "an export"}.get(intent, intent)
    return InputError(
        f"This asks for {word}; `run` only trains.",
        fix=f"Use: {command(plan)}" if plan.get("command") else "",
        code="request.not_training",
    )


def _train(client: Client, wanted: Request, *, yes: bool, detach: bool, as_json: bool) -> int:
    from tunesmith.orchestrator import commands

    approval = {"by": commands.person(), "usd": None, "hours": None} if yes else None
    job = str(commands.submit(client, wanted, approve=approval)["id"])
    say(f"{job}: planning")
    try:
        doc = _until_approved(client, job, yes=yes, as_json=as_json)
        if commands.refused(doc):
            error = commands.failure(doc)
            if error is not None:
                found = [item for item in doc.get("findings") or [] if item.get("level") != "info"]
                others = [item for item in found if item.get("message") != error.message]
                if not as_json and others:
                    from tunesmith.orchestrator import views

                    draw(views.findings(others), err=True)
                return fail(error, as_json, job=job)
        if commands.waits(doc):
            return _left_waiting(doc, job, as_json)
        if detach and commands.outcome(doc) == 0:
            say(f"{job} goes on by itself. Follow it: tunesmith watch {job}")
            emit(commands.document(doc), as_json, _shown)
            return 0
        code, last = follow(client, job, lines=False, restart=True)
    except KeyboardInterrupt:
        return detached(job, as_json)
    if last is None:
        return detached(job, as_json)
    emit(commands.document(last), as_json, _shown)
    return code


def _until_approved(client: Client, job: str, *, yes: bool, as_json: bool) -> Mapping[str, Any]:
    """The `show` document once the job is approved, has ended, or must be left to wait."""
    from tunesmith.orchestrator import commands, views

    terminal = sys.stdin.isatty() and sys.stderr.isatty()
    shown = ""
    while True:
        doc = commands.settle(client, job)
        state, plan_hash = str(doc.get("state")), str(doc.get("plan_hash") or "")
        if plan_hash != shown and not as_json and not commands.refused(doc):
            _draw_plan(client, job)
            shown = plan_hash
        if not commands.waits(doc):
            return doc
        if state == "awaiting_input" and terminal:
            if as_json:
                draw(views.questions(doc.get("questions") or []), err=True)
            fields = _answers(doc.get("questions") or [])
            if not fields:
                return doc
            try:
                commands.answer(client, job, fields)
            except InputError as error:
                fail(error, False)
        elif state == "awaiting_approval" and yes:
            # The approval given with the request covers the first plan; this one came after a question or a change.
            commands.approve(client, job, plan=plan_hash)
        elif state == "awaiting_approval" and terminal:
            if as_json:
                _draw_plan(client, job, err=True)
            if not _decide(client, job, plan_hash):
                return client.show(job)
        else:
            return doc


def _draw_plan(client: Client, job: str, *, err: bool = False) -> None:
    from tunesmith.orchestrator import views_plan

    plan = client.plan(job)
    if plan is not None:
        draw(views_plan.plan(plan), err=err)


def _answers(questions: Sequence[Mapping[str, Any]]) -> list[str]:
    """FIELD=VALUE for each question, asked at the terminal; an empty answer leaves them all open."""
    from tunesmith.orchestrator.inert import inert

    fields = []
    for item in questions:
        choices = [inert(choice, limit=80) for choice in item.get("choices") or []]
        hint = f" [{' | '.join(choices)}]" if choices else ""
        given = click.prompt(
            f"{inert(item.get('text', ''), limit=300)}{hint}", default="", show_default=False, err=True
        )
        if not given.strip():
            return []
        fields.append(f"{item.get('field')}={given.strip()}")
    return fields


def _decide(client: Client, job: str, plan_hash: str) -> bool:
    """Ask for a decision and carry it out. False where the job is left as it is. Enter never approves."""
    from tunesmith.orchestrator import commands

    said = click.prompt("Start? [y]es, [n]o, [e]dit, Enter to decide later", default="", show_default=False, err=True)
    word = said.strip().lower()
    if word in ("y", "yes"):
        commands.approve(client, job, plan=plan_hash)
        return True
    if word in ("n", "no"):
        commands.reject(client, job)
        return False
    if word in ("e", "edit"):
        change = click.prompt("KEY=VALUE (train.epochs=3)", default="", show_default=False, err=True).strip()
        try:
            if change:
                commands.edit(client, job, [change])
        except InputError as error:
            fail(error, False)
        return True
    return False


def _left_waiting(doc: Mapping[str, Any], job: str, as_json: bool) -> int:
    from tunesmith.orchestrator import commands

    if as_json:
        print_json(commands.document(doc))
    if doc.get("state") == "awaiting_approval":
        say(f"{job} waits for approval. Start it: tunesmith approve {job}")
    else:
        say(f"{job} waits for an answer: tunesmith answer {job} FIELD=VALUE")
    return Waiting.exit_code


def _shown(doc: Mapping[str, Any]) -> Any:
    from tunesmith.orchestrator import views

    return views.show(doc)


def detached(job: str, as_json: bool) -> int:
    """Say that Ctrl-C ended only the watching."""
    message = f"Detached from {job}; the job goes on."
    fix = f"Follow it: tunesmith watch {job}. End it: tunesmith cancel {job}"
    stopped = Detached(message, fix=fix, code="interrupted")
    if as_json:
        return fail(stopped, True, job=job)
    say(f"\n{message}\n{fix}")
    return DETACHED


class Detached(TunesmithError):
    """A person pressed Ctrl-C while following a job."""

    exit_code = DETACHED
    default_code = "interrupted"


# --- following -----------------------------------------------------------------------------------------------------


def follow(client: Client, job: str, *, lines: bool, restart: bool) -> tuple[int, Mapping[str, Any] | None]:
    """Follow a job to its end, or to where it waits: its exit code and `show` document (None after Ctrl-C).

    With `lines` every event is a JSON line on stdout; otherwise progress is drawn on stderr.
    """
    from tunesmith.orchestrator import commands
    from tunesmith.orchestrator.ctrlc import CtrlC

    try:
        with CtrlC() as ctrl_c:
            events = ctrl_c.each(commands.watch(client, job, restart=restart, notice=say))
            if lines:
                for event in events:
                    print_json(event, line=True)
            elif sys.stderr.isatty():
                _draw_live(events)
            else:
                _print_lines(events)
    except KeyboardInterrupt:
        if lines:
            say(f"Detached from {job}; the job goes on.")
        else:
            detached(job, False)
        return DETACHED, None
    doc = client.show(job)
    if commands.waits(doc):
        say(f"{job} waits for you: tunesmith show {job}")
    return commands.outcome(doc), doc


def _draw_live(events: Iterator[Mapping[str, Any]]) -> None:
    from rich.live import Live

    from tunesmith.orchestrator import views
    from tunesmith.orchestrator.progress import Progress

    progress = Progress()
    with Live(console=console(err=True), refresh_per_second=4, transient=True) as live:
        for event in events:
            progress.apply(event)
            live.update(views.live(progress))


def _print_lines(events: Iterator[Mapping[str, Any]]) -> None:
    """A line when the state changes, and otherwise one every other second at most; the last is never left out."""
    from tunesmith.orchestrator.progress import Progress

    progress = Progress()
    said, printed, before = "", 0.0, ""
    with contextlib.closing(_Last()) as last:
        for event in events:
            progress.apply(event)
            if progress.state != before:
                before = progress.state
                last.flush()
                say(before.replace("_", " "))
            line = progress_line(progress)
            if not line or line == said:
                continue
            said = line
            if time.monotonic() - printed >= LINE_SECONDS:
                printed = time.monotonic()
                last.drop()
                say(line)
            else:
                last.keep(line)


class _Last:
    """A line held back, printed when nothing newer takes its place."""

    def __init__(self) -> None:
        self._line = ""

    def keep(self, line: str) -> None:
        self._line = line

    def drop(self) -> None:
        self._line = ""

    def flush(self) -> None:
        if self._line:
            say(self._line)
        self._line = ""

    close = flush


def progress_line(progress: Progress) -> str:
    """Progress in one line: step, loss, speed, time left."""
    from tunesmith.orchestrator import figures

    said = []
    if progress.phase and progress.phase != "training":
        unit = f" {progress.unit}" if progress.unit else ""
        done = f" {figures.count(progress.done)}/{figures.count(progress.of)}{unit}" if progress.of else ""
        said.append(progress.phase + done)
    elif progress.step is not None:
        said.append(f"step {progress.step}" + (f"/{progress.total}" if progress.total else ""))
    if progress.step is not None and progress.loss is not None:
        said.append(f"loss {figures.amount(progress.loss)}")
    if said and progress.tokens_per_second:
        said.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if said and progress.eta_seconds is not None:
        said.append(f"{figures.duration(progress.eta_seconds)} left")
    return "   ".join(said)
