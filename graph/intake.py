"""From a sentence to partial spec documents, without a language model: what was understood, what not, what to ask.

`read` is pure: it looks words up in tables (vocabulary.py, surroundings.py, means.py, intents.py) and in the model
catalogue, touches no file and no network, and executes nothing. Cost: some ten milliseconds.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tunesmith.graph import intents, means, surroundings, vocabulary
from tunesmith.graph.compose import Fact, Made, Part, compose
from tunesmith.graph.intents import Intent
from tunesmith.graph.naming import mention
from tunesmith.graph.rules import Hit, Rule
from tunesmith.graph.sentence import Sentence, sentence
from tunesmith.orchestrator.nouns import Finding, Question, Resolved

MOST = 4000
_FILLER = """a an the this that these those my our your its it i we you he she they me us them i'd i'm i'll
    we'd let's lets please pls plz thanks thank hi hey hello ok okay so and or but then also just now too only both
    each all any some more want wants wanted would like need needs could can should shall will must may might do
    does did be is are was were am has have had been being get got go going make made let using use used with
    without within on in at of for from by as to into via over under up out about through per based if when where
    which what who whose there here than not no train training trained run runs running job jobs task start starting
    perform set help give take model models llm llms base data dataset datasets file files rows examples samples
    result results first second next last new good better really very quite actually basically simply something one
    ones it's that's learning language large small adapter adapters weights version fine tune tuned tuning output
    answer answers question questions respond response responses know able way order such other same machine hugging
    face huggingface hf hub column columns field fields method technique approach project experiment called named
    name every time long much many max maximum min total doesn't isn't work works check whether sure see tell
    convert export push upload quantize quantise quantization merge save evaluate eval report maintain during after
    before while until later again cost how why u w w/ thx uses calls followed finally afterwards"""
FILLER = frozenset(_FILLER.split())
RULES: tuple[Rule, ...] = (
    *vocabulary.METHOD_RULES,
    *vocabulary.ADAPTER_RULES,
    *vocabulary.LENGTH_RULES,
    *vocabulary.TRAIN_RULES,
    *vocabulary.TUNING_RULES,
    *means.LIMIT_RULES,
    *means.PLACE_RULES,
    *surroundings.EVAL_RULES,
    *surroundings.COLUMN_RULES,
    *means.DELIVER_RULES,
    *intents.VERB_RULES,
    *surroundings.REFERENCE_RULES,
    *surroundings.DATA_RULES,
)
_TOKEN = re.compile(r"[^\s,;()!?]+")
_WEAK = ("and", "+")
_THEN = re.compile(
    r"\b(?:and |, )?(?:then|followed by|after that|afterwards|next|second(?:ly)?|finally)\b|;|->|\+|→|\band\b"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A sentence, understood as far as it goes. `stages` are partial spec documents; `command` does what was asked."""

    intent: Intent
    stages: tuple[dict[str, Any], ...] = ()
    understood: tuple[Resolved, ...] = ()
    unread: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    findings: tuple[Finding, ...] = ()
    command: tuple[str, ...] = ()
    quick: bool = False


