"""Inputs to look at a model with before training: the first samples of a dataset, or zeros of the right shape."""

import contextlib
import inspect
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.trainer_utils import unwrap_peft_model

SAMPLES = 2  # that a model is looked at with


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments of a model's forward pass for a few samples, by name, and the number of samples."""

    values: Mapping[str, Any]
    num_samples: int

    @classmethod
    def of_batch(
        cls,
        model: nn.Module,
        batch: Mapping[str, Any],
        num_samples: int,
        label_names: Iterable[str] = ("labels",),
        makes_loss: bool = True,
    ) -> "ExampleInputs":
        """
        A batch as the model gets it in training.

        Models of transformers do without the labels and the padding mask, which say what counts, not what is computed,
        and often cannot be followed on tensors without data; but a decoder begins with the labels. A forward pass of
        the user's gets them all.

        Args:
            model (`nn.Module`), batch (`Mapping[str, Any]`): as in training.
            num_samples (`int`): in the batch, whatever the shapes of its tensors.
            label_names (`Iterable[str]`): entries that are labels.
            makes_loss (`bool`): whether the model gets `labels` in training.
        """
        left_out: set[str] = set()
        if _is_of_transformers(model):
            decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
            left_out = {"attention_mask", *(() if decodes else label_names)}
        if not makes_loss:
            left_out.add("labels")
        return cls({name: value for name, value in batch.items() if name not in left_out}, num_samples)

    @classmethod
    def made_up(cls, model: nn.Module) -> "ExampleInputs":
        """[`dummy_inputs`] of [`SAMPLES`] samples; raises what that raises."""
        return cls(dummy_inputs(model, SAMPLES), SAMPLES)

    def on(self, model: nn.Module) -> dict[str, Any]:
        """The arguments on the model's device, floating-point ones in its precision."""
        like = next(model.parameters())

        def moved(value: Any) -> Any:
            if not torch.is_tensor(value):
                return value
            return value.to(like.device, like.dtype if value.is_floating_point() else None)

        return {name: moved(value) for name, value in self.values.items()}


def first_batch(dataset: Iterable, num_samples: int, collate: Callable[[list], Any]) -> Any:
    """
    The first samples of a dataset in a batch, over again if there are fewer; `None` if there are none.

    No random state is changed. A dataset that is its own iterator is left alone, for it does not yield a sample again.
    """
    with restored_random_states():
        sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        rows: Any = (dataset[i] for i in range(len(dataset))) if sized else iter(dataset)  # type: ignore[arg-type, index]
        samples = [] if rows is dataset else list(itertools.islice(rows, num_samples))
        return collate((samples * num_samples)[:num_samples]) if samples else None


@contextlib.contextmanager
def restored_random_states(seed: int | None = None) -> Iterator[None]:
    """Context that restores the global random states of Python, NumPy and PyTorch (CPU); `seed` sets them within it."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def dummy_inputs(
    model: nn.Module,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    seq_len: int = 16,
    image_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """
    Inputs of the right shape for `model`: zeros, `[B, channels, height, width]` for images, `[B, seq_len]` for text,
    half a second of audio at 16 kHz or a spectrogram of the model's own length.

    Images are of the model's own size unless another is given.

    Raises:
        `ValueError`: if the model's main input is neither images, nor token ids, nor audio.
    """
    config: Any = getattr(model, "config", None)
    kind: Any = getattr(model, "main_input_name", None)
    if kind == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = image_size or getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch_size, getattr(vision, "num_channels", 3), height, width)
        return {"pixel_values": torch.zeros(shape, device=device)}
    if kind == "input_ids":
        return {"input_ids": torch.zeros((batch_size, seq_len), dtype=torch.long, device=device)}
    bands, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if kind == "input_features" and bands is not None and frames is not None:
        return {kind: torch.zeros((batch_size, bands, 2 * frames), device=device)}
    if kind == "input_features" and hasattr(config, "feature_projection_input_dim"):
        return {kind: torch.zeros((batch_size, 64, config.feature_projection_input_dim), device=device)}
    if kind == "input_values" and bands is not None:
        return {kind: torch.zeros((batch_size, config.max_length, bands), device=device)}
    if kind == "input_values":
        return {kind: torch.zeros((batch_size, 8000), device=device)}
    raise ValueError(
        f"What a {type(model).__name__} takes cannot be made up: that is known of Hugging Face models of images "
        "(pixel_values), text (input_ids) and audio (input_values, input_features). Pass a train_dataset, of which the "
        "first samples are taken, or set num_stages to 1."
    )


def num_positions(model: nn.Module) -> int | None:
    """Most tokens of a text, where each position has a learned embedding; `None` where positions are computed."""
    config: Any = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    offsets = [
        0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa and its like count from there
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings >= most and _is_of_positions(name)
    ]
    return most - max(offsets) if offsets else None


def _is_of_transformers(model: nn.Module) -> bool:
    """Whether the model's forward pass is one of transformers' own."""
    forward = inspect.unwrap(type(unwrap_peft_model(model)).forward)
    return forward.__module__.startswith("transformers.")


def _is_of_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "position" in last or last == "wpe"
