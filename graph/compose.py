"""From the facts of a sentence to spec documents: who is model and who is data, what contradicts, what is missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.executors.kernel import catalogue
from tunesmith.graph.means import GGUF_KINDS
from tunesmith.graph.naming import Mention, choices, looks_like_model
from tunesmith.graph.sentence import Ref
from tunesmith.graph.surroundings import ROLES, role_of
from tunesmith.orchestrator.nouns import Finding, Question, Resolved
from tunesmith.orchestrator.plain import plain

SHARED = ("backend", "hardware", "limits.usd", "limits.hours", "limits.memory_gb", "name")
SUGGESTED = ("smollm2-135m", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen3-4B")
KINDS = (
    ({"chosen", "rejected"}, "preference"),
    ({"label"}, "unpaired"),
    ({"messages"}, "messages"),
    ({"prompt", "completion"}, "prompt-completion"),
    ({"completion"}, "prompt-completion"),
    ({"text"}, "text"),
    ({"prompt"}, "prompt-only"),
)
SANE = {
    "train.learning_rate": 1.0,
    "train.epochs": 1000,
    "train.max_steps": 10_000_000,
    "train.max_length": 10_000_000,
    "train.effective_batch": 1_000_000,
    "train.micro_batch": 100_000,
    "limits.usd": 10_000_000,
    "limits.hours": 24 * 365,
    "limits.memory_gb": 1_000_000,
}


@dataclass(frozen=True, slots=True)
class Fact:
    """What words of a sentence say: `key` is a spec key, or one that only compose and intake read."""

    key: str
    value: Any
    words: str
    start: int


@dataclass(frozen=True, slots=True)
class Part:
    """The facts of one stage."""

    facts: tuple[Fact, ...]

    def all(self, *keys: str) -> list[Fact]:
        """Every fact of these keys, in order."""
        return [fact for fact in self.facts if fact.key in keys]


@dataclass(slots=True)
class Made:
    """Documents under construction, with all that was found on the way."""

    docs: tuple[dict[str, Any], ...] = ()
    understood: tuple[Resolved, ...] = ()
    unread: list[str] = field(default_factory=list)
    questions: tuple[Question, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    told: dict[tuple[int, str], Resolved] = field(default_factory=dict)
    mapping: dict[str, Any] | None = None

    def tell(self, stage: int, key: str, value: Any, words: str) -> None:
        """Note what was understood, and behind which words."""
        self.told.setdefault((stage, key), Resolved(key=key, value=plain(value), why=words))

    def error(self, code: str, message: str, where: str = "", fix: str = "") -> None:
        """An error finding."""
        self.findings.append(Finding(level="error", code=code, message=message, where=where, fix=fix))

    def warn(self, code: str, message: str, where: str = "", fix: str = "") -> None:
        """A warning finding."""
        self.findings.append(Finding(level="warning", code=code, message=message, where=where, fix=fix))


def compose(parts: Sequence[Part], intent: str) -> Made:
    """One partial spec document for each part, in order."""
    made = Made()
    docs = [_stage(made, index, part, intent) for index, part in enumerate(parts)]
    if len(docs) > 1:
        _share(made, docs)
    questions: list[Question] = []
    if intent == "train" and not any(finding.code == "model.unknown" for finding in made.findings):
        questions += _missing(docs)
    asked = {question.field for question in made.questions}
    made.questions = (*made.questions, *(question for question in questions if question.field not in asked))
    made.docs = tuple(docs)
    several = len(docs) > 1
    made.understood = tuple(
        Resolved(key=f"stages.{stage}.{key}" if several else key, value=told.value, why=told.why)
        for (stage, key), told in made.told.items()
    )
    return made


def _share(made: Made, docs: list[dict[str, Any]]) -> None:
    """What holds for the whole pipeline goes to every stage; a later stage trains the result of the one before."""
    late = next((doc["model"] for doc in docs if "model" in doc), None)
    for index, doc in enumerate(docs):
        if index == 0 and "model" not in doc and late is not None:
            doc["model"] = late
        elif index > 0 and doc.get("model") in (None, docs[0].get("model"), {"id": "job:last"}):
            doc["model"] = {"id": f"stage:{index}"}
            made.tell(index, "model.id", f"stage:{index}", "the result of the stage before")
    for key in SHARED:
        values = [found for doc in docs if (found := _get(doc, key)) is not None]
        for doc in docs:
            if values and _get(doc, key) is None:
                _put(doc, key, values[0])
    for doc in docs[:-1]:
        deliver = doc.pop("deliver", None)
        if deliver and "deliver" not in docs[-1]:
            docs[-1]["deliver"] = deliver


def _missing(docs: Sequence[dict[str, Any]]) -> list[Question]:
    questions = []
    for index, doc in enumerate(docs):
        prefix = f"stages.{index}." if len(docs) > 1 else ""
        for_method = f" for {doc['method'].upper()}" if len(docs) > 1 else ""
        if "model" not in doc:
            questions.append(
                Question(
                    field=f"{prefix}model.id", text=f"Which model should be trained{for_method}?", choices=SUGGESTED
                )
            )
        if not any(source.get("source") for source in doc.get("data", [])):
            text = f"Which data should it be trained on{for_method}? Give a file, a folder, a glob or a hub id."
            questions.append(Question(field=f"{prefix}data.0.source", text=text))
    return questions


def _stage(made: Made, index: int, part: Part, intent: str) -> dict[str, Any]:
    doc: dict[str, Any] = {}
    said: dict[str, Fact] = {}
    for fact in part.facts:
        if "." not in fact.key and fact.key not in ("backend", "hardware", "name", "batch", "accumulate", "beta"):
            continue
        if fact.key.split(".")[0] in (
            "columns",
            "ref",
            "verb",
            "method",
            "gguf",
            "push",
            "job",
            "model",
        ) or fact.key in (
            "data.source",
            "data.name",
            "data.full",
        ):
            continue
        before = said.get(fact.key)
        if before is not None and fact.key == "hardware" and {"gpus": 1} in (before.value, fact.value):
            said[fact.key] = before if fact.value == {"gpus": 1} else fact  # a card by its name is one GPU
        elif before is not None and before.value != fact.value:
            made.error(
                "request.contradiction",
                f"{before.words!r} and {fact.words!r} say different things.",
                fact.key,
                "Say one of the two.",
            )
        said.setdefault(fact.key, fact)
    doc["method"] = _method(made, index, part)
    _model_and_data(made, index, part, doc, intent)
    _batch(said, doc)
    for fact in said.values():
        if fact.key.startswith("data.") or fact.key in ("batch", "accumulate", "distill.teacher"):
            continue
        key = _key_for(doc["method"], fact.key)
        if key == "eval.tasks":
            _put(doc, key, list(fact.value))
        else:
            _put(doc, key, fact.value)
        made.tell(index, key, _get(doc, key), fact.words)
    for name in ("batch", "accumulate"):
        if name in said:
            made.tell(index, "train.effective_batch", _get(doc, "train.effective_batch"), said[name].words)
    _sources(made, index, part, said, doc)
    _deliveries(made, index, part, doc)
    _contradictions(made, part, said, doc)
    _odd_values(made, said)
    for fact in part.all("unsupported", "warmup"):
        made.unread.append(fact.words)
        key = "train.warmup_steps" if fact.key == "warmup" else fact.value
        fix = (
            "Give a number of steps instead, as in --set train.warmup_steps=10."
            if fact.key == "warmup"
            else f"Leave it out, or set {key}."
        )
        made.warn("request.unsupported", f"{fact.words!r} cannot be set here and is passed over.", key, fix)
    return doc


def _key_for(method: str, key: str) -> str:
    """Where a method reads what is called alike in several: beta, the temperature, the length of completions."""
    if key == "beta":
        section = {"rloo": "grpo"}.get(method, method)
        return f"{section}.beta" if section in ("grpo", "kto", "distill") else "dpo.beta"
    if method == "distill" and key in ("grpo.temperature", "grpo.max_completion"):
        return key.replace("grpo", method)
    return key


def _method(made: Made, index: int, part: Part) -> str:
    unknown = part.all("method.unknown")
    named = part.all("method") or part.all("method.weak")
    for fact in unknown:
        made.error(
            "method.unknown",
            f"{fact.words.upper()} is not a method here.",
            "method",
            "The methods are sft, dpo, grpo, kto, rloo, reward and distill.",
        )
    values = list(dict.fromkeys(fact.value for fact in named))
    if len(values) > 1 and part.all("method"):
        made.questions = (
            *made.questions,
            Question(field="method", text="Which method is meant?", choices=tuple(values)),
        )
    if values:
        made.tell(index, "method", values[0], named[0].words)
    return values[0] if values else "sft"


# --- model and data -------------------------------------------------------------------------------------------------


def _model_and_data(made: Made, index: int, part: Part, doc: dict[str, Any], intent: str) -> None:
    """Tell models from data among the references: by what is known of them, then by the words around them."""
    models: list[Fact] = []
    sources: list[Fact] = []
    loose: list[Fact] = []
    verb_objects: list[Fact] = []
    previous: list[Fact] = loose
    for fact in part.facts:
        if fact.key == "model.id" and isinstance(fact.value, Mention):
            models.append(fact)
        elif fact.key == "data.name":
            sources.append(fact)
            previous = sources
        elif fact.key in ("data.source", "model.id", "verb.model", "ref", "ref.like"):
            previous = _role(fact, models, sources, loose, verb_objects, previous)
            previous.append(fact)
    for fact in verb_objects:
        (sources if sources == [] and (models or _jobs(part)) else models).append(fact)
    for fact in loose:
        ref: Ref = fact.value
        if ref.kind in ("quoted", "code"):
            made.unread.append(ref.text)
        elif not models and sources and not _jobs(part) and ref.kind in ("hub", "path"):
            models.append(fact)
        else:
            sources.append(fact)
    models = _students(made, index, part, models, doc)
    _choose_model(made, index, part, models, doc, intent)
    rows: list[dict[str, Any]] = []
    for fact in sources:
        source = fact.value.text if isinstance(fact.value, Ref) else str(fact.value)
        if all(row["source"] != source for row in rows):
            made.tell(index, f"data.{len(rows)}.source", source, fact.words)
            rows.append({"source": source})
    if rows:
        doc["data"] = rows


def _role(
    fact: Fact,
    models: list[Fact],
    sources: list[Fact],
    loose: list[Fact],
    verb_objects: list[Fact],
    previous: list[Fact],
) -> list[Fact]:
    ref: Ref = fact.value
    if ref.hint == "data":
        return sources
    if ref.hint == "model" or (ref.kind in ("hub", "quoted") and catalogue.find(ref.text.split("@")[0]) is not None):
        return models
    if fact.key == "model.id":
        return models
    if fact.key == "data.source":
        return models if ref.kind == "hub" and looks_like_model(ref.text) else sources
    if fact.key == "verb.model":
        return verb_objects
    if fact.key == "ref.like" and previous is sources and ref.kind != "quoted":
        return sources
    if ref.kind == "hub" and looks_like_model(ref.text):
        return models
    return sources if ref.kind in ("file", "url") else loose


def _jobs(part: Part) -> list[Fact]:
    return part.all("job")


def _students(made: Made, index: int, part: Part, models: list[Fact], doc: dict[str, Any]) -> list[Fact]:
    """The models that are trained; of "distil A from B" the first is the student, and the other its teacher."""
    said = part.all("distill.teacher")
    if named := part.all("student"):
        said, models = [*said, *models], [_as_model(named[0])]
    for fact in said[:1]:
        value = fact.value if isinstance(fact.value, (Ref, Mention)) else _as_model(fact).value
        if isinstance(value, Mention) and value.id is None and value.choices:
            text = f"Which model is meant by {value.words!r}, the teacher?"
            made.questions = (*made.questions, Question(field="distill.teacher", text=text, choices=value.choices))
            continue
        id = value.text if isinstance(value, Ref) else _spoken(value.id, value.words) if value.id else value.words
        _put(doc, "distill.teacher", id)
        made.tell(index, "distill.teacher", id, fact.words)
    return models


def _as_model(fact: Fact) -> Fact:
    """A fact whose value is the bare name of a model, with the model or the choices that it names."""
    if isinstance(fact.value, Ref):
        return fact
    name = str(fact.value)
    known = catalogue.find(name)
    value = Mention(fact.start, fact.start, name, known.id if known else None, tuple(choices(name)))
    return replace(fact, value=value)


def _choose_model(made: Made, index: int, part: Part, facts: list[Fact], doc: dict[str, Any], intent: str) -> None:
    ids: dict[str, str] = {}
    for fact in facts:
        value = fact.value
        if isinstance(value, Ref):
            name, _, revision = value.text.partition("@") if value.kind == "hub" else (value.text, "", "")
            if value.kind == "job" and not name.startswith(("job:", "stage:")):
                name = f"job:{name}"
            known = catalogue.find(name) if value.kind in ("hub", "quoted") else None
            ids.setdefault(known.id if known else name, fact.words)
            if revision:
                doc["model"] = {"revision": revision}
        elif value.id is not None:
            ids.setdefault(_spoken(value.id, value.words), fact.words)
        elif value.choices:
            text = f"Which model is meant by {value.words!r}?"
            made.questions = (*made.questions, Question(field="model.id", text=text, choices=value.choices))
            doc["model"] = {"id": ""}
        else:
            _unknown_model(made, value.words)
    for fact in part.all("verb.object"):
        if not facts:
            _unknown_model(made, str(fact.value))
    sizes = part.all("model.size")
    if sizes and not facts and (alike := choices(sizes[0].value)):
        text = f"Which model is meant by {sizes[0].words!r}?"
        made.questions = (*made.questions, Question(field="model.id", text=text, choices=tuple(alike)))
    jobs = _jobs(part)
    if jobs and not ids and intent == "train":
        job = str(jobs[0].value)
        ids[job if job.startswith(("job:", "stage:")) else f"job:{job}"] = jobs[0].words
    if len(ids) > 1:
        made.questions = (
            *made.questions,
            Question(field="model.id", text="Which of these models should be trained?", choices=tuple(ids)),
        )
    if ids:
        id, words = next(iter(ids.items()))
        doc["model"] = {"id": id, **doc.get("model", {})}
        made.tell(index, "model.id", id, words)
    elif doc.get("model", {}).get("id") == "":
        del doc["model"]


def _spoken(id: str, words: str) -> str:
    """The id of a model, or the alias of the packaged weights where it was asked for by that."""
    alias = catalogue.EMBEDDED_ALIAS
    short = re.sub(r"[\W_]+", "", words.lower()) == alias.replace("-", "")
    return alias if id == catalogue.EMBEDDED_ID and short else id


def _unknown_model(made: Made, name: str) -> None:
    near = ", ".join(catalogue.nearest(name))
    fix = f"The nearest are {near}. A folder with config.json and a hub id (owner/name) work too."
    made.error("model.unknown", f"The model {name[:100]!r} is not known.", "model.id", fix)


def _sources(made: Made, index: int, part: Part, said: dict[str, Fact], doc: dict[str, Any]) -> None:
    """What is said of the data as such goes to each source; without a source it waits for the answer."""
    drawn = said.pop("data.random", None)
    if drawn is not None:
        message = f"{drawn.words!r}: the first rows are taken, not random ones."
        made.warn(
            "data.not_random", message, "data.limit", "A seeded random share is data.fraction, as in 10 % of the data."
        )
    rows = doc.setdefault("data", [{}]) if any(key.startswith("data.") for key in said) else doc.get("data", [])
    for key, fact in said.items():
        if key.startswith("data."):
            for row in rows:
                row[key.removeprefix("data.")] = fact.value
            made.tell(index, key, fact.value, fact.words)
    full = part.all("data.full")
    if full:
        made.tell(index, "data.full", True, full[0].words)
        for key in ("data.limit", "data.fraction"):
            if key in said:
                message = f"{full[0].words!r} and {said[key].words!r} say different things."
                made.error("request.contradiction", message, key, "Say one of the two.")
    mapping, words = _mapping(part, doc)
    if mapping:
        made.tell(index, "data.mapping.columns", mapping["columns"], words)
        if any(role != column for role, column in mapping["columns"].items()):
            made.mapping = mapping
            for row in rows:
                row["mapping"] = mapping


def _mapping(part: Part, doc: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The columns that were named, by role. Two unexplained columns take the two roles of the method, in order."""
    found: dict[str, str] = {}
    words = []
    for fact in part.all("columns.instead", "columns.role"):
        found |= fact.value
        words.append(fact.words)
    for fact in part.all("columns"):
        if set(fact.value) & (set(found) | set(found.values())):
            continue
        roles = [role_of(name) for name in fact.value]
        usual = ["chosen", "rejected"] if doc["method"] in ("dpo", "reward") else ["prompt", "completion"]
        if len(set(roles)) == len(roles) and set(roles) <= set(ROLES):
            found |= dict(zip(roles, fact.value, strict=True))
        elif len(fact.value) == len(usual):
            found |= dict(zip(usual, fact.value, strict=True))
        words.append(fact.words)
    kind = next((kind for roles, kind in KINDS if roles <= set(found)), None)
    if kind is None:
        return None, ""
    if kind == "preference" and not part.all("method", "method.weak"):
        doc["method"] = "dpo"
    return {"kind": kind, "columns": found}, "; ".join(words)


