"""TRL 1.16's GRPOTrainer as the oracle, on the same completions and rewards: losses, gradients and weights."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from tunesmith.executors.kernel.loops.grpo import Grpo, Judge
from tunesmith.executors.kernel.loops.rollout import Sample
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.nouns import GrpoSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning"),
]

PROMPTS, COUNT, STOP = 2, 4, 2
LONGEST = 9


@dataclass(frozen=True)
class Prompt:
    """A row as the data package makes it."""

    row: int
    ids: list[int]
    prompt: str
    columns: dict = field(default_factory=dict)


def as_text(ids):
    return " ".join(f"t{number:02d}" for number in ids)


def make_prompts(count):
    draw = random.Random(1)
    return [
        Prompt(at, ids, as_text(ids))
        for at in range(count)
        for ids in [[3 + at % 10, 13 + at // 10, *(draw.randrange(3, 40) for _ in range(draw.randint(1, 6)))]]
    ]


def completion(prompt_ids, sample, rounds):
    """What is written for a prompt in a round, the same for both sides; one in four is cut at the longest."""
    draw = random.Random(f"{prompt_ids} {sample} {rounds}")
    if draw.random() < 0.25:
        return [draw.randrange(3, 40) for _ in range(LONGEST)]
    return [*(draw.randrange(3, 40) for _ in range(draw.randint(1, LONGEST - 2))), STOP]


def reward(ids):
    """Rises with even tokens; equal for many, so that some groups teach nothing."""
    return float(sum(token % 2 == 0 for token in ids[:3]))


class Given:
    """A rollout that writes what it is told to."""

    problems = ()
    slots = PROMPTS * COUNT

    def __init__(self):
        self.rounds = 0

    def refresh(self):
        pass

    def generate(self, asks, *, key, greedy=False, told=None, stopped=None):
        made = []
        for ask in asks:
            for sample in ask.samples:
                ids = completion(list(ask.ids), sample, self.rounds)
                made.append(Sample(ask.row, sample, ids, [0.0] * len(ids), ids[-1] == STOP))
        self.rounds += 1
        return made


class Scorer:
    """The one reward function, as the rewards package gives it."""

    names = ("even",)

    def score(self, prompts, completions, completion_ids, columns, step):
        values = [[reward(ids)] for ids in completion_ids]
        return Scored(values, [value[0] for value in values])


@dataclass(frozen=True)
class Scored:
    values: list
    totals: list
    told = {}
    extra = {}
    alerts = ()


def trl_run(make_model, state, prompts, spec, steps, tmp_path, *, accumulate, rate, full):
    """TRL's trainer on the prompts in their order: (logs, first gradients, final weights)."""
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(WordLevel({f"t{number:02d}": number for number in range(97)}, unk_token="t03"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t00", bos_token="t01", eos_token="t02")
    logs, first, rounds = [], {}, []

    def write(asked, trainer):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]
        made = [completion(item, at % COUNT, len(rounds)) for at, item in enumerate(ids)]
        rounds.append(asked)
        return {"prompt_ids": ids, "completion_ids": made, "logprobs": [[0.0] * len(item) for item in made]}

    def even(prompts, completions, completion_ids, **kwargs):
        return [reward(ids) for ids in completion_ids]

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not first:
                first.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                seen.append(dict(logs))

    seen = logs
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = make_model("llama")
    if full:  # TRL reads its reference from where the model came from
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        peft_config=None if full else config,
        reward_funcs=even,
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * COUNT // accumulate,
            gradient_accumulation_steps=accumulate,
            num_generations=COUNT,
            max_completion_length=LONGEST,
            temperature=spec.temperature,
            beta=spec.beta,
            loss_type=spec.loss,
            num_iterations=spec.num_iterations,
            epsilon=spec.epsilon,
            epsilon_high=spec.epsilon_high,
            scale_rewards=spec.scale_rewards,
            mask_truncated_completions=spec.mask_truncated,
            shuffle_dataset=False,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=1.0,
            logging_steps=1,
            logging_first_step=True,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": item.prompt} for item in prompts]),
        processing_class=tokenizer,
        rollout_func=write,
        callbacks=[Watch()],
    )
    if not full:
        set_peft_model_state_dict(trainer.model, state)
    trainer.train()
    final = {name: item.detach().clone() for name, item in trainer.model.named_parameters() if item.requires_grad}
    return logs, first, final


