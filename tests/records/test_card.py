"""What a model card says, and that writing one ends no run."""

import json
import pickle
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from runs import arguments, trainer
from transformers import Trainer, ViTForImageClassification
from zoo import make

from hf_mmst.records.card import CardContent, model_card, task_of, write_card
from hf_mmst.records.results import command_line, split_metrics, standard_error
from hf_mmst.trainer import publishing

CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.mark.parametrize("name", ["digits_mmst", "text_mmst"])
def test_the_recipes_cards_are_made_of_their_results(name):
    """To write them anew: hf-mmst card model_cards/results/NAME.json --output-dir model_cards/NAME."""
    results = json.loads((CARDS / "results" / f"{name}.json").read_text())
    card = str(model_card(CardContent.from_results(results, name), "stages.png"))
    assert (CARDS / name / "README.md").read_text() == card
    assert (CARDS / name / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert f"| accuracy | {results['accuracy']:.4f} |" in card
    assert f"| tensors, planned | {results['planned_bytes'] / 2**20:.0f} |" in card
    error = standard_error(results["accuracy"], results["num_eval_samples"])
    assert f"The standard error of the accuracy is {error:.4f}" in card
    found = {one.metric_type: one.metric_value for one in ModelCard(card).data.eval_results}
    assert found["accuracy"] == results["accuracy"]


def run(folder, **settings):
    done = trainer(folder, max_steps=1, **settings)
    done.train()
    return done


def test_without_an_evaluation_there_are_no_numbers(tmp_path):
    run(tmp_path).create_model_card(tags="mine", tasks="image-classification", dataset_tags=["tester/pictures"])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.eval_results, card.data.datasets) == (None, ["tester/pictures"])
    assert {"mine", "hf_mmst"} <= {*card.data.tags}
    assert "AutoModelForImageClassification.from_pretrained" in card.text


def test_a_run_is_planned_once(tmp_path, monkeypatch):
    plans, made = publishing.planned_peak, []
    monkeypatch.setattr(publishing, "planned_peak", lambda *given: made.append(plans(*given)) or made[-1])
    done = trainer(tmp_path, model=make("vit", num_hidden_layers=2), num_stages=2)
    first, again = (done.results({})["planned_bytes"] for _ in range(2))
    assert [first] == [again] == [plan.total for plan in made]
    done.args.per_device_train_batch_size = 2
    assert done.results({})["planned_bytes"] == made[1].total < first
    done.train_dataset.columns["labels"][:] = 0  # where tokens have none, there may be no logits to plan
    done.results({})
    assert len(made) == 3


def test_end_to_end_has_no_table_of_stages(tmp_path):
    done = run(tmp_path, num_stages=1)
    done.evaluate()
    done.create_model_card(model_name="whole")
    text = (tmp_path / "README.md").read_text()
    assert "## Stages" not in text
    assert "with hf_mmst, end to end." in text
    assert not (tmp_path / "stages.png").exists()


def test_a_card_of_ones_own_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    run(tmp_path, model_card=False).create_model_card()
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_that_fails_is_a_warning(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    said = []
    monkeypatch.setattr("hf_mmst.trainer.publishing.write_card", full)
    monkeypatch.setattr("hf_mmst.trainer.publishing.logger.warning", said.append)
    run(tmp_path).create_model_card()
    (line,) = said
    assert "wrote no model card (OSError" in line
    assert "model_card=False" in line


def test_a_dataset_from_the_hub_is_named(tmp_path, monkeypatch):
    done = run(tmp_path)
    monkeypatch.setattr(done.eval_dataset, "builder_name", "cifar10", raising=False)
    done.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["cifar10"]
    monkeypatch.setattr(done.eval_dataset, "builder_name", "csv")
    done.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").data.datasets is None


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mmst.records.card.find_spec", lambda name: None)
    done = run(tmp_path)
    done.evaluate()
    done.create_model_card()
    assert "stages.png" not in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "stages.png").exists()


def test_adapters_say_how_they_are_loaded(tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"])
    done = run(tmp_path, name="bert", model=peft.get_peft_model(make("bert"), config))
    done.save_model()
    done.create_model_card(finetuned_from="tester/base")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert "base = AutoModelForSequenceClassification.from_pretrained('tester/base', num_labels=5)" in card.text


def test_a_cut_by_names_has_no_plan(tmp_path):
    done = run(tmp_path, stage_boundaries=["vit.layers.0"])
    done.create_model_card()
    assert "planned" not in (tmp_path / "README.md").read_text()


def test_a_pickled_configuration_has_no_token(tmp_path):
    args = arguments(tmp_path, hub_token="hf_secretsecretsecret")
    assert pickle.loads(pickle.dumps(args)).hub_token is None
    assert args.hub_token == "hf_secretsecretsecret"


def test_the_command_has_no_token_and_no_folders():
    words = ["/home/me/recipes/a.py", "--hub_token", "abc", "--hub-token=def", "--x", "hf_abcdefghijk", "/home/me/out"]
    assert command_line(words) == "recipes/a.py --hub_token '***' '--hub-token=***' --x '***' out"


def test_metrics_are_taken_apart():
    found = {"eval_loss": 1.0, "eval_runtime": 2.0, "epoch": 3, "eval_stage_1_f1": 0.5, "eval_stage_2_f1": 0.6}
    assert split_metrics(found) == ({"loss": 1.0}, {"f1": (0.5, 0.6)})


def test_tasks_are_known_by_class():
    assert task_of(make("vit")) == "image-classification"
    assert task_of(make("bert")) == "text-classification"
    assert task_of(make("bert-tokens")) == "token-classification"
    assert task_of(make("bert-mlm")) == "fill-mask"
    assert task_of(make("gpt2")) == "text-generation"
    assert task_of(make("bert").bert) is None
    assert task_of(type("Mine", (ViTForImageClassification,), {})(make("vit").config)) == "image-classification"


def test_language_models_show_perplexities_and_no_early_exit(tmp_path):
    done = run(tmp_path, name="llama")
    done.compute_metrics = None
    done.evaluate()
    done.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "| stage | layers | loss | perplexity | transport |" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    assert "auxiliary heads of the stages before the last.\n\n## Stages" in card.text
    assert "EarlyExit" not in card.text
    assert card.data.pipeline_tag == "text-generation"


def test_the_signature_is_trainers():
    import inspect

    from hf_mmst import MMSTTrainer

    assert inspect.signature(MMSTTrainer.create_model_card) == inspect.signature(Trainer.create_model_card)


def test_a_card_replaces_the_old_one_as_a_whole(tmp_path):
    content = CardContent("one", {"f1": 0.5}, [["a"], ["b"]], {"f1": [0.4, 0.5]}, {}, {})
    (tmp_path / "README.md").write_text("old" * 1000)
    path = write_card(tmp_path / "deep", content)
    assert [one.name for one in (tmp_path / "deep").iterdir() if one.name.startswith(".")] == []
    assert "![f1 of each stage](stages.png)" in path.read_text()
