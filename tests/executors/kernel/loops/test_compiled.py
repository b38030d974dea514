"""Compiled layers: the same numbers, no new compiling for a new packing, and always a way back."""

import pytest
import torch

from tunesmith.executors.kernel.loops import compiled, matrix
from tunesmith.executors.kernel.loops.batches import packed, padded

LORA, FULL = {"targets": ("q_proj", "up_proj")}, {"kind": "none"}

pytestmark = [  # what torch itself does while it compiles
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No code compiled for another test; and the product as it is on a GPU, which the compiler can look into."""
    monkeypatch.setattr(matrix, "onto", lambda x, w: x @ w.t())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def gradients(net, batch):
    net.outer.zero_grad()
    loss = net.summed_loss(batch) / batch.weight
    loss.backward()
    return loss.item(), {name: item.grad.clone() for name, item in net.trainable()}


def same(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        assert (gradient - one[1][name]).abs().max() <= 1e-5, name


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, kind, checkpointing", [("llama", LORA, False), ("llama", LORA, True), ("qwen3", FULL, True)]
)
def test_layers_compute_what_they_computed(family, kind, checkpointing, make_net, make_spec, make_rows):
    net = make_net(make_spec(adapter=kind, activation_checkpointing=checkpointing), family)
    rows = make_rows(6)
    for batch in (packed(rows, 200)[0], padded(rows, 6, 0)[0]):
        plain = gradients(net, batch)
        layers = compiled.Layers(compiled.layers_of(net), "aot_eager")
        before = graphs()
        same(gradients(net, batch), plain)
        assert graphs() > before
        layers.restore()
        before = graphs()
        same(gradients(net, batch), plain)
        assert graphs() == before


@pytest.mark.slow
def test_another_packing_compiles_nothing_anew(make_net, make_spec, make_rows):
    net = make_net(make_spec())
    compiled.Layers(compiled.layers_of(net), "eager")
    seen = []
    for count in range(2, 14):
        gradients(net, packed(make_rows(count, seed=count), 400)[0])
        seen.append(graphs())
    assert seen[0] > 0
    assert seen[-1] == seen[0]
    assert torch._dynamo.config.recompile_limit <= 8  # it would give up long before the twelfth


def test_evaluation_is_not_compiled(make_net, make_spec, make_rows):
    net = make_net(make_spec())
    compiled.Layers(compiled.layers_of(net), "eager")
    net.outer.eval()
    with torch.no_grad():
        net.summed_loss(packed(make_rows(4), 200)[0])
    assert graphs() == 0


@pytest.mark.slow
def test_an_offer_is_taken_where_it_gains(make_net, make_spec, make_rows, monkeypatch):
    net, batch = make_net(make_spec()), packed(make_rows(4), 200)[0]
    plain = gradients(net, batch)
    net.outer.zero_grad()
    pace = iter([2.0] * compiled.RUNS + [1.0] * compiled.RUNS)
    monkeypatch.setattr(compiled, "_timed", lambda net, batch: next(pace))
    verdict = compiled.offer(net, batch, steps=1_000_000, told=print, backend="eager")
    assert (verdict.kept, verdict.gain, verdict.why) == (True, 2.0, "")
    assert all(item.grad is None for _, item in net.trainable())
    before = graphs()
    same(gradients(net, batch), plain)
    assert graphs() == before > 0


def wrong(graph, inputs):
    """A compiler that gets every sum a little wrong."""
    for node in graph.graph.nodes:
        if node.target in (torch.add, torch.ops.aten.add.Tensor) or str(node.target) in ("<built-in function add>",):
            with graph.graph.inserting_after(node):
                scaled = graph.graph.call_function(torch.mul, (node, 1.01))
                node.replace_all_uses_with(scaled)
                scaled.args = (node, 1.01)
    graph.recompile()
    return graph.forward


def broken(graph, inputs):
    raise RuntimeError("no compiler here" + "." * 300 + "a long story")


def slow(net, batch):
    return 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, pace, said",
    [
        (wrong, None, "differ by"),
        (broken, None, "no compiler here"),
        ("eager", slow, "1.00 times as fast"),
    ],
)
def test_an_offer_that_is_no_good_leaves_the_model_as_it_was(
    backend, pace, said, make_net, make_spec, make_rows, monkeypatch
):
    net, batch = make_net(make_spec()), packed(make_rows(4), 200)[0]
    plain = gradients(net, batch)
    net.outer.zero_grad()
    if pace:
        monkeypatch.setattr(compiled, "_timed", pace)
    verdict = compiled.offer(net, batch, steps=1_000_000, told=print, backend=backend)
    assert not verdict.kept
    assert said in verdict.why
    assert "long story" not in verdict.why
    assert not any("forward" in vars(layer) for layer in net.causal.model.layers)
    same(gradients(net, batch), plain)


@pytest.mark.slow
def test_few_steps_do_not_pay_for_compiling(make_net, make_spec, make_rows, monkeypatch):
    net, batch = make_net(make_spec()), packed(make_rows(4), 200)[0]
    pace = iter([2e-6] * compiled.RUNS + [1e-6] * compiled.RUNS)
    monkeypatch.setattr(compiled, "_timed", lambda net, batch: next(pace))
    verdict = compiled.offer(net, batch, steps=3, told=print, backend="eager")
    assert not verdict.kept
    assert verdict.gain == pytest.approx(2.0)
    assert "3 steps do not pay" in verdict.why


def test_a_shape_that_does_not_compile_later_leaves_the_layers_as_they_were(make_net, make_spec, make_rows):
    net, batch, said = make_net(make_spec()), packed(make_rows(4), 200)[0], []
    plain = gradients(net, batch)
    layers = compiled.Layers(compiled.layers_of(net), broken)
    layers.told = said.append
    same(gradients(net, batch), plain)
    assert len(said) == 1
    assert "no compiler here" in said[0]
    assert not any("forward" in vars(layer) for layer in net.causal.model.layers)


def test_dropout_is_left_alone(make_net, make_spec, make_rows):
    net = make_net(make_spec(adapter={"dropout": 0.1}))
    verdict = compiled.offer(net, packed(make_rows(4), 200)[0], steps=10, told=print, backend="eager")
    assert not verdict.kept
    assert graphs() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inductor_on_a_gpu(make_model, make_spec, make_rows):
    from tunesmith.executors.kernel.loops import model as models

    net = models.ready(make_model().bfloat16(), make_spec(dtype="bfloat16"), torch.device("cuda"))
    verdict = compiled.offer(net, packed(make_rows(4), 200)[0], steps=1_000_000, told=print)
    assert verdict.kept or "times as fast" in verdict.why
