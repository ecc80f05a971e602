"""The engine against the paper's equations, and what it leaves alone."""

import copy

import pytest
import torch
from engines import assert_close, build
from reference import block_step, gradients, next_token_loss, train_step
from torch.nn.functional import cross_entropy
from zoo import MODELS, NUM_LABELS, batch, make

from hf_mmst import Partition, StageHeads, Stagewise, find_layers
from hf_mmst.cut.layers import resting_parameters


def engine_step(model, engine, inputs, weights, stages=None, **kwargs):
    labels = inputs["labels"]
    with engine.step(
        lambda logits: cross_entropy(logits, labels), weights, stages, inputs.get("attention_mask"), **kwargs
    ) as step:
        outputs = model(**inputs)
    last = max(step.transports)
    (outputs.loss + weights[last] * step.transport).backward()
    step.losses[last] = outputs.loss.detach()
    return step


@pytest.mark.parametrize(
    ("name", "norm", "head_layers"),
    [
        *((name, norm, 0) for name in ("vit", "bert", "swin") for norm in ("relative", "mean", "sum")),
        *((name, "relative", number) for name in ("vit", "bert") for number in (1, 2)),
    ],
)
def test_gradients_equal_the_reference(name, norm, head_layers):
    model, partition, heads, engine = build(name, norm=norm, head_layers=head_layers)
    inputs, weights = batch(name), [0.5, 0.0, 2.0]
    losses = train_step(model, name, partition, heads, inputs, weights, norm)
    expected = gradients(model, heads)
    step = engine_step(model, engine, inputs, weights)
    assert_close(gradients(model, heads), expected)
    found = [float(step.losses[k] + weights[k] * step.transports[k]) for k in range(3)]
    assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_gradients_through_the_rest_of_the_model_equal_the_reference(name, stage):
    model = make(name)
    partition = Partition.by_cost(find_layers(model), 3)
    engine = Stagewise(model, partition, StageHeads([], 0))
    inputs, criterion = batch(name), next_token_loss if name == "llama" else cross_entropy
    loss = block_step(model, name, partition, stage, inputs, 2.0, criterion)
    resting = {id(p) for p in resting_parameters(model, partition, stage)}
    expected = {n: None if id(p) in resting else p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in resting)
    with engine.step(None, [2.0] * 3, [stage], inputs.get("attention_mask"), to_the_end=True) as step:
        outputs = model(**inputs)
    whole = outputs.loss + 2.0 * step.transport
    whole.backward()
    assert whole.item() == pytest.approx(loss, rel=1e-5)
    found = {n: p.grad for n, p in model.named_parameters()}
    assert_close(found, expected)
    learned = {n for n, gradient in found.items() if gradient is not None}
    own = tuple(f"{n}." for n in partition.stages[stage])
    within = {n for n, _ in model.named_parameters() if n.startswith(tuple(f"{layer}." for layer in partition.layers))}
    assert {n for n in learned & within if not n.startswith(own)} == set()
    assert {n for n in within if n.startswith(own)} <= learned
    assert any("embed" in n for n in learned) == (stage == 0)


@pytest.mark.parametrize("name", ["deit", "dinov2", "roberta", "distilbert", "beit"])
def test_the_heads_layers_are_called_as_the_models_own(name):
    """With the identity for a head, and the last layer's own copy behind the second last: what the model computes."""
    model, partition, heads, engine = build(name, num_stages=4, head_layers=1)
    heads.heads[2] = torch.nn.Identity()
    heads.heads[2].forward = lambda hidden, mask: hidden
    inputs, found = batch(name), []
    model.eval()
    hook = model.get_submodule(partition.layers[-1]).register_forward_hook(lambda *a: found.append(a[2]))
    with torch.no_grad(), engine.observe(inputs.get("attention_mask")) as view:
        model(**inputs)
    hook.remove()
    expected = found[0][0] if isinstance(found[0], tuple) else found[0]
    torch.testing.assert_close(view.logits[2], expected)


@pytest.mark.parametrize("name", MODELS)
def test_later_stages_change_no_gradient_of_earlier_ones(name):
    model, partition, heads, engine = build(name)
    inputs, weights = batch(name), [1.0, 1.0, 1.0]
    engine_step(model, engine, inputs, weights)
    before = gradients(model, heads)
    with torch.no_grad():
        for layer in partition.stages[2]:
            for parameter in model.get_submodule(layer).parameters():
                parameter.mul_(1.5)
    engine_step(model, engine, inputs, weights)
    after = gradients(model, heads)
    later = tuple(f"0.{layer}." for layer in partition.stages[2])
    changed = {n for n in before if before[n] is not None and not torch.equal(before[n], after[n])}
    assert any(n.startswith(later) for n in changed)
    for stage in partition.stages[:2]:
        assert not any(n.startswith(tuple(f"0.{layer}." for layer in stage)) for n in changed)
    assert not any(n.startswith("1.") for n in changed)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_one_stage_alone_learns_what_it_learns_among_all(name, stage):
    model, partition, heads, engine = build(name)
    inputs, weights = batch(name), [1.0, 1.0, 1.0]
    engine_step(model, engine, inputs, weights)
    among_all = gradients(model, heads)
    ran = []
    hooks = [model.get_submodule(n).register_forward_hook(lambda *_, n=n: ran.append(n)) for n in partition.layers]
    step = engine_step(model, engine, inputs, weights, stages=[stage])
    for hook in hooks:
        hook.remove()
    alone = gradients(model, heads)
    assert list(step.transports) == [stage]
    assert ran == [n for stage_layers in partition.stages[: stage + 1] for n in stage_layers][: len(ran)]
    learned = {n for n, gradient in alone.items() if gradient is not None}
    assert_close({n: alone[n] for n in learned}, {n: among_all[n] for n in learned})
    own = {f"0.{n}." for n in partition.stages[stage]}
    others = {f"0.{n}." for k, layers in enumerate(partition.stages) if k != stage for n in layers}
    assert all(any(n.startswith(prefix) for n in learned) for prefix in own)
    assert not any(n.startswith(tuple(others)) for n in learned)


