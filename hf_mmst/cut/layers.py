"""The layers of a model, found by its structure, and what the model has around them."""

from collections.abc import Iterable, Sequence
from typing import TypeGuard

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import unwrap_peft_model

from .partition import Partition


def find_layers(model: nn.Module) -> list[str]:
    """
    Qualified names of the encoder's layers, in order, found by the model's structure.

    The trunk is the list of like modules ([`~torch.nn.ModuleList`]) that holds most parameters; lists whose members
    are transformers' `GradientCheckpointingLayer` come first. A trunk of groups that are lists of blocks, with at most
    a change of resolution beside (the four stages of a Swin), is opened, so that the blocks are the layers. Without any
    such list, sequences of like blocks side by side ([`~torch.nn.Sequential`], as in timm) are taken, or else the one
    sequence of unlike modules that holds most parameters (VGG), whose layers are [`run_ends`]' runs of these.

    Args:
        model (`nn.Module`): a Hugging Face model with an encoder; wrappers such as `PeftModel` may be around it.

    Returns:
        `list[str]`: names `n` such that `model.get_submodule(n)` is the layer.

    Raises:
        `ValueError`: if there is no list of layers.
    """
    lists = {name: module for name, module in model.named_modules() if _is_list_of_like_modules(module)}
    checkpointed = {name: module for name, module in lists.items() if _holds_checkpointed_layers(module)}
    candidates = checkpointed or lists
    rows = [] if candidates else _rows_of_blocks(model)
    if not candidates and not rows:
        single = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 1]
        if single:
            name, module = max(single, key=lambda one: _num_parameters(one[1]))
            raise ValueError(
                f"{name} of {type(model).__name__} holds one layer only, a {type(module[0]).__name__}, within which no "
                "stage can end, however often it runs. Set num_stages to 1, or pass an encoder of several layers that "
                "share no weights, such as ViT or BERT."
            )
        rows = _sequence_of_modules(model)
    if not candidates and not rows:
        raise ValueError(
            f"No list of layers was found in {type(model).__name__}, so it has no encoder to cut into stages. Set "
            "num_stages to 1, or pass a model with an encoder, such as AutoModelForImageClassification or "
            "AutoModelForSequenceClassification."
        )
    if candidates:
        trunk = max(candidates, key=lambda name: _num_parameters(candidates[name]))
        rows = [next((name for name in lists if trunk.startswith(f"{name}.")), trunk)]  # not blocks of one resolution
    return [
        name
        for row in rows
        for child, group in model.get_submodule(row).named_children()
        for name in _open(f"{row}.{child}", group)
    ]


def tail_parameters(model: nn.Module, layers: Sequence[str]) -> list[nn.Parameter]:
    """Parameters of the modules that were registered after the layers, such as a last norm and an own head."""
    named = list(model.named_parameters(remove_duplicate=False))  # tied ones are found wherever they are
    inside = tuple(f"{name}." for name in layers)
    end = max(i for i, (name, _) in enumerate(named) if name.startswith(inside))
    within = {id(p) for name, p in named if name.startswith(inside)}
    return list(dict.fromkeys(p for _, p in named[end + 1 :] if id(p) not in within))


def tied_parameters(model: nn.Module, layers: Sequence[str]) -> list[nn.Parameter]:
    """Those of [`tail_parameters`] that are used before the layers, too: embeddings that are also the own head's."""
    named = list(model.named_parameters(remove_duplicate=False))
    begin = min(i for i, (name, _) in enumerate(named) if name.startswith(tuple(f"{name}." for name in layers)))
    before = {id(p) for _, p in named[:begin]}
    return [p for p in tail_parameters(model, layers) if id(p) in before]


def resting_parameters(model: nn.Module, partition: Partition, stage: int) -> list[nn.Parameter]:
    """Those that rest while `stage` learns: of the other stages' layers, and of what is before all but the first's."""
    others = tuple(f"{name}." for k, names in enumerate(partition.stages) if k != stage for name in names)
    inside = tuple(f"{name}." for name in partition.layers)
    found, is_before = [], True
    for name, parameter in model.named_parameters():
        is_before &= not name.startswith(inside)
        if name.startswith(others) or (is_before and stage > 0):
            found.append(parameter)
    return found


