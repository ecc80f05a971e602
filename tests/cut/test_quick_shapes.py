"""What operations are said to put out at once is what torch finds, and misfits are still refused."""

import pytest
import torch

from hf_mmst.cut.quick_shapes import QuickShapes, aten


def empty(*sizes, dtype=torch.float32):
    return torch.empty(*sizes, dtype=dtype, device="meta")


def said(found):
    return [(one.shape, one.stride(), one.dtype, one.device) for one in (found if type(found) is tuple else (found,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("name", "sizes", "rest"),
    [
        ("add.Tensor", [(2, 3, 7), (2, 3, 7)], ()),
        ("add.Tensor", [(2, 3, 7), (2, 1, 7)], ()),
        ("add.Tensor", [(2, 3, 7)], (0.5,)),
        ("mul.Scalar", [(2, 3, 7)], (0.5,)),
        ("addmm", [(5,), (6, 7), (7, 5)], ()),
        ("addmm", [(1,), (6, 7), (7, 5)], ()),
        ("native_layer_norm", [(2, 3, 7)], ([7], None, None, 1e-5)),
        ("native_layer_norm", [(2, 3, 7)], ([3, 7], None, None, 1e-5)),
        ("gelu", [(2, 3, 7)], ()),
        ("_safe_softmax", [(2, 3, 7)], (-1,)),
        ("_softmax", [(2, 3, 7)], (1, False)),
    ],
)
def test_shapes_are_those_of_torch(name, sizes, rest, dtype):
    packet, _, overload = name.partition(".")
    func = getattr(getattr(aten, packet), overload or "default")
    tensors = [empty(*size, dtype=dtype) for size in sizes]
    turned = [tensor.mT.contiguous().mT if tensor.dim() > 2 else tensor for tensor in tensors]
    for given in (tensors, turned):
        expected = func(*given, *rest)
        with QuickShapes():
            found = func(*given, *rest)
        assert said(found) == said(expected)


def test_what_does_not_fit_is_refused():
    linear, norm = torch.nn.Linear(7, 5, device="meta"), torch.nn.LayerNorm(7, device="meta")
    with QuickShapes():
        assert linear(empty(2, 3, 7)).shape == (2, 3, 5)
        for module in (linear, norm):
            with pytest.raises(RuntimeError):
                module(empty(2, 3, 6))
