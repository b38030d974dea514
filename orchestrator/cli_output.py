"""What every command prints through: one JSON document or a view on stdout, notices and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tunesmith.orchestrator.errors import TunesmithError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

F = TypeVar("F", bound=Callable[..., Any])

SCHEMA_VERSION = 1
PIPE_WIDTH = 120


def json_option(command: F) -> F:
    """The `--json` option, as the argument `as_json`."""
    help_text = "Print one JSON document on stdout and nothing else there."
    return click.option("--json", "as_json", is_flag=True, help=help_text)(command)


def emit(doc: Mapping[str, Any], as_json: bool, view: Callable[[Mapping[str, Any]], RenderableType]) -> None:
    """Print a document: as JSON, or drawn by `view`."""
    if as_json:
        print_json(doc)
    else:
        draw(view(doc))


def print_json(doc: Any, *, line: bool = False) -> None:
    """One JSON document; indented on a terminal. A `line` is always one line, and is flushed."""
    from tunesmith.orchestrator.events import finite

    terminal = sys.stdout.isatty()
    # On a terminal everything outside ASCII is escaped too: a string could hold C1 or bidi controls.
    ascii_only = terminal or (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    indent = 2 if terminal and not line else None
    text = json.dumps(finite(doc), ensure_ascii=ascii_only, indent=indent, allow_nan=False, default=str)
    sys.stdout.write(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") + "\n")
    if line:
        sys.stdout.flush()


def draw(view: RenderableType, *, err: bool = False) -> None:
    """Print a view on stdout, or on stderr."""
    console(err=err).print(view)


def console(*, err: bool = False) -> Console:
    """A rich console that takes no markup, no emoji codes and no highlighting; wide where it is not a terminal."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, markup=False, emoji=False, highlight=False, width=width)


def say(text: str) -> None:
    """A notice for people, on stderr."""
    from tunesmith.orchestrator.inert import inert

    click.echo(inert(text, lines=True), err=True)


def fail(error: TunesmithError, as_json: bool, **beside: Any) -> int:
    """Print an error: as the one document on stdout, or in words on stderr. Its exit code."""
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "error": error.to_doc(), **beside})
    else:
        from tunesmith.orchestrator.inert import inert

        head = f"Error: {error.message}"
        if error.where and error.where not in error.message:
            head += f" ({error.where})"
        for part in (head, error.why, error.fix):
            if part:
                click.echo(inert(part, lines=True, limit=4000), err=True)
    return error.exit_code
