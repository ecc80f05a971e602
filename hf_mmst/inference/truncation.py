"""`truncate`: the first stages of a model as a smaller plain model, with the head of the last of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..cut.copies import copied
from ..cut.example_inputs import dummy_inputs
from ..method.engine import Stagewise
from ..method.heads import OwnHead, PoolingHead
from ..records.stages import Stages, check_model

SMALL = 2.0**-12  # what hidden states are scaled by for a tanh; a power of two rounds nothing


def truncate(model: PreTrainedModel, stages: Stages, num_stages: int) -> PreTrainedModel:
    """
    Keep the first `num_stages` stages of a model, as a plain Hugging Face model with fewer layers.

    What follows them becomes the auxiliary head of the last stage that is kept: the heads' layers, if they have any,
    the last norm and the classifier. What a plain model can say depends on what it has after its layers:

    - One LayerNorm, pooling and one Linear, as in ViT, DeiT, DINOv2 and Swin. ViT and DeiT pool the first token, so
      their heads have to be trained with `head_pooling="cls"`.
    - A Linear, tanh and a Linear on the first token, as in BERT, RoBERTa and their like, with heads that pool the first
      token (the default of pretrained ones). There is no norm after their layers: one layer more, whose matrices are
      zero, is the head's norm, and costs the time of a layer. The tanh gets values so small that it is the identity;
      that is for inference, not for training on.
    - Stages of language models have the model's own head already, so that any of them is a model.

    Whether it comes out the same is checked on random input. What stays is that a norm's eps is the model's own, not
    the head's 1e-5: that is seen where hidden states are tiny, as they are in models without training.

    Args:
        model (`PreTrainedModel`): the trained model; it is not changed.
        stages ([`Stages`]): its stages, see [`load_stages`].
        num_stages (`int`): number of stages to keep, from 1 to K - 1.

    Returns:
        `PreTrainedModel`: for `save_pretrained`, `from_pretrained`, pipelines and everything else.

    Raises:
        `ValueError`: if `num_stages` is out of range, the stages are of another model, or a plain model of this kind
            cannot express the head.
    """
    partition, kind = stages.partition, type(model).__name__
    check_model(model, stages)
    if type(num_stages) is not int or not 1 <= num_stages < partition.num_stages:
        raise ValueError(
            f"num_stages={num_stages!r} of {partition.num_stages} cannot be kept: set it to a whole number from 1 to "
            f"{partition.num_stages - 1}."
        )
    head: Any = stages.heads.heads[num_stages - 1]
    own = isinstance(head, OwnHead)
    if not own and not isinstance(head, PoolingHead):
        raise ValueError(
            f"The head of stage {num_stages} is a {type(head).__name__}, which no plain {kind} can express. Use the "
            "whole model, or EarlyExit, which keeps the heads of classifiers."
        )
    kept = [name for stage in partition.stages[:num_stages] for name in stage]
    tail = None if own else _tail(model, partition.layers)
    last = len(kept) + len(stages.heads.layers)  # the head's layers come last
    layers = [*partition.layers[: last + (tail is not None and tail.dense)]]
    if tail is not None and tail.dense and last + 1 >= len(partition.layers):
        raise ValueError(
            f"num_stages={num_stages} would take {last + 1} layers, {len(kept)} of the stages, {last - len(kept)} of "
            f"the head and one for its norm, but the {kind} has {len(partition.layers)}. Set num_stages to less, or "
            "use the whole model."
        )
    small = type(model)(_shortened(model, layers)).eval()
    found = {name for name, _ in small.named_modules()}
    if not found.issuperset(layers) or found & {*partition.layers[len(layers) :]}:
        raise ValueError(
            f"A {kind} with fewer layers does not have the layers {layers[0]} .. {layers[-1]}, so that it cannot be "
            "truncated. Use EarlyExit, which needs no smaller model."
        )
    around = () if tail is None else (f"{tail.first}.", f"{tail.classifier}.")
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith(around)}
    for name, layer in zip(layers[len(kept) :], stages.heads.layers, strict=False):
        weights |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    missing = [
        name
        for name, tensor in small.state_dict().items()
        if not name.startswith(around) and (name not in weights or weights[name].shape != tensor.shape)
    ]
    if missing:
        raise ValueError(f"A {kind} with fewer layers has other weights ({missing[0]}, ...). Use EarlyExit.")
    small.load_state_dict({name: weights[name] for name in small.state_dict() if name in weights}, strict=False)
    norm: Any = None
    if tail is not None:
        first, classifier = (small.get_submodule(name) for name in (tail.first, tail.classifier))
        if tail.dense:
            norm = _make_norm(small.get_submodule(layers[-1]), type(model).__name__)
            _set_dense(first, classifier, head)
        else:
            norm = first
            _set_classifier(small, classifier, head)
        norm.load_state_dict(head.norm.state_dict())
    _check(model, small, stages, num_stages, None if norm is None else norm.eps)
    return small.to(next(model.parameters()).dtype)


def _shortened(model: PreTrainedModel, layers: list[str]) -> Any:
    """The model's configuration, for its first `layers` only."""
    config = model.config.to_dict()
    if "depths" in config:
        groups: dict[str, int] = {}
        for name in layers:
            group = name.rpartition(".")[0]
            groups[group] = groups.get(group, 0) + 1
        for name in ("num_heads", "hidden_sizes"):
            if name in config:
                config[name] = config[name][: len(groups)]
        config["depths"] = list(groups.values())
        if "embed_dim" in config:
            config["hidden_size"] = config["embed_dim"] * 2 ** (len(groups) - 1)
    else:
        config[model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][: len(layers)]
    derived = ("stage_names", "out_features", "out_indices")
    return type(model.config)(**{name: value for name, value in config.items() if name not in derived})


