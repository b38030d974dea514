"""The command line: parses, calls commands.py, prints. The one place, beside the daemon, that puts the parts together.

Start-up is kept light: rich, httpx, pydantic and the planner are imported by the command that needs them.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from tunesmith.orchestrator import cli_home, cli_jobs, cli_models, cli_run
from tunesmith.orchestrator.cli_output import draw, emit, fail, json_option, say
from tunesmith.orchestrator.errors import InputError, TunesmithError

if TYPE_CHECKING:
    from tunesmith.orchestrator.home import Home
    from tunesmith.orchestrator.nouns import Plan, Request

PIPE_CLOSED = 141  # as a shell reports a program that SIGPIPE ended
INTERRUPTED = 130


class Commands(click.Group):
    """The group of all commands, in the order of a day's work; an unknown word is met with the nearest command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0] if args else ""
        if self.get_command(ctx, word) is None and word and not word.startswith("-"):
            if any(char.isspace() for char in word):
                ctx.fail('A request needs a command before it: tunesmith run "...", plan "..." or ask "...".')
            near = difflib.get_close_matches(word, list(self.commands), n=1)
            ctx.fail(f"There is no command {word[:40]!r}." + (f" Did you mean {near[0]}?" if near else ""))
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tunesmith", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Fine-tune language models on your own machine: say what you want, review the plan, watch it run."""
    ctx.obj = Parts()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that commands need and that the core does not import: planner, intake, data check."""

    def home(self) -> Home:
        """The home of this user."""
        from tunesmith.orchestrator.home import default_home

        return default_home()

    def plan(self, request: Request) -> Plan:
        """A plan made in this process. Nothing is stored."""
        from tunesmith.graph.planning import plan
        from tunesmith.orchestrator.backends import Backends

        home = self.home()
        return plan(request, devices=Backends(home.path).devices, cache=home.cache)

    def intent(self, request: Request) -> str:
        """What a request asks for: train, status, check, advice or export.

        Raises InputError for one that cannot be understood or carried out, before any job is made of it.
        """
        from tunesmith.graph.planning import intake
        from tunesmith.orchestrator.commands import finding_error
        from tunesmith.orchestrator.plain import plain

        draft = intake(request, {})
        for finding in draft.findings:
            if finding.level == "error":
                raise finding_error(plain(finding))
        return str(draft.intent)

    def check(self, data: str, *, method: str | None, model: str | None, sets: Sequence[str]) -> dict[str, Any]:
        """The `check` document of a data set, read in this process."""
        from pathlib import Path

        from tunesmith.executors.kernel import catalogue
        from tunesmith.executors.kernel.data import check
        from tunesmith.orchestrator.wire import read_spec

        spec = read_spec({"model": model or "model", "data": data, "method": method or "sft"}, sets)
        folder: Path | None = None
        if model is not None:
            folder = catalogue.at_hand(spec.model, self.home().cache)
            if folder is None and catalogue.find(model) is None:
                raise unknown_model(model, catalogue.nearest(model))
        doc = check(spec.data, method=method, tokenizer_folder=folder)
        if model is not None and folder is None:
            doc["problems"].append(no_tokenizer(model))
        return doc

    def models(self) -> list[dict[str, Any]]:
        """Every model of the catalogue, and whether its weights are on this machine."""
        from tunesmith.executors.kernel import catalogue, weights
        from tunesmith.orchestrator.nouns import ModelRef

        cache = self.home().cache
        return [
            {
                "id": facts.id,
                "aliases": list(facts.aliases),
                "family": facts.family,
                "params": facts.params,
                "active_params": facts.active_params,
                "context": facts.context,
                "instruct": facts.instruct,
                "licence": facts.licence,
                "at_hand": weights.at_hand(ModelRef(id=facts.id), cache) is not None,
            }
            for facts in catalogue.known()
        ]


def unknown_model(name: str, near: Sequence[str]) -> InputError:
    """The error for a model that is neither at hand nor in the catalogue."""
    return InputError(
        f"{name[:100]} is not a model that is known here.",
        fix=f"Did you mean {', '.join(near)}?" if near else "Give a folder, or a model id of the Hub.",
        code="model.unknown",
        where="model",
    )


def no_tokenizer(name: str) -> dict[str, str]:
    """The finding for tokens that were asked for and could not be counted."""
    return {
        "level": "warning",
        "code": "model.no_tokenizer",
        "message": f"Tokens were not counted: the tokenizer of {name[:100]} is not on this machine.",
        "where": "--model",
        "fix": "Give a folder that holds the model, or download it first.",
    }


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `run` and `plan` share."""
    for option in (
        click.option("--quick", is_flag=True, help="A short trial: few rows, few steps."),
        click.option(
            "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set a key of the spec (train.epochs=3)."
        ),
        click.option("--backend", metavar="B", help="Where to run: local, or a plug-in's name."),
        click.argument("target", metavar="REQUEST|SPEC.yaml"),
    ):
        command = option(command)
    return command


