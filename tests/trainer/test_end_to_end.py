"""One stage, one layer at a time, and stages with the model's loss: the numbers of plain Trainer, for any model."""

import pytest
import torch
import transformers as tf
from other_models import MODELS, Slope, TextAndNumbers
from runs import arguments, assert_same, losses, weights
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_mmst import MMSTConfig, MMSTTrainer


def collate(samples):
    labels = [sample.get("labels") for sample in samples]
    if isinstance(labels[0], dict):
        return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": labels}
    batch = tf.default_data_collator(samples)
    return {**batch, "return_loss": True} if "pixel_values" in batch and "input_ids" in batch else batch


def run(folder, name, cls=MMSTTrainer, resume=None, callbacks=None, **settings):
    build, sample, _ = MODELS[name]
    labels = {"label_names": ["target"]} if build is TextAndNumbers else {}
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "remove_unused_columns": False, **labels, **settings}
    args = arguments(folder, MMSTConfig if cls is MMSTTrainer else TrainingArguments, **settings)
    set_seed(0)
    data = [sample(i) for i in range(8)]
    trained = cls(build(), args, train_dataset=data, eval_dataset=data, data_collator=collate, callbacks=callbacks)
    trained.train(resume_from_checkpoint=resume)
    return trained


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_plain_trainer(name, tmp_path):
    """Those of one stage in every setting; a layer at a time weighs micro-batches by what is known of their labels."""
    plain = run(tmp_path / "plain", name, Trainer, gradient_accumulation_steps=2)
    one = run(tmp_path / "one", name, num_stages=1, gradient_accumulation_steps=2)
    assert losses(one) == losses(plain)
    assert_same(weights(one.model), weights(plain.model))
    assert one.evaluate().keys() == plain.evaluate().keys()
    if not MODELS[name][2]:
        return
    means = name in ("no labels", "images and texts", "detection", "a module")  # of which Trainer takes the mean
    settings = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2 if means else 1}
    plain = run(tmp_path / "plain", name, Trainer, **settings)
    offloaded = run(tmp_path / "offloaded", name, stage_order="end_to_end", **settings)
    exact = name != "encoder and decoder"  # whose layers share a bias, to which they add in another order
    assert losses(offloaded) == (losses(plain) if exact else pytest.approx(losses(plain), rel=1e-6))
    for key, tensor in weights(plain.model).items():
        torch.testing.assert_close(weights(offloaded.model)[key], tensor, rtol=0, atol=0 if exact else 1e-5)


class WeightsAfter(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append(weights(model))


BLOCKS = {"stage_order": "sequential", "stage_objective": "model", "transport_weight": 0.0, "num_stages": 2}


@pytest.mark.parametrize("name", [one for one in MODELS if one not in ("choices", "one shared layer", "no layers")])
def test_by_the_models_loss_a_stage_learns_what_it_learns_in_plain_trainer(name, tmp_path):
    """And the others nothing; what comes before the layers learns with the first stage."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    plain = run(tmp_path / "plain", name, Trainer, max_steps=1, **settings)
    after = WeightsAfter()
    trained = run(tmp_path / "blocks", name, callbacks=[after], **BLOCKS, **settings)
    assert losses(trained)[0] == losses(plain)[0]
    set_seed(0)
    begin, end = weights(MODELS[name][0]()), weights(plain.model)
    stage, rest = (tuple(f"{layer}." for layer in names) for names in trained.partition.stages)
    learning = {key for key, _ in trained.model.named_parameters()}
    for key, tensor in after.found[0].items():
        expected = begin[key] if key in learning and key.startswith(rest) else end[key]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
        assert not (key in learning and key.startswith(stage)) or torch.equal(tensor, after.found[1][key]), key
    decodes = name == "encoder and decoder"
    assert trained._run.staged.mask_name == ("decoder_attention_mask" if decodes else "attention_mask")


@pytest.mark.parametrize("name", ["video", "a module"])
def test_one_stage_goes_on_from_a_checkpoint_of_plain_trainer(name, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    plain = run(tmp_path, name, Trainer, **settings)
    resumed = run(tmp_path, name, num_stages=1, resume=str(tmp_path / "checkpoint-1"), **settings)
    assert_same(weights(resumed.model), weights(plain.model))


@pytest.mark.parametrize("name", ["a decoder", "images and texts", "a module"])
def test_a_budget_for_what_has_no_stages_is_one_for_a_layer_at_a_time(name, tmp_path):
    assert run(tmp_path, name, memory_budget="1GiB", num_stages=None, max_steps=1).args.stage_order == "end_to_end"


def test_a_budget_for_what_cannot_be_planned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="labels is a list, not a tensor.* leave memory_budget unset"):
        run(tmp_path, "detection", memory_budget="1GiB", num_stages=None)


def test_a_budget_without_samples_is_refused(tmp_path):
    args = arguments(tmp_path, memory_budget="1GiB", num_stages=None)
    with pytest.raises(ValueError, match="memory_budget.* planned with the first samples .* leave memory_budget unset"):
        MMSTTrainer(MODELS["questions"][0](), args, train_dataset=[])


def test_layers_that_share_weights_do_not_rest_apart(tmp_path):
    build, sample, _ = MODELS["questions"]
    model = build()
    layers = model.bert.encoder.layer
    layers[1].attention = layers[0].attention
    args = arguments(tmp_path, stage_order="end_to_end")
    with pytest.raises(
        ValueError, match=r'layer.1 of BertFor.* shares weights with bert.encoder.layer.0.*Set offload="none"'
    ):
        MMSTTrainer(model, args, train_dataset=[sample(0)])


def test_single_modules_are_not_recomputed_one_by_one(tmp_path):
    with pytest.raises(ValueError, match="Vgg is a sequence of single modules.*cannot be recomputed one by one"):
        MMSTTrainer(MODELS["single modules"][0](), arguments(tmp_path, stage_order="end_to_end"))


def test_without_layers_there_is_nothing_that_could_rest(tmp_path):
    with pytest.raises(ValueError, match=r'No list of layers.*Set offload="none"'):
        MMSTTrainer(Slope(), arguments(tmp_path, stage_order="end_to_end"))
