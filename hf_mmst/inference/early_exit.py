"""`EarlyExit`: a trained classifier whose samples leave at the first stage whose head is confident enough."""

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.utils import cached_file

from ..method.engine import Stagewise
from ..records.atomic_writes import write_atomically
from ..records.reading import damaged, load_whole, read_json
from ..records.stages import Stages, check_model, checkpoint_folder, load_stages
from .early_exit_pass import AllHaveLeft, EarlyExitOutput, ExitPass, per_sample_inputs
from .exit_rules import ExitPoint, ExitRule, HeadLogits, exit_curve, temperature

EXITS_NAME = "exits.json"


class EarlyExit:
    """
    A classifier in which each sample exits at the first stage whose head is confident enough.

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
        self.heads.read_first_token(model, self.partition.layers[-1])
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
        write_atomically(Path(folder) / EXITS_NAME, lambda path: path.write_text(content))

    @torch.no_grad()
    def __call__(self, **inputs: torch.Tensor) -> EarlyExitOutput:
        """Classify a batch of B samples, given as the model takes it."""
        with self.active():
            return self.model(**inputs)

    @torch.no_grad()
    def observe(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> HeadLogits:
        """
        Run the whole model over batches with `labels`, and keep the logits of each stage.

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
        device = next(self.model.parameters()).device
        passes: list[ExitPass] = []

        @functools.wraps(forward)
        def exiting(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            size = next((len(value) for value in given.values() if torch.is_tensor(value)), 0)
            mask = given.get("attention_mask")
            passes.append(
                ExitPass(self.partition, self.heads, self.rule, size, mask, self._per_sample or set(), device)
            )
            try:
                passes[-1].leave(self.partition.num_stages - 1, forward(*args, **kwargs).logits.float(), whole=True)
            except AllHaveLeft:
                pass
            finally:
                done = passes.pop()
            return done.output()

        def before_layer(name, *call):
            return passes[-1].before_layer(name, *call)

        def after_layer(name, *call):
            return passes[-1].after_layer(name, *call)

        with contextlib.ExitStack() as stack:
            if self._per_sample is None:
                self._per_sample = per_sample_inputs(self.model, self.partition)
            for name in self.partition.layers:
                layer = self.model.get_submodule(name)
                before = functools.partial(before_layer, name)
                after = functools.partial(after_layer, name)
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