CASES = {
    "dapo": (GrpoSpec(loss="dapo"), 1, False),
    "dapo, two halves": (GrpoSpec(loss="dapo"), 2, False),
    "grpo with a reference": (GrpoSpec(loss="grpo", beta=0.2, temperature=0.8), 1, False),
    "dr_grpo, unscaled": (GrpoSpec(loss="dr_grpo", scale_rewards="none"), 2, False),
    "bnpo, scaled by the batch": (GrpoSpec(loss="bnpo", scale_rewards="batch"), 1, False),
    "three iterations, clipped": (GrpoSpec(loss="dapo", num_iterations=3, epsilon=0.05, epsilon_high=0.1), 1, False),
    "iterations and reference": (GrpoSpec(loss="grpo", num_iterations=2, beta=0.1), 2, False),
    "cut answers masked": (GrpoSpec(loss="dapo", mask_truncated=True), 1, False),
    "cut answers masked, means of answers": (GrpoSpec(loss="grpo", mask_truncated=True), 1, False),
    "all weights with a reference": (GrpoSpec(loss="dapo", beta=0.1), 1, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packing", [True, False])
def test_grpo_equals_trl(case, packing, make_model, make_net, make_spec, make_bench, tmp_path):
    from dataclasses import replace

    from peft.utils import get_peft_model_state_dict

    base, accumulate, full = CASES[case]
    spec = replace(base, num_generations=COUNT, max_completion=LONGEST)
    steps, rate = 6, 2e-2 if not full else 1e-3
    prompts = make_prompts(PROMPTS * steps)
    job = make_spec(
        adapter={"kind": "none"} if full else None,
        effective_batch=PROMPTS, max_steps=steps, learning_rate=rate, warmup_steps=0, scheduler="constant",
    )  # fmt: skip
    net = make_net(job)
    state = {} if full else get_peft_model_state_dict(net.outer, save_embedding_layers=False)
    state = {name: item.detach().clone() for name, item in state.items()}
    logs, first, final = trl_run(
        make_model, state, prompts, spec, steps, tmp_path, accumulate=accumulate, rate=rate, full=full
    )
    frozen = None
    if full:
        frozen = make_net(job)
        frozen.outer.requires_grad_(False).eval()
    with Reporter(tmp_path, 1) as reporter:
        method = Grpo(
            net, prompts, spec, rollout=Given(), judge=Judge(as_text, Scorer()), reporter=reporter, seed=0,
            micro_batch=1, max_length=64, packing=packing, pad_id=0, frozen=frozen,
        )  # fmt: skip
        bench = make_bench(job, prompts, net=net, method=method, name="ours")
        bench.engine.sampler.step = lambda step: list(range(step * PROMPTS, (step + 1) * PROMPTS))
        ours_first = {}

        def keep(optimizer, args, kwargs):
            if not ours_first:
                ours_first.update({name: item.grad.clone() for item, name in bench.engine.names.items()})

        bench.engine.optimizer.register_step_pre_hook(keep)
        bench.engine.run()
    assert len(logs) == steps
    assert ours_first.keys() == first.keys()
    for name, gradient in first.items():
        assert (gradient - ours_first[name]).abs().max() <= 1e-5 * gradient.abs().max() + 1e-6, name
    assert max(gradient.abs().max() for gradient in first.values()) > 1e-4
    names = ["grad_norm", "reward", "completions/clipped_ratio", "completions/mean_length", "frac_reward_zero_std"]
    if accumulate == 1:  # with more, TRL logs means of micro-batches' means
        names += ["loss", "clip_ratio/region_mean", *(["kl"] if spec.beta else [])]
    for name in names:
        series = bench.series(f"train/{name}")
        for step, log in enumerate(logs, 1):
            if step in series:
                exact = {"rel": 2e-3, "abs": 2e-5}
                assert series[step] == pytest.approx(float(log[name]), **exact), (name, step)
    moved = max(float(log["learning_rate"]) for log in logs) * steps
    apart = max((final[name] - item).abs().max() for name, item in bench.weights().items())
    assert apart < 1e-2 * moved
