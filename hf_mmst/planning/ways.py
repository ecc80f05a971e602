"""`Way`: a way of training, as the settings that make it."""

from dataclasses import dataclass, fields
from typing import Any

import torch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA_RANK = 16  # of the way that is there for comparison


@dataclass(frozen=True)
class Way:
    """
    A way of training: the settings that its memory and compute depend on.

    Attributes:
        num_stages (`int`): K; 1, whatever is given, in end-to-end training.
        stage_order (`str`): `"simultaneous"`, `"sequential"`, or `"end_to_end"`, as it is with one stage.
        stage_objective (`str`): `"local"`, or `"model"` in the sequential order.
        offload (`str`): `"none"`, `"stages"` or `"layers"`.
        resident_layers (`int`): layers that are not offloaded, where layers are.
        rests_inputs (`bool`): whether inputs of offloaded layers rest, too.
        layer_batch_size (`int`, *optional*): samples that are in an offloaded layer at once.
        offloaded_step (`str`): `"host"` or `"device"`, where the optimizer steps offloaded layers.
        feature_cache (`str`): `"none"` or `"disk"`.
        stage_clipping (`bool`): whether stages step by themselves.
        activation_checkpointing (`bool`): whether activations within a stage are recomputed.
        lora (`bool`): whether adapters of rank 16 learn in the place of the layers (PEFT).
    """

    num_stages: int = 1
    stage_order: str = "simultaneous"
    offload: str = "none"
    feature_cache: str = "none"
    stage_clipping: bool = False
    activation_checkpointing: bool = False
    lora: bool = False
    stage_objective: str = "local"
    resident_layers: int = 0
    rests_inputs: bool = False
    layer_batch_size: int | None = None
    offloaded_step: str = "host"

    def __post_init__(self):
        if self.num_stages == 1 or self.stage_order == "end_to_end":
            vars(self).update(num_stages=1, stage_order="end_to_end")

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of [`MMSTConfig`] for this way of training, without those at their defaults."""
        different = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        if self.num_stages == 1:
            different.add("offload")  # whose default is another one then
        different -= {"lora", "rests_inputs"}
        found = {name: value for name, value in vars(self).items() if name in different}
        return found | ({"activation_checkpointing_kwargs": {"offload": True}} if self.rests_inputs else {})

    @property
    def name(self) -> str:
        """The way in words."""
        whole = f"LoRA (r = {LORA_RANK})" if self.lora else "end to end"
        words = [whole if self.num_stages == 1 else f"K = {self.num_stages}"]
        if self.offload == "layers":
            some = f"all but {self.resident_layers} " if self.resident_layers else ""
            words.append(f"{some}layers{' and their inputs' if self.rests_inputs else ''} offloaded")
            if self.layer_batch_size is not None:
                words.append(f"{self.layer_batch_size} samples in a layer")
            if self.offloaded_step == "device":
                words.append("stepped on the device")
        if self.num_stages > 1:
            if self.stage_objective == "model":
                words.append("in turn, by the model's loss")
            if self.offload == "stages":
                words.append("stages offloaded")
            elif self.stage_objective == "local":
                words.append("all stages at once")
        if self.stage_clipping:
            words.append("each steps by itself")
        if self.feature_cache != "none":
            words.append("features cached")
        if self.activation_checkpointing:
            words.append("checkpointing")
        return ", ".join(words)
