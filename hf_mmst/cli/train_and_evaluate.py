"""The work of `hf-mmst train`, `pilot` and `eval`: from the flags to a trained model, trials, or metrics of stages."""

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.integrations import get_available_reporting_integrations

from ..config import MMSTConfig
from ..field_checks import check_fields, whole
from ..records.reading import load_whole, read_tensors
from ..records.stages import HEADS_NAME, checkpoint_folder, load_stages
from ..tasks import images, texts
from ..tasks.report import train_and_report
from ..trainer.mmst_trainer import MMSTTrainer
from ..trials import Pilot, pilot
from .arguments import parse_arguments


@dataclass
class TrialArguments:
    """Arguments of how much a pilot tries; its trials must fit `memory_budget`."""

    num_trials: Annotated[int, whole(1, "12 by default")] = field(
        default=12, metadata={"help": "Settings to try at most."}
    )
    trial_steps: Annotated[int, whole(1, "60 by default")] = field(
        default=60, metadata={"help": "Optimizer steps of a trial, over all stages."}
    )
    trial_samples: Annotated[int, whole(2, "2000 by default")] = field(
        default=2000, metadata={"help": "Samples that trials are trained and ranked on."}
    )

    def __post_init__(self):
        check_fields(self)


def train(task: str, flags: Sequence[str]) -> None:
    """
    Train, evaluate, save, and write `results.json`, as the recipes do.

    Args:
        task (`str`): `"images"` or `"texts"`.
        flags (`Sequence[str]`): the command line after the task.

    Raises:
        `ValueError`: if there is no dataset, or no model of texts, or for anything in them that cannot be.
    """
    begin = time.perf_counter()
    model_args, data, args = _parse("train", task, flags)
    dataset, model = data.dataset_name, model_args.model_name_or_path or "ViT from scratch"
    train_and_report(
        _trainer(task, model_args, data, args),
        model=Path(model).name,
        dataset=Path(dataset).name if Path(dataset).exists() else dataset,
        begin=begin,
    )


def try_settings(task: str, flags: Sequence[str]) -> Pilot:
    """[`pilot`] for a task; arguments and errors are those of [`train`]."""
    model_args, data, trials, args = _parse("pilot", task, flags, TrialArguments)
    budget, args.memory_budget = args.memory_budget, None
    trainer = _trainer(task, model_args, data, args)
    return pilot(
        lambda: copy.deepcopy(trainer.model),
        args,
        trainer.train_dataset,
        trainer.compute_metrics,
        data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
        budget=budget,
        num_trials=trials.num_trials,
        max_steps=trials.trial_steps,
        max_samples=trials.trial_samples,
    )


def _parse(command: str, task: str, flags: Sequence[str], *more: type) -> tuple:
    module = images if task == "images" else texts
    kinds = (
        (images.ImageModelArguments, images.ImageArguments)
        if task == "images"
        else (texts.TextModelArguments, texts.TextArguments)
    )
    parsed = parse_arguments(
        *kinds,
        *more,
        MMSTConfig,
        args=flags,
        defaults={"output_dir": f"outputs/{task}", **module.DEFAULTS},
        program=f"hf-mmst {command} {task}",
    )
    loggers = get_available_reporting_integrations()
    for name in parsed[-1].report_to:
        if name not in loggers:
            raise ValueError(
                f"report_to={name!r} is not known, or its package is not installed. Set report_to to none, or to one "
                f"that is: {', '.join(loggers)}."
            )
    if parsed[1].dataset_name is None:
        raise ValueError("There is no dataset. Set dataset_name to a name on the Hub, a folder or a file.")
    if task == "texts" and parsed[0].model_name_or_path is None:
        raise ValueError("There is no model. Set model_name_or_path to a name on the Hub or a folder.")
    return parsed


def _trainer(task: str, model_args: Any, data: Any, args: MMSTConfig) -> MMSTTrainer:
    with args.main_process_first():
        name = data.dataset_name
        splits = images.load_images(name) if task == "images" else texts.load_texts(name, data)
    return (images.image_trainer if task == "images" else texts.text_trainer)(model_args, data, args, splits)


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
        `ValueError`: if the dataset has other labels, or the checkpoint is no classifier, or damaged.
    """
    whole(1, "32 by default")("batch_size", batch_size)
    whole(1, "128 by default")("max_seq_length", max_seq_length)
    if max_samples is not None:
        whole(1, "all by default")("max_samples", max_samples)
    stages = load_stages(model)
    if stages.heads.kind != "pooled":
        raise ValueError(
            f"{model} has learned to label or predict tokens; only classifiers of images and texts are evaluated here. "
            "Evaluate it with MMSTTrainer.evaluate."
        )
    config = AutoConfig.from_pretrained(model)
    kind = (config.architectures or [""])[0]
    if not kind.endswith(("ForImageClassification", "ForSequenceClassification")):
        raise ValueError(
            f"config.json of {model} is of {kind or 'no architecture'}; only classifiers of images and texts are "
            "evaluated here. Evaluate it with MMSTTrainer.evaluate."
        )
    sees = kind.endswith("ForImageClassification")
    load_whole(AutoModelForImageClassification if sees else AutoModelForSequenceClassification, model)
    of_texts = texts.TextArguments(dataset_name=dataset, max_eval_samples=max_samples, max_seq_length=max_seq_length)
    splits = images.load_images(dataset) if sees else texts.load_texts(dataset, of_texts)
    known, found = list(config.id2label.values()), splits["test"].features["label"].names
    if known != found:
        raise ValueError(
            f"{model} knows the labels {', '.join(known)}; {dataset} has {', '.join(found)}. Pass a dataset with the "
            "same labels in the same order."
        )
    cut: dict[str, Any] = {"num_stages": 1}  # without auxiliary heads there are no metrics of stages
    if len(stages.heads) > 0:
        pooling = "auto" if any(stages.heads.maps) else stages.heads.pooling
        cut = {"head_pooling": pooling, "head_layers": len(stages.heads.layers)}
        cut["stage_boundaries"] = list(stages.partition.boundaries)
    with tempfile.TemporaryDirectory() as folder:
        args = MMSTConfig(
            folder,
            **cut,
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
        tensors = read_tensors(checkpoint_folder(model) / HEADS_NAME, trainer.heads.state_dict(), "the model")
        trainer.heads.load_state_dict(tensors)
        return trainer.evaluate()
