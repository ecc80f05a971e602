"""
Fine-tunes a model as the task scripts of transformers do: three dataclasses, the last checkpoint, metrics, a card.

Written for `Trainer` and `TrainingArguments`; the two names imported below are all that differs.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_mmst import MMSTConfig as TrainingArguments
from hf_mmst import MMSTTrainer as Trainer

logger = logging.getLogger(__name__)


@dataclass
class DataTrainingArguments:
    """What is trained on."""

    dataset_name: str | None = field(default=None, metadata={"help": "A folder."})
    max_seq_length: int = field(default=16, metadata={"help": "Tokens at most."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad each text, or each batch."})
    max_train_samples: int | None = field(default=None, metadata={"help": "For debugging."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "For debugging."})


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "A folder."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Another number of labels."})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    logger.warning(f"Process rank: {training_args.local_process_index}, device: {training_args.device}")

    last_checkpoint = None
    if os.path.isdir(training_args.output_dir) and training_args.do_train:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
    set_seed(training_args.seed)

    raw_datasets = load_from_disk(data_args.dataset_name)
    is_text = "sentence" in raw_datasets["train"].column_names
    label_list = raw_datasets["train"].features["label"].names
    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        num_labels=len(label_list),
        label2id={label: i for i, label in enumerate(label_list)},
        id2label=dict(enumerate(label_list)),
    )
    auto = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
    model = auto.from_pretrained(
        model_args.model_name_or_path, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes
    )

    if is_text:
        processor = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        padding = "max_length" if data_args.pad_to_max_length else False

        def preprocess_function(examples):
            return processor(
                examples["sentence"], padding=padding, max_length=data_args.max_seq_length, truncation=True
            )

        with training_args.main_process_first(desc="dataset map pre-processing"):
            raw_datasets = raw_datasets.map(preprocess_function, batched=True)
        data_collator = default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(processor)
    else:
        processor = None

        def transforms(batch):
            batch["pixel_values"] = [torch.tensor(image, dtype=torch.float32) for image in batch["image"]]
            return batch

        for split in raw_datasets:
            raw_datasets[split].set_transform(transforms)

        def data_collator(examples):
            pixel_values = torch.stack([example["pixel_values"] for example in examples])
            return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    train_dataset, eval_dataset = raw_datasets["train"], raw_datasets["validation"]
    if data_args.max_train_samples is not None:
        train_dataset = train_dataset.select(range(data_args.max_train_samples))
    if data_args.max_eval_samples is not None:
        eval_dataset = eval_dataset.select(range(data_args.max_eval_samples))

    def preprocess_logits_for_metrics(logits, labels):
        if isinstance(logits, tuple):
            logits = logits[0]
        return logits.argmax(dim=-1)

    def compute_metrics(p: EvalPrediction):
        return {"accuracy": (p.predictions == p.label_ids).astype(np.float32).mean().item()}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=processor,
        data_collator=data_collator,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )

    if training_args.do_train:
        checkpoint = None
        if training_args.resume_from_checkpoint is not None:
            checkpoint = training_args.resume_from_checkpoint
        elif last_checkpoint is not None:
            checkpoint = last_checkpoint
        train_result = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = train_result.metrics
        metrics["train_samples"] = len(train_dataset)
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate(eval_dataset=eval_dataset)
        metrics["eval_samples"] = len(eval_dataset)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_predict:
        predict_dataset = raw_datasets["test"]
        if is_text:
            predict_dataset = predict_dataset.remove_columns("label")
        predictions = trainer.predict(predict_dataset, metric_key_prefix="predict").predictions
        if trainer.is_world_process_zero():
            with open(os.path.join(training_args.output_dir, "predict_results.txt"), "w") as writer:
                writer.write("index\tprediction\n")
                writer.writelines(f"{index}\t{label_list[item]}\n" for index, item in enumerate(predictions))

    kwargs = {
        "finetuned_from": model_args.model_name_or_path,
        "tasks": "text-classification" if is_text else "image-classification",
        "dataset": "a small dataset",
        "language": "en",
    }
    if training_args.push_to_hub:
        trainer.push_to_hub(**kwargs)
    else:
        trainer.create_model_card(**kwargs)
    return trainer


def dataset(kind: str) -> DatasetDict:
    """Three splits of a small dataset of `"texts"` or `"images"`."""
    from datasets import ClassLabel

    rng = np.random.default_rng(0)
    splits = {}
    for split, size in (("train", 32), ("validation", 16), ("test", 8)):
        labels = rng.integers(3, size=size)
        if kind == "texts":
            columns = {"sentence": [" ".join([["a", "small", "set", "of", "words"][i]] * (i + 3)) for i in labels]}
        else:
            columns = {"image": [rng.normal(size=(3, 32, 32)).tolist() for _ in labels]}
        columns = Dataset.from_dict({**columns, "label": labels})
        splits[split] = columns.cast_column("label", ClassLabel(names=["red", "green", "blue"]))
    return DatasetDict(splits)


if __name__ == "__main__":
    main()
