"""Many architectures: gradients against the generic reference, a step, saving and loading; and what is refused, why."""

import re

import datasets
import numpy as np
import pytest
import torch
from encoders import ENCODERS, MODELS, REFUSED, VGG, build, inputs
from engines import WEIGHTS, cut, step
from pages import block
from reference import detached_step, gradients
from runs import arguments, weights
from torch import nn
from transformers import TrainerCallback

from hf_mmst import MMSTConfig, MMSTTrainer, StageHeads, Stages, find_layers, load_stages, plan
from hf_mmst.cut.layers import run_ends
from hf_mmst.cut.probe import profile_layers
from hf_mmst.inference.early_exit import EarlyExit
from hf_mmst.inference.exit_rules import ExitRule
from hf_mmst.method.heads import ConvHead
from hf_mmst.method.transport import TransportWeights
from hf_mmst.planning.budget import planned_peak
from hf_mmst.records.stages import save_stages
from hf_mmst.tasks.images import ImageModelArguments, _build

HEADS = {}  # what kind of head each model has got, as far as it has been tested


def assert_same(model, heads, expected):
    """The gradients that are there are those expected, up to rounding of the largest of them."""
    found = {f"{i}.{n}": p.grad for i, one in enumerate((model, heads)) for n, p in one.named_parameters()}
    scale = max(gradient.abs().max().item() for gradient in expected.values() if gradient is not None)
    for key, gradient in expected.items():
        assert (found[key] is None) == (gradient is None), key
        if gradient is not None:
            torch.testing.assert_close(
                found[key], gradient, rtol=1e-4, atol=1e-6 * scale, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_step_save_load(name, tmp_path):
    model = build(name)
    batch = inputs(model)
    partition, heads = cut(model)
    HEADS[name] = type(heads.heads[0])
    _, around = detached_step(model, partition, heads, batch, WEIGHTS)
    assert around == []
    expected = gradients(model, heads)
    step(model, partition, heads, batch)
    assert_same(model, heads, expected)
    before = weights(model)
    torch.optim.SGD([*model.parameters(), *heads.parameters()], lr=1e-3).step()
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    for stage in partition.stages:
        assert any(n.startswith(tuple(f"{layer}." for layer in stage)) for n in changed)
    model.save_pretrained(tmp_path)
    state = TransportWeights("constant", 0.0, partition.num_stages).state_dict()
    save_stages(tmp_path, Stages(partition, heads, {"transport_norm": "relative"}, state))
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = model.state_dict()
    assert all(torch.equal(tensor, trained[n]) for n, tensor in loaded.state_dict().items())
    stages = load_stages(tmp_path)
    assert stages.partition == partition
    assert [type(head) for head in stages.heads] == [type(head) for head in heads]
    trained = heads.state_dict()
    assert all(torch.equal(tensor, trained[n]) for n, tensor in stages.heads.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("architecture", "first", "number"),
    [
        ("resnet10t", "timm_model.layer1.0", 4),
        ("convnext_atto", "timm_model.stages.0.blocks.0", 12),
        ("deit_tiny_patch16_224", "timm_model.blocks.0", 12),
        ("vgg11_bn", "timm_model.features.0", 29),
        ("vgg11", "timm_model.features.0", 21),
        ("swin_s3_tiny_224", "with the channels last", 0),
    ],
)
def test_models_of_timm(architecture, first, number):
    pytest.importorskip("timm", reason="timm needs torchvision; models of transformers run without it")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=5)).train()
    if number == 0:
        with pytest.raises(ValueError, match=first):
            cut(model)
        return
    partition, heads = cut(model)
    assert (partition.layers[0], len(partition.layers)) == (first, number)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = inputs(model)
    _, around = detached_step(model, partition, heads, batch, WEIGHTS)
    assert around == []
    expected = gradients(model, heads)
    step(model, partition, heads, batch)
    assert_same(model, heads, expected)


