"""Micro-batches within a layer: the samples of a batch pass it a few at a time, while its weights are there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten


class MicroBatches:
    """
    Runs a layer on a few samples of a batch after the other, so that the activations of a few are there at once.

    Tensors of two dimensions or more that have as many rows as the first argument, the hidden states, are cut by
    samples; everything else goes along whole.

    Args:
        layer (`nn.Module`): the layer.
        size (`int`): samples at once.
        name (`str`): of the layer, for messages.

    Raises:
        `ValueError`: if what the layer puts out of a sample depends on the others, which is tried on the first batch.
    """

    def __init__(self, layer: nn.Module, size: int, name: str):
        self._layer, self._size, self._name = layer, size, name
        self._is_tried = False
        for module in layer.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise self._error()

    def run(self, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
        """`forward(*args, **kwargs)`, a few samples at a time."""
        rows = next((len(leaf) for leaf in tree_leaves((args, kwargs)) if _is_batch(leaf)), 0)
        if rows <= self._size:
            return forward(*args, **kwargs)

        def on(start: int, number: int) -> Any:
            def cut(leaf: Any) -> Any:
                return leaf[start : start + number] if _is_batch(leaf) and len(leaf) == rows else leaf

            positional, named = tree_map(cut, (args, kwargs))
            return forward(*positional, **named)

        if not self._is_tried:
            self._try(on)
        return _joined([on(start, self._size) for start in range(0, rows, self._size)])

    def _try(self, on: Callable[[int, int], Any]) -> None:
        """Whether a few samples by themselves give what they give beside others, without dropout."""
        self._is_tried = True
        before = {module: module.training for module in self._layer.modules()}
        self._layer.eval()
        try:
            with torch.no_grad():
                alone, beside = tree_leaves(on(0, self._size)), tree_leaves(on(0, 2 * self._size))
        finally:
            for module, training in before.items():
                module.training = training
        for one, both in zip(alone, beside, strict=True):
            if one is not None and not torch.allclose(one, both[: len(one)], rtol=1e-2, atol=1e-3):
                raise self._error()

    def _error(self) -> ValueError:
        return ValueError(
            f"What {self._name} puts out of a sample depends on the others of its batch, so that it cannot run on "
            f"{self._size} of them at a time. Leave layer_batch_size unset."
        )


def _is_batch(leaf: Any) -> bool:
    return torch.is_tensor(leaf) and leaf.dim() > 1


def _joined(parts: list[Any]) -> Any:
    leaves = zip(*map(tree_leaves, parts), strict=True)
    return tree_unflatten([None if one[0] is None else torch.cat(one) for one in leaves], tree_structure(parts[0]))
