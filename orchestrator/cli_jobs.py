"""Commands about jobs that are there: jobs, show, watch, logs, metrics, answer, edit, approve and the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from tunesmith.orchestrator.cli_output import emit, json_option, print_json
from tunesmith.orchestrator.errors import InputError

if TYPE_CHECKING:
    from tunesmith.orchestrator.client import Client

JOB = click.argument("job")


def add_to(group: click.Group) -> None:
    """Register this module's commands."""
    for command in (jobs, show, watch, logs, metrics, answer, edit, approve, reject, cancel, retry, ask, backends):
        group.add_command(command)


@contextlib.contextmanager
def daemon(parts: Any) -> Iterator[Client]:
    """A client of the daemon, which is started when none runs."""
    from tunesmith.orchestrator.client import Client, ensure_daemon

    home = parts.home()
    ensure_daemon(home)
    with Client(home) as client:
        yield client


def view(name: str) -> Callable[[Any], Any]:
    """A function of views.py, imported when it is needed."""

    def draw(doc: Any) -> Any:
        from tunesmith.orchestrator import views

        return getattr(views, name)(doc)

    return draw


@click.command()
@click.option("--state", metavar="STATE", help="Only jobs in this state.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@click.option("--before", metavar="JOB", help="Go on below this job.")
@json_option
@click.pass_obj
def jobs(parts: Any, state: str | None, limit: int, before: str | None, as_json: bool) -> None:
    """List jobs, newest first."""
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        emit(commands.jobs(client, limit=limit, before=before, state=state), as_json, view("jobs"))


@click.command()
@JOB
@json_option
@click.pass_obj
def show(parts: Any, job: str, as_json: bool) -> None:
    """Show one job: state, progress, results, findings. JOB is an id, a unique prefix, a name, or `last`."""
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        doc = commands.show(client, job)
        plan = None if as_json or doc.get("state") != "awaiting_approval" else client.plan(str(doc["id"]))
    if plan is not None:
        from tunesmith.orchestrator import views_plan

        emit(plan, False, views_plan.plan)
    emit(doc, as_json, view("show"))


@click.command()
@JOB
@json_option
@click.pass_obj
def watch(parts: Any, job: str, as_json: bool) -> int:
    """Follow a job until it ends, or waits for you. Ctrl-C stops watching, not the job."""
    from tunesmith.orchestrator.cli_run import follow

    with daemon(parts) as client:
        job = str(client.show(job)["id"])
        code, doc = follow(client, job, lines=as_json, restart=False)
        if not as_json and doc is not None:
            emit(doc, False, view("show"))
        return code


@click.command()
@JOB
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the attempt ends.")
@click.option("--attempt", type=click.IntRange(1), help="Which attempt; the newest when left out.")
@json_option
@click.pass_obj
def logs(parts: Any, job: str, following: bool, attempt: int | None, as_json: bool) -> int:
    """Print the log of a job's attempt."""
    from tunesmith.orchestrator import commands
    from tunesmith.orchestrator.inert import inert

    with daemon(parts) as client:
        pieces = commands.logs(client, job, attempt=attempt, follow=following)
        try:
            if as_json and not following:
                print_json(commands.document({"job": job, "attempt": attempt, "text": "".join(pieces)}))
                return 0
            for piece in pieces:
                if as_json:
                    print_json({"text": piece}, line=True)
                else:
                    click.echo(inert(piece.replace("\r\n", "\n").replace("\r", "\n"), lines=True), nl=False)
        except KeyboardInterrupt:
            return 130
    return 0


@click.command()
@JOB
@click.option("--key", metavar="KEY", help="Only this series, such as train/loss.")
@click.option("--attempt", metavar="N", help="Only this attempt; otherwise the newest wins for each step.")
@json_option
@click.pass_obj
def metrics(parts: Any, job: str, key: str | None, attempt: str | None, as_json: bool) -> None:
    """Print a job's metrics: loss, learning rate, speed and so on."""
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        emit(commands.metrics(client, job, key=key, attempt=attempt), as_json, view("metrics"))


@click.command()
@JOB
@click.argument("fields", nargs=-1, required=True, metavar="FIELD=VALUE...")
@json_option
@click.pass_obj
def answer(parts: Any, job: str, fields: Sequence[str], as_json: bool) -> None:
    """Answer what a plan asks.

    For example: tunesmith answer last model.id=Qwen/Qwen3-0.6B
    """
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        emit(commands.answer(client, job, fields), as_json, moved)


@click.command()
@JOB
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", required=True, help="Set a key of the spec.")
@json_option
@click.pass_obj
def edit(parts: Any, job: str, sets: Sequence[str], as_json: bool) -> None:
    """Change a job's spec. The plan is made anew, and an approval is void."""
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        emit(commands.edit(client, job, sets), as_json, moved)


@click.command()
@JOB
@click.option("--plan", "plan_hash", metavar="HASH", help="Only if the plan is still this one.")
@click.option("--usd", type=click.FloatRange(0), help="Spend at most so many dollars.")
@click.option("--hours", type=click.FloatRange(0, min_open=True), help="Run at most so many hours.")
@json_option
@click.pass_obj
def approve(parts: Any, job: str, plan_hash: str | None, usd: float | None, hours: float | None, as_json: bool) -> None:
    """Approve a job's plan; it is queued."""
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        emit(commands.approve(client, job, plan=plan_hash, usd=usd, hours=hours), as_json, moved)


@click.command()
@JOB
@json_option
@click.pass_obj
def reject(parts: Any, job: str, as_json: bool) -> None:
    """Turn a job's plan down."""
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        emit(commands.reject(client, job), as_json, moved)


@click.command()
@JOB
@json_option
@click.pass_obj
def cancel(parts: Any, job: str, as_json: bool) -> None:
    """End a job and everything that runs for it."""
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        emit(commands.cancel(client, job), as_json, moved)


@click.command()
@JOB
@json_option
@click.pass_obj
def retry(parts: Any, job: str, as_json: bool) -> None:
    """Run a job again that ended without a result."""
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        emit(commands.retry(client, job), as_json, moved)


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[JOB] QUESTION")
@json_option
@click.pass_obj
def ask(parts: Any, words: Sequence[str], as_json: bool) -> None:
    """Ask about a job, or about all of them.

    For example: tunesmith ask last "What is the loss now?"
    """
    from tunesmith.orchestrator import commands

    if len(words) > 2:
        raise InputError("Put the question in quotes.", fix='tunesmith ask last "What is the loss now?"', code="usage")
    job, question = (None, words[0]) if len(words) == 1 else (words[0], words[1])
    with daemon(parts) as client:
        emit(commands.ask(client, question, job), as_json, answered)


@click.command()
@json_option
@click.pass_obj
def backends(parts: Any, as_json: bool) -> None:
    """List where jobs can run, and why somewhere is not ready."""
    from tunesmith.orchestrator import commands

    with daemon(parts) as client:
        emit(commands.backends(client), as_json, view("backends"))


def moved(doc: Any) -> Any:
    """What a command did to a job, in a line."""
    from tunesmith.orchestrator import views

    line = views.text(f"{doc.get('id')} is ")
    line.append_text(views.state(doc.get("state", "")))
    return line.append(".")


def answered(doc: Any) -> Any:
    """The answer to a question."""
    from rich.text import Text

    from tunesmith.orchestrator.inert import inert

    return Text(inert(doc.get("answer", ""), lines=True, limit=4000))
