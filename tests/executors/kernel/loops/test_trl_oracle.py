"""TRL 1.16 as the oracle: the same rows and labels, first gradients, and 20 steps of loss, LoRA, with accumulation."""

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

STEPS = 20
BATCH, ACCUMULATE = 2, 2
MAX_LENGTH = 48


class Fixed:
    """Stands in for the sampler: exactly these rows in these steps."""

    def __init__(self, steps):
        self.steps = steps
        self.steps_per_epoch = len(steps)

    def step(self, index):
        return self.steps[index]

    def epochs_done(self, steps):
        return steps / len(self.steps)


class Peek:
    """A model callback that keeps the first gradients, the batches, and the losses of TRL's trainer."""

    def __init__(self):
        self.gradients = None
        self.losses = []
        self.norms = []


def trl_run(model, rows, state, tmp_path, *, packing, batch):
    """TRL's trainer over rows in their order, from the same weights: (peek, batches it saw, final weights)."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    peek, seen = Peek(), []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if peek.gradients is None:
                peek.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                peek.losses.append(logs["loss"])
                peek.norms.append(logs["grad_norm"])

    class Seen(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append((inputs["input_ids"].clone(), inputs["labels"].clone(), inputs.get("attention_mask")))
            return super().training_step(model, inputs, *args, **kwargs)

    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    set_peft_model_state_dict(adapted, state)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(97)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    dataset = Dataset.from_list([{"input_ids": row.ids, "labels": row.labels} for row in rows])
    trainer = Seen(
        model=adapted,
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=ACCUMULATE,
            max_steps=STEPS,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=MAX_LENGTH,
            packing=packing,
            logging_steps=1,
            logging_first_step=True,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    packs = [list(item) for item in trainer.train_dataset["seq_lengths"]] if packing else None
    ids = [list(item) for item in trainer.train_dataset["input_ids"]]
    trainer.train()
    final = {name: item.detach().clone() for name, item in adapted.named_parameters() if item.requires_grad}
    return peek, seen, final, ids, packs


def our_run(bench):
    """Our engine over the same rows: (first gradients after clipping, losses, norms)."""
    first = {}

    def keep(optimizer, args, kwargs):
        if not first:
            first.update({name: item.grad.clone() for item, name in bench.engine.names.items()})

    bench.engine.optimizer.register_step_pre_hook(keep)
    bench.engine.run()
    return first, bench.series("train/loss"), bench.series("train/grad_norm")


def supervised_documents(ids, labels, mask=None):
    """(ids, labels) of every row of a batch, padding cut off."""
    rows = []
    for at in range(ids.shape[0]):
        width = int(mask[at].sum()) if mask is not None else ids.shape[1]
        rows.append((ids[at, :width].tolist(), labels[at, :width].tolist()))
    return rows


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sft_equals_trl(family, layout, make_bench, make_model, make_net, make_rows, make_spec, tmp_path):
    from peft.utils import get_peft_model_state_dict

    packing = layout == "packed"
    rows = make_rows(140 if packing else STEPS * BATCH * ACCUMULATE, seed=5)
    spec = make_spec(
        packing=packing, effective_batch=BATCH * ACCUMULATE, micro_batch=1 if packing else BATCH,
        max_length=MAX_LENGTH, max_steps=STEPS,
    )  # fmt: skip
    net = make_net(spec, family)
    state = {
        name: item.clone() for name, item in get_peft_model_state_dict(net.outer, save_embedding_layers=False).items()
    }
    batch = 1 if packing else BATCH
    peek, seen, final, trl_ids, packs = trl_run(make_model(family), rows, state, tmp_path, packing=packing, batch=batch)

    # which of our rows each of TRL's optimizer steps held
    number = {tuple(row.ids): row.row for row in rows}
    assert len(number) == len(rows)
    steps = []
    for step in range(STEPS):
        held = []
        for at in range(step * batch * ACCUMULATE, (step + 1) * batch * ACCUMULATE):
            ids, start = trl_ids[at], 0
            for length in packs[at] if packing else [len(ids)]:
                held.append(number[tuple(ids[start : start + length])])
                start += length
        steps.append(held)

    bench = make_bench(spec, rows, net=net, name="ours")
    bench.engine.sampler = Fixed(steps)
    ours_first, losses, norms = our_run(bench)
    assert bench.engine.cursor.ledger == steps

    # the same rows and labels
    trl_rows = sorted(
        (document_ids, document_labels)
        for ids, labels, mask in seen[:ACCUMULATE]
        for document_ids, document_labels in split_documents(ids, labels, mask, packs, number, packing)
    )
    our_rows = sorted((rows[at].ids, rows[at].labels) for at in steps[0])
    assert trl_rows == our_rows

    # the same gradients in the first step
    assert len(ours_first) == len(peek.gradients) == 2 * 7 * 2
    for name, gradient in peek.gradients.items():
        assert gradient.abs().max() > 1e-5, name
        assert (gradient - ours_first[name]).abs().max() <= 1e-6, name

    # the same trajectory
    assert len(peek.losses) == STEPS == len(losses)
    for step in range(STEPS):
        assert losses[step + 1] == pytest.approx(peek.losses[step], abs=1e-4), step
        assert norms[step + 1] == pytest.approx(peek.norms[step], rel=1e-3), step
    assert losses[STEPS] < losses[1]
    moved = max((final[name] - state_of(state, name)).abs().max() for name in final)
    apart = max((final[name] - item).abs().max() for name, item in bench.weights().items())
    assert moved > 1e-3
    assert apart < 1e-4 * max(1.0, float(moved)), (apart, moved)


def state_of(state, name):
    """A weight in peft's own naming."""
    return state[name.replace(".default", "")]


def split_documents(ids, labels, mask, packs, number, packing):
    """The documents of a batch of TRL's, each with its labels; in packs it never trains a document's first token."""
    if not packing:
        return supervised_documents(ids, labels, mask)
    flat, marks, found, start = ids[0].tolist(), labels[0].tolist(), [], 0
    while start < len(flat):
        length = next(n for n in range(1, len(flat) - start + 1) if tuple(flat[start : start + n]) in number)
        found.append((flat[start : start + length], marks[start : start + length]))
        start += length
    return found
