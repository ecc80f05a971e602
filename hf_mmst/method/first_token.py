"""A layer of which the first token alone is read -> that token, without what the layer makes of all others."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..cut.copies import copied
from ..cut.example_inputs import ExampleInputs
from ..cut.hidden_states import call_with, hidden_states_of, input_hidden_states, with_hidden_states
from ..cut.probe import run_example
from ..cut.temporary_attributes import replaced

ATTENTION = "scaled_dot_product_attention"
FEW = 2  # tokens that are put out: one alone would be taken for a step of decoding, whose keys are grouped otherwise


@contextlib.contextmanager
def first_tokens_of(layer: nn.Module, mixer: str) -> Iterator[None]:
    """
    Within this context a layer puts out its first [`FEW`] tokens only, as the whole layer does up to rounding.

    A layer mixes its tokens in its attention and nowhere else; all that it does before and after is done to each token
    by itself. So the layer's forward runs twice: on all tokens until they are mixed, and on the first ones alone from
    beginning to end, with what the first run has found put in at the mixer: of attention the keys, values and mask, so
    that queries, output projection and feed-forward are those of the first tokens. Dropout draws other numbers than in
    the whole layer. Activations are not checkpointed, for few are saved, and the layer is not compiled.

    Args:
        layer (`nn.Module`): the layer.
        mixer (`str`): where it mixes its tokens, see [`token_mixer`]. A forward pass that does not come by there, as
            with another implementation of attention, puts out all tokens.
    """
    forward = functools.partial(_forward, layer, mixer)
    with replaced(layer, "forward", forward), replaced(layer, "gradient_checkpointing", False):
        yield


def token_mixer(model: nn.Module, name: str, example: ExampleInputs | None = None) -> str | None:
    """
    Where a layer mixes its tokens, found by trial.

    A copy of the layer with random weights is run as a whole and by [`first_tokens_of`], in float64 on the CPU: first
    for PyTorch's attention, [`ATTENTION`], then for each part of the layer, in the order in which these end.

    Args:
        model (`nn.Module`): the model; on the meta device or any other.
        name (`str`): its layer.
        example ([`ExampleInputs`], *optional*): what the model is run with to see what the layer gets; made up by
            default.

    Returns:
        `str`, *optional*: [`ATTENTION`], or the name of the first part of the layer after which no tokens are mixed;
        `None` if the first token comes out otherwise with any, or does not depend on the others in this example.
    """
    calls: list[tuple[tuple, dict[str, Any]]] = []
    with torch.no_grad():
        run_example(
            model,
            [name],
            lambda *_: None,
            example or ExampleInputs.made_up(model),
            lambda _, args, kwargs: calls.append((args, kwargs)),
        )
    hidden = input_hidden_states(*calls[0])
    if hidden.dim() != 3 or hidden.shape[1] <= FEW:
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layer = copied(model.get_submodule(name), False, _random)
        args, kwargs = tree_map(lambda value: _random(value) if torch.is_tensor(value) else value, calls[0])
        parts: list[str] = []
        with contextlib.ExitStack() as stack:
            for part, module in layer.named_modules():
                noted = functools.partial(lambda part, *_: parts.append(part), part)
                stack.callback(module.register_forward_hook(noted).remove)
            whole = _first(layer(*args, **kwargs))
        hidden = input_hidden_states(args, kwargs)
        others = torch.cat([hidden[:, :1], -hidden[:, 1:]], 1)
        if torch.equal(_first(call_with(layer, others, args, kwargs)), whole):
            return None
        for mixer in (ATTENTION, *(part for part in parts[:-2] if parts.count(part) == 1)):
            if _agrees(layer, mixer, args, kwargs, whole):
                return mixer
    return None


def _agrees(layer: nn.Module, mixer: str, args: tuple, kwargs: dict[str, Any], whole: torch.Tensor) -> bool:
    try:
        with first_tokens_of(layer, mixer):
            output = hidden_states_of(layer(*args, **kwargs))
    except Exception:  # whatever a layer raises where it gets other shapes than it expects
        return False
    return output.shape[1] == FEW and bool((_first(output) - whole).abs().max() <= 1e-6 * whole.abs().max())


def _random(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU: random numbers in float64 in the place of any, and whole ones as they are."""
    shape = tensor.shape
    if not tensor.is_floating_point():
        return torch.ones(shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()
    if len(shape) < 2:
        found = torch.rand(shape, dtype=torch.float64) + 0.5
    else:
        found = torch.randn(shape, dtype=torch.float64) / tensor[0].numel() ** 0.5
    return nn.Parameter(found) if isinstance(tensor, nn.Parameter) else found


class _Mixed(Exception):  # noqa: N818 - not an error
    """Ends a forward pass where its tokens have been mixed."""


class _Attention(TorchFunctionMode):
    """Ends the first forward pass at its attention, whose keys and values the second gets."""

    def __init__(self):
        super().__init__()
        self._found: tuple | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        attend = self._attend if func is scaled_dot_product_attention else func
        return attend(*args, **(kwargs or {}))

    def _attend(self, query, key, value, attn_mask=None, *others, **kwargs):
        if self._found is None:
            mask = None if attn_mask is None else attn_mask[..., :FEW, :]
            self._found = (key, value, mask, *others), kwargs
            raise _Mixed
        args, kwargs = self._found
        return scaled_dot_product_attention(query[..., :FEW, :], *args, **kwargs)

    def watched(self) -> "_Attention":
        return self


class _Part:
    """Ends the first forward pass after a part of the layer, of whose output the second gets the first tokens."""

    def __init__(self, module: nn.Module):
        self._module, self._forward = module, module.forward
        self._found: Any = None

    def _mix(self, *args, **kwargs) -> Any:
        if self._found is None:
            self._found = _few(self._forward(*args, **kwargs))
            raise _Mixed
        return self._found

    def watched(self) -> contextlib.AbstractContextManager:
        return replaced(self._module, "forward", self._mix)


def _forward(layer: nn.Module, mixer: str, *args: Any, **kwargs: Any) -> Any:
    own = functools.partial(type(layer).forward, layer)  # the instance's is this function
    mixing = _Attention() if mixer == ATTENTION else _Part(layer.get_submodule(mixer))
    try:
        with mixing.watched():
            return own(*args, **kwargs)
    except _Mixed:
        pass
    hidden = input_hidden_states(args, kwargs)
    number = hidden.shape[1]

    def few(value):
        if value is hidden:
            return value[:, :FEW]
        of_tokens = torch.is_tensor(value) and value.dim() > 2 and value.shape[-2] == number  # masks, positions
        return value[..., :FEW, :] if of_tokens else value

    args, kwargs = tree_map(few, (args, kwargs))
    with mixing.watched():
        return own(*args, **kwargs)


def _few(output: Any) -> Any:
    return with_hidden_states(output, hidden_states_of(output)[:, :FEW])


def _first(output: Any) -> torch.Tensor:
    return hidden_states_of(output)[:, 0]
