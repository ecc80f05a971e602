"""Scripts written for Trainer, with two names changed."""

import inspect
import json
import re

import pytest
import script
from pushes import tokenizer
from runs import arguments
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from zoo import Samples, make

from hf_mmst import MMSTTrainer

FLAGS = ["--do_train", "--do_eval", "--do_predict", "--use_cpu", "--report_to", "none", "--disable_tqdm", "True"]
FLAGS += ["--num_stages", "2", "--per_device_train_batch_size", "8", "--num_train_epochs", "2", "--save_steps", "2"]


@pytest.fixture(params=["texts", "images"])
def flags(request, tmp_path):
    kind = request.param
    name = "bert" if kind == "texts" else "vit"
    make(name).save_pretrained(tmp_path / "model")
    if kind == "texts":
        tokenizer(tmp_path).save_pretrained(tmp_path / "model")
    script.dataset(kind).save_to_disk(tmp_path / "data")
    given = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    kept = ["--remove_unused_columns", "True" if kind == "texts" else "False"]
    return [*words, *kept, "--ignore_mismatched_sizes", "True", *FLAGS]


def run(flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", *flags])
    return script.main()


def test_a_script_trains_evaluates_predicts_and_leaves_what_trainer_leaves(flags, tmp_path, monkeypatch, capsys):
    run(flags, monkeypatch)
    out = tmp_path / "out"
    said = capsys.readouterr().out
    for split in ("train", "eval"):
        assert f"***** {split} metrics *****" in said
        found = json.loads((out / f"{split}_results.json").read_text())
        assert found[f"{split}_samples"] == (32 if split == "train" else 16)
        assert f"{split}_loss" in found
    assert 0 <= found["eval_accuracy"] <= 1
    assert found["eval_stage_2_accuracy"] == found["eval_accuracy"]
    assert "eval_stage_1_accuracy" in json.loads((out / "all_results.json").read_text())
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 8
    lines = (out / "predict_results.txt").read_text().splitlines()
    assert len(lines) == 9
    assert {line.partition("\t")[2] for line in lines[1:]} <= {"red", "green", "blue"}
    card = (out / "README.md").read_text()
    assert re.search(r"name: a small dataset\n.*metrics:\n", card, re.DOTALL)
    assert "language:\n- en" in card


def test_a_script_that_was_interrupted_goes_on_at_its_last_checkpoint(flags, tmp_path, monkeypatch):
    first = run([*flags, "--max_steps", "4"], monkeypatch)
    assert get_last_checkpoint(tmp_path / "out").endswith("checkpoint-4")
    seen = []
    monkeypatch.setattr(MMSTTrainer, "get_batch_samples", lambda self, *a: seen.append(1) or super_samples(self, *a))
    super_samples = Trainer.get_batch_samples
    second = run([*flags, "--max_steps", "6"], monkeypatch)
    assert (first.state.global_step, second.state.global_step) == (4, 6)
    assert len(seen) == 2


def test_a_script_takes_a_json_file(flags, tmp_path, monkeypatch):
    values, name = {}, None
    for word in flags:
        if word.startswith("--"):
            name = word[2:]
            values[name] = True
        else:
            values[name] = {"True": True, "False": False}.get(word, int(word) if word.isdigit() else word)
    (tmp_path / "run.json").write_text(json.dumps({**values, "max_steps": 1, "pad_to_max_length": True}))
    assert run([str(tmp_path / "run.json")], monkeypatch).state.global_step == 1


@pytest.mark.parametrize("kind", ["positional", "keyword", "model_init"])
def test_every_way_to_call_trainer(kind, tmp_path):
    args, data = arguments(tmp_path, max_steps=1), Samples("bert", 16)
    collator, tokens = DataCollatorWithPadding(tokenizer(tmp_path)), tokenizer(tmp_path)
    if kind == "positional":
        run = MMSTTrainer(make("bert"), args, collator, data, data, tokens)
    elif kind == "keyword":
        run = MMSTTrainer(
            args=args, model=make("bert"), processing_class=tokens, data_collator=collator, train_dataset=data
        )
    else:
        run = MMSTTrainer(None, args, collator, data, None, tokens, lambda: make("bert"))
    run.train()
    assert run.state.global_step == 1
    assert run.processing_class is tokens
    assert run.data_collator is collator


def test_every_public_method_takes_what_trainers_takes():
    for name, method in inspect.getmembers(Trainer, inspect.isfunction):
        if not name.startswith("_"):
            theirs, ours = inspect.signature(method), inspect.signature(getattr(MMSTTrainer, name))
            assert list(ours.parameters)[1:] == list(theirs.parameters)[1:] or "args" in ours.parameters, name


def test_the_configuration_of_the_host_names_the_one_to_use(tmp_path):
    with pytest.raises(TypeError, match="args of type TrainingArguments. Use MMSTConfig in its place"):
        MMSTTrainer(make("vit"), TrainingArguments(str(tmp_path), use_cpu=True))