@dataclass(frozen=True)
class _Tail:
    """What a model has after its layers, by name: a LayerNorm, or a Linear if `dense`, and the classifying Linear."""

    first: str
    classifier: str
    dense: bool


def _tail(model: nn.Module, layers: Sequence[str]) -> _Tail:
    inside = tuple(f"{name}." for name in layers)
    names = [name for name, _ in model.named_parameters()]
    last = max(i for i, name in enumerate(names) if name.startswith(inside))
    after = list(dict.fromkeys(name.rpartition(".")[0] for name in names[last + 1 :]))
    modules: list[Any] = [model.get_submodule(name) for name in after]
    kinds = [type(module) for module in modules]
    square = kinds == [nn.Linear, nn.Linear] and modules[0].in_features == modules[0].out_features
    if kinds != [nn.LayerNorm, nn.Linear] and not square:
        what = ", ".join(f"{name} ({kind.__name__})" for name, kind in zip(after, kinds, strict=True))
        raise ValueError(
            f"After its layers a {type(model).__name__} has {what}, which cannot say what a stage's head does: "
            "LayerNorm, pooling, Linear. Use EarlyExit, which keeps the heads."
        )
    return _Tail(after[0], after[1], square)


def _make_norm(layer: nn.Module, kind: str) -> nn.LayerNorm:
    """
    Make a layer that adds nothing to what it gets, so that only its norms are left; the last of them is returned.

    Those before it normalize without weights, and what is normalized already the last one only scales and shifts.
    """
    norms = [module for module in layer.modules() if isinstance(module, nn.LayerNorm)]
    if not norms:
        raise ValueError(f"The layers of a {kind} have no LayerNorm that could be that of a head. Use EarlyExit.")
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return norms[-1]


@torch.no_grad()
def _set_dense(dense: Any, classifier: Any, head: PoolingHead) -> None:
    """Let a Linear, tanh and a Linear be one Linear: a tanh of small values is the identity up to their square."""
    nn.init.eye_(dense.weight).mul_(SMALL)
    nn.init.zeros_(dense.bias)
    classifier.weight.copy_(head.classifier.weight / SMALL)
    classifier.bias.copy_(head.classifier.bias)


def _set_classifier(model: nn.Module, classifier: Any, head: PoolingHead) -> None:
    """Let the classifier do what the head does, also where it takes the first token and the mean of the others."""
    weight, bias = head.classifier.weight, head.classifier.bias
    with torch.no_grad():
        classifier.bias.copy_(bias)
        if classifier.weight.shape == weight.shape:
            classifier.weight.copy_(weight)
        elif classifier.weight.shape[1] == 2 * weight.shape[1]:
            first = 1.0
            if head.pooling == "mean":
                config: Any = model.config
                first = 1 / (1 + (config.image_size // config.patch_size) ** 2)
            classifier.weight.copy_(torch.cat([first * weight, (1 - first) * weight], 1))


def _check(model: nn.Module, small: Any, stages: Stages, num_stages: int, eps: Any) -> None:
    """That the smaller model says what the head says, on random input, were the head's norm to have its eps."""
    random = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(value.shape, generator=random)
        if value.is_floating_point()
        else torch.randint(small.config.vocab_size, value.shape, generator=random)
        for name, value in dummy_inputs(model, 2).items()
    }
    whole = copied(model, training=False).float().cpu()
    heads: Any = copied(stages.heads).float().cpu()
    if eps is not None:
        heads.heads[num_stages - 1].norm.eps = eps
    with torch.no_grad(), Stagewise(whole, stages.partition, heads).observe() as view:
        whole(**inputs)
    with torch.no_grad():
        found = small.float()(**inputs).logits
    if not torch.allclose(found, view.logits[num_stages - 1], rtol=1e-4, atol=1e-5):
        raise ValueError(
            f'The head of stage {num_stages} pools "{stages.heads.pooling}", but a {type(model).__name__} pools '
            "otherwise, or has other functions after its layers, so that it cannot say what the head says. Use "
            'EarlyExit, which keeps the heads, or train with head_pooling set to the other of "cls" and "mean" if it '
            "is that."
        )
