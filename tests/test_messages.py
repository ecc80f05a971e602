"""The table of messages on the page on troubleshooting: each is raised, as it stands there."""

import copy
import re

import pytest
import torch
from encoders import REFUSED
from pages import block
from runs import arguments, own_loss, run_end_to_end, trainer
from transformers import BertConfig, BertForQuestionAnswering, TrainerCallback, TrainingArguments
from zoo import TEXT, Samples, make

from hf_mmst import MMSTConfig, MMSTTrainer, find_layers, load_stages
from hf_mmst.cli.command import main


def refused(name):
    return lambda folder: MMSTTrainer(REFUSED[name][0](), arguments(folder))


class Unlabelled(Samples):
    def __getitem__(self, index):
        return {"pixel_values": super().__getitem__(index)["pixel_values"]}


class Random(Samples):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "pixel_values": torch.randn(3, 32, 32)}


def layerdrop(folder):
    model = make("bert")
    model.config.layerdrop = 0.1
    MMSTTrainer(model, arguments(folder))


class Copies(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        copy.deepcopy(model)


def converted(folder):
    run = run_end_to_end(folder)
    run.model.to(torch.bfloat16)
    run.evaluate()


def damaged(folder):
    (folder / "stages.json").write_text("{")
    load_stages(folder)


# A part of the message: what raises it, why, what to do.
MESSAGES = {
    "MMSTTrainer got args of type": (
        lambda folder: MMSTTrainer(make("vit"), TrainingArguments(str(folder))),
        "the script still makes `TrainingArguments`",
        "use `MMSTConfig` in its place",
    ),
    "num_stages=9, but the model has 4 layers": (
        lambda folder: trainer(folder, num_stages=9),
        "a stage has one layer at least",
        "`num_stages` to that number or less",
    ),
    "which is not a layer of the model. Did you mean": (
        lambda folder: trainer(folder, stage_boundaries=["vit.layer.1"]),
        "`stage_boundaries` names modules as `model.named_modules()` does",
        "the name that is proposed",
    ),
    "has no encoder to cut into stages": (
        lambda folder: find_layers(torch.nn.Linear(2, 2)),
        "no list, row or sequence of layers was found in the model",
        "another model, or `num_stages=1`",
    ),
    "holds one layer only": (
        refused("ALBERT"),
        "the layer is run again and again, or the model has a single one",
        "another model, or `num_stages=1`",
    ),
    "attend causally: no token depends on a later one": (
        refused("GPT-2, Llama and other decoders, as classifiers of sequences"),
        "a head in the middle would judge what most tokens have not seen",
        '`stage_order="end_to_end"` or `num_stages=1`, or an encoder, such as ViT or BERT',
    ),
    "ran 0 times in a forward pass": (
        refused("SqueezeBERT"),
        "layers that are shared, skipped or run out of order cannot be cut",
        "another model, or `num_stages=1`",
    ),
    "by a way around the end of that stage": (
        refused("XLM, FlauBERT"),
        "something carries activations past the end of a stage, so that it would not learn by itself",
        "other `stage_boundaries`, or `num_stages=1`",
    ),
    "hands on a second stream beside its hidden states": (
        refused("LiLT"),
        "the head of a stage would not see what it makes of the second",
        "another model, or `num_stages=1`",
    ),
    "has no head of which the stages' local losses could be made": (
        lambda folder: MMSTTrainer(BertForQuestionAnswering(BertConfig(**TEXT)), arguments(folder)),
        "the model's task is none of [these](models.md#tasks)",
        "a model for one of them, or a `compute_loss_func`",
    ),
    "skips layers at random": (
        layerdrop,
        "LayerDrop would skip the ends of stages",
        "that field of the model's configuration to 0",
    ),
    "it would learn end to end, past its stages": (
        lambda folder: own_loss(MMSTTrainer)(make("vit"), arguments(folder), train_dataset=Samples("vit")).train(),
        "a custom trainer runs the model by itself: for one loss of its output, or once more, as for R-Drop or FGM",
        "the loss as `compute_loss_func`; `super().training_step` once more; or `num_stages=1`",
    ),
    "The batch has no labels": (
        lambda folder: trainer(folder, data=Unlabelled("vit")).train(),
        "every stage learns from them; the collator or `remove_unused_columns` may have dropped them",
        "a column `labels` in the dataset; `remove_unused_columns=False`",
    ),
    'offload="stages" keeps the stage that learns in device memory': (
        lambda folder: arguments(folder, offload="stages"),
        "in the simultaneous order all stages learn on each batch",
        '`stage_order="sequential"` or `"multi_lap"`; `offload="layers"`',
    ),
    'feature_cache="disk" keeps what a stage gets': (
        lambda folder: arguments(folder, feature_cache="disk"),
        "there is nothing to keep where all stages learn on each batch",
        '`stage_order="sequential"` or `"multi_lap"`',
    ),
    "gives the same samples differently each time": (
        lambda folder: trainer(folder, data=Random("vit"), stage_order="sequential", feature_cache="memory").train(),
        "random augmentation makes features that are not found again",
        "`cache_views`, to the number of views of a sample",
    ),
    "num_laps=2 has no effect": (
        lambda folder: arguments(folder, num_laps=2),
        "laps belong to one order",
        '`stage_order="multi_lap"`',
    ),
    "cannot start anew with each stage": (
        lambda folder: trainer(
            folder, stage_order="sequential", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch"
        ).train(),
        "each stage has its own warm-up and decay, which needs a rate that depends on the step alone",
        "`lr_scheduler_type` to linear, cosine, ...",
    ),
    "steps each weight within the backward pass": (
        lambda folder: arguments(folder, optim="lomo"),
        "rates of stages and heads, clipping and offload do not reach LOMO and layerwise GaLore or APOLLO",
        "another `optim`, and `stage_clipping=True`",
    ),
    "twice as a whole, although a stage ends within it": (
        lambda folder: trainer(folder, "swin", activation_checkpointing=True).train(),
        "Swin checkpoints a group of layers at once",
        "`activation_checkpointing=False`, and more `num_stages`",
    ),
    "which a gradient scaler cannot follow": (
        lambda folder: run_end_to_end(folder, fp16=True, offload="layers"),
        "layers step one by one in host memory",
        "`bf16=True` in the place of `fp16`",
    ),
    "small steps are lost and squared gradients overflow": (
        lambda folder: trainer(folder, model=make("vit").half()).train(),
        "the model was loaded in the precision of its checkpoint, in which AdamW cannot learn",
        "`bf16=True` or `fp16=True` for mixed precision, and the dtype torch.float32 in `from_pretrained`",
    ),
    "it cannot be copied or pickled as a whole in training": (
        lambda folder: run_end_to_end(folder, callbacks=[Copies()]).train(),
        "a callback copies the model with the hooks by which its layers come and go",
        'a copy of its `state_dict()`, or one that is made in `on_train_begin`; else `offload="none"`',
    ),
    "was given to the trainer, but are": (
        converted,
        "the model was converted while the trainer holds its layers at rest",
        'another dtype before the trainer is made; else `offload="none"`',
    ),
    "cannot take all stages' outputs": (
        lambda folder: trainer(folder, "swin", head_layers=1),
        "the heads would hold a copy of layers of another width",
        "`head_layers=0`",
    ),
    "Nothing fits in": (
        lambda folder: trainer(folder, model=make("vit", num_hidden_layers=2), num_stages=2, memory_budget="1KiB"),
        "not even the least way fits; the message says what it needs",
        "a larger `memory_budget`, or a smaller `per_device_train_batch_size`",
    ),
    "it was not written by MMSTTrainer": (
        load_stages,
        "the folder is a checkpoint of plain `Trainer`, or another one",
        "the output folder of a run, or one of its checkpoints",
    ),
    "is damaged, or was not written by hf_mmst": (
        damaged,
        "a file is cut off, or does not say what it should; the message names what is wrong with it",
        "a copy of the file that is whole",
    ),
}


@pytest.mark.parametrize("part", MESSAGES)
def test_the_message_is_raised(part, tmp_path):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as raised:
        MESSAGES[part][0](tmp_path)
    assert part in str(raised.value)


def test_the_command_says_it_without_a_traceback(tmp_path, capsys):
    assert main(["eval", str(tmp_path), "x"]) == 2
    assert "it was not written by MMSTTrainer" in capsys.readouterr().err


def table():
    lines = ["| message | why | what to set |", "|---|---|---|"]
    lines += [f"| `{re.sub(r'[0-9]+', 'N', part)}` | {why} | {remedy} |" for part, (_, why, remedy) in MESSAGES.items()]
    return "\n".join(lines)


def test_the_table_is_what_was_raised():
    assert block("recipes/troubleshooting.md", "messages") == table()


def test_every_field_that_a_remedy_sets_is_one():
    fields = {name for _, _, remedy in MESSAGES.values() for name in re.findall(r"`(\w+)=", remedy)}
    assert len(fields) > 4
    assert fields <= MMSTConfig.__dataclass_fields__.keys()