def test_a_stage_of_single_modules_ends_before_a_convolution(tmp_path, capsys):
    """A layer is a convolution with all up to the next; its transport is that of the part that keeps the shape."""
    model = build(VGG)
    layers = find_layers(model)
    assert run_ends(model, layers) == [f"features.{i}" for i in (2, 6, 9, 13, 16)]
    run = MMSTTrainer(model, arguments(tmp_path, num_stages=5, max_steps=1), train_dataset=Pictures())
    assert run.partition.stages[1] == ("features.3", "features.4", "features.5", "features.6")
    run.train()
    said = capsys.readouterr().out
    assert "5 stages of 1+1+1+1+1 layers" in said
    assert "; no transport term in stages 1, 3, whose layers all change the shape of what they get" in said
    x = inputs(model)["pixel_values"]
    with torch.no_grad(), run._run.staged.engine.observe() as view:
        model.eval()(x)
        into = model.features[:3](x)
        onto = model.features[3:6](into)
    torch.testing.assert_close(view.movements[1], ((onto - into) ** 2).sum((1, 2, 3)) / (into**2).sum((1, 2, 3)))
    assert view.movements[0].tolist() == view.movements[2].tolist() == [0.0, 0.0, 0.0]
    assert all(moved > 0 for k in (1, 3, 4) for moved in view.movements[k].tolist())
    with pytest.raises(ValueError, match="num_stages=6, but the model has 5 layers"):
        MMSTTrainer(build(VGG), arguments(tmp_path, num_stages=6))
    with pytest.raises(
        ValueError, match="head_layers=1, but Vgg is a sequence of single modules.*Set head_layers to 0"
    ):
        MMSTTrainer(build(VGG), arguments(tmp_path, head_layers=1))
    planned = plan(build(VGG), 4, num_stages=5)
    assert any("5" in row.name for row in planned.rows)


@pytest.mark.parametrize("name", ["Swin v2", "Donut's Swin", "FocalNet", "Hiera", "PVT v2"])
def test_groups_of_blocks_are_opened(name):
    """So that a stage moves what it gets, where a group as a whole would change its shape."""
    model = build(name)
    layers = find_layers(model)
    assert len(layers) == sum(model.config.depths)
    assert sum(layer.keeps_shape for layer in profile_layers(model, layers)) >= len(layers) - 3


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_with_a_reason(name, tmp_path):
    make, _, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        MMSTTrainer(make(), arguments(tmp_path, num_stages=3))


def test_a_network_of_timm_is_made_from_scratch_for_the_images_there_are():
    pytest.importorskip("timm", reason="timm needs torchvision; models of transformers run without it")
    image = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [np.zeros((28, 28), np.uint8)], "label": [0]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=image))
    given = ImageModelArguments(architecture="vgg11_bn", architecture_args='{"mlp_ratio": 0.0625}')
    model, processor = _build(given, splits, 32)
    assert processor is None
    assert (model.config.image_size, model.config.num_channels, model.config.num_labels) == (32, 1, 2)
    assert model.timm_model.pre_logits.fc1.out_channels == 256
    assert model(torch.zeros(2, 1, 32, 32)).logits.shape == (2, 2)


class Pictures(torch.utils.data.Dataset):
    """Random images, 32 pixels wide."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        chance = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=chance), "labels": torch.tensor(index % 5)}


def statistics(model, stage=None):
    return {
        name: tensor.clone()
        for name, tensor in model.named_buffers()
        if "running" in name and (stage is None or name.startswith(tuple(f"{layer}." for layer in stage)))
    }


@pytest.mark.parametrize("name", ["ResNet", VGG])
def test_statistics_of_frozen_stages_do_not_move(name, tmp_path):
    """BatchNorm's running mean and variance change while a stage learns, and at no other time."""
    model = build(name)
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = statistics(model)

    run = MMSTTrainer(
        model,
        arguments(tmp_path, stage_order="sequential", num_stages=3, max_steps=6, per_device_train_batch_size=8),
        train_dataset=Pictures(),
        callbacks=[Watch()],
    )
    assert all(isinstance(head, ConvHead) for head in run.heads)
    seen[0] = statistics(model)
    run.train()
    for k, stage in enumerate(run.partition.stages):
        for number in range(1, 7):
            moved = [n for n in statistics(model, stage) if not torch.equal(seen[number][n], seen[number - 1][n])]
            learns = (number - 1) // 2 == k
            assert bool(moved) == learns, (k, number, moved)
    after = statistics(model)
    run.evaluate(Pictures())
    assert all(torch.equal(tensor, after[name]) for name, tensor in statistics(model).items())


