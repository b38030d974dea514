"""Products by oneDNN are torch's own to rounding, and who is asked follows from the processor alone."""

import pytest
import torch

from tunesmith.executors.kernel.loops import matrix


@pytest.fixture
def asked(monkeypatch):
    """Whatever the processor, oneDNN is asked; counts how often."""
    calls = []
    function = torch.ops.mkldnn._linear_pointwise.default

    def linear(*args):
        calls.append(args[0].shape)
        return function(*args)

    monkeypatch.setattr(matrix, "_linear", lambda: linear)
    monkeypatch.setattr(matrix, "other_vendor", lambda: True)
    return calls


@pytest.mark.parametrize("rows, inner, outer", [(1, 8, 8), (70, 64, 192), (33, 192, 64), (17, 48, 4096)])
def test_it_is_the_same_product(rows, inner, outer, asked):
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, inner, generator=draw), torch.randn(outer, inner, generator=draw)
    assert (matrix.onto(x, w) - x @ w.t()).abs().max() < 1e-4
    assert asked[0] == (rows, inner)


def test_other_types_and_no_rows_go_the_usual_way(asked):
    for dtype in (torch.float64, torch.bfloat16):
        matrix.onto(torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype))
    assert matrix.onto(torch.ones(0, 3), torch.ones(4, 3)).shape == (0, 4)
    assert asked == []


@pytest.mark.parametrize(
    "info, other",
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", True),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", False),
        ("processor\t: 0\n", False),
        ("", False),
    ],
)
def test_the_vendor_is_read(info, other):
    assert matrix.other_vendor(info) is other


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e-4), (torch.bfloat16, 0.25)])
@pytest.mark.parametrize("rows", [1, 7, 16, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_weight_is_the_same_product(dtype, far, rows, biased):
    if not matrix.Packed.possible(dtype, torch.device("cpu")):
        assert dtype is not torch.float32
        pytest.skip("this processor has no packed products of this type")
    draw = torch.Generator().manual_seed(0)
    bias = torch.randn(40, generator=draw).to(dtype) if biased else None
    packed = matrix.Packed(bias)
    for _ in range(2):  # packed anew, the old weight is gone
        x, w = (torch.randn(size, 96, generator=draw).to(dtype) for size in (rows, 40))
        packed.pack(w)
        wanted = torch.nn.functional.linear(x, w, bias)
        assert (packed(x) - wanted).abs().max() < far
        assert packed(x[None]).shape == (1, rows, 40)


def test_what_cannot_be_packed_is_known_beforehand(monkeypatch):
    assert not matrix.Packed.possible(torch.float64, torch.device("cpu"))
    assert not matrix.Packed.possible(torch.float32, torch.device("meta"))
    monkeypatch.setattr(matrix, "_linear", lambda: None)
    assert not matrix.Packed.possible(torch.float32, torch.device("cpu"))
