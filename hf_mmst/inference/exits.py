"""A checkpoint with its heads and a batch -> logits of the first head that is sure enough, or of heads together."""

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_map, tree_map_with_path
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.utils import ModelOutput, cached_file

from ..cut.example_inputs import dummy_inputs
from ..cut.hidden_states import hidden_states_of, with_hidden_states
from ..cut.partition import Partition
from ..method.engine import Stagewise
from ..records import files
from ..records.reading import damaged, load_whole, read_json
from ..records.stages import Stages, check_model, checkpoint_folder, load_stages
from .exit_rules import ExitPoint, ExitRule, HeadLogits, exit_curve, layers_until, temperature

EXITS_NAME = "exits.json"


@dataclass
class EarlyExitOutput(ModelOutput):
    """
    What [`EarlyExit`] returns.

    Attributes:
        logits (`torch.Tensor`): `[B, num_labels]`, the answer of the stage at which each sample left.
        exit_stages (`torch.Tensor`): `[B]`, the number of that stage, from 1.
        layers_run (`torch.Tensor`): `[B]`, the number of layers that ran for each sample, those of heads too.
    """

    logits: torch.Tensor | None = None
    exit_stages: torch.Tensor | None = None
    layers_run: torch.Tensor | None = None


class EarlyExit:
    """
    A classifier that lets each sample leave at the first stage whose head is sure enough.

    The samples that have left are no longer in the batch that the next layers see. The model itself is not changed.

    ```python
    early = EarlyExit.from_pretrained("vit-stages")
    early.rule = calibrate(early, early.observe(validation_batches), max_drop=0.005).rule
    early(pixel_values=images).logits
    with early.active():
        pipeline("image-classification", model=early.model, image_processor=processor)("cat.png")
    ```

    Args:
        model (`nn.Module`): a classifier with single labels, as it was trained in stages.
        stages ([`Stages`]): its stages, see [`load_stages`].
        rule ([`ExitRule`], *optional*): when a sample leaves.

    Raises:
        `ValueError`: if the model has no single label a sample, or the stages are of another model, or the rule is for
            another number of stages.
    """

    def __init__(self, model: nn.Module, stages: Stages, rule: ExitRule | None = None):
        _refuse_tokens(stages)
        check_model(model, stages)
        config: Any = model.config
        kind = getattr(config, "problem_type", None)
        if config.num_labels < 2 or kind not in (None, "single_label_classification"):
            raise ValueError(
                f"{type(model).__name__} has num_labels={config.num_labels} and problem_type={kind!r}: how sure a head "
                "is can only be told where one of several classes is right. Use the model by itself."
            )
        model.eval()
        self.model, self.partition = model, stages.partition
        weight = next(model.parameters())
        self.heads = stages.heads.to(weight.device, weight.dtype).eval()
        self.rule = rule or ExitRule()
        self._per_sample: set[tuple] | None = None

    @property
    def rule(self) -> ExitRule:
        """When a sample leaves; can be set."""
        return self._rule

    @rule.setter
    def rule(self, rule: ExitRule) -> None:
        if not isinstance(rule, ExitRule):
            raise TypeError(f"rule is of type {type(rule).__name__}. Set it to an ExitRule.")
        if rule.temperatures and len(rule.temperatures) != self.partition.num_stages:
            raise ValueError(
                f"The rule has {len(rule.temperatures)} temperatures, the model {self.partition.num_stages} stages. "
                "Set one for each stage, or none."
            )
        self._rule = rule

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **rule: Any) -> "EarlyExit":
        """
        Load a checkpoint that [`MMSTTrainer`] has written, and `exits.json` if there is one.

        Args:
            name (`str` or `os.PathLike`): a folder, or a name on the Hub.
            rule: fields of [`ExitRule`] that go before those of `exits.json`.

        Raises:
            `ValueError`: if it is no classifier, holds adapters only, or is damaged.
        """
        folder = checkpoint_folder(name)
        if not Path(name).is_dir():
            cached_file(name, EXITS_NAME, _raise_exceptions_for_missing_entries=False)
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{name} holds adapters only. Load the base model, wrap it with PeftModel.from_pretrained, and pass "
                "that: EarlyExit(model, load_stages(folder))."
            )
        stages = load_stages(folder)
        _refuse_tokens(stages)
        config = AutoConfig.from_pretrained(name)
        autos = [
            auto
            for auto in (
                AutoModelForImageClassification,
                AutoModelForSequenceClassification,
                AutoModelForAudioClassification,
            )
            if type(config) in auto._model_mapping
        ]
        if not autos:
            raise ValueError(f"{name} holds a {type(config).__name__}, which has no classifier to exit from early.")
        path = folder / EXITS_NAME
        saved = read_json(path, ExitRule) if path.is_file() else ExitRule()
        if len(saved.temperatures) not in (0, stages.partition.num_stages):
            raise damaged(
                path, f"it has {len(saved.temperatures)} temperatures, for {stages.partition.num_stages} stages"
            )
        return cls(load_whole(autos[0], name), stages, replace(saved, **rule))

    def save_rule(self, folder: str | os.PathLike) -> None:
        """Write `exits.json`, which [`from_pretrained`] reads."""
        content = json.dumps(asdict(self.rule), indent=2) + "\n"
        files.replace(Path(folder) / EXITS_NAME, lambda path: path.write_text(content))

    @torch.no_grad()
    def __call__(self, **inputs: torch.Tensor) -> EarlyExitOutput:
        """Classify a batch of B samples, given as the model takes it."""
        with self.active():
            return self.model(**inputs)

    @torch.no_grad()
    def observe(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> HeadLogits:
        """
        Run the whole model over batches with `labels`, and keep what each stage says.

        Raises:
            `ValueError`: if there is no batch, or one has no labels or other labels than the model.
        """
        engine = Stagewise(self.model, self.partition, self.heads)
        device = next(self.model.parameters()).device
        logits, labels = [], []
        for batch in batches:
            if not isinstance(batch, Mapping) or not torch.is_tensor(batch.get("labels")):
                raise ValueError("A batch has no labels. Pass a list of batches, each a mapping that has them.")
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            with engine.observe(inputs.get("attention_mask")) as view:
                outputs = self.model(**inputs)
            logits.append(torch.stack([*view.logits, outputs.logits.float()]).cpu())
            labels.append(batch["labels"].cpu())
        if not labels:
            raise ValueError("There are no batches. Pass one at least, of inputs and labels.")
        return HeadLogits(torch.cat(logits, 1), torch.cat(labels))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within this context the model's own forward pass exits early, so that pipelines do."""
        own, forward = "forward" in vars(self.model), self.model.forward
        signature = inspect.signature(forward)
        walks: list[_Walk] = []

        @functools.wraps(forward)
        def exiting(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            size = next((len(value) for value in given.values() if torch.is_tensor(value)), 0)
            walks.append(_Walk(self, size, given.get("attention_mask"), self._per_sample or set()))
            try:
                walks[-1].leave(self.partition.num_stages - 1, forward(*args, **kwargs).logits.float(), whole=True)
            except _AllHaveLeft:
                pass
            finally:
                walk = walks.pop()
            return walk.output()

        with contextlib.ExitStack() as stack:
            if self._per_sample is None:
                self._per_sample = _per_sample_inputs(self.model, self.partition)
            for name in self.partition.layers:
                layer = self.model.get_submodule(name)
                before = functools.partial(_before_layer, walks, name)
                after = functools.partial(_after_layer, walks, name)
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
            self.model.forward = exiting
            if own:
                stack.callback(setattr, self.model, "forward", forward)
            else:
                stack.callback(delattr, self.model, "forward")
            yield


def calibrate(early: EarlyExit, found: HeadLogits, max_drop: float = 0.005) -> ExitPoint:
    """
    The rule with the fewest layers at which accuracy on validation data drops by at most `max_drop`.

    Each stage's temperature is the one of least cross-entropy. With `early.rule.patience` set, patience is chosen. What
    else `early.rule` says, `ensemble` above all, stays.

    Args:
        early ([`EarlyExit`]): the model.
        found ([`HeadLogits`]): what its stages say of validation data, see [`EarlyExit.observe`].
        max_drop (`float`, *optional*, defaults to 0.005): of the accuracy (0 to 1) without exits.

    Raises:
        `ValueError`: if `found` is of another number of stages, or `max_drop` is not from 0 to 1.
    """
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop={max_drop!r} is not a number from 0 to 1. Set max_drop to 0.005 for half a point.")
    if len(found.logits) != early.partition.num_stages:
        raise ValueError(
            f"found is of {len(found.logits)} stages, but the model has {early.partition.num_stages}. Pass what "
            "early.observe returns."
        )
    temperatures = tuple(temperature(logits, found.labels) for logits in found.logits)
    points = exit_curve(replace(early.rule, temperatures=temperatures), found, early.partition, len(early.heads.layers))
    whole = points[-1].accuracy
    return min((one for one in points if one.accuracy >= whole - max_drop), key=lambda one: one.mean_layers)


def _refuse_tokens(stages: Stages) -> None:
    if stages.heads.kind != "pooled":
        raise ValueError(
            "The stages have learned to label or predict tokens. What leaves early is a sample, but its tokens are not "
            "sure at the same stage, and those that stay attend to those that would leave. Use the model by itself."
        )


class _AllHaveLeft(Exception):  # noqa: N818 - not an error
    """Ends a forward pass in which no sample is left."""


class _Walk:
    """One forward pass over `size` samples, of which those in `rows` have not left."""

    def __init__(self, early: EarlyExit, size: int, mask: torch.Tensor | None, per_sample: set[tuple]):
        self.early, self.size, self.mask, self.per_sample = early, size, mask, per_sample
        device = next(early.model.parameters()).device
        self.rows = torch.arange(size, device=device)
        self.stages = torch.full((size,), early.partition.num_stages - 1, device=device)
        self.agreed = torch.zeros(size, dtype=torch.long, device=device)
        self.answers: torch.Tensor | None = None

    def leave(self, stage: int, logits: torch.Tensor, whole: bool = False) -> torch.Tensor:
        """Let the samples go that are sure enough; returns which of those in the batch stay."""
        rule, logits = self.early.rule, logits[self.rows] if whole else logits
        before = None if self.answers is None else self.answers[self.rows]
        answer = rule.answer(stage, logits, before)
        if self.answers is None:
            self.answers = answer.new_zeros(self.size, answer.shape[-1])
        if before is not None:
            self.agreed[self.rows] = (self.agreed[self.rows] + 1) * (before.argmax(-1) == answer.argmax(-1))
        self.answers[self.rows] = answer
        left = torch.ones_like(self.rows, dtype=torch.bool)
        if not whole:
            left = rule.leaves(stage, answer, self.agreed[self.rows])
        self.stages[self.rows[left]] = stage
        self.rows = self.rows[~left]
        return ~left

    def select(self, name: str, path: tuple, value: Any, hidden: torch.Tensor) -> Any:
        """The rows of a layer's input that belong to samples that are left."""
        if not torch.is_tensor(value) or value is hidden or len(self.rows) == self.size:
            return value
        return value[self.rows] if (name, path) in self.per_sample and len(value) == self.size else value

    def output(self) -> EarlyExitOutput:
        """What was found."""
        head_layers = self.early.rule.asks_heads * len(self.early.heads.layers)
        until = torch.tensor(layers_until(self.early.partition, head_layers), device=self.stages.device)
        return EarlyExitOutput(logits=self.answers, exit_stages=self.stages + 1, layers_run=until[self.stages])


def _before_layer(walks: list[_Walk], name: str, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    hidden = _hidden_of(args, kwargs)
    return tree_map_with_path(lambda path, value: walks[-1].select(name, path, value, hidden), (args, kwargs))


def _after_layer(walks: list[_Walk], name: str, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    walk = walks[-1]
    partition, heads = walk.early.partition, walk.early.heads
    if name == partition.layers[-1]:  # what comes after the layers sees all samples again; of some nothing is read
        hidden = hidden_states_of(output)
        padded = hidden.new_zeros(walk.size, *hidden.shape[1:])
        padded[walk.rows] = hidden
        return with_hidden_states(output, hidden if len(walk.rows) == walk.size else padded)
    if name not in partition.boundaries or not walk.early.rule.asks_heads:
        return None
    stage, hidden = partition.boundaries.index(name), hidden_states_of(output)
    mask = None if walk.mask is None else walk.mask[walk.rows]
    fits = mask is not None and hidden.dim() == 3 and mask.shape == hidden.shape[:2]
    stay = walk.leave(stage, heads(stage, hidden, mask if fits else None, args, kwargs).float())
    if not stay.any():
        raise _AllHaveLeft
    if stay.all():
        return None
    return tree_map(lambda value: value[stay] if torch.is_tensor(value) else value, output)


def _per_sample_inputs(model: nn.Module, partition: Partition) -> set[tuple]:
    """Where, in the inputs of which layers, there are tensors with a row for each sample: those that grow with it."""
    sizes: list[dict[tuple, int]] = []

    def watch(name, _module, args, kwargs):
        leaves, _ = tree_flatten_with_path((args, kwargs))
        sizes[-1].update({(name, path): len(leaf) for path, leaf in leaves if torch.is_tensor(leaf) and leaf.dim()})

    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in partition.layers:
            hook = functools.partial(watch, name)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for size in (2, 3):
            sizes.append({})
            inputs = dummy_inputs(model, size, device)
            if "input_ids" in inputs:  # with padding, for models leave a mask out that hides nothing
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                inputs["attention_mask"][:, -1] = 0
            model(**inputs)
    return {where for where, size in sizes[0].items() if size == 2 and sizes[1].get(where) == 3}


def _hidden_of(args: tuple, kwargs: dict) -> torch.Tensor:
    return hidden_states_of(args or tuple(kwargs.values()))
