"""Runs ranks quickly: imports once, then forks them for each line on stdin and prints how each of them ended.

A line is {"body": NAME, "world": N, "folder": PATH, ...}; each rank runs the body and leaves what it returns in
FOLDER/R.json. The processes are real, and what they say to each other goes over gloo.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import peft  # noqa: F401  (the loops import it late)
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.control import Control
from tunesmith.executors.kernel.crew import Seat
from tunesmith.executors.kernel.loops import methods
from tunesmith.executors.kernel.loops import model as models
from tunesmith.executors.kernel.loops import ranks as meeting
from tunesmith.executors.kernel.loops.dpo import Dpo
from tunesmith.executors.kernel.loops.engine import Engine
from tunesmith.executors.kernel.loops.forks import Tree
from tunesmith.executors.kernel.loops.grpo import Grpo, Judge
from tunesmith.executors.kernel.loops.reference import Reference
from tunesmith.executors.kernel.loops.rollout import Rollout
from tunesmith.executors.kernel.loops.sft import Sft
from tunesmith.executors.kernel.preflight import Preflight
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.executors.kernel.silent import Silent
from tunesmith.orchestrator.errors import JobFailed, TunesmithError
from tunesmith.orchestrator.events import Kind, decode
from tunesmith.orchestrator.nouns import AdapterSpec, DataSource, GrpoSpec, JobSpec, ModelRef, TrainSpec

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def together(seat, folder, silence=60.0):
    """The ranks, met through a file of the folder."""
    if seat.world == 1:
        return meeting.ALONE

    def lost(error):
        return JobFailed("lost", code="ranks.lost", why=str(error))

    path = folder / "meet"
    return meeting.join(
        path, seat.rank, seat.world, CPU, lost=lost, check=lambda: None, silence=timedelta(seconds=silence)
    )


def messages(seat, folder):
    """All that ranks say to each other, once."""
    ranks = together(seat, folder)
    seen = {"shared": ranks.share(range(7)), "flags": [ranks.agree(seat.rank == 0), ranks.agree(seat.rank == 1)]}
    draw = torch.Generator().manual_seed(seat.rank)
    tensors = [
        torch.randn(5, 7, generator=draw),
        torch.randn(3, 4, generator=draw).t(),
        torch.zeros(0, 2),
        torch.tensor(1.5 + seat.rank),
        torch.randn(2, generator=draw, dtype=torch.float64),
        torch.randn(6, generator=draw).bfloat16(),
        torch.randn(meeting.BUCKET_BYTES // 4 + 1, generator=draw),
    ]
    ranks.sum_(tensors)
    save_file({str(at): item.contiguous() for at, item in enumerate(tensors)}, folder / f"{seat.rank}.safetensors")
    seen["gathered"] = ranks.gather({"rank": seat.rank, "word": "ä" * seat.rank, "third": 1 / 3, "none": None})
    ranks.same("rows", [1, 2])
    try:
        ranks.same("weights", seat.rank == seat.world - 1)
    except JobFailed as error:
        seen["apart"] = [error.code, error.message, error.why]
    ranks.leave()
    seen["over"] = not torch.distributed.is_initialized()
    return seen


def quiet(seat, folder):
    """The last rank goes on living and says nothing."""
    ranks = together(seat, folder, silence=1.0)
    while seat.rank == seat.world - 1:
        if (folder / "0.json").exists():
            return {}
    return {"agreed": ranks.agree(True)}


def killed(seat, folder):
    """The last rank is killed while the others wait for it."""
    ranks = together(seat, folder)
    ranks.sum_([torch.ones(3)])
    if seat.rank == seat.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum_([torch.ones(3)])


def resolved(adapter, settings, grpo):
    """A spec of a tiny model."""
    usual = {
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "max_length": 64,
        "dtype": "float32",
        "optimizer": "adamw",
        "activation_checkpointing": False,
        "save_steps": 1000,
        "eval_steps": 1000,
    }
    return JobSpec(
        model=ModelRef(id="tiny"),
        data=(DataSource(source="rows.jsonl"),),
        adapter=AdapterSpec(**adapter),
        train=TrainSpec(**{**usual, **settings}),
        grpo=GrpoSpec(**grpo),
    )


def made(method, net, spec, rows, ranks, reporter, control):
    """A method over rows given as plain data."""
    train = spec.train
    sizes = {"micro_batch": train.micro_batch, "max_length": 64, "packing": train.packing, "pad_id": 0, "ranks": ranks}
    if method == "sft":
        return Sft(net, [Row(**row) for row in rows], **sizes)
    if method == "dpo":
        trees = [Tree(row["row"], row["prompt"], row["answers"]) for row in rows]
        return Dpo(net, trees, spec.dpo, reference=Reference(None, len(rows), 2, ranks=ranks), **sizes)
    rollout = Rollout(net, stops=frozenset({2}), max_completion=8, temperature=1.0, slots=16)
    judge = Judge(lambda ids: " ".join(map(str, ids)), Evens())
    asked = [Asked(row["row"], row["ids"]) for row in rows]
    voice = {"reporter": reporter, "seed": train.seed, "stopped": control.stop}
    return Grpo(net, asked, spec.grpo, rollout=rollout, judge=judge, **voice, **sizes)


def train(
    seat, folder, adapter, settings, rows, held=(), method="sft", grpo=(), resume=None, spare=False, deeds=(), dry=None
):
    """A run of the engine on a tiny model.

    With `dry` (a step, a limit) the last rank has no memory for larger batches from that step on; step -1 is before the
    first one, which is then tried.

    `deeds` are steps: after `stop` rank 0 gets TERM, in the rollout after `torn` as well, after `kill` rank 1 dies.
    """
    deeds = dict(deeds)
    spec = resolved(adapter, settings, dict(grpo))
    torch.manual_seed(7)
    net = models.ready(LlamaForCausalLM(LlamaConfig(**SHAPE)), spec, CPU)
    if spare:
        net.outer.register_parameter("spare", torch.nn.Parameter(torch.ones(3, 3)))
    reporter = (Silent if seat.rank else Reporter)(folder, 1)
    control = Control(Path(os.devnull) if seat.rank else folder / "control")
    ranks = together(seat, folder)
    ranks.same("weights", meeting.fingerprint([item for _, item in net.trainable()]))
    engine = Engine(
        net,
        made(method, net, spec, rows, ranks, reporter, control),
        spec.train,
        reporter=reporter,
        control=control,
        checkpoints=folder / "checkpoints",
        facts={"attempt": 1, "spec_hash": "0"},
        evaluation=made(method, net, spec, held, ranks, reporter, control),
        ranks=ranks,
    )
    for _ in methods.foresee(engine.method, [range(len(rows))]):
        pass
    if resume is not None:
        engine.resume(checkpoint.newest_verified(Path(resume) / "checkpoints").path)

    def do(deed, rank, number):
        if deeds.get(deed) == engine.cursor.step and seat.rank == rank:
            os.kill(os.getpid(), number)

    def stepping(usual):
        usual()
        do("stop", 0, signal.SIGTERM)
        do("kill", 1, signal.SIGKILL)

    def generating(usual, *args, **more):
        do("torn", 0, signal.SIGTERM)
        return usual(*args, **more)

    def look(module, given):
        if torch.is_grad_enabled() and engine.cursor.step >= dry[0] and given[0].numel() > dry[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    if dry is not None:
        if seat.rank == seat.world - 1:
            net.causal.get_input_embeddings().register_forward_pre_hook(look)
        if dry[0] < 0:
            Preflight(engine, folder / "cache", {}, reporter=reporter, pause=lambda: None).run()
    engine._step = partial(stepping, engine._step)
    if method == "grpo":
        engine.method.rollout.generate = partial(generating, engine.method.rollout.generate)
    with reporter, control.listening():
        outcome = engine.run()
    if "torn" not in deeds:
        ranks.leave()
    weights = {name: item.detach().contiguous() for name, item in net.trainable()}
    save_file(weights, folder / f"weights-{seat.rank}.safetensors")
    found = {"ended": outcome.ended, "step": outcome.step, "best": outcome.best_step, "ledger": outcome.ledger}
    found |= {"room": [engine.method.room.rows, engine.method.room.tokens], "rungs": engine.ladder.taken}
    return found | {"metrics": [] if seat.rank else metrics(folder)}


def metrics(folder):
    events = map(decode, (folder / "events.jsonl").read_bytes().splitlines())
    return [[event.step, dict(event.values)] for event in events if event is not None and event.kind is Kind.METRIC]


class Asked:
    """A prompt without columns."""

    def __init__(self, row, ids):
        self.row, self.ids, self.prompt, self.columns = row, ids, str(row), {}


class Evens:
    """A reward: the share of even tokens. It cannot be asked about nothing."""

    names = ("evens",)

    def score(self, prompts, completions, completion_ids, columns, step):
        assert completions
        values = [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
        return Earned([[value] for value in values], values)


class Earned:
    """What answers earned."""

    told = {}
    extra = {}
    alerts = ()

    def __init__(self, values, totals):
        self.values, self.totals = values, totals


class Row:
    """A tokenised row."""

    def __init__(self, row, ids, labels):
        self.row, self.ids, self.labels = row, ids, labels


BODIES = {body.__name__: body for body in (messages, quiet, killed, train)}


def forked(body, seat, folder, given):
    warnings.simplefilter("error")
    try:
        found = BODIES[body](seat, folder, **given)
    except TunesmithError as error:
        found = {"error": error.to_doc()}
    (folder / f"{seat.rank}.json").write_text(json.dumps(found))


def main():
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        body, world, folder = given.pop("body"), given.pop("world"), Path(given.pop("folder"))
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                try:
                    forked(body, Seat(rank, world), folder, given)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(70)
            pids.append(pid)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
