"""The model card of a run: `README.md`, with a plot of its stages."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cut.objectives import objective_of
from .atomic_writes import write_atomically
from .colours import PLANNED, WAYS
from .pictures import light_page
from .results import ENSEMBLE, SETTINGS, standard_error

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD_NAME, PLOT_NAME = "README.md", "stages.png"
TAGS = ("hf_mmst", "module-wise", "generated_from_trainer")
AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "token-classification": "AutoModelForTokenClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
}
METRICS = ("accuracy", "f1", "precision", "recall", "matthews_correlation", "pearsonr", "spearmanr", "mse", "mae")


@dataclass(frozen=True)
class CardContent:
    """
    The content of a model card.

    Attributes:
        name (`str`): how the model is loaded: a name on the Hub, or a folder.
        metrics (`Mapping[str, float]`): what the evaluation found.
        stages (`Sequence[Sequence[str]]`): names of each stage's layers.
        stage_metrics (`Mapping[str, Sequence[float]]`): metrics by name, of each stage.
        settings (`Mapping[str, Any]`): hyper-parameters.
        versions (`Mapping[str, str]`): of packages.
        model (`str`): what the model is called in a sentence.
        task (`str`, *optional*): the Hub's name of the task, such as `"image-classification"`.
        base_model (`str`, *optional*): what was fine-tuned, by its name on the Hub.
        dataset (`str`, *optional*): what it was trained on.
        datasets (`Sequence[str]`): names on the Hub of that.
        input_shape (`Sequence[int]`, *optional*): `[channels, height, width]` where no image processor is saved.
        num_labels (`int`, *optional*): number of classes.
        peak_bytes (`int`, *optional*), planned_bytes (`int`, *optional*): of tensors, measured and planned.
        process_bytes (`int`, *optional*): of the whole process, on a CPU.
        num_eval_samples (`int`, *optional*): how many samples the metrics are of.
        device (`str`), command (`str`): where and how it was trained.
        language (`Sequence[str]`), license (`str`, *optional*), tags (`Sequence[str]`): metadata.
        library (`str`): `"transformers"`, or `"peft"` for adapters.
    """

    name: str
    metrics: Mapping[str, float]
    stages: Sequence[Sequence[str]]
    stage_metrics: Mapping[str, Sequence[float]]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    model: str = "model"
    task: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    datasets: Sequence[str] = ()
    input_shape: Sequence[int] | None = None
    num_labels: int | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    process_bytes: int | None = None
    num_eval_samples: int | None = None
    device: str = ""
    command: str = ""
    language: Sequence[str] = ()
    license: str | None = None
    tags: Sequence[str] = ()
    library: str = "transformers"

    @property
    def num_stages(self) -> int:
        """Number of stages K."""
        return len(self.stages)

    @property
    def has_heads(self) -> bool:
        """Whether the stages have auxiliary heads, from whose losses they have learned."""
        return self.settings.get("stage_objective") != "model"

    @property
    def exits(self) -> bool:
        """Whether samples can leave early."""
        return self.task not in ("token-classification", "fill-mask", "text-generation")

    @property
    def errors(self) -> list[float] | None:
        """Of each stage's accuracy the standard error, if that is plotted and the number of samples is known."""
        if self.plotted != "accuracy" or not self.num_eval_samples:
            return None
        return [standard_error(value, self.num_eval_samples) for value in self.stage_metrics["accuracy"]]

    @property
    def plotted(self) -> str | None:
        """Name of the metric that the picture shows: the accuracy, or else the first one that is no loss."""
        names = [name for name in self.stage_metrics if name not in ("loss", "transport")]
        return "accuracy" if "accuracy" in names else next(iter(names), None)

    @classmethod
    def from_results(cls, results: Mapping[str, Any], name: str, **more: Any) -> "CardContent":
        """
        The content of a card from what `results.json` holds.

        Args:
            results (`Mapping[str, Any]`): see [`run_results`].
            name (`str`): how the model is loaded.
            more: attributes that the results do not have.
        """
        metrics = results["metrics"] if "metrics" in results else {"accuracy": results["accuracy"]}
        num_stages = results["num_stages"]
        settings = {key: results[key] for key in SETTINGS if key in results and _says_something(key, results)}
        known = {
            "task": results.get("task"),
            "model": results.get("model") or "model",
            "base_model": results.get("base_model"),
            "dataset": results.get("dataset"),
            "input_shape": results.get("input_shape"),
            "num_labels": results.get("num_labels"),
            "peak_bytes": results.get("peak_bytes"),
            "planned_bytes": results.get("planned_bytes"),
            "process_bytes": results.get("process_bytes"),
            "num_eval_samples": results.get("num_eval_samples"),
            "device": "{type}, {name}".format(**results["device"]),
            "command": results["command"],
        }
        return cls(
            name=name,
            metrics=metrics,
            stages=results["stages"],
            stage_metrics={
                key.removeprefix("stage_"): value
                for key, value in results.items()
                if key.startswith("stage_") and isinstance(value, list) and len(value) == num_stages
            },
            settings={"num_stages": num_stages, **settings},
            versions=results["versions"],
            **{**known, **{key: value for key, value in more.items() if value}},
        )


