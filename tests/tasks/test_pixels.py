"""Images of all kinds -> pixel values in the model's scale."""

from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from zoo import make

from hf_mmst import MMSTConfig
from hf_mmst.tasks.images import ImageArguments, ImageModelArguments, image_trainer
from hf_mmst.tasks.pixels import decoded

SIDE = 8
RAMP = np.linspace(0, 255, SIDE * SIDE).round().astype(np.uint8).reshape(SIDE, SIDE)
COLOURS = Image.fromarray(np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1))


def cell(image, kind="png"):
    file = BytesIO()
    image.save(file, kind)
    return {"path": "here/1.png", "bytes": file.getvalue()}


def trainer(folder, images, model=None, **data):
    """Of a ViT from scratch with these images, of two classes in turn."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": images, "label": [i % 2 for i in range(len(images))]}
    split = datasets.Dataset.from_dict(rows, features=features)
    args = MMSTConfig(str(folder), num_stages=2, use_cpu=True, report_to="none", remove_unused_columns=False)
    given = model or ImageModelArguments(hidden_size=24, num_hidden_layers=2)
    return image_trainer(given, ImageArguments(**data), args, datasets.DatasetDict(train=split, test=split))


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bits_are_scaled_as_8_are(kind, tmp_path):
    deep = cell(Image.fromarray(RAMP.astype(np.uint16) * 257), kind)
    assert (np.asarray(decoded(deep)) == RAMP).all()
    made = trainer(tmp_path, [deep, cell(Image.fromarray(RAMP))])
    assert made.model.config.num_channels == 1
    deep, plain = (made.eval_dataset[i]["pixel_values"] for i in range(2))
    assert torch.equal(deep, plain)
    assert deep[0].flatten().tolist() == pytest.approx((RAMP.flatten() / 127.5 - 1).tolist(), abs=1e-6)


@pytest.mark.parametrize("first", [0, 1])
def test_one_image_in_colour_makes_all_of_them_so(first, tmp_path):
    images = [cell(Image.fromarray(RAMP)), cell(COLOURS)]
    made = trainer(tmp_path, images[first:] + images[:first])
    assert made.model.config.num_channels == 3
    grey, colours = (made.eval_dataset[(i + first) % 2]["pixel_values"] for i in range(2))
    assert torch.equal(grey[0], grey[1])
    assert not torch.equal(colours[0], colours[1])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"path": "here/1.png", "bytes": b"a text"}, "cannot identify image file"),
        ({"path": "here/1.png", "bytes": b""}, "cannot identify image file"),
        ({"path": "here/1.png", "bytes": cell(COLOURS)["bytes"][:80]}, "image file is truncated"),
        (cell(Image.fromarray(RAMP / np.float32(255)), "tiff"), "its values of mode F are not those of 8 or 16 bits"),
        (cell(Image.fromarray(RAMP.astype(np.int32) - 9), "tiff"), "its values of mode I are not"),
    ],
)
def test_the_file_that_cannot_be_read_is_named(broken, message, tmp_path):
    with pytest.raises(ValueError, match=f"The image here/1.png cannot be used: .*{message}.*Replace it"):
        trainer(tmp_path, [cell(Image.fromarray(RAMP)), broken]).eval_dataset[1]


@pytest.mark.parametrize(("side", "size", "patch"), [(1, 4, 1), (7, 8, 2), (28, 28, 7), (30, 32, 8)])
def test_patches_fill_the_image(side, size, patch, tmp_path):
    config = trainer(tmp_path, [cell(COLOURS.resize((side, side)))] * 2).model.config
    assert (config.image_size, config.patch_size) == (size, patch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"patch_size": 5}, "patch_size=5 do not fill images of image_size=8. Set patch_size to one of 1, 2, 4, 8, or"),
        ({"patch_size": 0}, "patch_size=0 is not a whole number of at least 1"),
        ({"image_size": 0}, "image_size=0 is not a whole number of at least 1"),
        ({"image_size": 30}, "patch_size=7 do not fill images of image_size=30"),
        ({"hidden_size": 0}, "hidden_size=0 is not a whole number of at least 1"),
        ({"num_attention_heads": 7}, "num_attention_heads=7. Set num_attention_heads to one of 1, 2, 3, 4, 6, 8,"),
        ({"architecture": "vgg11_bn", "model_name_or_path": "a/b"}, "Leave one of them unset"),
        ({"architecture_args": "[1]"}, r"architecture_args='\[1\]' is no JSON object"),
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path='./nowhere' is neither a folder nor a name"),
        ({"model_name_or_path": "vit", "image_size": 64}, "image_size=64 is for a model from scratch"),
        ({"model_name_or_path": "vit", "patch_size": 4}, "patch_size=4 is for a model from scratch"),
    ],
)
def test_models_that_cannot_be_are_refused(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("vit").save_pretrained("vit")
    data = {name: given.pop(name) for name in ["image_size"] if name in given}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [cell(COLOURS)] * 2, ImageModelArguments(**{"hidden_size": 24, **given}), **data)
