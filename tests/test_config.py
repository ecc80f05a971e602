"""What the user says, and what is refused at once."""

import dataclasses
import math
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments
from zoo import Samples, make

import hf_mmst
from hf_mmst import MMSTConfig, MMSTTrainer

OWN_FIELDS = {
    "num_stages": None,
    "stage_boundaries": None,
    "stage_order": None,
    "num_laps": 1,
    "end_to_end_laps": 0,
    "head_layers": None,
    "head_learning_rate": None,
    "stage_learning_rate_decay": None,
    "stage_objective": "local",
    "head_pooling": "auto",
    "transport_weight": 0.3,
    "transport_norm": "relative",
    "transport_schedule": "auto",
    "stage_clipping": False,
    "memory_budget": None,
    "offload": None,
    "resident_layers": 0,
    "layer_batch_size": None,
    "offloaded_step": None,
    "feature_cache": "none",
    "cache_views": None,
    "stage_parallel": False,
    "model_card": True,
}


def test_the_public_names():
    assert hf_mmst.__all__ == [
        "EarlyExit",
        "MMSTConfig",
        "MMSTTrainer",
        "Partition",
        "StageHeads",
        "Stages",
        "Stagewise",
        "calibrate",
        "find_layers",
        "load_stages",
        "pilot",
        "plan",
        "truncate",
    ]
    for name in hf_mmst.__all__:
        assert getattr(hf_mmst, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = hf_mmst.Trainer


def test_only_these_fields_are_added(tmp_path):
    own = {f.name: f for f in dataclasses.fields(MMSTConfig)}
    for field in dataclasses.fields(TrainingArguments):
        own.pop(field.name)
    assert {name: field.default for name, field in own.items()} == OWN_FIELDS
    assert all(field.metadata["help"] for field in own.values())
    for name in OWN_FIELDS:
        assert f"{name} (`" in MMSTConfig.__doc__


def test_flags_and_yaml(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--stage_order", "multi_lap", "--num_laps", "2"]
    flags += ["--stage_boundaries", "a", "b", "--transport_weight", "0.5", "--transport_norm", "sum"]
    (parsed,) = HfArgumentParser(MMSTConfig).parse_args_into_dataclasses(flags)
    assert (parsed.stage_order, parsed.num_laps, parsed.stage_boundaries) == ("multi_lap", 2, ["a", "b"])
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nhead_pooling: cls\nnum_stages: 6\n")
    (parsed,) = HfArgumentParser(MMSTConfig).parse_yaml_file(str(path))
    assert (parsed.head_pooling, parsed.num_stages) == ("cls", 6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_stages": 0}, "num_stages=0 is not a whole number of at least 1"),
        ({"num_stages": -3}, "num_stages=-3 is not a whole number"),
        ({"num_stages": 2.5}, "num_stages=2.5 is not a whole number"),
        ({"num_laps": 0}, "num_laps=0 is not a whole number"),
        ({"num_laps": 2}, 'num_laps=2 has no effect with stage_order="simultaneous".*multi_lap'),
        ({"transport_weight": -1.0}, "transport_weight=-1.0 is not a finite number of at least 0"),
        ({"transport_weight": float("nan")}, "transport_weight=nan is not a finite number"),
        ({"transport_weight": float("inf")}, "transport_weight=inf is not a finite number"),
        ({"stage_order": "parallel"}, "stage_order='parallel' is not known.*simultaneous, sequential, multi_lap"),
        ({"transport_norm": "l2"}, "transport_norm='l2' is not known.*relative, mean, sum"),
        ({"transport_schedule": "cosine"}, "transport_schedule='cosine' is not known"),
        ({"head_pooling": "max"}, "head_pooling='max' is not known"),
        ({"stage_boundaries": []}, r"stage_boundaries=\[\] is not a list of layer names"),
        ({"stage_boundaries": "vit.layers.1"}, "stage_boundaries='vit.layers.1' is not a list"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "Set use_reentrant to False",
        ),
        ({"ddp_static_graph": True}, "Leave it unset"),
        ({"optim": "lomo"}, 'optim="lomo" steps each weight within the backward pass.*stage_clipping=True'),
        (
            {"optim": "galore_adamw_layerwise", "stage_order": "end_to_end"},
            'optim="galore_adamw_layerwise" steps each weight within the backward pass',
        ),
        (
            {"offload": "layers", "accelerator_config": {"dispatch_batches": True}},
            "Leave dispatch_batches unset in accelerator_config",
        ),
    ],
)
def test_bad_values_are_refused_at_once(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MMSTConfig(str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_every_field_has_a_type(name, tmp_path):
    config = MMSTConfig(str(tmp_path), use_cpu=True)
    switch = isinstance(OWN_FIELDS[name], bool)
    for value in ("no", [], math.nan, -1, (1,), 1 if switch else True):
        setattr(config, name, value)
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} ") + ".*[Ss]et "):
            config.check_stages()
    setattr(config, name, True if switch else OWN_FIELDS[name])
    if name != "stage_parallel":
        config.check_stages()


def test_plain_training_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args of type TrainingArguments. Use MMSTConfig in its place"):
        MMSTTrainer(make("vit"), TrainingArguments(str(tmp_path), use_cpu=True))


def test_missing_labels(tmp_path):
    data = Samples("vit")
    data.columns["targets"] = data.columns["labels"]
    data.__class__ = type(
        "Unlabelled", (Samples,), {"__getitem__": lambda s, i: {"pixel_values": s.columns["pixel_values"][i]}}
    )
    args = MMSTConfig(str(tmp_path), num_stages=2, use_cpu=True, report_to="none", disable_tqdm=True)
    with pytest.raises(ValueError, match="The batch has no labels, only pixel_values.*Give the dataset such a column"):
        MMSTTrainer(make("vit"), args, train_dataset=data).train()


def test_too_few_steps(tmp_path):
    args = MMSTConfig(str(tmp_path), max_steps=2, stage_order="sequential", use_cpu=True, report_to="none")
    with pytest.raises(
        ValueError, match="2 optimizer steps cannot be shared out over 4 turns of 4 stages in 1 laps.*at least 4"
    ):
        MMSTTrainer(make("vit"), args, train_dataset=Samples("vit")).train()


def test_processes_that_would_not_find_each_other_are_refused(tmp_path, monkeypatch):
    config = MMSTConfig(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started.*Set use_cpu=True"):
        config.check_stages()