def test_all_parameters_learn_in_exactly_one_stage():
    for name in ("vit", "bert", "swin"):
        model, _, heads, engine = build(name)
        learned = []
        for stage in range(3):
            engine_step(model, engine, batch(name), [1.0] * 3, stages=[stage])
            learned += [n for n, gradient in gradients(model, heads).items() if gradient is not None]
        assert sorted(learned) == sorted(
            f"{i}.{n}" for i, m in enumerate((model, heads)) for n, _ in m.named_parameters()
        )


def test_the_frozen_prefix_runs_in_eval_mode_without_graph():
    model, _, _, engine = build("bert", dropout=True)
    seen = {}
    for name in ("bert.embeddings", *engine.partition.layers):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, _, n=name: seen.update({n: (module.training, torch.is_grad_enabled())})
        )
    engine_step(model, engine, batch("bert"), [1.0] * 3, stages=[1])
    assert seen.pop("bert.embeddings") == (False, False)
    assert seen == {"bert.encoder.layer.0": (False, False), "bert.encoder.layer.1": (True, True)}
    assert model.training


@pytest.mark.parametrize("stages", [None, [1], [2]])
def test_nothing_is_left_on_the_model(stages):
    model, _, _, engine = build("vit")
    before = {n: copy.copy(vars(m)) for n, m in model.named_modules()}
    engine_step(model, engine, batch("vit"), [1.0] * 3, stages)
    with pytest.raises(RuntimeError, match="while learning"), engine.step(_fail, [1.0] * 3) as _:
        model(**batch("vit"))
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert vars(module).keys() == before[name].keys(), name
        assert module.training


def _fail(logits):
    raise RuntimeError("while learning")


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize(("name", "num_stages"), [("vit", 2), ("vit", 4), ("bert", 4), ("swin", 3)])
def test_saved_bytes_are_at_most_the_largest_stages(name, num_stages, weight):
    model, partition, _, engine = build(name, num_stages)
    inputs = batch(name, size=8)
    alone = [saved_bytes(model, engine, inputs, [0.0] * num_stages, [k]) for k in range(num_stages)]
    together = saved_bytes(model, engine, inputs, [weight] * num_stages, None)
    end_to_end = saved_bytes(model, Stagewise(model, Partition((partition.layers,)), StageHeads([], 5)), inputs, [0.0])
    assert together <= max(alone)
    assert together < end_to_end


def saved_bytes(model, engine, inputs, weights, stages=None):
    """Peak bytes of the tensors kept for the backward pass, each storage counted once, parameters and inputs not."""
    there_anyway = [*model.parameters(), *engine.heads.parameters(), *inputs.values()]
    anyway_at = {tensor.untyped_storage().data_ptr() for tensor in there_anyway}
    live: dict[int, list[int]] = {}
    peak = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal peak
            self.tensor, self.at = tensor, tensor.untyped_storage().data_ptr()
            if self.at not in anyway_at:
                live.setdefault(self.at, [tensor.untyped_storage().nbytes(), 0])[1] += 1
                peak = max(peak, sum(size for size, _ in live.values()))

        def __del__(self):
            if self.at not in anyway_at:
                live[self.at][1] -= 1
                if not live[self.at][1]:
                    del live[self.at]

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        engine_step(model, engine, inputs, weights, stages)
    assert not live
    gradients(model, engine.heads)
    return peak


def test_side_inputs_with_a_graph_reach_their_parameters():
    """BEiT's shared position bias enters every layer: its gradient is the sum of the gradients of all stages."""
    model = make("beit")
    table = model.beit.encoder if hasattr(model.beit, "encoder") else model.beit
    bias = next(p for n, p in table.named_parameters() if "relative_position_bias_table" in n)
    partition = Partition.by_cost(find_layers(model), 2)
    engine = Stagewise(model, partition, StageHeads([32], NUM_LABELS))
    inputs = batch("vit")
    with engine.step(lambda logits: cross_entropy(logits, inputs["labels"]), [0.0, 0.0]):
        loss = model(**inputs).loss
        first = bias.grad.clone()
    loss.backward()
    both = bias.grad.clone()
    model.zero_grad(set_to_none=True)
    engine_step(model, engine, inputs, [0.0, 0.0], stages=[0])
    torch.testing.assert_close(first, bias.grad)
    assert first.abs().max() > 0
    assert not torch.allclose(both, first)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_gradient_scaler_scales_every_stage(name):
    """As with fp16: each stage's loss is scaled before its backward pass, and unscaling gives the plain gradients."""
    model, _, heads, engine = build(name)
    inputs, weights = batch(name), [0.3] * 3
    engine_step(model, engine, inputs, weights)
    expected = gradients(model, heads)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([*model.parameters(), *heads.parameters()], lr=0.1)
    with engine.step(
        lambda logits: cross_entropy(logits, inputs["labels"]),
        weights,
        mask=inputs.get("attention_mask"),
        backward=lambda loss: scaler.scale(loss).backward(),
    ) as step:
        outputs = model(**inputs)
    scaler.scale(outputs.loss + weights[2] * step.transport).backward()
    scaler.unscale_(optimizer)
    assert_close(gradients(model, heads), expected)
