"""The command `hf-mmst`: training, evaluation and cards without a script."""

import json
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from pushes import TEXTS, tokenizer
from transformers import AutoModelForImageClassification
from zoo import make

from hf_mmst import MMSTConfig
from hf_mmst.cli.command import main
from hf_mmst.cli.exit_codes import exit_code
from hf_mmst.tasks.texts import TextArguments, TextModelArguments, load_texts, text_trainer

QUICK = ["--max_steps", "2", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "--num_stages", "2"]


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of parquet files with dark and light images."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    (tmp_path / "images").mkdir()
    for split in ("train", "test"):
        labels = rng.integers(2, size=32)
        pixels = [rng.integers(100, size=(16, 16, 3), dtype=np.uint8) + np.uint8(100 * label) for label in labels]
        rows = datasets.Dataset.from_dict({"img": pixels, "label": labels}, features=features)
        rows.to_parquet(tmp_path / "images" / f"{split}.parquet")
    return str(tmp_path / "images")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A CSV file of short texts, and a folder with a model for them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [f'"{TEXTS[i % 5]} {TEXTS[i % 7]}",{("no", "yes")[i % 2]}' for i in range(40)]
    (tmp_path / "texts.csv").write_text("\n".join(["sentence,label", *lines]))
    make("bert", num_labels=2).save_pretrained(tmp_path / "model")
    tokenizer(tmp_path).save_pretrained(tmp_path / "model")
    return str(tmp_path / "texts.csv"), str(tmp_path / "model")


def test_images_are_trained_on_and_evaluated(images, tmp_path, capsys):
    out = str(tmp_path / "out")
    flags = ["--dataset_name", images, "--output_dir", out, "--hidden_size", "24", "--num_hidden_layers", "2"]
    assert main(["train", "images", *flags, *QUICK]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["num_stages"], found["task"], found["dataset"]) == (2, "image-classification", "images")
    assert AutoModelForImageClassification.from_pretrained(out).config.label2id == {"dark": 0, "light": 1}
    capsys.readouterr()
    assert main(["eval", out, images, "--json", str(tmp_path / "metrics.json")]) == 0
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert f"accuracy {metrics['eval_accuracy']:.2%}" in said
    assert metrics["eval_accuracy"] == found["accuracy"]
    for name in ("accuracy", "loss", "transport"):
        again = [metrics[f"eval_stage_{k}_{name}"] for k in (1, 2)]
        assert again == pytest.approx(found[f"stage_{name}"], rel=1e-5)
    assert main(["card", str(tmp_path / "out" / "results.json"), "--name", "tester/dark-or-light"]) == 0
    assert 'from_pretrained("tester/dark-or-light")' in (tmp_path / "out" / "README.md").read_text()
    config = AutoModelForImageClassification.from_pretrained(out).config
    config.hidden_size *= 2
    other = AutoModelForImageClassification.from_config(config)
    other.save_pretrained(out)
    assert main(["eval", out, images]) == 2
    assert "stages.safetensors is damaged, or was not written by hf_mmst: heads.0.classifier" in capsys.readouterr().err
    lacking = {name: tensor for name, tensor in other.state_dict().items() if name != "classifier.bias"}
    other.save_pretrained(out, state_dict=lacking)
    assert main(["eval", out, images]) == 2
    assert "does not hold this model: it lacks classifier.bias" in capsys.readouterr().err


def test_texts_are_trained_on_and_evaluated(texts, tmp_path, capsys):
    data, model = texts
    out = str(tmp_path / "out")
    config = tmp_path / "run.yaml"
    config.write_text(f"dataset_name: {data}\nmodel_name_or_path: {model}\nmax_seq_length: 8\nlearning_rate: 1e-4\n")
    assert main(["train", "texts", "--config", str(config), "--output_dir", out, *QUICK]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["learning_rate"], found["num_eval_samples"]) == (1e-4, 8)
    assert main(["eval", out, data, "--max-seq-length", "8"]) == 0
    assert f"accuracy {found['accuracy']:.2%}" in capsys.readouterr().out.splitlines()[-1]


