"""One attempt from its attempt.json to its results. The one place where data, weights and loops meet.

Exit codes: 0 succeeded, 75 ended at a checkpoint because told to, 2 the input cannot be used, 1 anything else. The last
state event says the same in words; tracebacks go to the log only.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.executors.kernel import checkpoint, earlier
from tunesmith.executors.kernel.control import Control
from tunesmith.executors.kernel.crew import LOST, Crew, Seat, devices
from tunesmith.executors.kernel.explain import explained, stopped
from tunesmith.executors.kernel.measured import Measured, ran_on
from tunesmith.executors.kernel.place import choose_device, home_of, offline
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.silent import Silent
from tunesmith.executors.kernel.sizing.rows import processes
from tunesmith.executors.kernel.spoken import speak
from tunesmith.executors.kernel.track import Track
from tunesmith.orchestrator.errors import InputError, Stopped, TunesmithError
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import Attempt, ModelRef, spec_hash
from tunesmith.orchestrator.plain import build, plain

if TYPE_CHECKING:
    from tunesmith.executors.kernel.data import Prepared
    from tunesmith.executors.kernel.loops.engine import Engine
    from tunesmith.executors.kernel.loops.model import Net
    from tunesmith.executors.kernel.loops.ranks import Ranks
    from tunesmith.executors.kernel.loops.trl import TrlEngine
    from tunesmith.executors.kernel.rewards import Rewards

SUCCEEDED, FAILED, BAD_INPUT, TOLD_TO = 0, 1, 2, 75


def run(folder: Path) -> int:
    """Run the attempt in `folder` and return its exit code. Never raises."""
    folder = folder.absolute()
    try:
        attempt = build(Attempt, json.loads((folder / "attempt.json").read_text(encoding="utf-8")))
        reporter = Reporter(folder, attempt.number)
    except (OSError, ValueError, TypeError, KeyError, TunesmithError) as error:
        print(f"The attempt in {folder} cannot be read: {error}", file=sys.stderr)
        return BAD_INPUT
    control = Control(folder / "control")
    with reporter, control.listening():
        track = Track(home_of(folder), attempt.job, plain(attempt.spec), lambda text: reporter.log(text, "warning"))
        measured = Measured()
        reporter.listeners += [track, speak, measured]
        reporter.state("starting")
        try:
            Run(folder, attempt, reporter, control, track=track).go()
        except BaseException as error:
            trouble = explained(error)
            if trouble.code == "internal":
                traceback.print_exc()
            measured.tell(reporter)
            track.close()
            reporter.state("stopped" if isinstance(trouble, Stopped) else "failed", trouble)
            return _code(trouble)
        measured.tell(reporter)
        track.close()
        reporter.state("succeeded")
    return SUCCEEDED


def follow(folder: Path, seat: Seat) -> int:
    """Run the attempt in `folder` as a rank above 0, and return its exit code: it says nothing and saves nothing."""
    folder = folder.absolute()
    attempt = build(Attempt, json.loads((folder / "attempt.json").read_text(encoding="utf-8")))
    run = Run(folder, attempt, Silent(folder, attempt.number), Control(Path(os.devnull)), seat)
    try:
        run.go()
    except BaseException as error:
        trouble = explained(error)
        if trouble.code == "internal":
            traceback.print_exc()
        if trouble.code == "ranks.lost":
            return LOST
        run.crew.tell(trouble)
        return _code(trouble)
    return SUCCEEDED


OWN = ("sft", "dpo", "grpo")  # methods with a loop of our own; TRL's trainers serve the others


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokenised rows, those held out apart: Encoded, Pair or Prompt by the method; `tables` are TRL's."""

    train: Sequence[Any] = ()
    eval: Sequence[Any] = ()
    tables: Any = None