def model_card(content: CardContent, plot: str | None = None, picture: str | None = None) -> "ModelCard":
    """
    The card, with metadata for the Hub's search and leaderboards.

    Args:
        content (`CardContent`): what it says.
        plot (`str`, *optional*): the file with the picture of the stages, beside the card.
        picture (`str`, *optional*): the file with the picture of the training, beside the card.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    title = content.name.rstrip("/").rpartition("/")[2]
    measured = [name for name in content.metrics if name in METRICS]
    dataset = content.dataset or "the evaluation set"
    results = [
        EvalResult(
            task_type=content.task or "other",
            dataset_type=next(iter(content.datasets), re.sub(r"\W+", "-", dataset.lower()).strip("-")),
            dataset_name=dataset,
            metric_type=name,
            metric_value=content.metrics[name],
            metric_name=name,
        )
        for name in content.metrics
        if not name.startswith(f"{ENSEMBLE}_")  # which is not what the plain model reaches
    ]
    data = ModelCardData(
        base_model=content.base_model if _is_hub_name(content.base_model) else None,
        datasets=list(content.datasets) or None,
        eval_results=results or None,
        language=list(content.language) or None,
        library_name=content.library,
        license=content.license,
        metrics=measured or None,
        model_name=title,
        pipeline_tag=content.task,
        tags=list(dict.fromkeys([*TAGS, *([content.task] if content.task else []), *content.tags])),
    )
    template = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        data,
        template_str=template,
        title=title,
        introduction=_introduction(content),
        snippet=_snippet(content),
        card=content,
        plot=plot,
        picture=picture,
    )


def write_card(folder: str | Path, content: CardContent, picture: Path | None = None) -> Path:
    """
    Write the card to `README.md` in `folder`, and the picture beside it, if matplotlib is there to draw it.

    Args:
        folder (`str` or `Path`): is made, if it is not there.
        content (`CardContent`): what the card says.
        picture (`Path`, *optional*): a picture of the training in the same folder, that the card is to show.

    Returns:
        `Path`: the file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot = PLOT_NAME if content.plotted and content.num_stages > 1 and find_spec("matplotlib") is not None else None
    if plot is not None:
        write_atomically(folder / PLOT_NAME, lambda path: draw_stages(content, path))
    card = str(model_card(content, plot, None if picture is None else picture.name))
    write_atomically(folder / CARD_NAME, lambda path: path.write_text(card, encoding="utf-8"))
    return folder / CARD_NAME