def run_ends(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """
    The layers after which a stage may end: each block of a list; in a sequence of single modules, those before the
    next that has a kernel or matrix, so that norm, activation and pooling stay with the convolution before them.
    """
    begins = [_begins_a_run(model.get_submodule(name)) for name in layers]
    return [name for name, end in zip(layers, [*begins, True][1:], strict=True) if end]


def last_norm(model: nn.Module, last_layer: str, width: int) -> nn.LayerNorm | None:
    """The LayerNorm of that width that was registered last after the layers, if there is one."""
    modules = list(model.named_modules())
    end = max(i for i, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{last_layer}."))
    norms = [m for _, m in modules[end + 1 :] if isinstance(m, nn.LayerNorm) and m.normalized_shape == (width,)]
    return norms[-1] if norms and norms[-1].elementwise_affine else None


def checkpoints_across(model: nn.Module, partition: Partition) -> str | None:
    """Name of a module that activation checkpointing runs twice as a whole, end of a stage and all, if there is one."""
    for name, module in model.named_modules():
        inside = any(one.startswith(f"{name}.") for one in partition.boundaries[:-1])
        if inside and isinstance(module, GradientCheckpointingLayer):
            return name
    return None


def refuse_shared(model: nn.Module, layers: Sequence[str]) -> None:
    """
    Raises:
        `ValueError`: if layers share weights, which could not be offloaded with one of them.
    """
    layer_of: dict[nn.Parameter, str] = {}
    for name in layers:
        for parameter in model.get_submodule(name).parameters():
            if layer_of.setdefault(parameter, name) != name:
                raise ValueError(
                    f"{name} of {type(model).__name__} shares weights with {layer_of[parameter]}, so that the two "
                    'cannot rest one by one. Set offload="none".'
                )


def refuse_layerdrop(model: nn.Module, why: str) -> None:
    """
    Raises:
        `ValueError`: if layers are skipped at random; `why` that cannot be.
    """
    config = getattr(unwrap_peft_model(model), "config", None)
    for name, value in vars(config).items() if config is not None else ():
        if "layerdrop" in name and value:
            raise ValueError(f"config.{name}={value} skips layers at random, {why}. Set it to 0.")


def _open(name: str, group: nn.Module) -> Iterable[str]:
    """The names of the layers inside a group, or the name itself if it is a layer."""
    if isinstance(group, nn.ModuleList) or _is_row_of_blocks(group):
        return [f"{name}.{child}" for child, _ in group.named_children()]
    inner = [
        (n, m) for n, m in group.named_children() if _is_list_of_like_modules(m, 1, (nn.ModuleList, nn.Sequential))
    ]
    if isinstance(group, GradientCheckpointingLayer):  # not a layer, which holds attention beside a list of experts
        inner = [(n, m) for n, m in inner if _num_matrices(group) - _num_matrices(m) <= 1]
    inner = [(n, m) for n, m in inner if 2 * _num_parameters(m) > _num_parameters(group)]
    return [f"{name}.{n}.{child}" for n, m in inner for child, _ in m.named_children()] or [name]


def _rows_of_blocks(model: nn.Module) -> list[str]:
    """Where there is no list: sequences of like blocks side by side, such as the `layer1` .. `layer4` of a ResNet."""
    rows: dict[tuple[str, type], list[str]] = {}
    for name, module in model.named_modules():
        if _is_row_of_blocks(module):
            rows.setdefault((name.rpartition(".")[0], type(module[0])), []).append(name)
    found = max(
        rows.values(), key=lambda names: sum(_num_parameters(model.get_submodule(n)) for n in names), default=[]
    )
    return found if sum(len(list(model.get_submodule(name).children())) for name in found) > 1 else []


def _sequence_of_modules(model: nn.Module) -> list[str]:
    """Where there are no such rows: the sequence of most parameters among those with two layers or more."""
    found = {
        name: _num_parameters(module)
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Sequential) and sum(map(_begins_a_run, module.children())) > 1
    }
    return [max(found, key=lambda name: found[name])] if found else []


def _begins_a_run(module: nn.Module) -> bool:
    return any(True for _ in module.children()) or any(p.dim() > 1 for p in module.parameters())


def _is_row_of_blocks(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return _is_list_of_like_modules(module, 1, (nn.Sequential,)) and any(
        True for _ in next(module.children()).children()
    )


def _is_list_of_like_modules(
    module: nn.Module, at_least: int = 2, kinds: tuple[type[nn.Module], ...] = (nn.ModuleList,)
) -> bool:
    children = list(module.children())
    return isinstance(module, kinds) and len(children) >= at_least and len({type(c) for c in children}) == 1


def _holds_checkpointed_layers(module: nn.Module) -> bool:
    return all(isinstance(child, GradientCheckpointingLayer) for child in module.children())


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _num_matrices(module: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in module.parameters())
