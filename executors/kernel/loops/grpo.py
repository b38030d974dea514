"""Group relative policy optimisation: answers are written, scored, compared within their group, and learnt from.

Each round picks prompts, writes `num_generations` answers to each with the weights of the moment, and scores them. The
`num_iterations` optimizer steps that follow train on those answers, their prompt computed once for all of them. Answers
whose advantage is zero teach nothing and are left out of the pass; the loss is still divided by all of them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops import groups as records
from tunesmith.executors.kernel.loops import policy
from tunesmith.executors.kernel.loops.batches import Batch
from tunesmith.executors.kernel.loops.forks import Tree, forked, spread
from tunesmith.executors.kernel.loops.groups import Group, Written
from tunesmith.executors.kernel.loops.method import Interrupted, Meter, Turn, evaluating
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.ranks import ALONE, Ranks
from tunesmith.executors.kernel.loops.rollout import Ask, Rollout, Sample
from tunesmith.executors.kernel.loops.room import Room, fullest
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import Finding, GrpoSpec

_NAMES = (
    *("reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio"),
    *("entropy", "kl", "clip_ratio/region_mean", "rollout_gap", "rollout_seconds"),
)
CHECKED_EVERY = 20  # rounds; looking at the gap waits for the device
SHOWN = 2  # answers of a step that are sent as samples
SAID = 500  # characters of a column that a reward function logged
STALE = {torch.float32: 1e-2, torch.bfloat16: 0.15, torch.float16: 0.15}  # mean gap of rollout and trainer, in nats


class Prompt(Protocol):
    """A row to be answered, as `data.prompts` makes it."""

    @property
    def row(self) -> int: ...
    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def prompt(self) -> Any: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...


class Scores(Protocol):
    """Rewards of some answers: one value for each function, None where it does not apply, and the weighted sum.

    `told` are means and `extra` columns (one value for each answer) that functions logged by themselves.
    """

    @property
    def values(self) -> Sequence[Sequence[float | None]]: ...
    @property
    def totals(self) -> Sequence[float]: ...
    @property
    def told(self) -> Mapping[str, float]: ...
    @property
    def extra(self) -> Mapping[str, Sequence[Any]]: ...
    @property
    def alerts(self) -> Sequence[Finding]: ...


@dataclass(frozen=True, slots=True)
class Unasked:
    """The scores of no answers."""

    values: tuple[Sequence[float | None], ...] = ()
    totals: tuple[float, ...] = ()
    told: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    alerts: tuple[Finding, ...] = ()


class Scorer(Protocol):
    """The reward functions of a job, as `rewards.load` gives them."""

    @property
    def names(self) -> Sequence[str]: ...

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        step: int,
    ) -> Scores:
        """Rewards of completions, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Judge:
    """What turns tokens into rewards: the text of some tokens, and the reward functions."""

    text: Callable[[Sequence[int]], str]
    scorer: Scorer

    def __call__(self, asked: Sequence[Prompt], samples: Sequence[Sample], step: int) -> tuple[Scores, list[str]]:
        """Scores of one sample each for the prompts in `asked`, and the texts. A rank without any asks nobody."""
        if not samples:
            return Unasked(), []
        texts = [self.text(sample.ids) for sample in samples]
        told = [
            text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(asked, texts, strict=True)
        ]
        names = list(dict.fromkeys(name for prompt in asked for name in prompt.columns))
        columns = {name: [prompt.columns.get(name) for prompt in asked] for name in names}
        prompts = [prompt.prompt for prompt in asked]
        ids = [list(sample.ids) for sample in samples]  # theirs to change: ours are trained on
        return self.scorer.score(prompts, told, ids, columns, step), texts


