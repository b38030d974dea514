"""Files that rewards come from: their bytes and hashes at any time, their functions in the job's process alone.

A user's code is read as bytes, hashed, and looked at as a syntax tree when a job is planned. It runs in `function`
only, from the very bytes whose hash was checked.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.rewards.entry import Entry
from tunesmith.orchestrator.errors import InputError

MOST_BYTES = 4 * 2**20


def content(path: str) -> bytes:
    """The bytes of a file. Raises InputError reward.file."""
    place = Path(path).expanduser()
    try:
        if not place.is_file():
            raise _missing(path, place)
        with place.open("rb") as handle:
            data = handle.read(MOST_BYTES + 1)
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror or type(error).__name__}") from error
    if len(data) > MOST_BYTES:
        raise _refused(path, f"is larger than {MOST_BYTES >> 20} MiB")
    return data


def sha256(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def named(entry: Entry, data: bytes) -> str:
    """The function that an entry means, by the syntax tree of its file: the one it names, or the only public one.

    Raises InputError: reward.file (no Python), reward.function (no such function, or several to choose from).
    """
    try:
        tree = ast.parse(data, filename=entry.path)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise _refused(entry.path, f"is no Python{line}: {reason[:200]}") from error
    functions = list(
        dict.fromkeys(
            node.name
            for node in _statements(tree.body)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_")
        )
    )
    if not entry.argument:
        if len(functions) == 1:
            return functions[0]
        listed = f"It defines {', '.join(functions[:20])}." if functions else "It defines no public function."
        fix = f"Name one: {entry.path}:{functions[0]}." if functions else "Define one, and name it: FILE.py:FUNCTION."
        raise InputError(
            f"{entry.path} does not say which function is the reward.",
            why=listed,
            fix=fix,
            code="reward.function",
            where="grpo.rewards",
        )
    names = set(_bound(tree.body))
    if entry.argument not in names and "*" not in names:
        near = difflib.get_close_matches(entry.argument, functions, n=1)
        raise InputError(
            f"{entry.path} has no function {entry.argument!r}.",
            why=f"It defines {', '.join(functions[:20])}." if functions else "It defines no public function.",
            fix=f"Did you mean {near[0]!r}?" if near else "Check the name behind the colon.",
            code="reward.function",
            where="grpo.rewards",
        )
    return entry.argument


def function(entry: Entry, data: bytes) -> Callable[..., Any]:
    """Run a user's file and give its function. In the job's process only.

    The file's folder is not put on the path: what runs is what was hashed. Raises InputError: reward.load (the file
    raised), reward.function, and what `named` raises.
    """
    name = named(entry, data)
    module = types.ModuleType(f"tunesmith_reward_{sha256(data)[:16]}")
    module.__file__ = str(Path(entry.path).expanduser())
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up
    try:
        code = compile(data, module.__file__, "exec", dont_inherit=True)
        exec(code, module.__dict__)  # noqa: S102  this is the reward that was approved
    except (Exception, SystemExit) as error:
        raise _raised(entry, module.__file__, error) from error
    found = getattr(module, name, None)
    if not callable(found) or isinstance(found, type):
        raise InputError(
            f"{entry.path}:{name} is no function.",
            why=f"It is a {'class' if isinstance(found, type) else type(found).__name__}.",
            fix="Name a function, or an instance of a class with __call__.",
            code="reward.function",
            where="grpo.rewards",
        )
    return found  # type: ignore[no-any-return]


def line_in(path: str, error: BaseException) -> int | None:
    """The last line of a user's file that an exception passed through."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module does, those inside if, try, with and loops too."""
    for node in body:
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Names that a module binds at its top; "*" where a star import may bind any."""
    for node in _statements(body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name))


def _missing(path: str, place: Path) -> InputError:
    beside = [item.name for item in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, beside, n=1)
    return InputError(
        f"There is no file {path}.",
        why="A reward comes from it.",
        fix=f"Did you mean {near[0]!r}?" if near else "Check the path; it begins where the request was made.",
        code="reward.file",
        where="grpo.rewards",
    )


def _refused(path: str, reason: str) -> InputError:
    return InputError(f"The reward file {path} {reason}.", code="reward.file", where="grpo.rewards")


def _raised(entry: Entry, path: str, error: BaseException) -> InputError:
    line = line_in(path, error)
    fix = "Run the file by itself with python to see it."
    if isinstance(error, ModuleNotFoundError):
        fix = (
            "Install the module where the job runs. Files beside the reward cannot be imported: only the approved file"
            " runs, so put what it needs into it."
        )
    return InputError(
        f"{entry.path} cannot be loaded.",
        why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}",
        fix=fix,
        code="reward.load",
        where=f"{entry.path}:{line}" if line else entry.path,
    )
