"""A chat template rendered without transformers, for plans: the same text as `apply_chat_template`, at a tenth of the
start-up. The kernel renders through the tokenizer itself; a test holds the two equal.

Templates come from model repositories: they run in jinja2's sandbox, with what transformers gives them and no more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.data.convert import Message
from tunesmith.orchestrator.errors import InputError

Render = Callable[[Sequence[Message], bool], str]

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a model's folder, or nothing where there is none that can be read."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def token_text(config: Mapping[str, Any], name: str) -> str | None:
    """A special token's text from tokenizer_config.json, where it may stand alone or inside an object."""
    value = config.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def source_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a model's folder: chat_template.jinja, else the one in tokenizer_config.json."""
    try:
        return (folder / "chat_template.jinja").read_text("utf-8")
    except (OSError, ValueError):
        found = config.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def renderer(folder: Path) -> Render | None:
    """A function (messages, add_generation_prompt) -> text, compiled once; None where the model has no template.

    The function raises InputError data.template_refused where the template will not render a conversation.
    """
    config = settings(folder)
    source = source_of(folder, config)
    if source is None:
        return None
    import jinja2

    try:
        template = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(
            "The model's chat template is not valid.", why=str(error), code="data.bad_template", where=str(folder)
        ) from error
    tokens = {name: text for name in _TOKENS if (text := token_text(config, name)) is not None}

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(
                template.render(
                    messages=turns, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens
                )
            )
        except Exception as error:  # a template is a program of strangers: it may raise anything
            raise refused(error) from error

    return render


def refused(error: Exception) -> InputError:
    """The typed error for a conversation that a chat template will not render."""
    return InputError(
        "The model's chat template refuses this conversation.",
        why=f"{type(error).__name__}: {str(error)[:300]}",
        fix="Give the conversation the turns that the model knows (some know no system turn), or choose another model.",
        code="data.template_refused",
    )


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):  # type: ignore[misc, unused-ignore]
        """`{% generation %}` marks answers in some templates; here it only lets them through."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