# --- the rest -------------------------------------------------------------------------------------------------------


def _batch(said: dict[str, Fact], doc: dict[str, Any]) -> None:
    """A batch size is what one optimizer step sees, unless accumulation is named beside it."""
    batch, steps = said.get("batch"), said.get("accumulate")
    micro = said.get("train.micro_batch")
    if steps is not None and (batch or micro):
        each = (micro or batch).value  # type: ignore[union-attr]
        _put(doc, "train.micro_batch", each)
        _put(doc, "train.effective_batch", each * steps.value)
    elif batch is not None:
        _put(doc, "train.effective_batch", batch.value)


def _deliveries(made: Made, index: int, part: Part, doc: dict[str, Any]) -> None:
    some = part.all("gguf.some")
    if some and _get(doc, "deliver.gguf") is None:
        _put(doc, "deliver.gguf", "Q4_K_M")
        made.tell(index, "deliver.gguf", "Q4_K_M", some[0].words)
    kind = _get(doc, "deliver.gguf")
    if kind is not None and kind not in GGUF_KINDS:
        made.error("request.value", f"{kind} is no GGUF type.", "deliver.gguf", f"Use one of {', '.join(GGUF_KINDS)}.")
    target = _get(doc, "deliver.push")
    if target is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(target)):
        made.error("request.value", f"Cannot push to {str(target)[:100]!r}.", "deliver.push", "Write it as OWNER/NAME.")
    if target is None and part.all("push.where"):
        made.questions = (*made.questions, Question(field="deliver.push", text="Push where? Give OWNER/NAME."))
    if "deliver" in doc and set(doc["deliver"]) == {"private"}:
        made.warn("request.unsupported", "Nothing is pushed, so it is neither private nor public.", "deliver.private")


