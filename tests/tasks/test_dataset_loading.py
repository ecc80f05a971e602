"""Files, folders and splits of texts and images: what is read, how it is split, and what is refused."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_mmst.tasks.dataset_loading import split_off
from hf_mmst.tasks.images import load_images
from hf_mmst.tasks.splits import SplitArguments, choose_splits
from hf_mmst.tasks.texts import TextArguments, load_texts

HEADER = "sentence,label\n"
ROWS = "a cat,no\na dog,yes\n" * 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, files):
    """Files by name, texts or bytes; the path of the only one, or of their folder."""
    folder = folder / "data"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / next(iter(files)) if len(files) == 1 else folder)


def lines(*rows):
    return "".join(json.dumps(dict(zip(("sentence", "label"), row, strict=True))) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("files", "sizes", "names"),
    [
        ({"a.csv": HEADER + ROWS}, (16, 4), ["no", "yes"]),
        ({"a.tsv": (HEADER + ROWS).replace(",", "\t")}, (16, 4), ["no", "yes"]),
        ({"a[1].csv": b"\xef\xbb\xbf" + (HEADER + ROWS).encode()}, (16, 4), ["no", "yes"]),
        ({"a.jsonl": lines(*[("", 2), ("b", 10)] * 3)}, (4, 2), ["2", "10"]),
        ({"train.csv": HEADER + ROWS, "test.csv": HEADER + "a dog,yes\n"}, (20, 1), ["no", "yes"]),
        ({"train.csv": HEADER + ROWS, "validation.csv": HEADER + "a dog,yes\n"}, (20, 1), ["no", "yes"]),
    ],
)
def test_texts_are_read(files, sizes, names, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(write(tmp_path, files)).parent)
    splits = load_texts("data" if len(files) > 1 else next(iter(files)), TextArguments())
    assert (len(splits["train"]), len(splits["test"])) == sizes
    for split in splits.values():
        assert split.features["label"].names == names
        assert all("dog" in row["text"] for row in split if names[row["label"]] == "yes")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.csv": HEADER + ",yes\n" + ROWS}, "1 rows of the train split have no text, first of all row 1"),
        ({"a.csv": HEADER + ROWS + "a,\n"}, "1 rows of the train split have no label, first of all row 21"),
        ({"a.csv": HEADER + "1,no\n2,yes\n"}, r"no column with texts.*sentence \(int64\).*Set text_column_name"),
        ({"a.csv": HEADER + "a,0.5\nb,1.5\n"}, "are no classes, but of the type float64"),
        ({"a.csv": HEADER + "a,rare\n" + ROWS}, "The class rare has one sample"),
        ({"a.csv": HEADER + "a,yes\nb,yes\n"}, "has one class only, yes"),
        ({"a.csv": HEADER.encode() + b"caf\xe9,yes\n"}, "'utf-8' codec can't decode.*in UTF-8"),
        ({"a.csv": HEADER + "a,b,c,d\n" + ROWS}, "rows with more cells than its header"),
        ({"a.csv": HEADER + ROWS + "a,b,c,d\n"}, "Expected 2 fields in line 22, saw 4"),
        ({"a.csv": HEADER}, "no data"),
        ({"a.csv": ""}, "No columns to parse"),
        ({"a.csv": "sentence,topic\n" + ROWS}, r"no column label with labels.*topic.*Set label_column_name"),
        ({"a.json": '{"sentence": "a", "lab'}, "JSON parse error"),
        ({"a.jsonl": lines(("a", [0, 1]), ("b", [1, 0]))}, "are no classes"),
        ({"a.jsonl": lines(("a", 1), (None, 0))}, "no text, first of all row 2"),
        ({"a.txt": "a cat\na dog\n"}, "of no format with inputs and labels. Pass a file in one of .csv, .tsv"),
        ({"a.xlsx": "?"}, "of no format with inputs and labels"),
        ({"train.txt": "a cat", "README": ""}, r"no column label with labels; its columns are text \(string\)"),
        ({"train.csv": HEADER + ROWS, "README.md": "---\na: [b\n---\n"}, "cannot be read: while parsing a flow"),
        ({"a.parquet": b"PAR1?"}, "a.parquet cannot be read"),
        ({"train.csv": HEADER + ROWS, "train.jsonl": lines(("a", "no"))}, "several formats: .csv, .jsonl"),
        ({"train.csv": HEADER + ROWS, "test.jsonl": lines(("a", "no"))}, "the same data file format"),
        ({"train.csv": HEADER + ROWS, "test.csv": "text,label\na,no\nb,no\n"}, "the same columns"),
        ({"train.csv": HEADER + ROWS, "test.csv": HEADER + "a,maybe\n"}, "labels that the train split lacks: maybe"),
        ({"test.csv": HEADER + ROWS, "README": ""}, "has no train split, only test"),
        ({"README": "", "notes": ""}, "cannot be read"),
    ],
)
def test_texts_that_cannot_be_are_refused(files, message, tmp_path, capfd):
    name = write(tmp_path, files)
    with pytest.raises(ValueError, match=message) as raised:
        load_texts(name, TextArguments())
    assert name in str(raised.value) or "rare" in message
    assert "Failed to" not in capfd.readouterr().err


def test_the_columns_are_what_the_user_says(tmp_path):
    name = write(tmp_path, {"a.csv": "title,body,topic\n" + "a,b,x\nc,d,y\n" * 5})
    rows = load_texts(name, TextArguments(text_column_name="body", label_column_name="topic"))["train"]
    assert {*rows["text"]} == {"b", "d"}
    assert rows.features["label"].names == ["x", "y"]
    for column in ("nothing", "topic"):
        with pytest.raises(ValueError, match=f"no column {column} with texts"):
            load_texts(name, TextArguments(text_column_name=column, label_column_name="topic"))


def picture(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8)).save(path)


def test_images_without_a_test_split_are_split_by_class(tmp_path):
    for index in range(10):
        folder = tmp_path / "data" / ("cat" if index < 6 else "dog")
        picture(folder / f"{index}.png")
        for kind in ("txt", "json"):
            (folder / f"{index}.{kind}").write_text("{}")
    splits = load_images(str(tmp_path / "data"))
    assert splits["train"].features["label"].names == ["cat", "dog"]
    counts = {name: np.bincount(split["label"][:]).tolist() for name, split in splits.items()}
    assert counts == {"train": [5, 3], "test": [1, 1]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["1.png", "2.png"], "no labels of two classes; its columns are image. Put the images of each class"),
        (["cat/1.png", "cat/2.png"], "no labels of two classes"),
        (["cat/1.png", "dog/1.png", "dog/2.png"], "The class cat has one sample"),
        (["test/cat/1.png", "test/dog/1.png"], "no train split, only test"),
        ([], "doesn't contain any data files"),
    ],
)
def test_images_that_cannot_be_are_refused(files, message, tmp_path):
    (tmp_path / "data").mkdir()
    for name in files:
        picture(tmp_path / "data" / name)
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "data"))


def parquet(folder, **splits):
    classes = datasets.ClassLabel(names=["cat", "dog"])
    folder.mkdir()
    for name, (pictures, labels) in splits.items():
        features = datasets.Features({"image": datasets.Image(), "label": classes})
        rows = {"image": [np.zeros((4, 4), np.uint8) if one else None for one in pictures], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return str(folder)


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    train = ([1] * 4, [0, 1, 0, 1])
    splits = load_images(parquet(tmp_path / "a", train=train, test=([1], [-1]), validation=([1, 1], [1, 0])))
    assert splits["test"]["label"][:] == [1, 0]
    with pytest.raises(ValueError, match="the test split have the label -1"):
        load_images(parquet(tmp_path / "b", train=train, test=([1, 1], [-1, 0])))
    with pytest.raises(ValueError, match="1 rows of the train split have no image, first of all row 2"):
        load_images(parquet(tmp_path / "c", train=([1, 0, 1, 1], [0, 1, 0, 1])))


@pytest.mark.parametrize(("share", "size"), [(0.001, 2), (0.5, 10), (0.999, 18)])
def test_a_part_of_the_train_split_is_split_off(share, size):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"text": ["x"] * 20, "label": [0] * 15 + [1] * 5}, features=features)
    parts = split_off(rows, share)
    assert len(parts["test"]) == size
    assert sum(parts["test"]["label"]) == pytest.approx(size / 4, abs=0.5)
    chosen = choose_splits(datasets.DatasetDict(train=rows, test=rows), SplitArguments(validation_fraction=share))
    assert [len(part) for part in chosen] == [20 - size, size]
