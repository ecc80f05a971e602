"""A batch that passes each layer a few samples at a time: the numbers of the whole one, for one trip of the weights."""

import pytest
import torch
from runs import assert_same, losses, run_end_to_end, weights
from torch import nn
from transformers import Trainer
from zoo import make

from hf_mmst import MMSTTrainer
from hf_mmst.memory.micro_batches import MicroBatches

SETTINGS = {"per_device_train_batch_size": 16, "max_steps": 4}


def run(folder, name, cls=MMSTTrainer, **settings):
    trained = run_end_to_end(folder, name, cls, model=make(name), **SETTINGS, **settings)
    trained.train()
    return trained


@pytest.mark.parametrize(("name", "samples"), [("vit", 5), ("bert", 4), ("llama", 1)])
def test_the_numbers_are_those_of_the_whole_batch(name, samples, tmp_path):
    whole, parts = run(tmp_path / "whole", name), run(tmp_path / "parts", name, layer_batch_size=samples)
    plain = run(tmp_path / "plain", name, Trainer)
    for other in (whole, plain):
        assert losses(parts) == pytest.approx(losses(other), rel=1e-5)
        for key, tensor in weights(other.model).items():
            torch.testing.assert_close(weights(parts.model)[key], tensor, rtol=0, atol=1e-4)
    assert parts._run.moved == whole._run.moved


class Centred(nn.Module):
    """Takes the mean of the batch off each sample."""

    def forward(self, hidden):
        return hidden - hidden.mean(0)


def test_a_layer_that_looks_at_other_samples_is_refused():
    cases = (Centred(), "depends on the others of its batch"), (nn.Sequential(nn.BatchNorm1d(3)), "a.b puts out")
    for layer, message in cases:
        with pytest.raises(ValueError, match=f"{message}.*Leave layer_batch_size unset"):
            MicroBatches(layer, 2, "a.b").run(layer, torch.randn(6, 3))


def test_what_is_no_batch_goes_along_whole_and_what_comes_is_put_together():
    seen = []

    def forward(hidden, mask=None, scale=None):
        seen.append((len(hidden), None if mask is None else len(mask), len(scale)))
        return hidden * scale, None, {"mask": mask}

    hidden, mask, scale = torch.randn(5, 3), torch.ones(5, 1), torch.ones(1, 3)
    parts = MicroBatches(nn.Identity(), 2, "layer")
    out, nothing, more = parts.run(forward, hidden, mask=mask, scale=scale)
    assert torch.equal(out, hidden)
    assert nothing is None
    assert torch.equal(more["mask"], mask)
    assert seen[-3:] == [(2, 2, 1), (2, 2, 1), (1, 1, 1)]
    parts.run(forward, hidden[:2], scale=scale)
    assert seen[-1] == (2, None, 1)


def test_the_inputs_of_the_parts_can_rest(tmp_path):
    resting = {"activation_checkpointing_kwargs": {"offload": True}}
    parts = run(tmp_path / "parts", "bert", layer_batch_size=6)
    at_rest = run(tmp_path / "resting", "bert", layer_batch_size=6, **resting)
    assert at_rest.args.rests_inputs
    assert_same(weights(at_rest.model), weights(parts.model))
    assert at_rest._run.moved["moved_out_bytes"] > parts._run.moved["moved_out_bytes"]