def _contradictions(made: Made, part: Part, said: dict[str, Fact], doc: dict[str, Any]) -> None:
    kind = said.get("adapter.kind")
    kinds = {fact.value for fact in part.all("adapter.kind")}
    if kind is not None and kinds == {"none"}:
        for key in ("adapter.rank", "adapter.alpha", "adapter.dropout"):
            if key in said:
                message = f"{said[key].words!r} with {kind.words!r}: full weights have no adapter."
                made.error("request.contradiction", message, key, "Leave one of the two out.")
    if kinds == {"lora", "qlora"} or kinds == {"lora", "dora"}:
        made.findings = [
            item
            for item in made.findings
            if not (item.code == "request.contradiction" and item.where == "adapter.kind")
        ]
        _put(doc, "adapter.kind", (kinds - {"lora"}).pop())


def _odd_values(made: Made, said: dict[str, Fact]) -> None:
    for key, most in SANE.items():
        fact = said.get({"train.effective_batch": "batch"}.get(key, key))
        if fact is not None and isinstance(fact.value, (int, float)) and fact.value > most:
            made.error(
                "spec.value",
                f"{fact.words!r} cannot be meant: {key} would be {fact.value:g}.",
                key,
                "Check the number.",
            )


def _get(doc: dict[str, Any], key: str) -> Any:
    for step in key.split("."):
        doc = doc.get(step) if isinstance(doc, dict) else None  # type: ignore[assignment]
    return doc


def _put(doc: dict[str, Any], key: str, value: Any) -> None:
    *steps, last = key.split(".")
    for step in steps:
        doc = doc.setdefault(step, {})
    doc[last] = value
