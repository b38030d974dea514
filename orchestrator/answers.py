"""Questions about jobs, answered from recorded facts: no language model, no guess, the same answer for the same facts.

Every figure in an answer is also in `facts`, with the step it was recorded at. What is not recorded is said so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from tunesmith.orchestrator import figures
from tunesmith.orchestrator.events import number
from tunesmith.orchestrator.inert import inert
from tunesmith.orchestrator.states import JOB_ENDS, JobState

Doc = Mapping[str, Any]


class Records(Protocol):
    """What may be looked at to answer: documents of the daemon, never the store itself."""

    def show(self, job: str) -> Doc:
        """The `show` document of a job."""
        ...

    def jobs(self, limit: int = 50) -> Sequence[Doc]:
        """Summaries, newest first."""
        ...

    def series(self, job: str, keys: tuple[str, ...] = ()) -> Mapping[str, Sequence[Sequence[Any]]]:
        """{key: [[step, value, time], ...]} of the keys asked for."""
        ...


ABLE = (
    "status, progress, loss and its trend, learning rate, speed, time left, settings, results, cost, the queue, "
    "and why a job failed"
)

_UNDERWAY = frozenset({JobState.RUNNING, JobState.EVALUATING, JobState.DELIVERING})
_WAITING = frozenset({JobState.AWAITING_INPUT, JobState.AWAITING_APPROVAL})
_JOB_ID = re.compile(r"\bj-[a-z2-7]{6}\b", re.ASCII)


def ask(question: str, *, job: str | None, read: Records, now: datetime | None = None) -> dict[str, Any]:
    """{"answer", "facts": [{"key", "value", "step"?}], "job": id | null} for a question.

    `job` is the id asked about, or None; then the job named in the question is taken, or the one under way, or the
    newest. Two or three reads of the records, whatever the question.
    """
    text = _plain(question)
    jobs = read.jobs()
    chosen = job if job is not None else _choose(text, jobs)
    if chosen is None:
        return {"answer": "There is no job yet, so there is nothing to tell.", "facts": [], "job": None}
    asked = _Asked(text, read.show(chosen), jobs, read, now or datetime.now(UTC))
    return {"answer": asked.answer(), "facts": asked.facts, "job": chosen}


def _plain(question: str) -> str:
    return re.sub(r"\s+", " ", question.lower().replace("\u2019", "'")).strip()


class _Asked:
    """One question, with the job it is about and the facts its answer rests on."""

    def __init__(self, text: str, job: Doc, jobs: Sequence[Doc], read: Records, now: datetime) -> None:
        self.text = text
        self.job = job
        self.jobs = jobs
        self.read = read
        self.now = now
        self.name = inert(job.get("name") or job.get("id") or "the job", limit=80)
        self.facts: list[dict[str, Any]] = []

    def about_all(self) -> bool:
        """Whether the question is about all jobs rather than about one."""
        return bool(_ALL.search(self.text))

    def answer(self) -> str:
        if self.about_all():
            return self.queue()
        said = [topic(self) for pattern, topic in _TOPICS if pattern.search(self.text)]
        said += self.settings()
        if not said and _STATUS.search(self.text):
            said = [self.status()]
        if not said:
            unknown = f"That is not in what is recorded of {self.name}, or I do not understand the question."
            return f"{unknown} I can tell: {ABLE}."
        return " ".join(dict.fromkeys(said))

    def fact(self, key: str, value: Any, step: Any = None) -> Any:
        """Record a fact that the answer uses; its value."""
        entry = {"key": key, "value": value} if step is None else {"key": key, "value": value, "step": step}
        if entry not in self.facts:
            self.facts.append(entry)
        return value

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a series, non-finite values included."""
        found = []
        for point in self.read.series(str(self.job.get("id", "")), (key,)).get(key) or ():
            value = number(point[1])
            if value is not None and isinstance(point[0], int):
                found.append((point[0], value))
        return found

    # --- topics ----------------------------------------------------------------------------------------------------

    def status(self) -> str:
        where = str(self.job.get("state", "unknown"))
        self.fact("state", where)
        said = [f"{self.name} is {where.replace('_', ' ')}{self._elapsed()}."]
        if where in _WAITING:
            said.append(self.waiting())
        step = self.step()
        if step:
            said.append(step)
        if self.points("train/loss"):
            said.append(self.loss())
        if where in _UNDERWAY:
            rate = self._last("train/learning_rate")
            if rate is not None:
                said.append(f"The learning rate is {figures.amount(self.fact('train/learning_rate', rate))}.")
            speed = self._progress("tokens_per_second")
            if speed is not None:
                said.append(f"It does {figures.amount(self.fact('tokens_per_second', speed))} tokens/s.")
            if self._progress("eta_seconds") is not None:
                said.append(self.eta())
        if where in (JobState.FAILED, JobState.LOST):
            said.append(self.failure())
        if where == JobState.SUCCEEDED:
            said.append(self.results())
        return " ".join(said)

    def step(self) -> str:
        step, total = self._progress("step"), self._progress("total_steps")
        if step is None:
            return ""
        self.fact("step", step)
        verb = "It came to" if self.job.get("state") in JOB_ENDS else "It is at"
        if total is None:
            return f"{verb} step {figures.amount(step)}."
        self.fact("total_steps", total)
        return f"{verb} step {figures.amount(step)} of {figures.amount(total)} ({figures.share(step, total)})."

    def progress(self) -> str:
        return self.step() or f"{self.name} has not taken a step yet: it is {self._state()}."

    def loss(self) -> str:
        return self._course("train/loss", "The training loss") or f"No training loss is recorded yet: {self._is()}."

    def eval_loss(self) -> str:
        return self._course("eval/loss", "The evaluation loss") or "No evaluation loss is recorded yet."

    def reward(self) -> str:
        return self._course("train/reward", "The reward") or "No reward is recorded."

    def grad_norm(self) -> str:
        return self._course("train/grad_norm", "The gradient norm") or "No gradient norm is recorded yet."

    def learning_rate(self) -> str:
        points = self.points("train/learning_rate")
        if points:
            step, value = points[-1]
            self.fact("train/learning_rate", value, step)
            return f"The learning rate is {figures.amount(value)} at step {step}."
        planned = ((self.job.get("spec") or {}).get("train") or {}).get("learning_rate")
        if planned is None:
            return "No learning rate is recorded yet."
        return (
            f"The learning rate is planned to be {figures.amount(self.fact('train.learning_rate', planned))} at most."
        )

    def speed(self) -> str:
        rate = self._progress("tokens_per_second")
        if rate is None:
            return f"No speed is recorded: {self._is()}."
        self.fact("tokens_per_second", rate)
        verb = "does" if self._state() in _UNDERWAY else "last did"
        return f"It {verb} {figures.amount(rate)} tokens/s."

    def eta(self) -> str:
        where = self._state()
        if where in JOB_ENDS:
            return f"{self.name} has ended: it is {where.replace('_', ' ')}."
        left = self._progress("eta_seconds")
        if left is None:
            return f"How long it still takes is not known yet: {self._is()}."
        self.fact("eta_seconds", left)
        return f"About {figures.duration(left)} left."

    def failure(self) -> str:
        where = self._state()
        if where not in (JobState.FAILED, JobState.LOST):
            return f"{self.name} has not failed: it is {where.replace('_', ' ')}."
        error = self._error()
        if error is None:
            return f"{self.name} is {where}, and the reason is not recorded. See: tunesmith logs {self._id()}"
        self.fact("error.code", error.get("code", ""))
        parts = [str(error.get(key) or "") for key in ("message", "why", "fix")]
        said = " ".join(inert(part, limit=600) for part in parts if part)
        step = self._progress("step")
        at = f" at step {figures.amount(self.fact('step', step))}" if step is not None else ""
        return f"{self.name} {'was lost' if where == JobState.LOST else 'failed'}{at}: {said}"

    def waiting(self) -> str:
        where = self._state()
        if where == JobState.AWAITING_APPROVAL:
            return f"It waits for your approval: tunesmith approve {self._id()}"
        if where == JobState.AWAITING_INPUT:
            asked = [inert(item.get("text", ""), limit=200) for item in self.job.get("questions") or []]
            return " ".join(["It waits for an answer:", *asked, f"tunesmith answer {self._id()} FIELD=VALUE"])
        return f"{self.name} waits for nobody: it is {where.replace('_', ' ')}."

    def results(self) -> str:
        found = self.job.get("artifacts") or []
        if not found:
            return f"There is no result yet: {self._is()}."
        for item in found:
            self.fact(f"artifact.{item.get('kind')}", item.get("path"))
        said = ", ".join(
            f"{inert(item.get('kind'), limit=30)} at {inert(item.get('path'), limit=300)}" for item in found
        )
        return f"The result is home and verified: {said}."

    def cost(self) -> str:
        cost = self.job.get("cost") or {}
        usd, hours = number(cost.get("usd")), number(cost.get("hours"))
        if usd is None:
            return "No cost is recorded."
        self.fact("cost.usd", usd)
        said = f"It has cost {figures.money(usd)} ({inert(cost.get('source', ''), limit=20)})"
        if hours is not None:
            said += f" in {figures.duration(self.fact('cost.hours', hours) * 3600)} of running"
        return said + "."

    def checkpoints(self) -> str:
        for attempt in reversed(self.job.get("attempts") or []):
            if attempt.get("checkpoint"):
                self.fact("checkpoint", attempt["checkpoint"])
                return f"The last checkpoint is {inert(attempt['checkpoint'], limit=200)}."
        return "No checkpoint is recorded yet."

    def queue(self) -> str:
        running = [item for item in self.jobs if item.get("state") in _UNDERWAY]
        queued = [item for item in self.jobs if item.get("state") == JobState.QUEUED]
        waiting = [item for item in self.jobs if item.get("state") in _WAITING]
        said = []
        for word, group in (("running", running), ("queued", queued), ("waiting for you", waiting)):
            self.fact(f"jobs.{word.split()[0]}", len(group))
            said.append(f"{len(group)} {word}" + (f" ({', '.join(map(_named, group[:8]))})" if group else ""))
        return ", ".join(said) + "."

    def settings(self) -> list[str]:
        """The settings that the question names, as the spec has them."""
        spec = self.job.get("spec") or {}
        said = []
        for pattern, key in _SETTINGS:
            if pattern.search(self.text):
                value: Any = spec
                for part in key.split("."):
                    value = value.get(part) if isinstance(value, Mapping) else None
                if key == "data" and isinstance(value, Sequence):
                    value = ", ".join(str(item.get("source", "")) for item in value if isinstance(item, Mapping))
                if value not in (None, ""):
                    self.fact(key, value)
                    said.append(f"{key} is {inert(figures.amount(value), limit=200)}.")
                else:
                    said.append(f"{key} is not set.")
        return said

    # --- what they rest on -----------------------------------------------------------------------------------------

    def _course(self, key: str, what: str) -> str:
        """Where a series stands, where it came from, and where it is going."""
        points = self.points(key)
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        if not points:
            return ""
        if not finite:
            return f"{what} is not a number at any of its {len(points)} recorded steps."
        step, value = finite[-1]
        self.fact(key, value, step)
        said = f"{what} is {figures.amount(value)} at step {step}"
        if len(finite) > 1:
            first_step, first = finite[0]
            self.fact(f"{key}/first", first, first_step)
            way = "down from" if value < first else ("up from" if value > first else "as it was,")
            said += f", {way} {figures.amount(first)} at step {first_step}"
            said += trend([value for _, value in finite])
        said += "."
        bad = [at for at, value in points if not math.isfinite(value)]
        if bad:
            self.fact(f"{key}/not_a_number", len(bad), bad[0])
            said += f" It was not a number at {len(bad)} steps, first at step {bad[0]}."
        return said

    def _elapsed(self) -> str:
        attempts = self.job.get("attempts") or []
        start = _time(attempts[0].get("started_at")) if attempts else None
        if start is None:
            return ""
        end = _time(attempts[-1].get("ended_at")) if self._state() in JOB_ENDS else self.now
        if end is None or end < start:
            return ""
        seconds = self.fact("elapsed_seconds", round((end - start).total_seconds()))
        return f" after {figures.duration(seconds)}"

    def _error(self) -> Doc | None:
        error = self.job.get("error")
        if isinstance(error, Mapping):
            return error
        for attempt in reversed(self.job.get("attempts") or []):
            if isinstance(attempt.get("error"), Mapping):
                found: Doc = attempt["error"]
                return found
        return next((item for item in self.job.get("findings") or [] if item.get("level") == "error"), None)

    def _progress(self, key: str) -> float | None:
        return number((self.job.get("progress") or {}).get(key))

    def _last(self, key: str) -> float | None:
        return number((self.job.get("last") or {}).get(key))

    def _state(self) -> str:
        return str(self.fact("state", str(self.job.get("state", "unknown"))))

    def _is(self) -> str:
        return f"{self.name} is {self._state().replace('_', ' ')}"

    def _id(self) -> str:
        return inert(self.job.get("id", ""), limit=20)


