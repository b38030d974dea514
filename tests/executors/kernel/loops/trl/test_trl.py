"""TRL's trainers under our roof: each method trains and delivers as our own loops do, and KTO is TRL's own."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tunesmith.executors.kernel import checkpoint
from tunesmith.executors.kernel.loops import trl
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.events import Kind
from tunesmith.orchestrator.nouns import KtoSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

REAL = Path(__file__).parents[6] / "shared" / "data" / "kto_en_demo.json"


# --- what is trained -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", trl.METHODS)
def test_a_method_trains_saves_and_loads_with_plain_libraries(method, bench, student, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.trainer import base_trainer

    def send(*args, **kwargs):
        raise AssertionError("telemetry")

    monkeypatch.setattr(base_trainer, "send_telemetry", send)
    run = bench(method)
    before, base = run.weights(), run.engine.net.causal.get_input_embeddings().weight.clone()
    outcome = run.engine.run()
    assert (outcome.ended, outcome.step) == ("finished", 6)
    assert run.engine.restore_best() == 6

    losses = run.series("train/loss")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    for key in ("learning_rate", "grad_norm", "num_tokens", "tokens_per_second", "epoch", "entropy"):
        if key != "entropy" or method != "reward":
            assert sorted(run.series(f"train/{key}")) == [1, 2, 3, 4, 5, 6], key
    own = {"kto": "rewards/margins", "reward": "accuracy", "rloo": "reward", "distill": "completions/mean_length"}
    assert len(run.series(f"train/{own[method]}")) >= 3
    assert sorted(run.series("eval/loss")) == sorted(run.series(f"eval/{own[method]}")) == [0, 3, 6]
    assert [round(rate, 6) for rate in run.series("train/learning_rate").values()][:2] == [0.0, 0.01]
    assert run.series("train/epoch")[5] == 1.0
    assert not any("runtime" in key or "per_second" in key for event in run.events(Kind.METRIC)
                   for key in event.values if key != "train/tokens_per_second")  # fmt: skip
    last = [event for event in run.events(Kind.PROGRESS) if event.values["phase"] == "training"][-1].values
    assert (last["done"], last["total"], last["unit"], last["eta_seconds"]) == (6, 6, "steps", 0.0)

    # only the adapter has moved, and the score head where there is one
    after = run.weights()
    assert all((after[name] - before[name]).abs().max() > 1e-5 for name in before)
    assert torch.equal(run.engine.net.causal.get_input_embeddings().weight, base)
    assert all(item.dtype == torch.float32 for item in after.values())

    # a checkpoint holds numbers and text, all of them named in its manifest
    (folder,) = run.folders()
    manifest = checkpoint.verify(folder)
    assert (manifest["step"], manifest["attempt"], manifest["spec_hash"]) == (4, 1, "0")
    assert {path.suffix for path in folder.rglob("*")} == {".json", ".safetensors"}
    (told,) = run.events(Kind.CHECKPOINT)
    assert told.values["path"] == "checkpoints/step-00000004"
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "events.jsonl"]

    # what is delivered is what was trained, to anybody
    out = run.folder / "output"
    out.mkdir()
    run.engine.net.save(out)
    kind, more = AutoModelForCausalLM, {}
    if method == "reward":
        kind, more = AutoModelForSequenceClassification, {"num_labels": 1, "pad_token_id": 256}
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    plain = PeftModel.from_pretrained(kind.from_pretrained(str(student), dtype=torch.float32, **more), str(out)).eval()
    ids = torch.tensor([[257, 40, 41, 42, 258]])
    mine = run.engine.net.outer.eval()
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, mine(input_ids=ids).logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kto", "reward"])
def test_the_rows_of_the_ledger_are_the_rows_trained(method, bench, rows_for):
    """Every row has a length of its own; the tokens of each step add up to those of its rows, over three epochs."""
    rows = [{**row, "prompt": "x" * (4 * 2**at)} for at, row in enumerate(rows_for[method][:6])]
    run = bench(method, rows=rows, eval=0.0, train={"effective_batch": 4, "max_steps": 6, "max_length": 512})
    outcome = run.engine.run()
    columns = [run.engine.rows.train.columns[name] for name in (("chosen", "rejected") if method == "reward" else ())]
    if method == "kto":
        both = run.engine.rows.train.columns
        columns = [[ask + said for ask, said in zip(both["prompt"], both["completion"], strict=True)]]
    lengths = [
        sum(len(run.tokenizer.apply_chat_template(column[at])["input_ids"]) for column in columns) for at in range(6)
    ]
    assert len(set(lengths)) == 6
    counts = list(run.series("train/num_tokens").values())
    steps = [counts[0], *(later - earlier for earlier, later in pairwise(counts))]
    assert steps == [sum(lengths[row] for row in step) for step in outcome.ledger]
    assert [len(step) for step in outcome.ledger] == [4, 2] * 3
    assert [sorted(outcome.ledger[at] + outcome.ledger[at + 1]) for at in (0, 2, 4)] == [list(range(6))] * 3
    assert len({tuple(outcome.ledger[at]) for at in (0, 2, 4)}) == 3


@pytest.mark.slow
def test_rloo_asks_for_the_rows_of_the_ledger_and_tells_the_rewards_of_them(bench, rows_for):
    grpo = {"num_generations": 3, "max_completion": 6, "num_iterations": 2}
    rows = rows_for["rloo"][:7]
    run = bench("rloo", rows=rows, eval=0.0, train={"effective_batch": 4, "max_steps": 8}, grpo=grpo)
    outcome = run.engine.run()
    seen = run.engine.rewards.rewards[0].call.__globals__["SEEN"]
    assert outcome.ledger[0::2] == outcome.ledger[1::2]
    assert [step for step, _, _ in seen] == [0, 2, 4, 6]
    for (_, prompts, answers), numbers in zip(seen, outcome.ledger[0::2], strict=True):
        assert prompts == [f"Say {row}." for row in numbers for _ in range(3)]
        assert answers == [str(row) for row in numbers for _ in range(3)]
    # seven rows make two steps of four: the second is filled up from the beginning of its epoch
    first = outcome.ledger[0] + outcome.ledger[2]
    assert sorted(first[:7]) == list(range(7))
    assert first[7] == first[0]
    assert min(run.series("train/letters").values()) > 0
    # 1 * short + 0.5 * vowels, where vowels may not apply
    for event in run.events(Kind.SAMPLE):
        short, vowels = event.values["rewards"]["short"], event.values["rewards"]["vowels"]
        assert event.values["reward"] == pytest.approx(short + 0.5 * (vowels or 0))
    samples = run.events(Kind.SAMPLE)
    assert {event.values["row"] for event in samples if event.step == 0} == {outcome.ledger[0][0]}


@pytest.mark.slow
def test_distillation_brings_the_student_closer_to_its_teacher(bench):
    run = bench("distill", train={"max_steps": 12, "eval_steps": 12, "save_steps": 100, "scheduler": "constant"})
    run.engine.run()
    measured = run.series("eval/loss")
    assert measured[12] < 0.9 * measured[0]


@pytest.mark.slow
def test_a_reward_model_learns_which_answer_is_better(bench):
    run = bench("reward", eval=0.3, train={"max_steps": 12, "eval_steps": 12, "save_steps": 100})
    run.engine.run()
    assert run.series("eval/accuracy")[12] == 1.0
    assert run.series("eval/loss")[12] < 0.3 < run.series("eval/loss")[0]


# --- against TRL alone ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_kto_equals_a_trainer_of_ones_own(kind, bench, student, tmp_path, rows_for):
    """The same losses, figures and weights as KTOTrainer configured by hand over the same rows, 5 steps of 2 x 2."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import KTOConfig, KTOTrainer

    run = bench(
        "kto", eval=0.0, adapter={"kind": kind}, kto=KtoSpec(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7),
        train={"max_steps": 5, "learning_rate": 1e-3, "weight_decay": 0.01, "max_length": 31},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(str(student), dtype=torch.float32)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        state = get_peft_model_state_dict(run.engine.net.outer, save_embedding_layers=False)
        set_peft_model_state_dict(model, {name: item.clone() for name, item in state.items()})
    outcome = run.engine.run()

    rows = [
        {
            "prompt": [{"role": "user", "content": rows_for["kto"][number]["prompt"]}],
            "completion": [{"role": "assistant", "content": rows_for["kto"][number]["completion"]}],
            "label": rows_for["kto"][number]["label"],
        }
        for step in outcome.ledger
        for number in step
    ]
    logs = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                kept.append(dict(logs))

    kept = logs
    trainer = KTOTrainer(
        model=model,
        args=KTOConfig(
            output_dir=str(tmp_path / "bare"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            activation_checkpointing=False, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=5, learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.01,
            beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, max_length=31, logging_steps=1,
            save_strategy="no", dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(str(student)),
        callbacks=[Keep()],
    )  # fmt: skip
    trainer.train()
    assert len(logs) == 5
    # full weights go through the very same operations; an adapter's product is computed by a function of our own
    exact = 0.0 if kind == "none" else 2e-5
    for name in ("loss", "grad_norm", "learning_rate", "kl", "rewards/chosen", "logps/chosen", "num_tokens"):
        for step, value in run.series(f"train/{name}").items():
            assert value == pytest.approx(logs[step - 1][name], rel=exact, abs=exact), (name, step)
    theirs = {name: item for name, item in model.named_parameters() if item.requires_grad}
    assert theirs.keys() == run.weights().keys()
    for name, item in run.weights().items():
        assert (theirs[name] - item).abs().max() <= exact, name
    assert run.engine.rows.cut > 5


@pytest.mark.slow
def test_kto_on_real_rows(bench, tmp_path):
    if not REAL.exists():
        pytest.skip(f"{REAL} is not here")
    run = bench("kto", source=REAL, eval=0.0, train={"max_steps": 2, "max_length": 320})
    found = run.engine.rows
    assert found.total == len(found.train) + len(found.eval) + len(found.lost) == 300
    assert len(found.train) > 90
    assert found.cut > 10
    assert {error.code for error in found.lost} <= {"data.no_supervised_tokens"}
    labels = found.train.columns["label"]
    assert set(map(type, labels)) == {bool}
    assert 0 < sum(labels) < len(labels)
    turns = found.train.columns["prompt"][0]
    assert turns[-1]["role"] == "user"
    outcome = run.engine.run()
    assert outcome.step == 2
    assert all(0 < loss < 1 for loss in run.series("train/loss").values())
    assert len({number for step in outcome.ledger for number in step}) == 8


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_default_of_trl_is_left_that_would_change_a_job(bench):
    for method in trl.METHODS:
        run = bench(method, name=method, train={"weight_decay": 0.1, "max_grad_norm": 0.5, "scheduler": "linear"})
        trainer = run.engine._make()
        args = trainer.args
        assert (args.bf16, args.fp16, args.use_cpu, args.report_to) == (False, False, True, [])
        assert (args.activation_checkpointing, args.gradient_checkpointing) == (False, False)
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == (8 if method == "rloo" else 4)
        assert (args.weight_decay, args.max_grad_norm, args.learning_rate) == (0.1, 0.5, 1e-2)
        assert (args.lr_scheduler_type, args.warmup_steps, args.max_steps, args.seed) == ("linear", 1, 6, 42)
        assert (args.save_strategy, args.eval_strategy, args.logging_nan_inf_filter) == ("no", "no", False)
        assert (args.trust_remote_code, args.push_to_hub, args.disable_dropout) == (False, False, True)
        names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
        assert names == ["DefaultFlowCallback", "Watch"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kto", "reward"])
def test_half_precision_and_activation_checkpointing(method, bench):
    run = bench(method, train={"dtype": "bfloat16", "activation_checkpointing": True, "max_steps": 3})
    frozen = {item.dtype for item in run.engine.net.outer.parameters() if not item.requires_grad}
    assert run.engine.run().step == 3
    assert frozen == {torch.bfloat16}
    assert {item.dtype for item in run.weights().values()} == {torch.float32}
    assert run.series("train/loss")[1] > 0


def test_early_stopping_needs_rows(bench):
    with pytest.raises(InputError) as caught:
        bench("reward", eval=0.0, train={"early_stopping": 1})
    assert caught.value.code == "train.early_stopping"


def test_a_teacher_of_another_vocabulary_is_refused(bench, make_folder):
    run = bench("distill")
    spec = run.engine.spec
    for name, more in (("wider", {"vocab_size": 300}), ("shuffled", {})):
        folder = make_folder(name, **more)
        if name == "shuffled":
            path = folder / "tokenizer.json"
            doc = json.loads(path.read_text())
            words = doc["model"]["vocab"]
            words["a"], words["b"] = words["b"], words["a"]
            path.write_text(json.dumps(doc))
        with pytest.raises(InputError) as caught:
            trl.load_teacher(folder, spec, run.engine.net, run.tokenizer)
        assert caught.value.code == "distill.vocabulary"