def read(text: str) -> Reading:
    """What a sentence asks for. Never raises for a text: what is wrong with it stands in `findings`."""
    if len(text) > MOST:
        return _refused(
            "request.too_long", f"The request has {len(text)} characters; {MOST} are read.", "Put it in a spec."
        )
    words = sentence(text)
    if not words.raw:
        return _refused("request.empty", "The request is empty.", _EXAMPLE)
    facts, unread = scan(words)
    intent = intents.find(words.marked, {fact.key for fact in facts})
    if intent is None:
        return _refused("request.not_understood", f"Nothing to do was found in {words.raw[:120]!r}.", _EXAMPLE, unread)
    parts = stages(words, facts) if intent == "train" else [Part(tuple(facts))]
    made = compose(parts, intent)
    command = command_for(intent, words, facts, made)
    quick = any(fact.key == "quick" and fact.value for fact in facts)
    findings = list(made.findings)
    if {fact.value for fact in facts if fact.key == "quick"} == {True, False}:
        findings.append(_contradiction("quick", "A quick test run and a run for production exclude each other."))
    if intent == "train" and any(one.isdigit() for word in unread for one in word):
        message = f"Not understood, and passed over: {', '.join(map(repr, unread))[:200]}."
        fix = "Say it in other words, or use --set KEY=VALUE."
        findings.append(Finding(level="warning", code="request.unread", message=message, fix=fix))
    if intent == "advice":
        findings.append(_advice(command, made.mapping))
    if intent == "export" and "export" in command and (target := _delivered(made.docs, "push")):
        fix = f"tunesmith push {command[2]} {target}"
        findings.append(Finding(level="info", code="export.push", message=f"Then push it to {target}.", fix=fix))
    return Reading(
        intent=intent,
        stages=made.docs,
        understood=made.understood,
        unread=(*unread, *made.unread) if intent in ("train", "export") else (),
        questions=made.questions if intent in ("train", "export") else _which_data(intent, made.docs),
        findings=tuple(findings),
        command=tuple(command),
        quick=quick,
    )


_EXAMPLE = 'Say what to train on what, for example: "Fine-tune Qwen3-0.6B on data.jsonl for 3 epochs".'


def _refused(code: str, message: str, fix: str, unread: Sequence[str] = ()) -> Reading:
    finding = Finding(level="error", code=code, message=message, fix=fix)
    return Reading(intent="train", findings=(finding,), unread=tuple(unread))


def _contradiction(where: str, message: str) -> Finding:
    return Finding(level="error", code="request.contradiction", message=message, where=where, fix="Say one of the two.")


# --- words to facts -------------------------------------------------------------------------------------------------


def scan(words: Sentence) -> tuple[list[Fact], list[str]]:
    """Every fact of a sentence in order, each word used once, and the words that no rule and no filler explains."""
    facts: list[Fact] = []
    unread: list[str] = []
    at = 0
    while match := _TOKEN.search(words.marked, at):
        at = match.start() + len(match[0]) - len(match[0].lstrip("-*.\"'#>[]"))
        if at >= match.end():
            continue
        found = mention(words, at)
        end, said = _longest(words, at, found.end if found else at)
        if said:
            facts += said
            at = end
        elif found:
            facts.append(Fact("model.id", found, found.words, at))
            at = found.end
        else:
            token = words.raw[at : match.end()].rstrip(".-\"':")
            if token and token.lower().removesuffix("'s") not in FILLER and any(one.isalnum() for one in token):
                unread.append(token)
            at = match.end()
    return facts, unread


def _longest(words: Sentence, at: int, least: int) -> tuple[int, list[Fact]]:
    """The rule that explains most characters from `at` on, beyond `least`: where it ends and what it says."""
    end, said = least, []
    for rule in RULES:
        match = rule.pattern.match(words.marked, at)
        if match is None or match.end() <= end:
            continue
        hit = Hit(words, match)
        if rule.key in ("data.name", "verb.object") and _is_ours(words, match.start("W"), rule.key):
            continue
        facts = rule.facts(hit)
        if facts:
            end = match.end()
            said = [Fact(key, value, hit.words, at) for key, value in facts.items()]
    return end, said


def _is_ours(words: Sentence, at: int, key: str) -> bool:
    """Whether the word at a place means something else than the name of a data set, or of a model nobody knows.

    A word after "fine-tune" is such a name only where it looks like one: "Foo-9000", not "assistants".
    """
    if mention(words, at) is not None:
        return True
    if key == "data.name":
        return False
    match = _TOKEN.match(words.raw, at)
    looks = match is not None and re.search(r"[\d_.-]|(?<=.)[A-Z]", match[0].rstrip(".-:"))
    return not looks or any(rule.pattern.match(words.marked, at) for rule in RULES if rule.key != "data.name")


