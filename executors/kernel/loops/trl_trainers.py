"""TRL's trainers as this house lets them run.

A trainer computes its loss, its gradients and its figures. The order of rows, the optimizer, the rate, the random
numbers, checkpoints and events are ours: they are those of our own loops, and all that a step does follows from
(seed, step). Every default of TRL's that would change a job silently is set here by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import PrinterCallback, ProgressCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from tunesmith.executors.kernel.data import stop_tokens
from tunesmith.executors.kernel.loops import optimizer as optimizers
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.schedule import factor
from tunesmith.executors.kernel.loops.trl_held import (
    Course,
    Held,
    Mismatched,
    Order,
    Watch,
    load_round,
    reward_functions,
)
from tunesmith.executors.kernel.loops.trl_plan import Plan
from tunesmith.executors.kernel.loops.trl_rows import Table, Tables
from tunesmith.executors.kernel.rewards import Rewards
from tunesmith.orchestrator.errors import JobFailed
from tunesmith.orchestrator.nouns import JobSpec, TrainSpec

TRAINERS = {"kto": KTOTrainer, "reward": RewardTrainer, "rloo": RLOOTrainer, "distill": DistillationTrainer}
CONFIGS = {"kto": KTOConfig, "reward": RewardConfig, "rloo": RLOOConfig, "distill": DistillationConfig}
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def make(
    spec: JobSpec,
    net: Net,
    tables: Tables,
    tokenizer: Any,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    course: Course,
    *,
    folder: Path,
    scaler_state: Mapping[str, Any],
    origin: Path | None = None,
    rewards: Rewards | None = None,
    teacher: Any = None,
) -> Any:
    """The trainer of a spec's method, ready for `train()`. `folder` is written to by nobody but us.

    `origin` is the checkpoint to go on from: inside a round of rloo it holds the answers of that round.
    """
    disable_progress_bar()
    tokenizer = copy.deepcopy(tokenizer)  # TRL gives it a pad token where it has none
    common = arguments(spec, net, plan, folder)
    train = spec.train
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(train.scheduler, step + plan.start, plan.total, _warmup(train, plan))
    )
    given: dict[str, Any] = {
        "model": net.outer,
        "train_dataset": _dataset(tables.train),
        "eval_dataset": _dataset(tables.eval, len(tables.train)) if len(tables.eval) else None,
        "processing_class": tokenizer,
        "callbacks": [Watch(course, train.seed)],
        "optimizers": (optimizer, schedule),
    }
    extra = {"kto": _kto, "reward": _reward, "rloo": _rloo, "distill": _distill}[spec.method]
    config, more = extra(spec, plan, tokenizer)
    if spec.method == "rloo":
        assert rewards is not None
        config["reward_weights"], more["reward_funcs"] = list(rewards.weights), reward_functions(rewards.names, course)
    elif spec.method == "distill":
        more["teacher_model"] = teacher
    args = CONFIGS[spec.method](**{**common, **config})
    args._n_gpu = min(args.n_gpu, 1)  # TRL refuses to start where it sees two
    kind = type(f"Held{TRAINERS[spec.method].__name__}", (Held, TRAINERS[spec.method]), {})
    weights = [(item, item.data) for _, item in net.trainable()]
    trainer = kind(args=args, **given, **more)
    if len(trainer.train_dataset) != len(tables.train):
        raise JobFailed(
            f"TRL left out {len(tables.train) - len(trainer.train_dataset):,} rows of its own accord.",
            code="data.rows_lost",
            why="Every row was checked before; this version of TRL has another rule.",
            fix="Report this, and raise train.max_length to go on.",
        )
    trainer.course, trainer.scaler_state = course, scaler_state
    grouped = spec.method in ("rloo", "distill")
    trainer.order = Order(plan.sampler, each=plan.each, times=plan.repeats * plan.accumulate if grouped else 0)
    if spec.method == "rloo":
        trainer._step = plan.start * plan.accumulate  # TRL counts from 0, and by it knows where a round ends
        if origin is not None and plan.start % plan.repeats:
            trainer._buffered_inputs = load_round(origin, plan.accumulate, net.device)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if grouped:
        _stop_at(trainer, tokenizer)
    _restore(net, weights)
    return trainer


def _restore(net: Net, weights: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Undo what TRL does to an adapter: a copy as the reference, which is the base alone; bfloat16 on a narrow base."""
    if net.adapted and "ref" in net.outer.peft_config:
        net.outer.delete_adapter("ref")
        net.outer.set_adapter("default")
    for item, values in weights:
        item.data = values


