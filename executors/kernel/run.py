"""One attempt from its attempt.json to its results. The one place where data, weights and loops meet.

Exit codes: 0 succeeded, 75 ended at a checkpoint because told to, 2 the input cannot be used, 1 anything else. The last
state event says the same in words; tracebacks go to the log only.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.control import Control
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.spoken import speak
from tunesmith.executors.kernel.track import Track
from tunesmith.orchestrator.errors import InputError, JobFailed, Stopped, StorageError, TunesmithError
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import Attempt, build, plain, spec_hash

if TYPE_CHECKING:
    import torch

    from tunesmith.executors.kernel.data import Encoded, Prepared
    from tunesmith.executors.kernel.loops.engine import Engine
    from tunesmith.executors.kernel.loops.model import Net

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
        reporter.listeners += [track, speak]
        reporter.state("starting")
        try:
            Run(folder, attempt, reporter, control).go()
        except BaseException as error:
            trouble = explained(error)
            if trouble.code == "internal":
                traceback.print_exc()
            track.close()
            reporter.state("stopped" if isinstance(trouble, Stopped) else "failed", trouble)
            return TOLD_TO if isinstance(trouble, Stopped) else BAD_INPUT if trouble.exit_code == 2 else FAILED
        track.close()
        reporter.state("succeeded")
    return SUCCEEDED


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokenised rows, those held out apart."""

    train: list[Encoded]
    eval: list[Encoded]


class Run:
    """The phases of one attempt, in order; between them a stop is obeyed."""

    def __init__(self, folder: Path, attempt: Attempt, reporter: Reporter, control: Control) -> None:
        self.folder = folder
        self.attempt = attempt
        self.spec = attempt.spec
        self.reporter = reporter
        self.control = control
        self.checkpoints = folder / "checkpoints"
        self.facts = {"attempt": attempt.number, "spec_hash": spec_hash(attempt.spec)}

    def go(self) -> None:
        """All of it. Raises TunesmithError, Stopped among them, or whatever a library raises."""
        _settled(self.spec)
        self.reporter.progress("loading", 0, 3, unit="parts")
        prepared = self._data()
        self._pause()
        tokenizer, model_folder = self._tokenizer()
        self.reporter.progress("loading", 1, 3, unit="parts")
        rows = self._encode(prepared, tokenizer)
        self._pause()
        net = self._net(model_folder)
        self.reporter.progress("loading", 3, 3, unit="parts")
        self._pause()
        pad_id = _pad_id(tokenizer)
        self._preflight(net, rows, pad_id)
        engine = self._engine(net, rows, pad_id)
        self._resume(engine)
        self.reporter.state("running")
        outcome = engine.run()
        if outcome.ended == "stopped":
            raise _stopped(f"at step {outcome.step:,} of {engine.total:,}; it goes on from its checkpoint")
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
        from tunesmith.executors.kernel.data import encode_many
        from tunesmith.executors.kernel.data.load import no_usable_rows

        limit = int(self.spec.train.max_length)
        total = len(prepared.train) + len(prepared.eval)
        parts: list[list[Encoded]] = []
        lost: list[InputError] = []
        cut = done = 0
        for examples in (prepared.train, prepared.eval):
            kept: list[Encoded] = []
            for result in encode_many(examples, tokenizer, limit):
                done += 1
                if isinstance(result, InputError):
                    lost.append(result)
                else:
                    kept.append(result)
                    cut += result.truncated
                self.reporter.progress("tokenizing", done, total, unit="rows")
                if done % 4096 == 0:
                    self._pause()
            parts.append(kept)
        self._report_dropped(lost, total)
        if cut:
            self.reporter.alert(
                "data.truncated", f"{cut:,} of {total:,} rows were longer than {limit:,} tokens and lost their end."
            )
        if not parts[0]:
            raise no_usable_rows(lost)
        return Rows(*parts)

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

    # --- the model --------------------------------------------------------------------------------------------------

    def _net(self, model_folder: Path) -> Net:
        from tunesmith.executors.kernel.loops import model

        device = choose_device(self.spec.hardware)
        self.reporter.progress("loading", 2, 3, unit="parts")
        net = model.load(model_folder, self.spec, device)
        trainable = sum(item.numel() for _, item in net.trainable())
        self.reporter.log(f"Training {trainable:,} parameters of {self.spec.model.id} on {device}.")
        return net

    def _preflight(self, net: Net, rows: Rows, pad_id: int) -> None:
        from tunesmith.executors.kernel.loops import selftest

        self.reporter.progress("preflight", 0, 1, unit="checks")
        net.packed = self.spec.train.packing is True
        verdict = selftest.check(net, rows.train, pad_id=pad_id)
        for problem in verdict.problems:
            self.reporter.log(f"Self-test: {problem}.", "warning")
        if verdict.packing is not None and net.packed:
            self.reporter.log(f"Self-test: packed and single rows agree (difference {verdict.packing:.1e}).")
        self.reporter.progress("preflight", 1, 1, unit="checks")

    def _engine(self, net: Net, rows: Rows, pad_id: int) -> Engine:
        from tunesmith.executors.kernel.loops.engine import Engine
        from tunesmith.executors.kernel.loops.sft import Sft

        if self.spec.method != "sft":
            raise InputError(
                f"The method {self.spec.method} is not available yet.",
                code="method.unavailable",
                where="method",
                fix="Use sft.",
            )
        train = self.spec.train

        def method(chosen: list[Encoded]) -> Sft:
            return Sft(
                net,
                chosen,
                micro_batch=int(train.micro_batch),
                max_length=int(train.max_length),
                packing=train.packing is True,
                pad_id=pad_id,
            )

        return Engine(
            net,
            method(rows.train),
            train,
            reporter=self.reporter,
            control=self.control,
            checkpoints=self.checkpoints,
            facts=self.facts,
            evaluation=method(rows.eval),
            task={"data": self.attempt.data_fingerprint, "model": self.spec.model.id, "method": self.spec.method},
        )

    def _resume(self, engine: Engine) -> None:
        """Go on from the newest checkpoint that verifies: an own one first, else one of the attempt named."""
        checkpoint.sweep(self.checkpoints)
        places = [self.checkpoints]
        named = self.attempt.resume_from
        if named is not None:
            job = self.folder.parent.parent
            path = (job / named).resolve()
            if not path.is_relative_to(job.resolve()):
                raise InputError(
                    "A checkpoint must lie in the job's own folder.", code="checkpoint.outside", where=named
                )
            places += [path, path.parent]
        for place in places:
            found = checkpoint.newest_verified(place) if checkpoint.STEP.match(place.name) is None else _only(place)
            for finding in found.passed_over:
                self.reporter.alert(finding.code, finding.message, where=finding.where)
            if found.path is not None:
                engine.resume(found.path)
                self.reporter.log(f"Going on from step {engine.cursor.step:,} ({found.path.parent.parent.name}).")
                return
        if named is not None:
            self.reporter.alert("checkpoint.none", "No checkpoint verifies, so training starts from the beginning.")

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

    def _pause(self) -> None:
        if self.control.stop():
            raise _stopped("before training began")