def draw_stages(content: CardContent, path: Path) -> None:
    """A picture, PNG, of the metric and the transport of each stage, from zero on."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    metric, numbers = content.plotted, range(1, content.num_stages + 1)
    assert metric is not None
    panels = {name: content.stage_metrics[name] for name in (metric, "transport") if name in content.stage_metrics}
    colour = WAYS["stages" if content.settings.get("transport_weight", 1) else "stages, greedy"]
    with light_page():
        figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
        for axes, (name, values) in zip(
            figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
        ):
            errors = content.errors if name == "accuracy" else None
            bars = axes.bar(numbers, values, width=0.6, yerr=errors, capsize=3, color=colour, ecolor=PLANNED)
            if content.num_stages <= 6:
                axes.bar_label(bars, fmt="{:.1%}" if name == "accuracy" else "{:.3f}", fontsize=8, padding=2)
            more = ", ± 1 standard error" if errors else ""
            axes.set(title=f"{name}{more}", xlabel="stage", xticks=list(numbers))
            axes.title.set_fontsize(10)
            axes.margins(y=0.12)
            if name == "accuracy":
                axes.set_ylim(0, 1.12)
                axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
                axes.yaxis.set_major_formatter(PercentFormatter(1))
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def task_of(model: Any) -> str | None:
    """The Hub's name of the task of a model, by its class: `"image-classification"`, `"text-classification"`, ..."""
    names, objective = [kind.__name__ for kind in type(model).__mro__], objective_of(model)

    def is_for(task: str) -> bool:
        return any(name.endswith(f"For{task}Classification") for name in names)

    if objective is not None and objective.head == "tokens":
        return "token-classification"
    if objective is not None and objective.head == "own":
        return "text-generation" if objective.shifts else "fill-mask"
    if is_for("Image"):
        return "image-classification"
    if is_for("Audio") or (is_for("Sequence") and getattr(model, "main_input_name", "") == "input_values"):
        return "audio-classification"
    return "text-classification" if is_for("Sequence") else None


def _introduction(content: CardContent) -> str:
    base, dataset = content.base_model, content.dataset
    model = f"[{base}](https://huggingface.co/{base}), fine-tuned" if base else f"{content.model}, trained"
    on = f" on {dataset}" if dataset else ""
    if content.num_stages == 1:
        return f"This is {model}{on} with hf_mmst, end to end."
    loss = "a loss of its own" if content.has_heads else "the model's loss while the others were frozen"
    return (
        f"This is {model}{on} module-wise with hf_mmst: its layers are cut into {content.num_stages} stages, "
        f"each of which has learned from {loss}, with a transport term that keeps it from moving the "
        "representation further than the task needs "
        "([the minimizing movement scheme](https://arxiv.org/abs/2309.17357))."
    )


def _snippet(content: CardContent) -> str:
    if content.library == "peft":
        auto = AUTO_CLASSES.get(content.task or "", "AutoModel")
        return (
            f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
            f"base = {auto}.from_pretrained({content.base_model!r}, num_labels={content.num_labels})\n"
            f"model = PeftModel.from_pretrained(base, {content.name!r})"
        )
    if content.task == "text-classification":
        return (
            "from transformers import pipeline\n\n"
            f'classify = pipeline("text-classification", model="{content.name}")\n'
            'print(classify("Any text."))'
        )
    if content.task == "image-classification" and content.input_shape is None:
        return (
            "from PIL import Image\nfrom transformers import pipeline\n\n"
            f'classify = pipeline("image-classification", model="{content.name}")\n'
            'print(classify(Image.new("RGB", (224, 224))))  # or the path of an image'
        )
    auto = AUTO_CLASSES.get(content.task or "", "AutoModel")
    lines = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{content.name}")']
    if content.input_shape is not None:
        shape = ", ".join(map(str, content.input_shape))
        lines = [
            "import torch",
            *lines,
            f"images = torch.zeros(1, {shape})  # scaled as in training",
            "print(model.config.id2label[model(images).logits.argmax(-1).item()])",
        ]
    return "\n".join(lines)


def _is_hub_name(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _says_something(key: str, results: Mapping[str, Any]) -> bool:
    """Whether a setting is one that the run used: not off, and not for another order."""
    value = results[key]
    return not (value is False or value is None or value == "none" or (key == "max_steps" and value <= 0))
