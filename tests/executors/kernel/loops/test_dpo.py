"""DPO: the reference is asked once and remembered, layouts agree, and a run that stops goes on bit for bit."""

import random
from dataclasses import replace

import pytest
import torch

from tunesmith.executors.kernel.data.pairs import Pair
from tunesmith.executors.kernel.loops import methods
from tunesmith.executors.kernel.loops.dpo import Dpo
from tunesmith.executors.kernel.loops.forks import Tree
from tunesmith.executors.kernel.loops.method import Turn
from tunesmith.executors.kernel.loops.reference import Reference, key
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DpoSpec


def make_pairs(count, seed=0):
    draw = random.Random(seed)

    def tokens(low, high):
        return [draw.randrange(3, 40) for _ in range(draw.randint(low, high))]

    return [Tree(at, tokens(1, 9), (tokens(1, 9), tokens(1, 9))) for at in range(count)]


def with_turns(count, seed=2):
    """Pairs as the data package makes them, with places in both answers that the policy did not write."""
    draw = random.Random(seed)
    pairs = []
    for tree in make_pairs(count, seed):
        chosen, rejected = ([*answer, *(draw.randrange(3, 40) for _ in range(5))] for answer in tree.answers)
        silent = tuple(tuple(sorted(draw.sample(range(len(side) - 1), 3))) for side in (chosen, rejected))
        pairs.append(Pair(tree.row, tree.prompt, chosen, rejected, unscored=silent))
    pairs.append(Pair(count, [], [5, 6, 7, 8], [9, 6, 5], unscored=((0, 2), (0,))))
    return pairs


@pytest.fixture
def make_dpo(make_net, make_spec):
    def make(pairs, *, adapter=None, packing=True, reference=None, train=None, **dpo):
        net = make_net(make_spec(adapter=adapter, **(train or {})))
        layout = {"micro_batch": 2, "max_length": 24, "packing": packing, "pad_id": 0}
        return Dpo(net, pairs, DpoSpec(**dpo), reference=reference, **layout)

    return make