def explained(error: BaseException) -> TunesmithError:
    """Any exception as one with a code: oom.cuda, oom.host, storage.*, internal, or its own."""
    if isinstance(error, TunesmithError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return _stopped("by an interrupt")
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return JobFailed(
            "The GPU ran out of memory.",
            code="oom.cuda",
            why=text.split(". ")[0][:300],
            fix="Lower train.micro_batch or train.max_length, or set train.activation_checkpointing to true.",
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return JobFailed(
            "The machine ran out of memory.",
            code="oom.host",
            why=text[:300],
            fix="Lower train.micro_batch or train.max_length, or choose a smaller model.",
        )
    if isinstance(error, OSError):
        try:
            with checkpoint.storage_errors(Path(error.filename or "results")):
                raise error
        except StorageError as known:
            return known
        except OSError:
            pass
    return JobFailed(
        "The training process met an error that it did not expect.",
        code="internal",
        why=f"{type(error).__name__}: {(text.splitlines() or [''])[0][:200]}",
        fix="The log holds the details. Retry the job: it goes on from its last checkpoint.",
    )


def home_of(folder: Path) -> Path:
    """The home that an attempt's folder belongs to: TUNESMITH_HOME, else by where the folder lies."""
    named = os.environ.get("TUNESMITH_HOME")
    if named:
        return Path(named)
    parents = folder.parents
    return parents[3] if len(parents) > 3 and parents[0].name == "attempts" and parents[2].name == "jobs" else folder


def offline() -> bool:
    """Whether the environment forbids asking the Hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def choose_device(hardware: Any) -> torch.device:
    """The device to train on: a GPU where there is one and the spec does not say cpu. Sets the threads of a CPU."""
    import torch

    if hardware != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    return torch.device("cpu")


def cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return count


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


def _only(folder: Path) -> checkpoint.Found:
    """One named checkpoint, if it verifies."""
    from tunesmith.orchestrator.nouns import Finding

    try:
        return checkpoint.Found(folder, checkpoint.verify(folder), ())
    except StorageError as error:
        finding = Finding(level="warning", code=error.code, message=f"{error.message} {error.why}", where=folder.name)
        return checkpoint.Found(None, {}, (finding,))


def _pad_id(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _stopped(where: str) -> Stopped:
    return Stopped(f"The attempt was told to end {where}.", code="stopped")
