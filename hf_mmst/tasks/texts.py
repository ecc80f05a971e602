"""Text classification: its arguments, datasets, and a ready trainer."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.utils import logging

from ..config import MMSTConfig
from ..cut.example_inputs import num_positions
from ..field_checks import a_dataset, a_model, check_fields, whole
from ..trainer.mmst_trainer import MMSTTrainer
from .dataset_loading import load_splits, with_class_labels
from .pretrained import pretrained_classifier
from .splits import SplitArguments, accuracy_metric, choose_splits

logger = logging.get_logger(__name__)
DEFAULTS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "warmup_steps": 0.1,
    "eval_strategy": "epoch",
    "logging_steps": 20,
    "save_strategy": "no",
}


@dataclass
class TextArguments(SplitArguments):
    """Arguments of a dataset of texts."""

    dataset_name: Annotated[str, a_dataset] | None = field(
        default=None,
        metadata={"help": "Hub name, a CSV, TSV, JSON or parquet file, or a folder with train and test files."},
    )
    text_column_name: str | None = field(default=None, metadata={"help": "Column of texts; the first one by default."})
    label_column_name: str = field(default="label", metadata={"help": "Column of labels, numbers or strings."})
    max_seq_length: Annotated[int, whole(1, "128 by default")] = field(
        default=128, metadata={"help": "Tokens of a text at most; no more than the model has positions for."}
    )


@dataclass
class TextModelArguments:
    """The pretrained model."""

    model_name_or_path: Annotated[str, a_model] | None = field(
        default=None, metadata={"help": "Hub name or folder of a pretrained model."}
    )

    def __post_init__(self):
        check_fields(self)


def load_texts(name: str, data: TextArguments) -> datasets.DatasetDict:
    """
    Train and test split with columns `text` and `label`, of a file, a folder or the Hub, see [`with_class_labels`].

    Raises:
        `ValueError`: if there is no such column of texts or of labels.
    """
    splits = load_splits(name)
    features, label = splits["train"].features, data.label_column_name
    types = {column: str(getattr(kind, "dtype", type(kind).__name__)) for column, kind in features.items()}
    texts = [column for column, kind in types.items() if kind.endswith("string") and column != label]
    text = data.text_column_name or next(iter(texts), "")
    for what, setting, column, known in (
        ("label", "label_column_name", label, types),
        ("text", "text_column_name", text, texts),
    ):
        if column not in known:
            raise ValueError(
                f"{name} has no column{column and ' '}{column} with {what}s; its columns are "
                f"{', '.join(f'{one} ({kind})' for one, kind in types.items())}. Set {setting} to one with {what}s."
            )
    return with_class_labels(splits, name, (text, "text"), label)


def text_trainer(
    model_args: TextModelArguments, data: TextArguments, args: MMSTConfig, splits: datasets.DatasetDict
) -> MMSTTrainer:
    """
    The trainer: a pretrained model and its tokenizer, on the texts in `splits`.

    Raises:
        `ValueError`: if the tokenizer has no words, or `max_seq_length` leaves no room for them.
    """
    name: Any = model_args.model_name_or_path
    train, test = choose_splits(splits, data, args.data_seed or 0)
    args.dataloader_pin_memory &= args.device.type != "cpu"
    set_seed(args.seed)
    model = pretrained_classifier(AutoModelForSequenceClassification, name, splits)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) <= len({*tokenizer.all_special_ids}):
        raise ValueError(
            f"{name} has no tokenizer with words. Save the model's own there with tokenizer.save_pretrained."
        )
    special = tokenizer.num_special_tokens_to_add()
    if data.max_seq_length <= special:
        raise ValueError(
            f"max_seq_length={data.max_seq_length} leaves no room beside {special} special tokens. Set max_seq_length "
            f"to {special + 1} or more."
        )
    most = min(data.max_seq_length, num_positions(model) or data.max_seq_length)
    if most < data.max_seq_length:
        logger.warning(f"Texts are cut to {most} tokens, as {name} has no more positions.")
    with args.main_process_first():
        train, test = (
            split.map(
                lambda batch: tokenizer(batch["text"], truncation=True, max_length=most),
                batched=True,
                remove_columns="text",
            )
            for split in (train, test)
        )
    return MMSTTrainer(
        model,
        args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        compute_metrics=accuracy_metric(args.process_index),
    )