def _stop_at(trainer: Any, tokenizer: Any) -> None:
    """Let every token that ends a turn end a completion, as our own rollouts do."""
    stops = sorted({*stop_tokens(tokenizer), *trainer.eos_token_ids})
    trainer.eos_token_ids = stops
    trainer.generation_config.eos_token_id = stops
    trainer.generation_kwargs["eos_token_id"] = stops


def _dataset(table: Table, first: int = 0) -> Dataset:
    """Columns as Arrow, and each row's place among all: what a reward finds the row's other columns by."""
    return Dataset.from_dict({**table.columns, "at": list(range(first, first + len(table)))})


def _warmup(train: TrainSpec, plan: Plan) -> int:
    return min(int(train.warmup_steps), plan.total)


def arguments(spec: JobSpec, net: Net, plan: Plan, folder: Path) -> dict[str, Any]:
    """A spec's train part as transformers' arguments; nothing that matters is left to a default.

    Weights come in the plan's type, so autocast is on only where our own loops use it.
    """
    train, device = spec.train, net.device
    half = device.type == "cuda" and train.dtype == "float16"
    checkpointing = "activation_checkpointing"
    if checkpointing not in {item.name for item in fields(KTOConfig)}:  # transformers before 5.20
        checkpointing = "gradient_checkpointing"
    return {
        "output_dir": str(folder),
        "max_steps": plan.total,
        "per_device_train_batch_size": plan.micro,
        "per_device_eval_batch_size": plan.each * max(1, plan.micro // plan.each),
        "gradient_accumulation_steps": plan.accumulate,
        "learning_rate": float(train.learning_rate),
        "lr_scheduler_type": SCHEDULERS[train.scheduler],
        "warmup_steps": _warmup(train, plan),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_bnb_8bit" if train.optimizer == "adamw-8bit" else "adamw_torch_fused",
        "adam_beta1": optimizers.BETAS[0],
        "adam_beta2": optimizers.BETAS[1],
        "adam_epsilon": optimizers.EPSILON,
        "seed": train.seed,
        "data_seed": train.seed,
        "bf16": net.autocast is torch.bfloat16,
        "fp16": half,
        "tf32": None,
        checkpointing: train.activation_checkpointing is True,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if train.activation_checkpointing is True else None,
        "disable_dropout": spec.adapter.dropout == 0,
        "use_cpu": device.type == "cpu",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": device.type == "cuda",
        "dataloader_drop_last": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "trust_remote_code": False,
        "pad_to_multiple_of": None,
    }


Extra = tuple[dict[str, Any], dict[str, Any]]


def _kto(spec: JobSpec, plan: Plan, tokenizer: Any) -> Extra:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = {
        "loss_type": "kto",
        "beta": spec.kto.beta,
        "desirable_weight": spec.kto.desirable_weight,
        "undesirable_weight": spec.kto.undesirable_weight,
        "precompute_ref_log_probs": False,
        "max_length": None,  # the collator cuts; which rows are left out was settled and said before
        "train_sampling_strategy": "sequential",
        "activation_offloading": False,
    }
    return config, {"data_collator": Mismatched(pad_token_id=pad, max_length=int(spec.train.max_length))}


def _reward(spec: JobSpec, plan: Plan, tokenizer: Any) -> Extra:
    config = {
        "max_length": None,  # rows that are too long were left out and said before
        "center_rewards_coefficient": None,
        "activation_offloading": False,
    }
    return config, {}


def _rloo(spec: JobSpec, plan: Plan, tokenizer: Any) -> Extra:
    grpo = spec.grpo
    config = {
        "remove_unused_columns": False,
        "num_generations": grpo.num_generations,
        "num_generations_eval": grpo.num_generations,
        "max_completion_length": grpo.max_completion,
        "temperature": grpo.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "beta": grpo.beta,
        "num_iterations": grpo.num_iterations,
        "epsilon": grpo.epsilon,
        "epsilon_high": grpo.epsilon_high,
        "normalize_advantages": False,
        "mask_truncated_completions": grpo.mask_truncated,
        "use_vllm": False,
        "use_transformers_continuous_batching": False,  # it casts what is trained to bfloat16 in place
        "log_completions": False,
    }
    return config, {}


def _distill(spec: JobSpec, plan: Plan, tokenizer: Any) -> Extra:
    distill = spec.distill
    config = {
        "remove_unused_columns": False,
        "beta": distill.beta,
        "temperature": distill.temperature,
        "max_completion_length": distill.max_completion,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "use_vllm": False,
        "log_completions": False,
    }
    return config, {}
