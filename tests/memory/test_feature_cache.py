"""Cached features: the numbers of recomputed ones, without the work; and never those of anything else."""

import shutil

import pytest
import torch
from datasets import Dataset
from encoders import MODELS, build
from runs import ORDERS, InterruptAt, arguments, assert_same, losses, trainer, weights
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForTokenClassification, set_seed
from zoo import Noisy, Samples, make

from hf_mmst import MMSTTrainer
from hf_mmst.cut.partition import Partition
from hf_mmst.memory import feature_store
from hf_mmst.memory.feature_cache import upstream_hash

T5 = {"vocab_size": 99, "d_model": 32, "num_layers": 4, "num_heads": 4, "d_ff": 64, "d_kv": 8, "num_labels": 5}


def run(folder, name="vit", model=None, cache="disk", order="sequential", extra=None, **kwargs):
    set_seed(0)
    settings = {"dropout": True, "num_train_epochs": 4, **ORDERS[order], **kwargs}
    return trainer(folder, name, model, feature_cache=cache, extra=extra, **settings)


def count_runs(model, name):
    """A list that gets an entry for each sample that passes through the named layer."""
    runs = []
    model.get_submodule(name).register_forward_pre_hook(lambda _m, args: runs.extend(args[0]))
    return runs


MIXED = {"offload": "stages", "gradient_accumulation_steps": 2, "bf16": True}


@pytest.mark.parametrize(
    ("name", "order", "settings"),
    [
        ("vit", "sequential", {}),
        ("vit", "multi_lap", {**MIXED, "activation_checkpointing": True}),
        ("bert", "sequential", {**MIXED, "activation_checkpointing": True}),
        ("bert", "multi_lap", {}),
        ("swin", "sequential", MIXED),
    ],
)
def test_the_numbers_are_those_of_recomputed_features(name, order, settings, tmp_path, capsys):
    trained = {}
    settings = {"num_train_epochs": 2 if order == "sequential" else 4, **settings}  # two in each turn
    for cache in ("none", "disk", "memory"):
        trained[cache] = run(tmp_path / cache, name, None, cache, order, **settings)
        runs = count_runs(trained[cache].model, trained[cache].partition.layers[0])
        trained[cache].train()
        trained[cache].runs = len(runs)
    for cache in ("disk", "memory"):
        assert_same(weights(trained[cache].model), weights(trained["none"].model))
        assert_same(weights(trained[cache].heads), weights(trained["none"].heads))
        assert losses(trained[cache]) == losses(trained["none"])
        assert trained[cache].runs < trained["none"].runs
    assert not list((tmp_path / "disk").glob("feature_cache*"))
    assert "for the features of 32 samples" in capsys.readouterr().out


def test_layers_before_run_once_per_sample(tmp_path):
    trained = run(tmp_path, num_train_epochs=5)
    first, second, third = (trained.partition.stages[k][0] for k in range(3))
    runs = {name: count_runs(trained.model, name) for name in (first, second, third)}
    trained.train()
    # Five epochs of its own, one for the next stage; a stage is entered from what is kept of the one before.
    assert {name: len(found) / 32 for name, found in runs.items()} == {first: 6, second: 6, third: 5}


def test_texts_padded_to_the_longest_of_their_batch(tmp_path):
    """Up to rounding: with another padding, matrix products may be summed in another order."""

    def collate(samples):
        found = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        longest = int(found["attention_mask"].sum(1).max())
        return {key: value[:, :longest] if value.dim() == 2 else value for key, value in found.items()}

    trained = {}
    for cache in ("none", "disk"):
        folder, extra = tmp_path / cache, {"data_collator": collate}
        trained[cache] = run(folder, "bert", None, cache, extra=extra, per_device_train_batch_size=4)
        runs = count_runs(trained[cache].model, trained[cache].partition.layers[0])
        trained[cache].train()
    assert len(runs) == 5 * 32
    for found, expected in zip(
        weights(trained["disk"].model).values(), weights(trained["none"].model).values(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["FNet", "Funnel"])
def test_padding_that_makes_a_difference_is_kept(name, tmp_path):
    """Where tokens depend on padding, a sample is found again where it is padded to the same length."""
    trained = {}
    for cache in ("none", "memory"):
        trained[cache] = run(tmp_path / cache, "bert", build(name), cache, num_stages=2, num_train_epochs=2)
        trained[cache].train()
    assert_same(weights(trained["memory"].model), weights(trained["none"].model))
    assert losses(trained["memory"]) == losses(trained["none"])

    def collate(samples):
        longest = max(int(sample["input_ids"].count_nonzero()) for sample in samples)
        whole = {k: torch.stack([sample[k] for sample in samples]) for k in samples[0]}
        return {k: tensor[:, :longest] if tensor.dim() == 2 else tensor for k, tensor in whole.items()}

    settings = {"extra": {"data_collator": collate}, "num_stages": 2, "per_device_train_batch_size": 2}
    with pytest.raises(ValueError, match="or padded to other lengths than before.*pad all to one length"):
        run(tmp_path, "bert", build(name), "memory", **settings, num_train_epochs=2).train()


@pytest.mark.parametrize(
    ("models", "name"), [(MODELS, "WavLM"), ({"T5": lambda: T5ForTokenClassification(T5Config(**T5))}, "T5")]
)
def test_layers_that_hand_on_more_than_hidden_states_are_refused(models, name, tmp_path):
    args = arguments(tmp_path, stage_order="sequential", feature_cache="memory", num_stages=2)
    with pytest.raises(ValueError, match='needs more of it than its hidden states. Set .*, or feature_cache="none"'):
        MMSTTrainer(build(name, models), args)


@pytest.mark.parametrize("workers", [0, 2])
def test_views_repeat_augmentation(workers, tmp_path):
    trained = {}
    for cache in ("none", "disk"):
        settings = {
            "data": Noisy("vit", 16),
            "cache_views": 2,
            "dataloader_num_workers": workers,
            "num_train_epochs": 3,
        }
        trained[cache] = run(tmp_path / cache, "vit", None, cache, **settings)
        runs = count_runs(trained[cache].model, trained[cache].partition.layers[0])
        trained[cache].train()
    assert len(runs) == (3 + 2) * 16
    assert_same(weights(trained["disk"].model), weights(trained["none"].model))


def test_random_samples_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="gives the same samples differently each time.*Set cache_views"):
        run(tmp_path, data=Noisy("vit")).train()