def stages(words: Sentence, facts: Sequence[Fact]) -> list[Part]:
    """The facts of each stage: split at "then" (or a plain "and") wherever a method stands on both sides."""
    methods = [fact for fact in facts if fact.key == "method"]
    cuts = []
    for before, after in pairwise(methods):
        joins = list(_THEN.finditer(words.marked, before.start, after.start))
        strong = [match for match in joins if match[0] not in _WEAK]
        if strong or (joins and before.value != after.value):
            cuts.append((strong or joins)[-1].start())
    bounds = [0, *cuts, len(words.marked) + 1]
    return [Part(tuple(fact for fact in facts if low <= fact.start < high)) for low, high in pairwise(bounds)]


# --- what is asked --------------------------------------------------------------------------------------------------


def command_for(intent: Intent, words: Sentence, facts: Sequence[Fact], made: Made) -> list[str]:
    """The tunesmith command that does it, as separate arguments, never through a shell."""
    doc: dict[str, Any] = made.docs[0] if made.docs else {}
    job = next((str(fact.value).removeprefix("job:") for fact in facts if fact.key == "job"), "last")
    text = words.raw if not words.raw.startswith("-") else f" {words.raw}"
    if intent == "status":
        return ["tunesmith", "ask", *([job] if job != "last" else []), text]
    if control := intents.CONTROL.search(words.marked):
        verb = control["verb"]
        return ["tunesmith", intents.CONTROL_COMMANDS.get(verb, verb), job]
    if intent == "export":
        folder = next((str(source["source"]) for source in doc.get("data", []) if source.get("source")), None)
        return _export_command(job, doc.get("deliver", {}), folder)
    sources = [source for source in doc.get("data", []) if source.get("source")]
    mapping = made.mapping
    if intent == "check" or (intent == "advice" and (sources or mapping)):
        command = ["tunesmith", "check", str(sources[0]["source"]) if sources else "DATA"]
        method = doc.get("method") if any(fact.key.startswith("method") for fact in facts) or mapping else None
        command += ["--for", str(method)] if method else []
        command += ["--model", doc["model"]["id"]] if doc.get("model") else []
        return command + _mapping_sets(mapping)
    if intent == "advice":
        return ["tunesmith", "ask", text]
    planned = any(fact.key == "plan" for fact in facts) or bool(
        intents.WILL_TAKE.search(words.marked) or intents.FITS.match(words.marked)
    )
    return ["tunesmith", "plan" if planned else "run", text]


def _export_command(job: str, deliver: dict[str, Any], folder: str | None) -> list[str]:
    if deliver.get("push") and not deliver.get("gguf") and not deliver.get("merge"):
        return ["tunesmith", "push", job, str(deliver["push"])]
    command = ["tunesmith", "export", job]
    command += ["--merge"] if deliver.get("merge") else []
    command += ["--gguf", str(deliver["gguf"])] if deliver.get("gguf") else []
    command += ["--to", folder] if folder else []
    return command


def _mapping_sets(mapping: dict[str, Any] | None) -> list[str]:
    """The mapping as `--set` arguments."""
    if not mapping:
        return []
    sets = [f"data.mapping.kind={mapping['kind']}"]
    sets += [f"data.mapping.columns.{role}={column}" for role, column in mapping["columns"].items()]
    return [part for item in sets for part in ("--set", item)]


def _delivered(docs: Sequence[dict[str, Any]], key: str) -> Any:
    return docs[0].get("deliver", {}).get(key) if docs else None


def _which_data(intent: Intent, docs: Sequence[dict[str, Any]]) -> tuple[Question, ...]:
    if intent == "check" and not (docs and any(source.get("source") for source in docs[0].get("data", []))):
        return (Question(field="data.0.source", text="Which data? Give a file, a folder, a glob or a hub id."),)
    return ()


def _advice(command: Sequence[str], mapping: dict[str, Any] | None) -> Finding:
    shown = shlex.join(command)
    if mapping:
        told = ", ".join(f"{role} from {column!r}" for role, column in mapping["columns"].items())
        return Finding(
            level="info",
            code="advice.mapping",
            message=f"Map the columns, no file has to be rewritten: {told}.",
            where="data.mapping",
            fix=f"{shown} ; the same --set arguments work with run and plan.",
        )
    return Finding(level="info", code="advice.command", message="This command answers it.", fix=shown)
