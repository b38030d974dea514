"""Commands about this installation: doctor, schema, daemon."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from tunesmith.orchestrator.cli_output import emit, json_option, print_json
from tunesmith.orchestrator.errors import NotReady


def add_to(group: click.Group) -> None:
    """Register this module's commands."""
    for command in (doctor, schema, daemon):
        group.add_command(command)


@click.command()
@json_option
@click.pass_obj
def doctor(parts: Any, as_json: bool) -> int:
    """Check this machine and this installation."""
    from tunesmith.orchestrator.commands import document
    from tunesmith.orchestrator.doctor import examine

    doc = document(examine(parts.home()))

    def draw(doc: Any) -> Any:
        from tunesmith.orchestrator import views

        return views.doctor(doc)

    emit(doc, as_json, draw)
    return 0 if doc["ready"] else NotReady.exit_code


@click.command()
@click.argument("name", metavar="spec|plan|event")
def schema(name: str) -> None:
    """Print the JSON Schema of a spec, a plan or an event line."""
    from tunesmith.orchestrator import commands

    print_json(commands.schema(name))


@click.group()
def daemon() -> None:
    """The process that keeps jobs alive. Every command starts it when none runs."""


@daemon.command()
@json_option
@click.pass_obj
def start(parts: Any, as_json: bool) -> None:
    """Start the daemon in the background."""
    from tunesmith.orchestrator import commands

    emit(commands.daemon_start(parts.home()), as_json, _status)


@daemon.command()
@json_option
@click.pass_obj
def stop(parts: Any, as_json: bool) -> None:
    """End the daemon. Running jobs go on, and the next daemon finds them again."""
    from tunesmith.orchestrator import commands

    emit(commands.daemon_stop(parts.home()), as_json, _status)


@daemon.command()
@json_option
@click.pass_obj
def status(parts: Any, as_json: bool) -> None:
    """Say whether the daemon runs; exits 5 where it does not."""
    from tunesmith.orchestrator import commands

    emit(commands.daemon_status(parts.home()), as_json, _status)


@daemon.command(name="run")
@click.pass_obj
def run_daemon(parts: Any) -> None:
    """Run the daemon in the foreground, for systemd or a container."""
    home = parts.home().make()
    command = [sys.executable, "-P", "-m", "tunesmith.orchestrator.daemon", "run", "--home", str(home.path)]
    os.execv(sys.executable, command)  # noqa: S606  # this process becomes the daemon: signals reach it


def _status(doc: Any) -> Any:
    from tunesmith.orchestrator import figures, views

    if doc.get("stopped"):
        return views.text(f"The daemon has ended (pid {doc.get('pid')}). Running jobs go on.")
    if not doc.get("running"):
        return views.text("No daemon runs.")
    since = figures.duration(doc.get("uptime_seconds"))
    begun = "started" if doc.get("started") else f"up for {since}"
    return views.text(
        f"The daemon runs: pid {doc.get('pid')}, version {doc.get('version')}, {begun}, home {doc.get('home')}"
    )