@cli.command()
@spec_options
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the resolved spec, which `tunesmith run` accepts.")
@json_option
@click.pass_obj
def plan(
    parts: Parts, target: str, backend: str | None, sets: Sequence[str], quick: bool, as_yaml: bool, as_json: bool
) -> int:
    """Show the plan of a request. Trains nothing, stores nothing."""
    from tunesmith.orchestrator import commands

    if as_yaml and as_json:
        raise click.UsageError("Give --json or --yaml, not both.")
    doc = commands.plan(commands.request(target, backend=backend, sets=sets, quick=quick), parts.plan)
    doc["command"] = [target if word == "SPEC.yaml" else word for word in doc["command"]]
    code = commands.plan_exit_code(doc)
    if as_yaml and code == 0 and doc.get("stages"):
        print_yaml(commands.resolved_specs(doc))
    elif as_yaml:
        from tunesmith.orchestrator import views_plan

        draw(views_plan.plan(doc), err=True)  # stdout stays empty: no half a spec ends in a file
    else:
        emit(doc, as_json, draw_plan)
        say_missing(doc)
    return code


def say_missing(doc: Mapping[str, Any]) -> None:
    """Say on stderr where a plan names a command that this version does not have."""
    word = (doc.get("command") or ["", ""])[1:2]
    if word and word[0] and word[0] not in cli.commands:
        say(f"This version has no `{word[0]}` command yet.")


def draw_plan(doc: Mapping[str, Any]) -> Any:
    """The view of a plan."""
    from tunesmith.orchestrator import views_plan

    return views_plan.plan(doc)


def print_yaml(specs: Sequence[Mapping[str, Any]]) -> None:
    """One spec, or several as the stages of a pipeline."""
    import yaml

    doc = specs[0] if len(specs) == 1 else {"tunesmith": 1, "stages": list(specs)}
    click.echo(yaml.safe_dump(doc, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110), nl=False)


@cli.command()
@click.argument("data")
@click.option(
    "--for", "method", metavar="METHOD", help="What it must be ready for: sft, dpo, grpo, kto, rloo, reward, distill."
)
@click.option("--model", metavar="M", help="Count tokens with this model's tokenizer.")
@click.option(
    "--set", "sets", multiple=True, metavar="data.KEY=VALUE", help="Set a key of the data source (data.split=test)."
)
@json_option
@click.pass_obj
def check(parts: Parts, data: str, method: str | None, model: str | None, sets: Sequence[str], as_json: bool) -> int:
    """Check whether data can be trained on, row by row."""
    from tunesmith.orchestrator.commands import document

    for item in sets:
        if not item.startswith("data."):
            raise click.UsageError(
                f"check takes settings of the data only, such as data.split=test, not {item[:60]!r}."
            )
    doc = document(parts.check(data, method=method, model=model, sets=sets))
    emit(doc, as_json, draw_check)
    ready = doc.get("ready") or {}
    return 0 if (ready.get(method) if method else any(ready.values())) else InputError.exit_code


def draw_check(doc: Mapping[str, Any]) -> Any:
    """The view of a data check."""
    from tunesmith.orchestrator import views_plan

    return views_plan.check(doc)


cli_run.add_to(cli, spec_options)
for module in (cli_jobs, cli_models, cli_home):
    module.add_to(cli)
_ORDER = "run plan check jobs show watch logs metrics answer edit approve reject cancel retry ask backends models"
cli.commands = {name: cli.commands[name] for name in [*_ORDER.split(), "doctor", "schema", "daemon"]}


def main(args: Sequence[str] | None = None) -> None:
    """The entry point: runs a command and exits with its code. No traceback reaches a user unless TUNESMITH_DEBUG=1."""
    sys.exit(run(list(sys.argv[1:] if args is None else args)))


def run(args: list[str]) -> int:
    """Run one command line; its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    before = args[: args.index("--")] if "--" in args else args
    try:
        return _run(args, "--json" in before)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _run(args: list[str], as_json: bool) -> int:
    try:
        code = cli.main(args=args, prog_name="tunesmith", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except TunesmithError as error:
        if debugging():
            raise
        return fail(error, as_json)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        return fail(usage(error), as_json)
    except (click.Abort, KeyboardInterrupt):
        return interrupted(as_json)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debugging():
            raise
        return fail(broken(error), as_json)


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("TUNESMITH_DEBUG", "") not in ("", "0")


def usage(error: click.ClickException) -> InputError:
    """A click error as ours."""
    ctx = getattr(error, "ctx", None)
    return InputError(
        error.format_message(),
        why=ctx.get_usage() if ctx is not None else "",
        fix=f"See: {ctx.command_path} --help" if ctx is not None else "",
        code="usage",
    )


def interrupted(as_json: bool) -> int:
    """Ctrl-C outside of following a job."""
    stopped = Interrupted("Interrupted.", code="interrupted")
    return fail(stopped, as_json)


class Interrupted(TunesmithError):
    """A person pressed Ctrl-C."""

    exit_code = INTERRUPTED
    default_code = "interrupted"


def broken(error: Exception) -> TunesmithError:
    """An error that nobody foresaw, in one line."""
    from tunesmith.orchestrator.inert import inert

    if isinstance(error, OSError) and error.strerror:
        from tunesmith.orchestrator.home import storage_error

        if error.filename is not None:
            from pathlib import Path

            return storage_error(error, Path(str(error.filename)))
    return TunesmithError(
        f"Something went wrong inside Tunesmith: {type(error).__name__}: {inert(error, limit=300)}",
        fix="Please report it, with the traceback that TUNESMITH_DEBUG=1 shows.",
        code="internal",
    )


if __name__ == "__main__":
    main()
