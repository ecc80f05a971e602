"""The budget of a run, in its arguments: planned before training, and kept."""

import pytest
import torch
from benchmark_planner import BATCH, Zeros, simulation
from benchmark_planner import make as build
from runs import arguments as given
from zoo import make

from hf_mmst import MMSTTrainer
from hf_mmst.cut.example_inputs import dummy_inputs
from hf_mmst.planning.budget import simulation_of
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way
from hf_mmst.trainer.stage_run import batch_to_plan

pytestmark = pytest.mark.usefixtures("remembered")


def arguments(folder, **settings):
    """Without a number of stages, so that it is planned."""
    return given(folder, **{"num_stages": None, **settings})


@pytest.mark.parametrize(
    "way",
    [Way(2), Way(stage_order="end_to_end", offload="layers"), Way(6, "sequential", "stages")],
)
def test_a_budget_in_the_arguments_plans_before_training(way, tmp_path, capsys):
    model, order = build("vit"), way.stage_order
    size = 32 if order == "simultaneous" else 64
    batch = {**dummy_inputs(model, size), "labels": torch.zeros(size, dtype=torch.long)}
    budget = str(int(1.06 * Simulation(model, batch).peak(way).total))
    steps = 6 if order == "sequential" else 2
    args = arguments(tmp_path, memory_budget=budget, per_device_train_batch_size=size, max_steps=steps)
    trained = MMSTTrainer(model, args, train_dataset=Zeros(model))
    assert args.stage_order == order
    assert args.memory_budget is None
    assert trained.partition.num_stages == (1 if order == "end_to_end" else args.num_stages)
    trained.train()
    said = capsys.readouterr().out
    assert "fits in" in said
    assert "hf_mmst: tensors planned" in said
    turns = {f"stage_{k + 1}_process_bytes" for k in range(args.num_stages)}
    expected = turns if order == "sequential" else {"process_bytes"}
    assert trained.peaks.by_name.keys() == expected
    assert all(value > 0 for value in trained.peaks.by_name.values())
    logged = [key for entry in trained.state.log_history for key in entry if "process" in key]
    assert {*logged} == expected


@pytest.mark.parametrize(("share", "cache"), [(0.9, "none"), (0.35, "memory")])
def test_a_budget_with_a_feature_cache(share, cache, tmp_path, capsys):
    """The cache is used where stages learn in turn, as the plan may choose."""
    model = build("vit")
    whole = simulation(model, "fp32").peak(Way()).total
    settings = {"per_device_train_batch_size": BATCH, "feature_cache": "memory", "num_train_epochs": 1}
    args = arguments(tmp_path, memory_budget=str(int(share * whole)), **settings)
    trained = MMSTTrainer(model, args, train_dataset=Zeros(model))
    assert args.feature_cache == cache
    assert ("nothing to keep in a feature cache" in capsys.readouterr().out) == (cache == "none")
    trained.train()
    assert ("memory will take" in capsys.readouterr().out) == (cache == "memory")


def test_a_budget_that_cannot_be_met_is_refused_before_training(tmp_path):
    model = make("vit")
    args = arguments(tmp_path, memory_budget="1KiB", per_device_train_batch_size=BATCH)
    with pytest.raises(ValueError, match=r'memory_budget="1KiB": Nothing fits in .*Set the budget to \d+MiB'):
        MMSTTrainer(model, args, train_dataset=Zeros(model))


def test_a_number_of_stages_is_kept_in_a_budget(tmp_path):
    settings = {"per_device_train_batch_size": 64, "num_stages": 3}
    batch = {**dummy_inputs(make("vit"), 64), "labels": torch.zeros(64, dtype=torch.long)}
    simulated = Simulation(make("vit"), batch)
    tight = simulated.peak(Way(3, "sequential", "stages", activation_checkpointing=True)).total  # would be end to end
    for budget, order in (("1GiB", "simultaneous"), (str(int(1.06 * tight)), "sequential")):
        args = arguments(tmp_path, memory_budget=budget, **settings)
        trained = MMSTTrainer(make("vit"), args, train_dataset=Zeros(make("vit")))
        assert args.num_stages == trained.partition.num_stages == 3
        assert args.stage_order == order
    args = arguments(tmp_path, memory_budget="1KiB", **settings)
    with pytest.raises(ValueError, match='memory_budget="1KiB", num_stages=3: Nothing fits.*Or leave num_stages unset'):
        MMSTTrainer(make("vit"), args, train_dataset=Zeros(make("vit")))


def test_a_budget_for_what_cannot_step_at_once(tmp_path):
    model = build("vit")
    args = arguments(tmp_path, memory_budget="40MiB", per_device_train_batch_size=BATCH, gradient_accumulation_steps=2)
    MMSTTrainer(model, args, train_dataset=Zeros(model))
    assert not args.stage_clipping


def test_a_budget_and_an_order_are_refused(tmp_path):
    for settings in (
        {"stage_order": "multi_lap"},
        {"offload": "layers"},
        {"resident_layers": 1, "stage_order": "end_to_end"},
        {"stage_boundaries": ["vit.layers.1"]},
        {"end_to_end_laps": 1},
    ):
        with pytest.raises(ValueError, match="Leave offload, resident_layers, end_to_end_laps and stage_boundaries"):
            arguments(tmp_path, memory_budget="1GiB", **settings)
    with pytest.raises(ValueError, match='Set memory_budget to one with a unit, as in "4GiB"'):
        arguments(tmp_path, memory_budget="lots")


def test_a_budget_with_parts_of_a_batch(tmp_path, capsys):
    """How layers are offloaded is kept, and planned with; where none are, nothing of it is left."""
    model = build("vit")
    whole = simulation(model, "fp32")
    parts = Way(offload="layers", layer_batch_size=BATCH // 2)
    least = whole.peak(parts).total
    assert least < whole.peak(Way(offload="layers")).total
    settings = {"per_device_train_batch_size": BATCH, "layer_batch_size": BATCH // 2, "stage_order": "end_to_end"}
    args = arguments(tmp_path, memory_budget=str(int(1.06 * least)), max_steps=1, **settings)
    trained = MMSTTrainer(model, args, train_dataset=Zeros(model))
    assert (args.offload, args.layer_batch_size) == ("layers", BATCH // 2)
    trained.train()
    ample = arguments(tmp_path, memory_budget="8GiB", **settings)
    MMSTTrainer(build("vit"), ample, train_dataset=Zeros(model))
    assert (ample.offload, ample.layer_batch_size) == ("none", None)
    assert "so layer_batch_size has no effect" in capsys.readouterr().out


def test_a_budget_keeps_what_was_set_of_checkpointing(tmp_path):
    model = build("vit")
    offloaded = simulation(model, "fp32").peak(Way(offload="layers")).total
    settings = {"stage_order": "end_to_end", "per_device_train_batch_size": BATCH}
    settings |= {"memory_budget": str(offloaded), "activation_checkpointing_kwargs": {"use_reentrant": False}}
    args = arguments(tmp_path, **settings)
    MMSTTrainer(model, args, train_dataset=Zeros(model))
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False, "offload": True}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_that_looks_at_all_tokens_is_planned_with_their_logits(smoothing, tmp_path):
    model = build("bert-masked-lm")
    args = given(tmp_path, num_stages=3, label_smoothing_factor=smoothing, per_device_train_batch_size=BATCH)
    planned = simulation_of(args, model, batch_to_plan(MMSTTrainer(model, args, train_dataset=Zeros(model))))
    assert (planned.tokens is None) == (smoothing > 0)
