"""Pixel values of image files: decoded, scaled for a model, augmented for training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")  # modes of PIL without colour


def channels_of(cells: Iterable[Any]) -> int:
    """3 if one of the images has colours, else 1; `cells` as those of a column `datasets.Image(decode=False)`."""
    return 3 if any(_mode(cell) not in GREY for cell in cells) else 1


def decoded(cell: Any) -> Image.Image:
    """
    An image of 8 bits, of a file's path or bytes.

    Raises:
        `ValueError`: naming the file, if it cannot be read, or if it is not known what is white in it.
    """
    with _named(cell):
        image = datasets.Image().decode_example(cell)
        if image.mode[0] not in "IF":
            return image
        values = np.asarray(image)  # of 16 bits, which PIL would clip, not scale
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values of mode {image.mode} are not those of 8 or 16 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _mode(cell: Any) -> str:
    """The mode in the file's header."""
    with _named(cell), Image.open(cell["path"] if cell["bytes"] is None else BytesIO(cell["bytes"])) as image:
        return image.mode


@contextmanager
def _named(cell: Any) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises
        name = cell.get("path") if isinstance(cell, dict) else None
        raise ValueError(
            f"The image {name or 'of a row'} cannot be used: {error}. Replace it, or leave it out."
        ) from error


def to_tensors(processor: Any, config: Any, augment: bool) -> Callable[[dict], dict]:
    """A transform of a batch of samples: pixel values in the model's scale; crops and flips for training."""
    flips = getattr(config, "num_channels", 3) == 3

    def transform(batch):
        mode = "RGB" if processor is not None or flips else "L"
        images = [decoded(image).convert(mode) for image in batch["image"]]
        if processor is not None:
            pixels = torch.as_tensor(np.asarray(processor(images, return_tensors="np")["pixel_values"]))
        else:
            size = (config.image_size, config.image_size)
            arrays = np.stack([np.asarray(image.resize(size)) for image in images]).astype(np.float32)
            pixels = torch.from_numpy(arrays.reshape(len(images), *size, -1)).permute(0, 3, 1, 2) / 127.5 - 1
        if augment:
            pixels = torch.stack([randomly_cropped(image, flips) for image in pixels])
        return {"pixel_values": list(pixels), "labels": batch["label"]}

    return transform


def randomly_cropped(image: torch.Tensor, flips: bool) -> torch.Tensor:
    """`[C, H, W]` moved by up to an eighth of its side, the border repeated; flipped half of the time."""
    side = image.shape[-1]
    pad = side // 8 if flips else side // 14
    top, left = torch.randint(2 * pad + 1, (2,)).tolist()
    padded = torch.nn.functional.pad(image[None], (pad, pad, pad, pad), mode="replicate")[0]
    cropped = padded[:, top : top + side, left : left + side]
    return cropped.flip(-1) if flips and torch.rand(()) < 0.5 else cropped
