"""Names of a dataset and of a model -> a trainer that classifies texts."""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from .config import MMSTConfig
from .splits import SplitArguments, accuracy_metric, choose_splits, labels_of
from .trainer import MMSTTrainer

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
DEFAULTS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "warmup_steps": 0.1,
    "logging_steps": 20,
    "save_strategy": "no",
}


@dataclass
class TextArguments(SplitArguments):
    """Which texts, and what is done to them."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name, a CSV, JSON or parquet file, or a folder with train and test files."}
    )
    text_column_name: str | None = field(default=None, metadata={"help": "Column of texts; the first one by default."})
    label_column_name: str = field(default="label", metadata={"help": "Column of labels, numbers or strings."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})


@dataclass
class TextModelArguments:
    """The pretrained model."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder of a pretrained model."})


def load_texts(name: str, data: TextArguments) -> datasets.DatasetDict:
    """Train and test split with columns `text` and `label`; without a test split, a fifth of the train split is it."""
    path = Path(name)
    if path.is_file():
        splits = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path))
    elif path.is_dir():
        files = {split: str(file) for split in ("train", "test") for file in path.glob(f"{split}.*")}
        splits = datasets.load_dataset(FORMATS[Path(files["train"]).suffix], data_files=files)
    else:
        splits = datasets.load_dataset(name)
    features, label = splits["train"].features, data.label_column_name
    text = data.text_column_name or next(
        n for n, kind in features.items() if "string" in str(kind.dtype) and n != label
    )
    splits = splits.select_columns([text, label]).rename_columns({text: "text", label: "label"})
    if not isinstance(splits["train"].features["label"], datasets.ClassLabel):
        splits = splits.class_encode_column("label")
    if "test" not in splits:
        splits = splits["train"].train_test_split(0.2, stratify_by_column="label", seed=0)
    return splits


def text_trainer(
    model_args: TextModelArguments, data: TextArguments, args: MMSTConfig, splits: datasets.DatasetDict
) -> MMSTTrainer:
    """The trainer: a pretrained model and its tokenizer, on the texts in `splits`."""
    name = model_args.model_name_or_path
    train, test = choose_splits(splits, data, args.data_seed or 0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    with args.main_process_first():
        train, test = (
            split.map(
                lambda batch: tokenizer(batch["text"], truncation=True, max_length=data.max_seq_length),
                batched=True,
                remove_columns="text",
            )
            for split in (train, test)
        )
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, ignore_mismatched_sizes=True, dtype=torch.float32, **labels_of(splits)
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
