"""One turn of a conversation in the shapes that data sets use: who speaks, and what."""

from __future__ import annotations

import json
from collections.abc import Mapping as Dict
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

TURNS_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")

_ROLE_KEYS = ("role", "from", "speaker")
_TEXT_KEYS = ("content", "value", "text")

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "customer", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "agent", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call",), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}


def role_of(name: str, roles: Dict[str, str]) -> str | None:
    """Our name of a role (system, user, assistant, tool), by the mapping's names first; None where nobody knows it."""
    return roles.get(name) or _ROLES.get(name.strip().lower())


def as_turn(value: Any) -> tuple[Any, Any] | None:
    """(role, content) of one turn as it stands, or None where the value is no turn."""
    if not isinstance(value, dict):
        return None
    for key in _ROLE_KEYS:
        if value.get(key) is not None:
            for text in _TEXT_KEYS:
                if text in value:
                    return value[key], value[text]
            return (value[key], None) if "tool_calls" in value else None
    return None


def as_turns(value: Any) -> list[tuple[Any, Any]] | None:
    """The turns of a conversation, also when it is JSON inside a text (as in CSV); None where it is none."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    found = [as_turn(item) for item in value]
    return None if None in found else found  # type: ignore[return-value]
