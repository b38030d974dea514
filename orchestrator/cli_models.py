"""The `models` command: what may be trained, and how good the estimates of past runs were."""

from __future__ import annotations

from typing import Any

import click

from tunesmith.orchestrator.cli_output import emit, json_option


def add_to(group: click.Group) -> None:
    """Register this module's command."""
    group.add_command(models)


@click.command()
@click.option("--accuracy", "as_accuracy", is_flag=True, help="Past runs: what was foretold against what came.")
@json_option
@click.pass_obj
def models(parts: Any, as_accuracy: bool, as_json: bool) -> None:
    """List the models that are known, or how good estimates were."""
    from tunesmith.orchestrator.commands import document

    if as_accuracy:
        from tunesmith.orchestrator.accuracy import accuracy

        emit(document(accuracy(parts.home())), as_json, _accuracy)
    else:
        emit(document({"models": parts.models()}), as_json, _models)


def _models(doc: Any) -> Any:
    from tunesmith.orchestrator import views_models

    return views_models.models(doc)


def _accuracy(doc: Any) -> Any:
    from tunesmith.orchestrator import views_models

    return views_models.accuracy(doc)