def trend(values: Sequence[float]) -> str:
    """Where a series goes now: the mean of its last fifth against the fifth before, in units of their spread."""
    size = len(values) // 5
    if size < 2:
        return ""
    before, after = values[-2 * size : -size], values[-size:]
    change = sum(after) / size - sum(before) / size
    spread = math.sqrt(sum((value - sum(part) / size) ** 2 for part in (before, after) for value in part) / (2 * size))
    if abs(change) <= spread / math.sqrt(size):
        return "; over the last steps it is flat within its noise"
    return "; it is still falling" if change < 0 else "; it has been rising lately"


def _choose(text: str, jobs: Sequence[Doc]) -> str | None:
    """The job that a question names, else the one under way, else the newest."""
    ids = set(_JOB_ID.findall(text))
    named = [job for job in jobs if job.get("id") in ids or _is_named(job, text)]
    underway = [job for job in jobs if job.get("state") in _UNDERWAY]
    found = [*named, *underway, *jobs]
    return str(found[0]["id"]) if found else None


def _is_named(job: Doc, text: str) -> bool:
    name = str(job.get("name") or "").lower()
    return bool(name) and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _named(job: Doc) -> str:
    name, id = job.get("name"), inert(job.get("id", ""), limit=20)
    return f"{id} {inert(name, limit=40)}" if name else id


