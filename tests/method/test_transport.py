"""The transport term against its plain formula, and its weights over time."""

import math
import subprocess
import sys

import pytest
import torch
from reference import plain_transport

from hf_mmst.method.order import Order
from hf_mmst.method.transport import TransportWeights, movement, transport


@pytest.mark.parametrize(("shape", "masked"), [((4, 7, 16), False), ((4, 7, 16), True), ((3, 16, 5, 5), False)])
@pytest.mark.parametrize("norm", ["relative", "mean", "sum"])
def test_value_and_gradients_equal_the_plain_formula(norm, masked, shape):
    torch.manual_seed(0)
    x, r = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    mask = (torch.rand(shape[:2]) > 0.3).long() if masked else None
    found, expected = [], []
    for function, results in ((transport, found), (plain_transport, expected)):
        value = function(x, x + r, mask, norm)
        results += [value.detach(), *torch.autograd.grad(3 * value, (x, r), allow_unused=True)]
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])
    torch.testing.assert_close(found[1], torch.zeros(shape), atol=1e-6, rtol=0)
    torch.testing.assert_close(movement(x, x + r, mask, norm).mean(), expected[0])


@pytest.mark.parametrize("norm", ["relative", "mean", "sum"])
def test_gradient_of_the_input_equals_the_plain_formula(norm):
    x, y = (torch.randn(4, 7, 16, requires_grad=True) for _ in range(2))
    for mine, plain in zip(
        torch.autograd.grad(transport(x, y, None, norm), (x, y)),
        torch.autograd.grad(plain_transport(x, y, None, norm), (x, y)),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain)


def test_pure_bf16_loses_what_the_rounding_of_the_stream_loses():
    torch.manual_seed(0)
    x, r = torch.randn(8, 50, 64), 0.1 * torch.randn(8, 50, 64)
    exact = plain_transport(x, x + r)
    rounded = (x.bfloat16(), (x + r).bfloat16())
    torch.testing.assert_close(transport(*rounded), plain_transport(*rounded))
    assert transport(*rounded) == pytest.approx(float(exact), rel=2e-2)


def test_relative_has_no_unit():
    x, r = torch.randn(4, 7, 16), torch.randn(4, 7, 16)
    torch.testing.assert_close(transport(10 * x, 10 * (x + r)), transport(x, x + r))


@pytest.mark.parametrize(("far", "expected"), [(30, 900.0), (40, 1000.0), (1e5, 1000.0), (math.inf, 1000.0)])
def test_relative_has_a_limit_at_which_it_still_asks_for_less(far, expected):
    """From embeddings near 0, or 0, a layer goes farther than any loss could weigh."""
    torch.manual_seed(0)
    r = torch.randn(2, 7, 16)
    x = r.roll(1, 2) / far
    y = (x + r).requires_grad_()
    value = transport(x, y)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    gradient = torch.autograd.grad(value, y)[0]
    torch.testing.assert_close(gradient, value.detach() * r / r.square().sum((1, 2), keepdim=True))


def test_nothing_but_input_output_and_mask_is_kept():
    x, y = (torch.randn(4, 7, 16, requires_grad=True) for _ in range(2))
    mask = torch.ones(4, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        transport(x, y, mask)
    assert kept[:3] == [x.data_ptr(), y.data_ptr(), mask.data_ptr()]
    assert len(kept) == 3


def identity(values):
    return values


def run(weights, losses, transports):
    for loss, moved in zip(losses, transports, strict=True):
        weights.observe(0, torch.tensor(loss), torch.tensor(moved))
        weights.step([0], identity)
    return weights[0]


def test_multipliers_grow_by_the_loss_every_fifty_steps():
    weights = TransportWeights("multipliers", 3.0, 2)
    assert run(weights, [2.0] * 49, [1.0] * 49) == 3.0
    assert run(weights, [2.0], [1.0]) == pytest.approx(3.0 / (1 + 2.0))
    assert run(weights, [4.0] * 50, [1.0] * 50) == pytest.approx(3.0 / (1 + 2.0 + 4.0))
    assert weights[1] == 3.0
    for loss in (float("nan"), float("inf"), -200.0):
        assert run(weights, [2.0] * 49 + [loss], [1.0] * 50) == pytest.approx(3.0 / (1 + 2.0 + 4.0), rel=1e-6)


def test_adaptive_holds_the_term_at_a_share_of_the_loss():
    weights = TransportWeights("adaptive", 1.0, 1)
    assert run(weights, [2.0] * 10, [0.5] * 10) * 0.5 == pytest.approx(0.1 * 2.0)
    for loss, moved in ((1.0, 0.0), (-1.0, 0.5), (float("nan"), 0.5), (float("inf"), 0.5), (1.0, float("inf"))):
        assert run(weights, [loss] * 10, [moved] * 10) == pytest.approx(0.4)


def test_state_goes_on_exactly():
    weights, again = TransportWeights("adaptive", 1.0, 1), TransportWeights("adaptive", 1.0, 1)
    run(weights, [0.3] * 17, [0.7] * 17)
    again.load_state_dict(weights.state_dict())
    assert run(weights, [0.1] * 8, [0.2] * 8) == run(again, [0.1] * 8, [0.2] * 8)


@pytest.mark.parametrize("schedule", ["adaptive", "multipliers", "constant"])
def test_another_weight_counts_from_a_state_on(schedule):
    weights, again = TransportWeights(schedule, 1.0, 1), TransportWeights(schedule, 3.0, 1)
    run(weights, [0.3] * 60, [0.7] * 60)
    again.load_state_dict(weights.state_dict())
    assert again[0] == pytest.approx(3 * weights[0])
    other = TransportWeights("paper", 3.0, 1)
    other.load_state_dict(weights.state_dict())
    assert other[0] == 3.0


@pytest.mark.parametrize(("order", "laps"), [("sequential", 1), ("multi_lap", 3)])
def test_steps_are_shared_out_evenly_with_the_remainder_to_the_last(order, laps):
    found = Order.build(order, 4, laps, 50)
    steps = [segment.steps for segment in found.segments]
    assert steps[:-1] == [50 // (4 * laps)] * (4 * laps - 1)
    assert sum(steps) == found.total_steps == 50
    assert [found.at(step).stages[0] for step in range(50)] == [
        segment.stages[0] for segment in found.segments for _ in range(segment.steps)
    ]
    assert [segment.lap for segment in found.segments] == [lap for lap in range(laps) for _ in range(4)]


def test_importing_the_package_is_light():
    code = "import sys, hf_mmst; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