@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_convolutional_networks_train_and_come_back(pooling, tmp_path):
    model = build("ConvNeXt")
    run = MMSTTrainer(
        model,
        arguments(tmp_path, num_stages=2, max_steps=2, head_pooling=pooling),
        train_dataset=Pictures(),
        eval_dataset=Pictures(),
        compute_metrics=lambda found: {"accuracy": 0.5},
    )
    run.train()
    run.save_model()
    assert isinstance(run.heads.heads[0], ConvHead) == (pooling == "auto")
    assert "eval_stage_1_loss" in run.evaluate()
    saved = load_stages(tmp_path).heads
    assert all(torch.equal(tensor, run.heads.state_dict()[n]) for n, tensor in saved.state_dict().items())


@pytest.mark.parametrize("name", ["ResNet", "ConvNeXt", "PVT", VGG])
def test_cached_features_and_one_resident_stage_change_no_number(name, tmp_path):
    runs = []
    for kind, settings in enumerate(({}, {"feature_cache": "disk", "offload": "stages"})):
        args = arguments(tmp_path / str(kind), stage_order="sequential", max_steps=9, optim="sgd", **settings)
        run = MMSTTrainer(build(name), args, train_dataset=Pictures())
        run.train()
        runs.append({**weights(run.model), **{f"heads.{n}": tensor for n, tensor in weights(run.heads).items()}})
    for key, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["ResNet", VGG, "DeBERTa v2", "Funnel", "MPNet", "wav2vec 2.0", "Longformer"])
def test_samples_leave_early(name):
    model = build(name).eval()
    batch = inputs(model)
    partition, heads = cut(model)
    with torch.no_grad():
        for head in heads:
            head.classifier.weight.mul_(15)
    early = EarlyExit(model, Stages(partition, heads, {}, {}))
    found = early.observe([batch])
    sure = early.rule.confidence(0, found.logits[0]).sort().values
    early.rule = ExitRule(threshold=((sure[1] + sure[2]) / 2).item())
    stages = early.rule.decide(found.logits)
    assert len(set(stages.tolist())) > 1
    output = early(**{key: value for key, value in batch.items() if key != "labels"})
    assert (output.exit_stages - 1).tolist() == stages.tolist()
    torch.testing.assert_close(output.logits, found.logits[stages, torch.arange(3)], rtol=1e-4, atol=1e-4)


def test_the_head_for_maps_is_the_papers():
    head = StageHeads([8], 5, maps=[True]).heads[0].eval()
    x = torch.randn(2, 8, 7, 5)
    expected = nn.functional.adaptive_avg_pool2d(head.conv(x).relu(), 2)
    expected = (expected - head.norm.running_mean[:, None, None]) / (1 + head.norm.eps) ** 0.5
    torch.testing.assert_close(head(x), head.classifier(expected.flatten(1)))


def test_what_depends_on_data_cannot_be_planned():
    with pytest.raises(ValueError, match="depends on data.*can be trained in stages, but not planned"):
        plan(MODELS["DeBERTa"]().config, 2)


def table():
    lines = ["| input | auxiliary head | encoders |", "|---|---|---|"]
    for kind, models in ENCODERS.items():
        heads = {name: HEADS.get(name) or type(cut(build(name))[1].heads[0]) for name in models}
        for head, words in ((ConvHead, "convolution"), (None, "LayerNorm, mean, Linear")):
            names = [name for name, found in heads.items() if (found is ConvHead) == (head is ConvHead)]
            if names:
                lines.append(f"| {kind} | {words} | {', '.join(names)} |")
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, (_, reason, _) in REFUSED.items()]
    return "\n".join(lines)


def test_the_table_is_what_was_tested():
    assert block("recipes/models.md", "encoders") == table()


def test_a_run_that_cannot_be_planned_says_why(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_mmst.planning.budget.logger.warning", said.append)
    model = build("DeBERTa")
    args = MMSTConfig(str(tmp_path), num_stages=2, use_cpu=True)
    assert planned_peak(args, model, inputs(model)) is None
    assert "hf_mmst has no plan of this run to compare with" in said[0]