def _time(value: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{pattern})\b")


_ALL = _words(
    r"queue[ds]?|(?:which|what|how many|list|any|all)(?: \w+){0,3} (?:jobs|runs)"
    r"|(?:what|anything) is (?:running|waiting|queued)|what's (?:running|waiting|queued)"
)
_STATUS = _words(
    r"status|how(?:'s| is| are| does| did)?|doing|going|progress|state|update|finished|done|running|ready|alive"
    r"|what's up"
)
_OTHER_LOSS = r"(?<!eval )(?<!evaluation )(?<!validation )(?<!test )(?<!out )"
_TOPICS: tuple[tuple[re.Pattern[str], Callable[[_Asked], str]], ...] = tuple(
    (_words(pattern), topic)
    for pattern, topic in (
        (r"(?:why|what|how come).*(?:fail\w*|crash\w*|wrong|stop\w*|died?|lost|error\w*|broke\w*)", _Asked.failure),
        (r"errors?|failed|oom", _Asked.failure),
        (r"(?:eval\w*|validation|held[- ]out|test) loss|overfit\w*", _Asked.eval_loss),
        (rf"{_OTHER_LOSS}loss|converg\w*|improv\w*|learning anything|diverg\w*|nan", _Asked.loss),
        (r"rewards?", _Asked.reward),
        (r"grad(?:ient)?[ _]norm", _Asked.grad_norm),
        (r"learning[ _-]rate|lr", _Asked.learning_rate),
        (r"speed|fast|slow|throughput|tokens?(?: per |/| a )s(?:ec\w*)?|tok/s", _Asked.speed),
        (r"eta|how (?:much )?long(?:er)?|how much time|when|time left|remaining|left", _Asked.eta),
        (r"finish(?:es)?|complete[ds]?", _Asked.eta),
        (r"steps?|epoch is it|how far|progress", _Asked.progress),
        (r"wait\w*|need from me|approv\w*|blocked|stuck", _Asked.waiting),
        (r"results?|output|adapter (?:saved|path|file)|artifacts?", _Asked.results),
        (r"where.*(?:adapter|model|weights|saved)", _Asked.results),
        (r"cost\w*|spen[dt]\w*|money|dollars?|price|bill", _Asked.cost),
        (r"checkpoints?", _Asked.checkpoints),
    )
)
_SETTINGS = tuple(
    (_words(pattern), key)
    for pattern, key in (
        (r"(?:which|what) (?:base )?model", "model.id"),
        (r"(?:which|what)(?: data| dataset| data ?set)|trained? on what|training data", "data"),
        (r"(?:which|what) method", "method"),
        (r"how many epochs|number of epochs", "train.epochs"),
        (r"batch(?:[ _]size)?", "train.effective_batch"),
        (r"(?:max(?:imum)?|sequence|context)[ _]length", "train.max_length"),
        (r"rank", "adapter.rank"),
        (r"scheduler", "train.scheduler"),
        (r"optimi[sz]er", "train.optimizer"),
        (r"seed", "train.seed"),
        (r"(?:which|what) (?:backend|machine)|where (?:does|is) it run\w*", "backend"),
    )
)