def test_short_trials_choose_settings(images, texts, tmp_path, capsys):
    data, model = texts
    common = ["--num_trials", "2", "--trial_steps", "4", "--output_dir", str(tmp_path / "out"), *QUICK]
    assert main(["pilot", "texts", "--dataset_name", data, "--model_name_or_path", model, *common]) == 0
    assert 'MMSTConfig("output", num_stages=' in capsys.readouterr().out.splitlines()[-1]
    size = ["--hidden_size", "24", "--num_hidden_layers", "2"]
    assert main(["pilot", "images", "--dataset_name", images, *size, *common, "--memory_budget", "1KiB"]) == 1
    assert "No trial fits in memory_budget" in capsys.readouterr().out
    assert main(["pilot", "images", *common]) == 2
    assert "hf-mmst pilot images: There is no dataset" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_dataset_with_other_labels_is_refused(texts, tmp_path, capsys):
    data, model = texts
    out = str(tmp_path / "out")
    main(["train", "texts", "--dataset_name", data, "--model_name_or_path", model, "--output_dir", out, *QUICK])
    (tmp_path / "other.csv").write_text((tmp_path / "texts.csv").read_text().replace("yes", "maybe"))
    assert main(["eval", out, str(tmp_path / "other.csv")]) == 2
    assert "knows the labels no, yes; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train images", "There is no dataset. Set dataset_name to"),
        ("train images --dataset_name=", "dataset_name='' is neither a folder or file nor"),
        ("train images --dataset_name x --report_to nope", "report_to='nope' is not known, or its package is not"),
        (
            "train texts --dataset_name {data} --model_name_or_path {damaged}",
            "cannot be read: Error while deserializing",
        ),
        ("train texts --dataset_name x.csv", "There is no model. Set model_name_or_path to"),
        ("train images --dataset_name x --num_stages 0", "num_stages=0 is not a whole number"),
        ("train images --dataset_name x --max_eval_samples 0", "max_eval_samples=0 is not a whole number"),
        ("train images --dataset_name x --max_train_samples -5", "max_train_samples=-5 is not a whole number"),
        ("train images --dataset_name x --validation_fraction 2", "validation_fraction=2.0 is no part of a whole"),
        ("train images --dataset_name x --validation_fraction nan", "validation_fraction=nan is no part of a whole"),
        ("train images --dataset_name ./nowhere", "dataset_name='./nowhere' is neither a folder or file nor"),
        ("train images --dataset_name nobody/nothing", "The dataset nobody/nothing cannot be read"),
        ("train images --dataset_name x --model_name_or_path ./y", "'./y' is neither a folder nor a name on the Hub"),
        ("train images --dataset_name {images} --model_name_or_path {texts}", "Unrecognized configuration class"),
        ("train texts --dataset_name {data} --model_name_or_path {words}", "has no tokenizer with words"),
        ("train texts --dataset_name {data} --model_name_or_path {texts} --max_seq_length 0", "max_seq_length=0"),
        (
            "train texts --dataset_name {data} --model_name_or_path {texts} --max_seq_length 2",
            "Set max_seq_length to 3",
        ),
        ("plan ./nowhere", "model='./nowhere' is neither a folder nor a name on the Hub"),
        ("plan {texts} --seq-len 65", "Set seq_len to 64 or less"),
        ("eval /nowhere x", "/nowhere is neither a folder nor a name on the Hub"),
        ("eval x x --max-samples 0", "max_samples=0 is not a whole number of at least 1"),
        ("eval x x --batch-size -1", "batch_size=-1 is not a whole number of at least 1"),
        ("eval x x --max-seq-length 0", "max_seq_length=0 is not a whole number of at least 1"),
        ("pilot images --dataset_name x --num_trials 0", "num_trials=0 is not a whole number"),
        ("pilot images --dataset_name x --trial_steps 0", "trial_steps=0 is not a whole number"),
        ("pilot images --dataset_name x --trial_samples 1", "trial_samples=1 is not a whole number"),
        ("card /nowhere/results.json", "No such file"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words, message, request, tmp_path, capsys):
    given = {}
    if "{" in words:
        given["data"], given["texts"] = request.getfixturevalue("texts")
        given["images"] = request.getfixturevalue("images") if "{images}" in words else None
        given["words"] = str(tmp_path / "words")
        make("bert").save_pretrained(given["words"])
        given["damaged"] = str(shutil.copytree(given["texts"], tmp_path / "damaged"))
        (tmp_path / "damaged" / "model.safetensors").write_bytes(b"?" * 100)
    capsys.readouterr()
    assert main(words.format(**given).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.startswith(f"hf-mmst {words.split()[0]}")
    assert len(line) < 1200


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("The image\n1.png cannot be used")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_worker_is_said_in_one_line(workers, capsys):
    loader = torch.utils.data.DataLoader(Broken(), num_workers=workers)
    assert exit_code("job", lambda: list(loader)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("job: ")
    assert line.endswith("1.png cannot be used")


def test_what_is_wrong_here_has_its_traceback():
    with pytest.raises(KeyError):
        exit_code("job", lambda: {}["a"])


def test_a_card_needs_the_results_of_a_run(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert main(["card", str(tmp_path / "results.json")]) == 2
    assert "results.json is damaged, or was not written by hf_mmst: command is missing" in capsys.readouterr().err


def test_unknown_words_end_it(capsys):
    for words in ("pilot", "train sounds", "plan", "plan x --seq-len y", "", "train images --num_stage 3"):
        with pytest.raises(SystemExit) as ended:
            main(words.split())
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("hf-mmst")
    assert "Did you mean num_stages?" in line


def test_texts_are_cut_to_the_positions_of_the_model(texts, tmp_path):
    _, model = texts
    (tmp_path / "long.csv").write_text("sentence,label\n" + f"{'a small set ' * 60},no\nof words,yes\n" * 10)
    data = TextArguments()
    args = MMSTConfig(str(tmp_path), num_stages=2, use_cpu=True, report_to="none")
    made = text_trainer(TextModelArguments(model), data, args, load_texts(str(tmp_path / "long.csv"), data))
    assert max(len(row["input_ids"]) for row in made.train_dataset) == 64 < data.max_seq_length


def test_the_environment(capsys):
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "- transformers: " in said
    assert "- hub: cannot be reached" in said


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom hf_mmst.cli.command import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'rich', 'numpy', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: hf-mmst" in done.stdout
