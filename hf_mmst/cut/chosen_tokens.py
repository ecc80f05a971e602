"""Some tokens of a batch: hidden states of all -> theirs alone, in as few rows as hold them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChosenTokens:
    """
    Tokens of a batch `[B, N]`, fewer than fill its rows.

    Attributes:
        shape (`tuple[int, int]`): B and N.
        numbers (`torch.Tensor`): their numbers in the batch, row by row, `[R N]`; the last one is repeated to fill R
            rows of N.
        count (`int`): M, how many there are.
    """

    shape: tuple[int, int]
    numbers: torch.Tensor
    count: int

    @classmethod
    def of(cls, mask: torch.Tensor) -> "ChosenTokens | None":
        """Those that `[B, N]` says; `None` if there are none, or so many that they fill as many rows."""
        numbers, (rows, length) = mask.flatten().nonzero().squeeze(1), mask.shape
        count = len(numbers)
        filling = -count % length
        if count == 0 or count + filling >= rows * length:
            return None
        return cls((rows, length), torch.cat([numbers, numbers[-1:].expand(filling)]), count)

    def packed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of hidden states `[B, N, D]`, those of the tokens, `[R, N, D]`."""
        return hidden_states.flatten(0, 1)[self.numbers].unflatten(0, (-1, self.shape[1]))

    def unpacked(self, tensor: torch.Tensor) -> torch.Tensor:
        """What was made of those, `[R, N, V]`: of each token once, `[M, V]`."""
        return tensor.flatten(0, 1)[: self.count]

    def among(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of labels `[B, N]` or logits `[B, N, V]`, those of the tokens, `[M]` or `[M, V]`."""
        refuse_other_tokens(tensor.shape[:2], self.shape)
        return tensor.flatten(0, 1)[self.numbers[: self.count]]


def refuse_other_tokens(found: Sequence[int], labels: Sequence[int]) -> None:
    """
    Raises:
        `ValueError`: if there is not one vector of logits for each token's label.
    """
    if [*found] != [*labels]:
        raise ValueError(
            f"A stage puts out {[*found]} tokens for labels of {[*labels]}: its layers pad or pool the tokens. Let the "
            "collator pad to a multiple of what they need (pad_to_multiple_of), or set num_stages to 1."
        )
