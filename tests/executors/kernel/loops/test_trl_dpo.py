"""TRL 1.16's DPOTrainer as the oracle: every loss with its gradients on one batch, and 50 steps of training."""

import random

import pytest

from tunesmith.executors.kernel.loops.dpo import Dpo
from tunesmith.executors.kernel.loops.forks import Tree
from tunesmith.executors.kernel.loops.method import Turn
from tunesmith.executors.kernel.loops.preference import LOSSES
from tunesmith.orchestrator.nouns import DpoSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

STEPS, BATCH, ACCUMULATE = 50, 2, 2
STOP = 2


def make_pairs(count, seed=0):
    """Trees of two answers, of unequal length, each ended by the stop token; every prompt is another one."""
    draw = random.Random(seed)
    return [
        Tree(
            at,
            [
                3 + at % 10,
                13 + at // 10 % 10,
                23 + at // 100,
                *(draw.randrange(3, 40) for _ in range(draw.randint(1, 6))),
            ],
            tuple([*(draw.randrange(3, 40) for _ in range(draw.randint(1, 9))), STOP] for _ in range(2)),
        )
        for at in range(count)
    ]


def as_text(ids):
    return " ".join(f"t{number:02d}" for number in ids)


@pytest.fixture
def make_trainer(make_model, tmp_path):
    """TRL's trainer over the pairs in their order, its adapter filled with a given state."""

    def make(pairs, state, callbacks=(), family="llama", **more):
        from datasets import Dataset
        from peft import LoraConfig, set_peft_model_state_dict
        from tokenizers import Tokenizer, pre_tokenizers
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        words = Tokenizer(WordLevel({f"t{number:02d}": number for number in range(97)}, unk_token="t03"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t00", bos_token="t01", eos_token="t02")
        rows = [
            {
                "prompt": as_text(tree.prompt) + " ",
                "chosen": as_text(tree.answers[0]),
                "rejected": as_text(tree.answers[1]),
            }
            for tree in pairs
        ]
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        settings = {
            "output_dir": str(tmp_path / "trl"),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "gradient_checkpointing": False,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATE,
            "max_steps": STEPS,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "max_grad_norm": 1.0,
            "max_length": None,
            "logging_steps": 1,
            "logging_first_step": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "train_sampling_strategy": "sequential",
        }
        trainer = DPOTrainer(
            model=make_model(family),
            peft_config=config,
            args=DPOConfig(**{**settings, **more}),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        set_peft_model_state_dict(trainer.model, state)  # a fresh adapter's B is zero, and so would be its gradients
        return trainer

    return make


@pytest.fixture
def make_dpo(make_net, make_spec):
    """Our method over the same pairs, and a copy of its adapter's first values in peft's naming."""

    def make(pairs, family="llama", packing=True, **dpo):
        from peft.utils import get_peft_model_state_dict

        net = make_net(make_spec(), family)
        state = get_peft_model_state_dict(net.outer, save_embedding_layers=False)
        method = Dpo(net, pairs, DpoSpec(**dpo), micro_batch=2, max_length=32, packing=packing, pad_id=0)
        return method, {name: item.detach().clone() for name, item in state.items()}

    return make


def test_every_loss_and_its_gradients_equal_trls(make_trainer, make_dpo):
    pairs = make_pairs(4)
    _, state = make_dpo(pairs)
    trainer = make_trainer(pairs, state)
    inputs = next(iter(trainer.get_train_dataloader()))
    (more,) = (trainer.data_collator([trainer.train_dataset[at] for at in range(4)]),)
    assert more["input_ids"].shape[0] == 2 * inputs["input_ids"].shape[0] == 8
    trainer.model.train()
    for kind in LOSSES:
        smoothing = 0.1 if kind in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
        trainer.loss_types, trainer.loss_weights = [kind], [1.0]
        trainer.label_smoothing, trainer.beta = smoothing, 0.3
        trainer.model.zero_grad()
        theirs = trainer._compute_loss(trainer.model, dict(more), False)
        theirs.backward()
        expected = {name: item.grad.clone() for name, item in trainer.model.named_parameters() if item.requires_grad}
        for packing in (True, False):
            ours, _ = make_dpo(pairs, packing=packing, loss=kind, beta=0.3, label_smoothing=smoothing)
            ours.micro_batch = 4
            (batch,) = ours.batches(range(4), Turn(0, 0))
            loss = ours.loss(batch) / batch.weight
            loss.backward()
            assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-6), kind
            for name, item in ours.net.trainable():
                assert (item.grad - expected[name]).abs().max() <= 1e-6 + 1e-5 * expected[name].abs().max(), (
                    kind,
                    name,
                )
        assert max(item.abs().max() for item in expected.values()) > 1e-4, kind


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fifty_steps_equal_trls(family, make_trainer, make_dpo, make_bench, make_spec):
    from transformers import TrainerCallback

    losses, norms, margins = [], [], []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])
                norms.append(logs["grad_norm"])
                margins.append(logs["rewards/margins"])

    pairs = make_pairs(STEPS * BATCH * ACCUMULATE, seed=3)
    method, state = make_dpo(pairs, family)
    trainer = make_trainer(pairs, state, [Watch()], family)
    trainer.train()
    final = {name: item.detach().clone() for name, item in trainer.model.named_parameters() if item.requires_grad}

    spec = make_spec(effective_batch=BATCH * ACCUMULATE, max_steps=STEPS, learning_rate=5e-3, warmup_steps=2)
    bench = make_bench(spec, pairs, net=method.net, method=method)
    bench.engine.sampler.step = lambda step: list(range(step * 4, step * 4 + 4))
    bench.engine.run()
    ours, our_norms, our_margins = (bench.series(f"train/{key}") for key in ("loss", "grad_norm", "rewards/margins"))
    assert len(losses) == len(ours) == STEPS
    for step in range(STEPS):
        assert ours[step + 1] == pytest.approx(losses[step], abs=1e-4), step
        assert our_norms[step + 1] == pytest.approx(norms[step], rel=1e-2, abs=1e-2), step
        assert our_margins[step + 1] == pytest.approx(margins[step], abs=1e-3), step
    residual = sum(abs(ours[step + 1] - losses[step]) for step in range(STEPS)) / STEPS
    assert residual <= 1e-5
    moved = max((final[name] - state[name.replace(".default", "")]).abs().max() for name in final)
    apart = max((final[name] - item).abs().max() for name, item in bench.weights().items())
    assert moved > 1e-2
    assert apart < 1e-2 * moved
