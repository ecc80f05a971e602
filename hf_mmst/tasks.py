"""A task and flags -> a trained model; a checkpoint and a dataset -> metrics of each of its stages."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from . import images, texts
from .arguments import parse_arguments
from .config import MMSTConfig
from .report import train_and_report
from .stages import load_stages


def train(task: str, flags: Sequence[str]) -> None:
    """
    Train, evaluate once, save, and write `results.json`, as the recipes do.

    Args:
        task (`str`): `"images"` or `"texts"`.
        flags (`Sequence[str]`): the command line after the task.

    Raises:
        `ValueError`: if there is no dataset, or no model of texts.
    """
    begin = time.perf_counter()
    module = images if task == "images" else texts
    kinds = (
        (images.ImageModelArguments, images.ImageArguments)
        if task == "images"
        else (texts.TextModelArguments, texts.TextArguments)
    )
    model_args, data, args = parse_arguments(
        *kinds, MMSTConfig, args=flags, defaults={"output_dir": f"outputs/{task}", **module.DEFAULTS}
    )
    if data.dataset_name is None:
        raise ValueError("There is no dataset. Set dataset_name to a name on the Hub, a folder or a file.")
    if task == "texts" and model_args.model_name_or_path is None:
        raise ValueError("There is no model. Set model_name_or_path to a name on the Hub or a folder.")
    with args.main_process_first():
        name = data.dataset_name
        splits = images.load_images(name) if task == "images" else texts.load_texts(name, data)
    make = images.image_trainer if task == "images" else texts.text_trainer
    dataset, model = data.dataset_name, model_args.model_name_or_path or "ViT from scratch"
    train_and_report(
        make(model_args, data, args, splits),
        model=Path(model).name,
        dataset=Path(dataset).name if Path(dataset).exists() else dataset,
        begin=begin,
    )


def evaluate(
    model: str, dataset: str, batch_size: int = 32, max_samples: int | None = None, max_seq_length: int = 128
) -> dict[str, float]:
    """
    Metrics of each stage of a checkpoint on the test split of a dataset, as [`MMSTTrainer.evaluate`] gives them.

    Args:
        model (`str`): a folder written by [`MMSTTrainer`], or the name of one on the Hub.
        dataset (`str`): a name on the Hub, a folder, or, of texts, a file.
        batch_size (`int`), max_samples (`int`, *optional*), max_seq_length (`int`): how much at once, and at most.

    Raises:
        `FileNotFoundError`: if the checkpoint holds no stages.
        `ValueError`: if the dataset has other labels.
    """
    stages = load_stages(model)
    config = AutoConfig.from_pretrained(model)
    sees = (config.architectures or [""])[0].endswith("ForImageClassification")
    of_texts = texts.TextArguments(dataset_name=dataset, max_eval_samples=max_samples, max_seq_length=max_seq_length)
    splits = images.load_images(dataset) if sees else texts.load_texts(dataset, of_texts)
    known, found = list(config.id2label.values()), splits["test"].features["label"].names
    if known != found:
        raise ValueError(
            f"{model} knows the labels {', '.join(known)}; {dataset} has {', '.join(found)}. Pass a dataset with the "
            "same labels in the same order."
        )
    with tempfile.TemporaryDirectory() as folder:
        args = MMSTConfig(
            folder,
            stage_boundaries=list(stages.partition.boundaries),
            head_pooling=stages.config["head_pooling"],
            head_layers=len(stages.heads.layers),
            transport_norm=stages.config["transport_norm"],
            per_device_eval_batch_size=batch_size,
            remove_unused_columns=not sees,
            report_to="none",
        )
        if sees:
            of_images = images.ImageArguments(dataset_name=dataset, max_eval_samples=max_samples)
            trainer = images.image_trainer(images.ImageModelArguments(model), of_images, args, splits)
        else:
            trainer = texts.text_trainer(texts.TextModelArguments(model), of_texts, args, splits)
        trainer.heads.load_state_dict(stages.heads.state_dict())
        return trainer.evaluate()