def gradients(method, picked):
    method.net.outer.zero_grad()
    batches = method.batches(picked, Turn(0, 0))
    units = sum(batch.weight for batch in batches)
    for batch in batches:
        (method.loss(batch) / units).backward()
    return {name: item.grad.clone() for name, item in method.net.trainable()}


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sft"])
def test_no_layout_changes_the_gradient(loss, make_dpo):
    pairs = make_pairs(6)
    packed = make_dpo(pairs, loss=loss)
    packed.micro_batch = 6
    expected = gradients(packed, range(6))
    for packing, micro in ((True, 1), (False, 1), (False, 4)):
        other = make_dpo(pairs, loss=loss, packing=packing)
        other.micro_batch = micro
        for name, gradient in gradients(other, range(6)).items():
            assert (gradient - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1e-7


def by_hand(net, pairs, loss, beta):
    """The mean loss from each row's own logits and a mask, without any layout; for sft a mean over tokens."""

    def side(prompt, answer, silent):
        sequence = torch.tensor([[*prompt, *answer]])
        logits = net.causal(input_ids=sequence).logits[0, :-1].log_softmax(-1)
        logps = logits.gather(1, sequence[0, 1:, None])[:, 0]
        places = [len(prompt) + place - 1 for place in range(len(answer)) if place not in silent]
        return logps[places].sum(), len(places)

    losses, units = [], 0
    for pair in pairs:
        sides = list(zip((pair.chosen, pair.rejected), pair.unscored, strict=True))
        (up, n), (down, m) = (side(pair.prompt, *each) for each in sides)
        with torch.no_grad(), net.outer.disable_adapter():
            (old_up, _), (old_down, _) = (side(pair.prompt, *each) for each in sides)
        up, down = up - old_up * (loss != "sft"), down - old_down
        if loss == "sft":
            losses.append(-up)
        elif loss == "ipo":
            losses.append((up / n - down / m - 1 / (2 * beta)) ** 2)
        else:
            losses.append(-torch.nn.functional.logsigmoid(beta * (up - down)))
        units += n if loss == "sft" else 1
    return sum(losses) / units


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sft"])
def test_what_others_say_in_an_answer_is_not_trained_on(loss, packing, make_net, make_spec, tmp_path):
    pairs = with_turns(5)
    spec = DpoSpec(loss=loss, reference="none" if loss == "sft" else "base")
    job = replace(make_spec(micro_batch=2, max_length=24, packing=packing), method="dpo", dpo=spec)
    theirs = make_net(job)
    expected = by_hand(theirs, pairs, loss, spec.beta)
    expected.backward()

    setting = methods.Setting(job, make_net(job), None, 0, tmp_path, tmp_path, None, lambda: False)
    method, _ = methods.make(setting, pairs, [])
    batches = method.batches(range(len(pairs)), Turn(0, 0))
    assert all((batch.forks is not None) == packing for batch in batches)
    units = sum(batch.weight for batch in batches)
    found = torch.zeros(())
    for batch in batches:
        part = method.loss(batch) / units
        part.backward()
        found += part.detach()
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = {name: item.grad for name, item in method.net.trainable()}
    for name, item in theirs.trainable():
        assert (gradients[name] - item.grad).abs().max() <= 1e-5 * item.grad.abs().max() + 1e-6, name


def test_the_reference_is_asked_once_for_each_row(make_dpo, monkeypatch, tmp_path):
    asked = []
    ask = Dpo._ask
    monkeypatch.setattr(Dpo, "_ask", lambda self, batch: (asked.append(batch.rows), ask(self, batch)))
    pairs = make_pairs(6)
    table = Reference(tmp_path / "cache" / "a.safetensors", 6, 2)
    method = make_dpo(pairs, reference=table)
    first = gradients(method, range(4))
    seen = [row for rows in asked for row in rows]
    assert sorted(seen) == [0, 1, 2, 3]
    gradients(method, range(4))
    assert [row for rows in asked for row in rows] == seen
    method.save(tmp_path, 1)
    again = make_dpo(pairs, reference=Reference(tmp_path / "cache" / "a.safetensors", 6, 2))
    for name, gradient in gradients(again, range(4)).items():
        assert torch.equal(gradient, first[name])
    assert [row for rows in asked for row in rows] == seen
    gradients(again, range(2, 6))
    assert {4, 5} <= {row for rows in asked for row in rows}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_broken_table_counts_as_empty(content, tmp_path):
    path = tmp_path / "a.safetensors"
    if content is None:
        Reference(path, 3, 2).flush()
        table = Reference(path, 3, 2)
        table.put([(0, 0), (0, 1)], torch.ones(2))
        table.flush()
        assert Reference(path, 4, 2).missing(range(4)) == [0, 1, 2, 3]
    else:
        path.write_bytes(content)
        assert Reference(path, 3, 2).missing(range(3)) == [0, 1, 2]


def test_the_name_of_a_table_follows_from_tokens_and_model():
    pairs = make_pairs(3)
    names = {
        key(pairs, "model"),
        key(pairs, "other"),
        key(pairs[:2], "model"),
        key([replace(pairs[0], prompt=[7]), *pairs[1:]], "model"),
        key([replace(pairs[0], answers=pairs[0].answers[::-1]), *pairs[1:]], "model"),
        key([replace(pairs[0], silent=((0,), ())), *pairs[1:]], "model"),
        key([replace(pairs[0], silent=((), (0,))), *pairs[1:]], "model"),
    }
    assert len(names) == 7
    assert key(make_pairs(3), "model") in names


def test_without_a_reference_nothing_is_asked(make_dpo, monkeypatch):
    monkeypatch.setattr(Dpo, "_ask", lambda self, batch: pytest.fail("asked"))
    method = make_dpo(make_pairs(2), reference=None)
    method.spec = DpoSpec(reference="none", loss="sigmoid_norm")
    assert max(float(item.abs().max()) for item in gradients(method, range(2)).values()) > 0


def test_all_weights_need_the_reference_before_they_change(make_dpo, make_bench, make_spec):
    """What the model thought at first is what it is compared with at the end, though nothing of it is left."""
    pairs = make_pairs(8)
    method = make_dpo(pairs, adapter={"kind": "none"})
    assert list(methods.foresee(method, iter([[0, 1, 2], [3, 4, 5, 6, 7]]))) == [3, 8]
    before = method.reference.table.clone()
    assert not before.isnan().any()
    spec = make_spec(adapter={"kind": "none"}, effective_batch=4, max_steps=4, learning_rate=1e-2)
    bench = make_bench(spec, pairs, net=method.net, method=method)
    bench.engine.run()
    assert torch.equal(method.reference.table, before)
    margins = bench.series("train/rewards/margins")
    assert abs(margins[1]) < 1e-6
    assert margins[4] > 0.01


@pytest.mark.parametrize("packing", [True, False])
def test_resume_is_bitwise(packing, make_dpo, make_bench, make_spec):
    pairs = make_pairs(10)
    spec = make_spec(effective_batch=4, max_steps=7, save_steps=3, packing=packing)

    def bench(name):
        method = make_dpo(pairs, packing=packing, train={"packing": packing})
        return make_bench(spec, pairs, net=method.net, method=method, name=name)

    whole = bench("whole")
    whole.engine.run()
    second = bench("second")
    second.engine.resume(whole.folder / "checkpoints" / "step-00000003")
    second.engine.run()
    for name, item in whole.weights().items():
        assert torch.equal(item, second.weights()[name])
    assert second.engine.cursor.ledger == whole.engine.cursor.ledger
    ours, theirs = second.series("train/loss"), whole.series("train/loss")
    assert ours == {step: theirs[step] for step in ours}


def test_a_loss_without_its_smoothing_is_refused(make_dpo):
    with pytest.raises(InputError) as caught:
        make_dpo(make_pairs(2), loss="exo_pair")
    assert caught.value.where == "dpo.label_smoothing"
