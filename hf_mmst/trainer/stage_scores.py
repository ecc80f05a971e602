"""Transport and loss of each stage over the samples of an evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


class StageScores:
    """
    The transport of each stage, and its loss, over all samples of an evaluation.
    """

    def __init__(self) -> None:
        self._movements: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []

    def add(
        self, movements: list[torch.Tensor], losses: list[torch.Tensor], gather: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """
        Add a batch of B samples.

        Args:
            movements (`list[torch.Tensor]`): of each sample in each stage, `[B]` each.
            losses (`list[torch.Tensor]`): the batch's mean loss of each stage, or none.
            gather (`Callable`): gathers a tensor `[B, ...]` of all processes.
        """
        columns = [*movements, *(loss.float().expand(len(movements[0])) for loss in losses)]
        rows = gather(torch.stack(columns, 1)).cpu()
        self._movements.append(rows[:, : len(movements)])
        self._losses.append(rows[:, len(movements) :])

    @classmethod
    def joined(cls, parts: Sequence["StageScores"]) -> "StageScores":
        """The scores of all stages, of those of some stages each, for the same samples."""
        whole = cls()
        whole._movements = [torch.cat(rows, 1) for rows in zip(*(part._movements for part in parts), strict=True)]
        whole._losses = [torch.cat(rows, 1) for rows in zip(*(part._losses for part in parts), strict=True)]
        return whole

    def losses(self, apart: bool) -> list[Any]:
        """Of each stage, the loss of each sample's batch, as the host gives the model's: by batches, if `apart`."""
        batches = [rows.numpy() for rows in self._losses]
        if apart:
            return [list(stage) for stage in zip(*(rows.T for rows in batches), strict=True)]
        return list(np.concatenate(batches).T)

    def means(self, perplexity: bool = False) -> dict[str, float]:
        """`stage_<k>_loss`, its exponential `stage_<k>_perplexity` if asked for, `stage_<k>_transport`; k from 1."""
        moved, losses = (
            torch.cat(rows).double().mean(0) if rows else torch.empty(0) for rows in (self._movements, self._losses)
        )
        found = {"loss": losses, **({"perplexity": losses.exp()} if perplexity else {}), "transport": moved}
        return {f"stage_{k + 1}_{name}": one.item() for name, values in found.items() for k, one in enumerate(values)}