class Grpo:
    """A row is a prompt. What a unit is depends on `spec.loss` (policy.weight).

    `rollout` writes the answers and `judge` scores them. `frozen` is the reference where all weights train; an
    adapter's reference is the model without it. `micro_batch` prompts with all their answers go through the model at
    once.
    """

    foreseen = False
    measure = "reward"
    higher = True

    def __init__(
        self,
        net: Net,
        rows: Sequence[Prompt],
        spec: GrpoSpec,
        *,
        rollout: Rollout,
        judge: Judge,
        reporter: Reporter,
        seed: int,
        micro_batch: int,
        max_length: int,
        packing: bool,
        pad_id: int,
        frozen: Net | None = None,
        stopped: Callable[[], bool] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.net = net
        self.rows = rows
        self.spec = spec
        self.rollout = rollout
        self.judge = judge
        self.reporter = reporter
        self.seed = seed
        self.micro_batch = micro_batch
        self.max_length = max_length
        self.limit: Room | None = None
        self.packing = packing
        self.pad_id = pad_id
        self.frozen = frozen
        self.stopped = stopped
        self.ranks = ranks
        self.repeats = spec.num_iterations
        self.at_once = rollout.slots * ranks.world
        self.meter = Meter("reward", *_NAMES, *(f"rewards/{name}" for name in judge.scorer.names))
        self._groups: list[Group] = []
        self._round = -1
        self._stale_told = False
        self._logged: dict[str, list[tuple[float, int]]] = {}

    # --- the engine's side ------------------------------------------------------------------------------------------

    def batches(self, picked: Sequence[int], turn: Turn) -> list[Batch]:
        """Answers to these rows, written now or, within a round, before. Raises Interrupted."""
        number = turn.step // self.repeats
        if number != self._round:
            self._groups = self._written(picked, turn)
            self._round = number
        return self._laid_out()

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss over the batch's tokens."""
        assert batch.owners is not None
        logps, entropy = self.net.token_logps(batch, self.spec.temperature)
        first = "old" not in batch.extra
        if first:
            self._compare(logps.detach(), batch)
            self._keep("old", logps.detach(), batch)
        old = logps.detach() if first else batch.extra["old"]
        reference = self._reference(batch) if self.spec.beta else None
        judged = policy.judge(logps, old, batch.extra["gains"][batch.owners], reference, self.spec)
        count = len(logps)
        self.meter.add("entropy", entropy.sum(), count)
        self.meter.add("clip_ratio/region_mean", judged.clipped.sum(), count)
        if judged.divergence is not None:
            self.meter.add("kl", judged.divergence.sum(), count)
        return (judged.losses * batch.extra["shares"][batch.owners]).sum()

    def assess(self, picked: Sequence[int], turn: Turn) -> Iterator[tuple[Tensor | float, int]]:
        """Rewards of one greedy answer to each row."""
        asked = self.ranks.share([self.rows[at] for at in picked])
        made = self._generate([Ask(row.row, row.ids, (0,)) for row in asked], turn, greedy=True)
        scores, _ = self.judge(asked, made, turn.step)
        self._warn_of(scores)
        for name, value in scores.told.items():
            self._logged.setdefault(name, []).append((value, len(made)))
        known = [total for total in scores.totals if not math.isnan(total)]
        yield math.fsum(known), len(known)
        self._measure_functions(scores)
        self.meter.add("completions/mean_length", sum(len(sample.ids) for sample in made), len(made))

    def assessed(self, step: int) -> None:
        """Tell the means of what the functions logged by themselves, over all answers of the evaluation."""
        told, self._logged = self._logged, {}
        if told:
            means = {
                f"eval/{name}": math.fsum(value * count for value, count in parts) / sum(count for _, count in parts)
                for name, parts in told.items()
            }
            self.reporter.metric(means, step)

    @property
    def room(self) -> Room:
        """As many prompts as a micro-batch has, or their tokens where prompt and answers are as long as they may be."""
        each = self.max_length + (self.spec.num_generations - 1) * self.spec.max_completion
        return Room(self.micro_batch, self.micro_batch * each).within(self.limit)

    @property
    def breadth(self) -> int:
        """Rows whose answers are written at a time."""
        return self.at_once

    def forget(self) -> None:
        """Empty the meter, and drop what functions have logged in an evaluation."""
        self.meter.drain(self.net.device)
        self._logged = {}

    @property
    def slots(self) -> int:
        """Answers written at a time; vLLM sees to its own."""
        return 0 if self.rollout.way == "vllm" else self.rollout.slots

    def narrow(self, slots: int) -> None:
        """Write only so many answers at a time."""
        self.rollout.narrow(slots)

    def rehearsal(self, most: int) -> tuple[Self, Batch]:
        """Made-up answers, as long as they may be, to the longest prompts, beside what the rollout keeps meanwhile."""
        lengths = [len(row.ids) for row in self.rows]
        self.rollout.hold(max(lengths))
        packing = self.packing and self.net.forked
        written, count = self.spec.max_completion, self.spec.num_generations
        fed = [length + (count * (written - 1) if packing else written) for length in lengths]
        stand_in = copy.copy(self)
        stand_in.meter = Meter(*self.meter.names)
        stand_in._stale_told = True
        stand_in._groups = [
            Group(at, tuple(_made_up(self.rows[at].ids[-1], written, number) for number in range(count)))
            for at in fullest(fed, self.room, most, packed=packing)
        ]
        return stand_in, max(stand_in._laid_out(), key=lambda batch: batch.ids.numel())

    def updated(self) -> None:
        """Bring the rollout's weights up to date, and let every rank know what the others found in the first pass."""
        self.rollout.refresh()
        if self.repeats > 1 and self.ranks.world > 1:
            every = self.ranks.gather(records.plain(self._groups))
            self._groups = records.completed(records.read(part) for part in every)

    def save(self, folder: Path, step: int) -> None:
        """Within a round, the answers it goes on with: written with weights that are gone."""
        if step % self.repeats:
            records.save(folder, self._groups, step // self.repeats)

    def load(self, folder: Path, step: int) -> None:
        """Go on within a round, or begin a new one."""
        self._round = -1
        if step % self.repeats:
            self._groups = records.load(folder, step // self.repeats)
            self._round = step // self.repeats

    # --- a round of rollouts ----------------------------------------------------------------------------------------

    def _written(self, picked: Sequence[int], turn: Turn) -> list[Group]:
        began = time.perf_counter()
        own = self.ranks.share(picked)
        count = self.spec.num_generations
        asks = [Ask(self.rows[at].row, self.rows[at].ids, range(count)) for at in own]
        samples = self._generate(asks, turn, greedy=False)
        asked = [self.rows[at] for at in own for _ in range(count)]
        scores, texts = self.judge(asked, samples, turn.step)
        self._warn_of(scores)
        if scores.told:
            self.reporter.metric({f"train/{name}": value for name, value in scores.told.items()}, turn.step + 1)
        grouped = [list(scores.totals[start : start + count]) for start in range(0, len(samples), count)]
        parts = self.ranks.gather(grouped)
        before = sum(len(part) for part in parts[: self.ranks.rank])
        scaled = policy.advantages([rewards for part in parts for rewards in part], self.spec.scale_rewards)
        gains = scaled[before : before + len(grouped)]
        mine = [
            Group(
                at,
                tuple(
                    Written(list(sample.ids), sample.ended, gain, torch.tensor(sample.logps))
                    for sample, gain in zip(samples[n * count : (n + 1) * count], gains[n], strict=True)
                ),
            )
            for n, at in enumerate(own)
        ]
        self._measure(scores, grouped, samples, time.perf_counter() - began)
        self._show(asked, texts, scores, turn.step)
        return records.merged((records.read(part) for part in self.ranks.gather(records.plain(mine))), picked)

    def _generate(self, asks: Sequence[Ask], turn: Turn, *, greedy: bool) -> list[Sample]:
        total = sum(len(ask.samples) for ask in asks)

        def told(tokens: int, samples: int) -> None:
            self.reporter.progress("rollout", samples, total, unit="answers", step=turn.step)

        with evaluating(self.net):
            key = f"{self.seed}:{turn.epoch}"
            made = self.rollout.generate(asks, key=key, greedy=greedy, told=told, stopped=self.stopped)
        if made is None:
            raise Interrupted
        return made

    def _measure(self, scores: Scores, grouped: Sequence[Sequence[float]], made: Sequence[Sample], took: float) -> None:
        known = [total for total in scores.totals if not math.isnan(total)]
        self.meter.add("reward", math.fsum(known), len(known))
        spreads = [float(torch.tensor(group, dtype=torch.float64).std()) for group in grouped if len(group) > 1]
        spreads = [spread for spread in spreads if not math.isnan(spread)]
        self.meter.add("reward_std", math.fsum(spreads), len(spreads))
        self.meter.add("frac_reward_zero_std", sum(spread < 1e-8 for spread in spreads), len(spreads))
        self.meter.add("completions/mean_length", sum(len(sample.ids) for sample in made), len(made))
        self.meter.add("completions/clipped_ratio", sum(not sample.ended for sample in made), len(made))
        self.meter.add("rollout_seconds", took)
        self._measure_functions(scores)

    def _measure_functions(self, scores: Scores) -> None:
        for at, name in enumerate(self.judge.scorer.names):
            known = [value for values in scores.values if (value := values[at]) is not None]
            self.meter.add(f"rewards/{name}", math.fsum(known), len(known))

    def _warn_of(self, scores: Scores) -> None:
        for alert in scores.alerts:
            self.reporter.alert(alert.code, alert.message, alert.level, where=alert.where)

    def _show(self, asked: Sequence[Prompt], texts: Sequence[str], scores: Scores, step: int) -> None:
        """Send the best and the worst answer of the first prompt."""
        count = min(len(texts), self.spec.num_generations)
        ranked = sorted(range(count), key=lambda at: -scores.totals[at])
        for at in dict.fromkeys([*ranked[:1], *ranked[-1:]][:SHOWN]):
            rewards = dict(zip(self.judge.scorer.names, scores.values[at], strict=True))
            values = {"row": asked[at].row, "prompt": asked[at].prompt, "completion": texts[at], "rewards": rewards}
            told = {name: str(column[at])[:SAID] for name, column in scores.extra.items() if at < len(column)}
            more = {"reward": scores.totals[at], **({"extra": told} if told else {})}
            self.reporter.emit(Kind.SAMPLE, {**values, **more}, step)

    # --- the training pass ------------------------------------------------------------------------------------------

    def _teaches(self, item: Written) -> bool:
        dropped = self.spec.mask_truncated and not item.ended
        return bool(item.ids) and not dropped and (item.gain != 0 or self.spec.beta > 0)

    def _units(self, item: Written) -> float:
        gone = self.spec.mask_truncated and not item.ended and self.spec.loss in ("dapo", "bnpo")
        return 0 if gone else policy.weight(self.spec, len(item.ids))[1]

    def _laid_out(self) -> list[Batch]:
        kept = [[n for n, item in enumerate(group.written) if self._teaches(item)] for group in self._groups]
        taught = [at for at, numbers in enumerate(kept) if numbers]
        trees = [
            Tree(
                self.rows[self._groups[at].at].row,
                self.rows[self._groups[at].at].ids,
                tuple(self._groups[at].written[n].ids for n in kept[at]),
            )
            for at in taught
        ]
        if self.packing and self.net.forked:
            found = forked(trees, self.room.tokens)
        else:
            found = spread(trees, self.room.rows, self.pad_id)
        batches = []
        for batch in found:
            members = tuple((taught[tree], kept[taught[tree]][n]) for tree, n in batch.members)
            batches.append(self._filled(replace(batch, members=members)))
        if batches:  # what is left out of the pass counts in the mean all the same
            every = sum(self._units(item) for group in self._groups for item in group.written)
            rest = int(every) - sum(batch.weight for batch in batches)
            batches[0] = replace(batches[0], weight=batches[0].weight + rest)
        return batches

    def _filled(self, batch: Batch) -> Batch:
        items = [self._groups[at].written[n] for at, n in batch.members]
        extra = {
            "gains": torch.tensor([item.gain for item in items], dtype=torch.float32),
            "shares": torch.tensor([policy.weight(self.spec, len(item.ids))[0] for item in items], dtype=torch.float32),
        }
        for name in ("sampled", "old", "reference"):
            known = [value for item in items if (value := getattr(item, name)) is not None]
            if len(known) == len(items):
                extra[name] = torch.cat(known)
        return replace(batch, extra=extra, weight=int(sum(self._units(item) for item in items)))

    def _keep(self, name: str, values: Tensor, batch: Batch) -> None:
        """Remember what was found for each answer, for the optimizer steps that follow on the same ones."""
        if self.repeats == 1:
            return
        items = [self._groups[at].written[n] for at, n in batch.members]
        for item, part in zip(items, torch.split(values, [len(item.ids) for item in items]), strict=True):
            setattr(item, name, part)

    def _reference(self, batch: Batch) -> Tensor:
        if "reference" in batch.extra:
            return batch.extra["reference"]
        if self.frozen is not None:
            with torch.no_grad():
                found, _ = self.frozen.token_logps(batch, self.spec.temperature)
        else:
            with evaluating(self.net), self.net.untuned():
                found, _ = self.net.token_logps(batch, self.spec.temperature)
        self._keep("reference", found, batch)
        return found

    def _compare(self, logps: Tensor, batch: Batch) -> None:
        """How far the rollout's opinion of its own answers lies from the trainer's: stale weights show here."""
        gap = (batch.extra["sampled"] - logps).abs()
        self.meter.add("rollout_gap", gap.sum(), len(gap))
        if not self._stale_told and self._round % CHECKED_EVERY == 0:
            self._warn(float(gap.mean()))

    def _warn(self, gap: float) -> None:
        limit = STALE.get(self.net.head.weight.dtype, 0.15)
        if self.net.autocast is not None:
            limit = STALE[torch.bfloat16]
        if gap > limit:
            self._stale_told = True
            self.reporter.alert(
                "grpo.rollout_gap",
                f"Answers are written with other probabilities than they are trained with: {gap:.2g} nats a token.",
            )


def _made_up(token: int, length: int, number: int) -> Written:
    """An answer that teaches something."""
    return Written([token] * length, True, 1.0 if number % 2 else -1.0, torch.zeros(length))
