"""Data sets of the Hugging Face Hub, through `datasets`, and only where the Hub can be reached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tunesmith.orchestrator.errors import InputError, TunesmithError
from tunesmith.orchestrator.nouns import DataSource

PATIENCE = 3.0  # seconds for the Hub to answer; a name server that is not there may take much longer to say so


def records(source: DataSource, *, offline: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream (where, values) of a data set on the Hub; where is "owner/name:split row 17", counting from 1.

    Raises InputError: data.unreachable, data.hub (the Hub answered, and it was a refusal).
    """
    reach(source.source, offline=offline)
    try:
        import datasets

        rows = datasets.load_dataset(source.source, source.config, split=source.split, streaming=True)
        for number, values in enumerate(rows, 1):
            yield f"{source.source}:{source.split} row {number}", dict(values)
    except TunesmithError:
        raise
    except Exception as error:
        raise _refused(source, error) from error


def rows(source: DataSource, *, offline: bool) -> int | None:
    """How many rows the Hub says a split has, or None where it does not say."""
    reach(source.source, offline=offline)
    try:
        import datasets

        about = datasets.load_dataset_builder(source.source, source.config).info
    except Exception as error:
        raise _refused(source, error) from error
    split = (about.splits or {}).get(source.split)
    return int(split.num_examples) if split is not None else None


def commit(source: DataSource, *, offline: bool) -> str:
    """The commit that names a data set's content now."""
    reach(source.source, offline=offline)
    try:
        import huggingface_hub

        return str(huggingface_hub.dataset_info(source.source).sha)
    except Exception as error:
        raise _refused(source, error) from error


def reach(name: str, *, offline: bool) -> None:
    """Raise InputError data.unreachable unless the Hub answers. Proxies of the environment are honoured."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if offline:
        raise _unreachable(name, "This machine was told not to ask the network.")
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise _unreachable(name, f"{key} is set.")
    reason = _ask(os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"))
    if reason is not None:
        raise _unreachable(name, reason)


def _ask(endpoint: str) -> str | None:
    """Why the endpoint does not answer, or None. In a thread, because looking up a name knows no time-out."""
    import threading
    import urllib.error
    import urllib.request

    answer: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310
            with urllib.request.urlopen(request, timeout=PATIENCE):  # noqa: S310
                answer.append(None)
        except urllib.error.HTTPError:
            answer.append(None)  # it answered
        except urllib.error.URLError as error:
            answer.append(f"{endpoint} does not answer: {error.reason}.")
        except (OSError, ValueError) as error:
            answer.append(f"{endpoint} does not answer: {error}.")

    thread = threading.Thread(target=ask, name="reach-hub", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answer[0] if answer else f"{endpoint} did not answer within {PATIENCE:g} seconds."


def _unreachable(name: str, why: str) -> InputError:
    return InputError(
        f"The data set {name} could not be read from here.",
        why=f"It is no file on this machine, and the Hub is out of reach: {why}",
        fix="Connect to the network, or name a local file or folder that holds the rows.",
        code="data.unreachable",
        where=name,
    )


def _refused(source: DataSource, error: Exception) -> InputError:
    lines = str(error).strip().splitlines()
    return InputError(
        f"The Hub did not give {source.source} (config {source.config or 'default'}, split {source.split}).",
        why=f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}",
        fix="Check the id, data.config and data.split; a private or gated data set needs `hf auth login`.",
        code="data.hub",
        where=source.source,
    )
