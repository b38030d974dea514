"""What runs in a guard's child: mathematics, patterns, JSON schemas, and the tasks of Reasoning Gym.

Each entry of WORK loads its library once and gives a function of one item. Nothing heavy is imported before that.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tunesmith.executors.kernel.rewards.built_in import BROKEN, json_in
from tunesmith.orchestrator.errors import InputError

# Of one item. Where that gives a function, the rest of the work is to call it, within a time limit of its own.
Work = Callable[[dict[str, Any]], Any]

MOST_MATHS = 4000  # characters of mathematics that are looked at
PACKAGES = {"boxed": "math-verify", "json": "jsonschema", "reasoning-gym": "reasoning-gym"}
EXTRAS = {"boxed": "rewards", "json": "rewards", "reasoning-gym": "gym"}

# Tasks of Reasoning Gym whose scorers hand a model's answer to Python's eval: there it may only be a literal.
_LITERALS = ("spiral_matrix", "string_insertion", "binary_matrix", "n_queens", "number_sorting")
# Those that hand it to SymPy's parser, which is eval too: there it may only be mathematics.
_EXPRESSIONS = ("simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown")
_NAMES = frozenset(
    {
        *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"),
        *("atanh", "exp", "log", "ln", "sqrt", "Abs", "abs", "sign", "pi", "oo"),
    }
)
_MATHS = re.compile(r"[A-Za-z0-9\s+\-*/^().,]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_VARIABLE = re.compile(r"[A-Za-z][0-9]{0,3}")  # x, C1; the e5 of 1e5
_ATTRIBUTE = re.compile(r"[A-Za-z][A-Za-z0-9]*\s*\.|\.\s*[A-Za-z]")
_TOWER = re.compile(r"(?:\*\*|\^)[\s(+-]*(?:\d{4,}|[\d.]+\s*(?:\*\*|\^))")  # 9**9**9, 2**9999


def missing(kind: str) -> InputError:
    """The error for a package that is not installed, with the command that installs it."""
    package = PACKAGES[kind]
    return InputError(
        f"The reward {kind} needs the package {package}, which is not installed.",
        fix=f"pip install {package} (or the extra: pip install 'tunesmith[{EXTRAS[kind]}]')",
        code="reward.package",
        where="grpo.rewards",
    )


def boxed(setup: dict[str, Any]) -> Work:
    """{"said", "wanted"} -> whether both are the same mathematics; None where the wanted one cannot be read."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise missing("boxed") from error
    options = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    @lru_cache(maxsize=512)
    def read(text: str) -> Any:
        # Its own time-outs are off: the alarm of this process is what interrupts it.
        return parse(text, options, parsing_timeout=None)

    def work(item: dict[str, Any]) -> float | None:
        wanted = read(f"\\boxed{{{item['wanted']}}}")
        if not wanted:
            return None
        said = read(f"\\boxed{{{item['said']}}}")
        return float(bool(said) and bool(verify(wanted, said, timeout_seconds=None)))

    return work


def regex(setup: dict[str, Any]) -> Work:
    """{"text"} -> whether the pattern of the setup is found in it."""
    pattern = re.compile(setup["pattern"])
    return lambda item: float(pattern.search(item["text"]) is not None)


def schema(setup: dict[str, Any]) -> Work:
    """{"text"} -> whether it is JSON that fits the schema of the setup. References elsewhere are never fetched."""
    try:
        import jsonschema
        import referencing
    except ImportError as error:
        raise missing("json") from error
    document = setup["schema"]
    try:
        kind = jsonschema.validators.validator_for(document)
        kind.check_schema(document)
    except (jsonschema.SchemaError, AttributeError, TypeError) as error:
        raise InputError(
            "The JSON schema of a reward is none.",
            why=str(getattr(error, "message", error))[:300],
            code="reward.schema",
            where="grpo.rewards",
        ) from error
    validator = kind(document, registry=referencing.Registry())

    def work(item: dict[str, Any]) -> float:
        value = json_in(item["text"])
        return 0.0 if value is BROKEN else float(validator.is_valid(value))

    return work


def gym(setup: dict[str, Any]) -> Work:
    """Items of three kinds, by "do": "about" a task, its "rows", or the score ("do" left out) of an "answer".

    - {"do": "about", "task", "config"} -> {} or what is wrong: {"unknown": names} or {"refused": reason}
    - {"do": "rows", "task", "config", "from", "to"} -> [{"question", "answer", "metadata"}, ...]
    - {"answer", "task", "config", "index"} or {"answer", "task", "entry"} -> the scorer's number
    """
    import warnings

    warnings.simplefilter("ignore")
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise missing("reasoning-gym") from error

    @lru_cache(maxsize=16)
    def dataset(task: str, config: str) -> Any:
        made = reasoning_gym.create_dataset(task, **json.loads(config))
        if task in _LITERALS:
            import sys

            vars(sys.modules[type(made).__module__])["eval"] = ast.literal_eval
        return made

    @lru_cache(maxsize=256)
    def entry(task: str, config: str, index: int) -> Any:
        return dataset(task, config)[index]

    def about(task: str, config: str) -> dict[str, Any]:
        if task not in DATASETS:
            return {"unknown": difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.5), "known": sorted(DATASETS)}
        keys = [item.name for item in dataclasses.fields(DATASETS[task][1])]
        odd = [key for key in json.loads(config) if key not in keys]
        if odd:
            return {"refused": f"It has no setting {odd[0]!r}; its settings are {', '.join(keys)}."}
        try:
            dataset(task, config)
        except Exception as error:  # whatever a task says of its settings
            return {"refused": f"{type(error).__name__}: {error}"[:300]}
        return {}

    def work(item: dict[str, Any]) -> Any:
        task, config = item["task"], item.get("config", "{}")
        if item.get("do") == "about":
            return about(task, config)
        if item.get("do") == "rows":
            return [_plain(dataset(task, config)[index]) for index in range(item["from"], item["to"])]
        answer = item["answer"]
        if task in _EXPRESSIONS and not is_maths(answer):
            return 0.0
        known = item["entry"] if "entry" in item else entry(task, config, item["index"])
        made = dataset(task, config)
        return lambda: float(made.score_answer(answer, known))

    return work


def is_maths(text: str) -> bool:
    """Whether a text is numbers, operators, variables and known functions only: nothing that could run.

    Every name must be known, wherever it stands: `(eval)(x)` is a call too. Usual towers of powers are refused as well;
    what else may take for ever is left to the limits on time and memory.
    """
    if len(text) > MOST_MATHS or not _MATHS.fullmatch(text) or _ATTRIBUTE.search(text) or _TOWER.search(text):
        return False
    return all(name in _NAMES or _VARIABLE.fullmatch(name) for name in _NAME.findall(text))


def _plain(made: dict[str, Any]) -> dict[str, Any]:
    """An entry as JSON-ready values: what is no JSON becomes its text."""
    return {
        "question": str(made["question"]),
        "answer": made["answer"] if made["answer"] is None else str(made["answer"]),
        "metadata": json.loads(json.dumps(made.get("metadata") or {}, default=str, skipkeys=True)),
    }


WORK: dict[str, Callable[[dict[str, Any]], Work]] = {
    "boxed": boxed,
    "regex": regex,
    "json": schema,
    "reasoning-gym": gym,
}