class Run:
    """The phases of one attempt, in order; between them a stop is obeyed."""

    def __init__(
        self,
        folder: Path,
        attempt: Attempt,
        reporter: Reporter,
        control: Control,
        seat: Seat | None = None,
        track: Track | None = None,
    ) -> None:
        self.folder = folder
        self.attempt = attempt
        self.spec = attempt.spec
        self.reporter = reporter
        self.control = control
        self.track = track
        self.checkpoints = folder / "checkpoints"
        self.seat = seat or Seat(0, processes(attempt.spec.hardware))
        self.crew = Crew(folder, self.seat, self._abandon)
        self.facts = {"attempt": attempt.number, "spec_hash": spec_hash(attempt.spec)}

    def go(self) -> None:
        """All of it. Raises TunesmithError, Stopped among them, or whatever a library raises."""
        _settled(self.spec)
        if self.seat.world > 1 and not self.seat.rank:
            devices(self.spec.hardware)  # GPUs that are missing are named before anything is read
        self.reporter.progress("loading", 0, 3, unit="parts")
        prepared = self._data()
        self._pause()
        tokenizer, model_folder = self._tokenizer()
        self.reporter.progress("loading", 1, 3, unit="parts")
        scorer = self._rewards()
        rows = self._encode(prepared, tokenizer)
        self._try_rewards(scorer, rows)
        self._pause()
        with self.crew:  # from here on with the other ranks, which have read the same rows
            net = self._net(model_folder)
            self.reporter.progress("loading", 3, 3, unit="parts")
            self._pause()
            ranks = self.crew.join(net.device, self._pause)
            engine: Engine | TrlEngine
            own: Engine | None = None
            if self.spec.method in OWN:
                self._preflight(net, rows, _pad_id(tokenizer), ranks)
                engine = own = self._engine(net, rows, tokenizer, model_folder, scorer, ranks)
            else:
                engine = self._trl_engine(net, rows, tokenizer, scorer)
            self._resume(engine, ranks)
            if own is not None and own.cursor.step < own.total:
                self._try_step(own)
                if net.device.type == "cuda":
                    self._compile(own, rows, _pad_id(tokenizer))
            self.reporter.state("running")
            outcome = engine.run()
            if self.seat.rank or outcome.ended != "stopped":  # after a stop nobody waits for the others
                self.crew.part(ranks)
        if self.seat.rank:
            return
        if outcome.ended == "stopped":
            raise stopped(f"at step {outcome.step:,} of {engine.total:,}; it goes on from its checkpoint")
        if outcome.ended == "early":
            self.reporter.log(f"Training ended early at step {outcome.step:,}: the evaluation got no better.")
        self.reporter.state("finishing")
        self._deliver(net, tokenizer, engine.restore_best())

    # --- what goes in -----------------------------------------------------------------------------------------------

    def _data(self) -> Prepared:
        from tunesmith.executors.kernel.data import fingerprint, prepare

        if self.attempt.data_fingerprint is not None:
            found = fingerprint(self.spec.data, offline=offline())
            if found != self.attempt.data_fingerprint:
                raise InputError(
                    "The data has changed since the plan was approved.",
                    code="data.changed",
                    why=f"The plan saw {self.attempt.data_fingerprint[:19]}, now it is {found[:19]}.",
                    where=", ".join(source.source for source in self.spec.data),
                    fix="Put the data back as it was, or plan the job again.",
                )
        prepared = prepare(self.spec, offline=offline())
        self._report_dropped(prepared.dropped, prepared.rows)
        return prepared

    def _tokenizer(self) -> tuple[Any, Path]:
        from tunesmith.executors.kernel import weights

        def tell(phase: str, done: int, total: int) -> None:
            self.reporter.progress("loading", done, total, unit="bytes" if phase == "download" else "tensors")

        folder = weights.locate(self.spec.model, home_of(self.folder) / "cache", progress=tell)
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"The tokenizer of {self.spec.model.id!r} cannot be loaded.",
                code="model.tokenizer",
                why=str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__,
                fix="The model's folder must hold a tokenizer.json.",
                where="model.id",
            ) from error
        return tokenizer, folder

    def _encode(self, prepared: Prepared, tokenizer: Any) -> Rows:
        from tunesmith.executors.kernel import data
        from tunesmith.executors.kernel.data.cached import cached
        from tunesmith.executors.kernel.data.load import no_usable_rows

        if self.spec.method not in OWN:
            return self._tables(prepared, tokenizer)
        kind = {"sft": data.Encoded, "dpo": data.Pair, "grpo": data.Prompt}[self.spec.method]
        limit = int(self.spec.train.max_length)
        if self.spec.method == "grpo":
            limit -= self.spec.grpo.max_completion
        total = len(prepared.train) + len(prepared.eval)
        parts: list[Any] = []
        for before, examples in ((0, prepared.train), (len(prepared.train), prepared.eval)):

            def told(done: int, before: int = before) -> None:
                self.reporter.progress("tokenizing", before + done, total, unit="rows")

            folder = home_of(self.folder) / "cache" / "tokens"
            more: dict[str, Any] = {"folder": folder, "progress": told, "pause": self._pause}
            found: data.Tokens[Any] = cached(kind, examples, tokenizer, limit, **more)
            if found.note:
                self.reporter.log(f"The cache of tokens: {found.note}", "warning")
            parts.append(found)
        lost = [error for part in parts for error in part.errors]
        self._report_dropped(lost, total)
        self._report_cut(sum(part.truncated for part in parts), total, limit)
        if not len(parts[0]):
            raise no_usable_rows(lost)
        return Rows(*parts)

    def _tables(self, prepared: Prepared, tokenizer: Any) -> Rows:
        """Rows as TRL's trainers read them, checked by our own encoding first."""
        from tunesmith.executors.kernel.loops.trl_rows import tables

        def told(done: int, total: int) -> None:
            self.reporter.progress("tokenizing", done, total, unit="rows")
            self._pause()

        found = tables(self.spec, prepared, tokenizer, told)
        self._report_dropped(found.lost, found.total)
        self._report_cut(found.cut, found.total, int(self.spec.train.max_length))
        return Rows(tables=found)

    def _report_cut(self, cut: int, total: int, limit: int) -> None:
        if cut:
            self.reporter.alert(
                "data.truncated", f"{cut:,} of {total:,} rows were longer than {limit:,} tokens and lost their end."
            )

    def _report_dropped(self, errors: Sequence[InputError], rows: int) -> None:
        counts = Counter(error.code for error in errors)
        for code, count in counts.most_common():
            first = next(error for error in errors if error.code == code)
            self.reporter.alert(
                code,
                f"{count:,} of {rows:,} rows are left out. The first: {first.message} {first.why}".strip(),
                rows=count,
                where=first.where,
                fix=first.fix,
            )

    # --- rewards ----------------------------------------------------------------------------------------------------

    def _rewards(self) -> Rewards | None:
        """The reward functions of a job that has any; a user's file must be the one that was approved."""
        if self.spec.method not in ("grpo", "rloo"):
            return None
        from tunesmith.executors.kernel import rewards

        return rewards.load(self.spec, self.attempt.reward_hashes)

    def _try_rewards(self, scorer: Rewards | None, rows: Rows) -> None:
        """Every reward on a few rows, before anything expensive is done."""
        if scorer is None:
            return
        from tunesmith.executors.kernel import rewards

        self.reporter.progress("preflight", 0, 1, unit="checks")
        for finding in rewards.dry_run(scorer, self._prompts(rows)):
            self.reporter.alert(finding.code, finding.message, finding.level, where=finding.where, fix=finding.fix)

    def _prompts(self, rows: Rows) -> Sequence[Any]:
        if rows.tables is None:
            return rows.train
        from tunesmith.executors.kernel.data import Prompt

        table = rows.tables.train
        every = zip(table.numbers, table.columns["prompt"], table.kept, strict=True)
        return [Prompt(number, [], prompt, kept) for number, prompt, kept in every]

    # --- the model --------------------------------------------------------------------------------------------------

    def _net(self, model_folder: Path) -> Net:
        from tunesmith.executors.kernel.loops import model

        device = choose_device(self.spec.hardware, self.seat)
        self.reporter.progress("loading", 2, 3, unit="parts")
        net = model.load(model_folder, self.spec, device)
        trainable = sum(item.numel() for _, item in net.trainable())
        several = f", in {self.seat.world} processes" if self.seat.world > 1 else ""
        said = f"Training {trainable:,} parameters of {self.spec.model.id} on {device}{several}."
        self.reporter.emit(Kind.LOG, {"level": "info", "message": said, **ran_on(net.causal, device)})
        return net

    def _preflight(self, net: Net, rows: Rows, pad_id: int, ranks: Ranks) -> None:
        from tunesmith.executors.kernel.loops import methods, selftest

        self.reporter.progress("preflight", 0, 1, unit="checks")
        net.packed = self.spec.train.packing is True
        verdict = selftest.check(net, methods.probes(self.spec, rows.train), pad_id=pad_id)
        net.packed, net.forked, net.chunked = map(ranks.agree, (net.packed, net.forked, net.chunked))
        for problem in verdict.problems:
            self.reporter.log(f"Self-test: {problem}.", "warning")
        if verdict.packing is not None and net.packed:
            self.reporter.log(f"Self-test: packed and single rows agree (difference {verdict.packing:.1e}).")
        self.reporter.progress("preflight", 1, 1, unit="checks")

    def _try_step(self, engine: Engine) -> None:
        """The largest step there can be, before anything is spent."""
        from tunesmith.executors.kernel.preflight import Preflight

        self.reporter.progress("preflight", 0, 1, unit="steps")
        about = {"job": self.attempt.job, "spec": self.facts["spec_hash"]}
        cache = home_of(self.folder) / "cache" / "preflight"
        Preflight(engine, cache, about, reporter=self.reporter, pause=self._pause).run()
        self.reporter.progress("preflight", 1, 1, unit="steps")

    def _compile(self, engine: Engine, rows: Rows, pad_id: int) -> None:
        from tunesmith.executors.kernel.loops import batches, compiled, methods

        net, steps = engine.net, engine.total - engine.cursor.step
        probes, room = methods.probes(self.spec, rows.train), engine.method.room
        budget = min(room.tokens, int(self.spec.train.micro_batch) * int(self.spec.train.max_length))
        batch = (batches.packed(probes, budget) if net.packed else batches.padded(probes, room.rows, pad_id))[0]

        def told(why: str) -> None:
            self.reporter.log(f"Layers are no longer compiled: {why}.", "warning")

        self.reporter.progress("preflight", 0, 1, unit="checks")
        verdict = compiled.offer(net, batch, steps=steps, told=told)
        if verdict.kept:
            self.reporter.log(f"Layers are compiled: {verdict.gain:.2f} times as fast, in {verdict.seconds:.0f} s.")
        else:
            self.reporter.log(f"Layers are not compiled: {verdict.why}.", "warning" if verdict.gain is None else "info")
        self.reporter.progress("preflight", 1, 1, unit="checks")

    def _engine(
        self, net: Net, rows: Rows, tokenizer: Any, model_folder: Path, scorer: Rewards | None, ranks: Ranks
    ) -> Engine:
        from tunesmith.executors.kernel.loops import methods
        from tunesmith.executors.kernel.loops.engine import Engine

        setting = methods.Setting(
            spec=self.spec,
            net=net,
            tokenizer=tokenizer,
            pad_id=_pad_id(tokenizer),
            model_folder=model_folder,
            cache=home_of(self.folder) / "cache",
            reporter=self.reporter,
            stopped=self.control.stop,
            scorer=scorer,
            ranks=ranks,
        )
        method, evaluation = methods.make(setting, rows.train, rows.eval)
        engine = Engine(
            net,
            method,
            self.spec.train,
            reporter=self.reporter,
            control=self.control,
            checkpoints=self.checkpoints,
            facts=self.facts,
            evaluation=evaluation,
            task=self._task(),
            ranks=ranks,
        )
        if scorer is not None:
            scorer.state.max_steps = engine.total
            self.reporter.listeners.append(scorer.state.note)
        for each in (method, evaluation):
            self._foresee(each, engine)
        return engine

    def _foresee(self, method: Any, engine: Engine) -> None:
        """What the model thinks before it changes, where that will be asked for later and could not be known then."""
        from tunesmith.executors.kernel.loops import methods

        size = int(self.spec.train.effective_batch)
        needed = sorted(engine.rows_ahead() if method is engine.method else range(len(method.rows)))
        chunks = (needed[start : start + size] for start in range(0, len(needed), size))
        for done in methods.foresee(method, chunks):
            self.reporter.progress("reference", done, len(needed), unit="rows")
            self._pause()

    def _trl_engine(self, net: Net, rows: Rows, tokenizer: Any, scorer: Rewards | None) -> TrlEngine:
        from tunesmith.executors.kernel import weights
        from tunesmith.executors.kernel.loops import trl

        if self.seat.world > 1:
            raise InputError(
                f"The method {self.spec.method} runs on one device.",
                code="hardware.gpus",
                where="hardware",
                why="TRL's trainer serves it, and only our own loops share a step between processes.",
                fix="Leave hardware out.",
            )
        teacher = None
        if self.spec.method == "distill":
            if self.spec.distill.teacher is None:
                raise trl.no_teacher()
            folder = weights.locate(ModelRef(id=self.spec.distill.teacher), home_of(self.folder) / "cache")
            teacher = trl.load_teacher(folder, self.spec, net, tokenizer)
        return trl.TrlEngine(
            net,
            rows.tables,
            self.spec,
            tokenizer,
            reporter=self.reporter,
            control=self.control,
            checkpoints=self.checkpoints,
            facts=self.facts,
            task=self._task(),
            rewards=scorer,
            teacher=teacher,
        )

    def _task(self) -> dict[str, Any]:
        return {"data": self.attempt.data_fingerprint, "model": self.spec.model.id, "method": self.spec.method}

    def _resume(self, engine: Engine | TrlEngine, ranks: Ranks) -> None:
        """Go on from the checkpoint that rank 0 found, if it found one; then every rank holds the same."""
        path = ranks.gather(None if self.seat.rank else self._checkpoint())[0]
        if path is not None:
            engine.resume(Path(path))
            origin = Path(path).parent.parent.name
            self.reporter.log(f"Going on from step {engine.cursor.step:,} ({origin}).")
        if ranks.world > 1:
            from tunesmith.executors.kernel.loops.ranks import fingerprint

            ranks.same("task", engine.task)
            ranks.same("weights", fingerprint([item for _, item in engine.net.trainable()]))

    def _checkpoint(self) -> str | None:
        path = earlier.newest(self.folder, self.attempt, self.reporter)
        return None if path is None else str(path)

    # --- what comes out ---------------------------------------------------------------------------------------------

    def _deliver(self, net: Net, tokenizer: Any, step: int) -> None:
        kind = "adapter" if net.adapted else "model"
        self.reporter.progress("saving", 0, 1, unit="results", step=step)
        signed: list[checkpoint.Written] = []

        def fill(folder: Path) -> None:
            inside = folder / kind
            inside.mkdir()
            net.save(inside)
            if not net.adapted:
                tokenizer.save_pretrained(str(inside))
            signed.append(checkpoint.sign(inside, step=step, **self.facts))

        checkpoint.write(self.folder / "output", fill, step=step, **self.facts)
        self.reporter.emit(
            Kind.ARTIFACT,
            {"kind": kind, "path": f"output/{kind}", "bytes": signed[0].bytes, "sha256": signed[0].sha256},
            step,
        )
        self.reporter.progress("saving", 1, 1, unit="results", step=step)

    def _abandon(self, error: TunesmithError) -> None:
        """End now: another rank is gone, and this one's main thread waits for it where nothing wakes it."""
        if self.track is not None:
            self.track.close()
        self.reporter.state("failed", error)
        os._exit(_code(error))

    def _pause(self) -> None:
        if self.control.stop():
            raise stopped("before training began")


def _code(trouble: TunesmithError) -> int:
    """The exit code of an attempt that an error ended."""
    return TOLD_TO if isinstance(trouble, Stopped) else BAD_INPUT if trouble.exit_code == 2 else FAILED


def _settled(spec: Any) -> None:
    """Refuse a spec in which something is still `auto`: choosing is the plan's work."""
    open_keys = [
        f"{part}.{key}"
        for part in ("adapter", "train")
        for key, value in plain(getattr(spec, part)).items()
        if value == "auto" and not (part == "adapter" and (spec.adapter.kind == "none" or key == "targets"))
    ]
    if open_keys:
        raise InputError(
            f"The spec leaves {', '.join(open_keys)} open.",
            code="spec.auto",
            where=open_keys[0],
            why="An attempt runs a plan in which every auto has been chosen.",
            fix="Submit the job through a plan.",
        )


def _pad_id(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
