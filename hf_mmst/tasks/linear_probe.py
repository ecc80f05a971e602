"""What a linear classifier reads from a model's layers: how far the classes lie apart at each depth."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..cut.partition import Partition
from ..method.engine import Stagewise
from ..method.heads import PoolingHead, StageHeads

if TYPE_CHECKING:
    from ..trainer.mmst_trainer import MMSTTrainer

PENALTY = 1e-3  # on the squared weights
STEPS = 100


def probed_accuracies(trainer: "MMSTTrainer", partition: Partition, heads: StageHeads) -> list[float]:
    """
    Accuracy of a linear classifier of the trained model's hidden states at the end of each stage but the last.

    It is trained on the training samples, once through the model, and evaluated on the others: LayerNorm without
    weights, pooling as in `heads`, Linear.

    Args:
        trainer ([`MMSTTrainer`]): whose model it is, in a single process.
        partition ([`Partition`]): the stages.
        heads ([`StageHeads`]): of these stages; their weights are not used.

    Returns:
        `list[float]`: K - 1 fractions; none where a head is not one that pools tokens.
    """
    if not all(isinstance(head, PoolingHead) for head in heads):
        return []
    reads = StageHeads(heads.widths, heads.num_labels, heads.pooling).to(trainer.args.device)
    for head in reads:
        head.classifier = nn.Identity()
    engine = Stagewise(trainer.model, partition, reads)
    train, test = (
        _features(trainer, engine, trainer.get_eval_dataloader(data))
        for data in (trainer.train_dataset, trainer.eval_dataset)
    )
    found = []
    for seen, unseen in zip(train[0], test[0], strict=True):
        classify = fitted(seen, train[1], heads.num_labels)
        found.append((classify(unseen).argmax(-1) == test[1]).double().mean().item())
    return found


@torch.no_grad()
def _features(
    trainer: Any, engine: Stagewise, batches: Iterable[Mapping[str, Any]]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pooled hidden states `[N, D]` of each stage but the last, and labels `[N]`, on the CPU."""
    trainer.model.eval()
    features, labels = [], []
    for batch in batches:
        inputs = trainer._prepare_inputs(batch)
        labels.append(inputs.pop("labels").cpu())
        with engine.observe(inputs.get("attention_mask")) as view:
            trainer.model(**inputs)
        features.append([one.cpu() for one in view.logits])
    return [torch.cat(stage) for stage in zip(*features, strict=True)], torch.cat(labels)


def fitted(features: torch.Tensor, labels: torch.Tensor, num_labels: int) -> nn.Linear:
    """The logistic regression of features `[N, D]` to labels `[N]`."""
    classify = nn.Linear(features.shape[1], num_labels, dtype=features.dtype)
    nn.init.zeros_(classify.weight)
    nn.init.zeros_(classify.bias)
    optimizer = torch.optim.LBFGS(classify.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(classify(features), labels) + PENALTY * classify.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return classify