def test_samples_that_turn_random_are_refused(tmp_path):
    class Later(Samples):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            sample = super().__getitem__(index)
            return {**sample, "pixel_values": sample["pixel_values"] + (self.reads > 200) * torch.rand(())}

    with pytest.raises(ValueError, match="More than 32 different samples"):
        run(tmp_path, data=Later("vit")).train()


def test_a_stream_has_no_samples_to_find_again(tmp_path):
    stream = Dataset.from_list([dict(Samples("vit", 1)[0])]).with_format("torch").to_iterable_dataset()
    with pytest.raises(ValueError, match='has no length.*Set feature_cache="none"'):
        run(tmp_path, data=stream, max_steps=3).train()


@pytest.mark.parametrize("settings", [{"feature_cache": "memory"}, {"cache_views": 2}])
def test_a_custom_loader_does_not_mark_samples(settings, tmp_path):
    class Own(MMSTTrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=8)

    args = arguments(tmp_path, stage_order="sequential", **settings)
    with pytest.raises(ValueError, match="get_train_dataloader of Own does not call that of MMSTTrainer"):
        Own(make("vit"), args, train_dataset=Samples("vit")).train()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights after a run that nothing interrupts."""
    trained = run(tmp_path_factory.mktemp("straight"))
    trained.train()
    return weights(trained.model)


@pytest.mark.parametrize("stop", [6, 21, 37])
def test_resume_is_bitwise_the_uninterrupted_run(stop, straight, tmp_path, capsys):
    settings = {"save_strategy": "steps", "save_steps": stop}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", extra={"callbacks": [InterruptAt(stop)]}, **settings).train()
    capsys.readouterr()
    resumed = run(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert ("are in" in capsys.readouterr().out) == (stop > 16)
    assert_same(weights(resumed.model), straight)


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_too_little_room_is_said_before_it_starts(cache, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000, "available": 1000})()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(feature_store.psutil, "virtual_memory", lambda: usage)
    with pytest.raises(ValueError, match=r"features of 32 samples are more than .* free.*Set output_dir"):
        run(tmp_path, cache=cache).train()


def test_the_hash_is_of_what_comes_before():
    model = make("bert")
    layers = [f"bert.encoder.layer.{i}" for i in range(4)]
    partition = Partition(tuple((name,) for name in layers))
    before = [upstream_hash(model, partition, k) for k in range(1, 4)]
    with torch.no_grad():
        model.classifier.bias += 1
    assert upstream_hash(model, partition, 3) == before[2]
    with torch.no_grad():
        model.get_submodule(layers[1]).output.dense.bias += 1
    after = [upstream_hash(model, partition, k) for k in range(1, 4)]
    assert after[1] != before[1]
    assert after[2] != before[2]
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias += 1
    assert upstream_hash(model, partition, 1) != after[0]


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match='Set stage_order to "sequential" or "multi_lap"'):
        arguments(tmp_path, feature_cache="disk")
    with pytest.raises(ValueError, match="Set feature_cache to one of none, disk, memory"):
        arguments(tmp_path, feature_cache="ram", stage_order="sequential")
    with pytest.raises(ValueError, match="Set cache_views to 1 or more"):
        arguments(tmp_path, cache_views=0)
    with pytest.raises(ValueError, match="Set dataloader_persistent_workers=False"):
        arguments(tmp_path, cache_views=1, dataloader_persistent_workers=True, dataloader_num_workers=1)
