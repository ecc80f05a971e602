"""The loss that the stages of a model learn from, and the kind of head that it needs, told by the model's task."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import unwrap_peft_model

from .chosen_tokens import ChosenTokens, refuse_other_tokens

HeadKind = Literal["pooled", "tokens", "own"]


@dataclass(frozen=True)
class Objective:
    """
    The loss of a model's task, and the kind of head whose logits it takes.

    Attributes:
        head (`str`):
            Of the stages before the last: `"pooled"`, logits `[B, num_labels]`; `"tokens"`, logits
            `[B, N, num_labels]`; `"own"`, the model's own head for all stages, logits `[B, N, vocab_size]`.
        compute (`Callable`): transformers' loss, of logits, labels and the model's configuration.
        shifts (`bool`): whether the label of a token is that of the next one.
    """

    head: HeadKind
    compute: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
    shifts: bool = False

    def count(self, labels: Any) -> int:
        """Number of labels that count: all but -100 of class indices, else all numbers."""
        if not torch.is_tensor(labels):
            return 0
        if self.shifts:
            labels = labels[..., 1:]
        return labels.numel() if labels.is_floating_point() else int((labels != -100).sum())

    def tokens(self, labels: Any) -> ChosenTokens | None:
        """The tokens whose labels `[B, N]` count, where a head of kind `"own"` need not see all others."""
        if self.head != "own" or not torch.is_tensor(labels):
            return None
        return ChosenTokens.of(self._at_tokens(labels) != -100)

    def loss_of(self, tokens: ChosenTokens, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As [`loss`], of the logits of those tokens alone, `[M, vocab_size]`, and the labels of all, `[B, N]`."""
        return ForMaskedLMLoss(logits, tokens.among(self._at_tokens(labels)), logits.shape[-1])

    def _at_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels `[B, N]` at the tokens whose logits are to say them."""
        return pad(labels[..., 1:], (0, 1), value=-100) if self.shifts else labels

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, config: Any) -> torch.Tensor:
        """
        Mean loss over the labels that count.

        Raises:
            `ValueError`: if there is not one vector of logits for each token's label.
        """
        if self.head != "pooled":
            refuse_other_tokens(logits.shape[:-1], labels.shape)
        return self.compute(logits, labels, config)


CLASSES = Objective("pooled", lambda logits, labels, config: ForSequenceClassificationLoss(labels, logits, config))
_OBJECTIVES = {
    ForSequenceClassificationLoss: CLASSES,
    ForTokenClassification: Objective("tokens", ForTokenClassification),
    ForMaskedLMLoss: Objective("own", lambda logits, labels, _: ForMaskedLMLoss(logits, labels, logits.shape[-1])),
    ForCausalLMLoss: Objective(
        "own", lambda logits, labels, _: ForCausalLMLoss(logits, labels, logits.shape[-1]), shifts=True
    ),
}


def objective_of(model: nn.Module) -> Objective | None:
    """The objective of a model, by the loss that transformers has for its class; `None` if stages cannot have one."""
    base: Any = unwrap_peft_model(model)
    name = getattr(base, "loss_type", None) or _loss_of(type(base))
    found = _OBJECTIVES.get(LOSS_MAPPING.get(name))
    config = getattr(base, "config", None)
    of_two_parts = name == "ForConditionalGeneration" or getattr(config, "is_encoder_decoder", False)
    return None if found and found.head == "own" and of_two_parts else found


def _loss_of(kind: type) -> str | None:
    """The key in `LOSS_MAPPING` of the loss of a class, by the names of the classes that it derives from."""
    for base in (one.__name__ for one in kind.__mro__ if issubclass(one, PreTrainedModel)):
        if base in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return "ForCausalLM"  # GPT2LMHeadModel and others, whose name does not say so
        found = re.search("|".join(LOSS_MAPPING), base)
        if found is not None:
            return found[0]
    return None
