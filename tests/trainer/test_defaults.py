"""What is chosen where stage_order and offload are unset: by the model, and by what cannot be offloaded."""

import pytest
from runs import losses
from transformers import BertForSequenceClassification, Trainer, TrainingArguments, set_seed
from zoo import Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer

COMMON = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 4, "logging_steps": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make("bert").save_pretrained(folder)
    return folder


def made(folder, model, cls=MMSTTrainer, config=MMSTConfig, **settings):
    return cls(model, config(str(folder), **COMMON, **settings), train_dataset=Samples("bert", 32))


def chosen(trainer):
    return trainer.args.stage_order, trainer.args.offload, trainer.args.num_stages


def test_a_pretrained_model_has_the_numbers_of_plain_trainer_with_layers_offloaded(checkpoint, tmp_path):
    trained = []
    for cls, config in ((MMSTTrainer, MMSTConfig), (Trainer, TrainingArguments)):
        set_seed(0)
        model = BertForSequenceClassification.from_pretrained(checkpoint)
        trained.append(made(tmp_path / cls.__name__, model, cls, config))
        trained[-1].train()
    assert chosen(trained[0]) == ("end_to_end", "layers", 1)
    assert trained[0]._run.moved["moved_in_bytes"] > 0
    assert losses(trained[0]) == losses(trained[1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_stages": 2}, ("simultaneous", "none", 2)),
        ({"transport_weight": 0.0}, ("simultaneous", "none", 2)),
        ({"stage_order": "sequential"}, ("sequential", "none", 2)),
        ({"offload": "none"}, ("end_to_end", "none", 1)),
        ({"resident_layers": 1}, ("end_to_end", "layers", 1)),
        ({"fp16_full_eval": True}, ("end_to_end", "none", 1)),
        ({"torch_compile": True}, ("end_to_end", "none", 1)),
    ],
)
def test_what_is_set_decides(settings, expected, checkpoint, tmp_path):
    model = BertForSequenceClassification.from_pretrained(checkpoint, num_hidden_layers=2)
    assert chosen(made(tmp_path, model, **settings)) == expected


@pytest.mark.parametrize(("settings", "placed"), [({}, False), ({"offload": "none"}, True), ({"num_stages": 2}, True)])
def test_the_host_places_what_is_not_offloaded(settings, placed, checkpoint, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(MMSTTrainer, "_move_model_to_device", lambda self, model, device: moved.append(model))
    model = BertForSequenceClassification.from_pretrained(checkpoint)
    trainer = made(tmp_path, model, **settings)
    assert trainer.place_model_on_device == placed  # of models that are made later, too
    assert (model in moved) == placed


def test_a_model_from_scratch_has_stages_and_each_model_is_looked_at_anew(checkpoint, tmp_path):
    trainer = made(tmp_path, make("bert"))
    assert chosen(trainer)[:2] == ("simultaneous", "none")
    assert trainer.partition.num_stages > 1
    trainer.model = BertForSequenceClassification.from_pretrained(checkpoint)
    trainer.train()
    assert chosen(trainer)[0] == "end_to_end"
    trainer.args.num_stages = 2
    trainer.args.check_stages()
    assert chosen(trainer) == ("simultaneous", "none", 2)
