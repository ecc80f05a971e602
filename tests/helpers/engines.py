"""Models cut and ready for the engine, and what their gradients are compared with."""

import torch
from torch.nn.functional import cross_entropy
from zoo import NUM_LABELS, make

from hf_mmst import Partition, StageHeads, Stagewise, find_layers
from hf_mmst.cut.layers import run_ends
from hf_mmst.cut.probe import check_cut, profile_layers


def build(name, num_stages=3, norm="relative", head_layers=0, **kwargs):
    model = make(name, **kwargs)
    layers = find_layers(model)
    partition = Partition.by_cost(layers, num_stages)
    widths = {profile.name: profile.width for profile in profile_layers(model, layers)}
    last = [model.get_submodule(n) for n in layers[len(layers) - head_layers :]]
    heads = StageHeads([widths[n] for n in partition.boundaries[:-1]], NUM_LABELS, layers=last)
    return model, partition, heads, Stagewise(model, partition, heads, norm)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


WEIGHTS = [0.5, 0.5, 0.5]


def cut(model):
    """Three stages, the first of two layers where there are so many: what they hand each other stays within it."""
    layers = find_layers(model)
    profile = {layer.name: layer for layer in profile_layers(model, layers)}
    ends = run_ends(model, layers)
    partition = Partition.by_names(layers, [ends[min(1, len(ends) - 3)], ends[-2]])
    check_cut(model, partition)
    ends = [profile[name] for name in partition.boundaries[:-1]]
    maps = [end.is_map for end in ends]
    return partition, StageHeads([end.width for end in ends], 5, maps=maps)


def step(model, partition, heads, batch):
    engine = Stagewise(model, partition, heads)
    mask = batch.get("attention_mask")
    with engine.step(lambda logits: cross_entropy(logits, batch["labels"]), WEIGHTS, mask=mask) as found:
        outputs = model(**batch)
    (outputs.loss + WEIGHTS[-1] * found.transport).backward()
