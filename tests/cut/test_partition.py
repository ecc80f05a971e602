"""Cutting layers into stages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2ForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
)
from zoo import TEXT, make

from hf_mmst import MMSTConfig, MMSTTrainer, Partition, find_layers
from hf_mmst.cut.probe import profile_layers


def test_swin_tiny_is_cut_by_compute_not_by_parameters():
    with torch.device("meta"):
        model = SwinForImageClassification(SwinConfig())
    layers = find_layers(model)
    costs = [layer.flops for layer in profile_layers(model, layers)]
    assert [len(stage) for stage in Partition.by_cost(layers, 4, costs).stages] == [3, 3, 3, 3]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=14), st.integers(1, 14))
def test_every_cut_is_a_cut(costs, num_stages):
    layers = [f"layers.{i}" for i in range(len(costs))]
    if num_stages > len(layers):
        with pytest.raises(ValueError, match=f"num_stages={num_stages}, but the model has {len(layers)} layers"):
            Partition.by_cost(layers, num_stages, costs)
        return
    partition = Partition.by_cost(layers, num_stages, costs)
    assert list(partition.layers) == layers
    assert partition.num_stages == num_stages
    assert all(partition.stages)


def test_the_cut_by_cost_is_the_best_one():
    partition = Partition.by_cost(list("abcdef"), 3, [4, 1, 1, 1, 1, 4])
    assert partition.stages == (("a",), ("b", "c", "d", "e"), ("f",))
    assert [len(stage) for stage in Partition.by_cost(list("abcdefghijkl"), 4).stages] == [3, 3, 3, 3]


def test_a_cut_ends_where_it_may():
    layers = list("abcdef")
    assert Partition.by_cost(layers, 2, [5, 1, 1, 1, 1, 1], ends=["c", "f"]).stages == (tuple("abc"), tuple("def"))
    with pytest.raises(ValueError, match="num_stages=3, but the model has 2 layers"):
        Partition.by_cost(layers, 3, ends=["c", "f"])


def test_the_cut_by_names():
    layers = list("abcdef")
    expected = (("a", "b"), ("c", "d", "e"), ("f",))
    assert Partition.by_names(layers, ["b", "e"]).stages == expected
    assert Partition.by_names(layers, ["b", "e", "f"]).stages == expected
    with pytest.raises(ValueError, match="not in the order of the layers"):
        Partition.by_names(layers, ["e", "b"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: GPT2ForSequenceClassification(GPT2Config(n_layer=2, n_embd=8, n_head=2, pad_token_id=0)),
            "attend causally",
        ),
        (lambda: AlbertForSequenceClassification(AlbertConfig(**TEXT, embedding_size=8)), "holds one layer only"),
        (
            lambda: AlbertForSequenceClassification(AlbertConfig(**TEXT, embedding_size=8, num_hidden_groups=2)),
            "layers that are shared, skipped or run out of order cannot be cut",
        ),
    ],
)
def test_the_trainer_refuses_decoders_and_shared_layers(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MMSTTrainer(model(), config(tmp_path, num_stages=2))


def config(folder, **kwargs):
    return MMSTConfig(str(folder), use_cpu=True, report_to="none", **kwargs)


def test_stages_above_the_number_of_layers(tmp_path):
    with pytest.raises(ValueError, match=r"num_stages=5, but the model has 4 layers .*Set num_stages to 4 or less"):
        MMSTTrainer(make("vit"), config(tmp_path, num_stages=5))


def test_a_boundary_that_is_no_layer_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"'vit.layer.1', which is not a layer.*Did you mean 'vit.layers.1'"):
        MMSTTrainer(make("vit"), config(tmp_path, stage_boundaries=["vit.layer.1"]))


def test_boundaries_override_the_number(tmp_path):
    trainer = MMSTTrainer(make("vit"), config(tmp_path, num_stages=4, stage_boundaries=["vit.layers.0"]))
    assert [len(stage) for stage in trainer.partition.stages] == [1, 3]


def test_a_task_without_local_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="BertForQuestionAnswering has no head .* compute_loss_func .*num_stages to 1"):
        MMSTTrainer(BertForQuestionAnswering(BertConfig(**TEXT)), config(tmp_path, num_stages=2))


def test_one_stage_takes_any_model(tmp_path):
    model = AlbertForSequenceClassification(AlbertConfig(**TEXT, embedding_size=8))
    assert MMSTTrainer(model, config(tmp_path, num_stages=1)).partition.num_stages == 1


def test_layerdrop_is_refused(tmp_path):
    model = make("bert")
    model.config.layerdrop = 0.1
    with pytest.raises(ValueError, match="config.layerdrop=0.1 skips layers at random.*Set it to 0"):
        MMSTTrainer(model, config(tmp_path, num_stages=2))


def test_with_nothing_set_there_are_four_stages_or_as_many_as_layers(tmp_path):
    args = MMSTConfig(str(tmp_path), use_cpu=True)
    for layers, stages in ((2, 2), (6, 4), (3, 3)):  # the same settings for several models
        run = MMSTTrainer(make("vit", num_hidden_layers=layers), args)
        assert (run.partition.num_stages, args.num_stages) == (stages, stages)
    args.stage_boundaries = ["vit.layers.0"]
    MMSTTrainer(make("vit"), args)
    assert args.num_stages == 2
    args.stage_boundaries, args.stage_order = None, "end_to_end"
    MMSTTrainer(make("vit"), args)
    assert args.num_stages == 1
    assert MMSTTrainer(make("vit", num_hidden_layers=2)).partition.num_stages == 2
    with pytest.raises(ValueError, match="num_stages=4, but the model has 2 layers"):
        MMSTTrainer(make("vit", num_hidden_layers=2), MMSTConfig(str(tmp_path), num_stages=4, use_cpu=True))
