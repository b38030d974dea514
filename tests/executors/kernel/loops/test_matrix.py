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
