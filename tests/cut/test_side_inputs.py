"""What enters layers beside hidden states: cut as the equations say, or refused."""

import pytest
import torch
import transformers as tf
from reference import detached_step, gradients
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_mmst import Partition, StageHeads, Stagewise
from hf_mmst.cut.probe import check_cut, trace_stages

WEIGHTS = [0.5, 0.5]


class Layer(nn.Module):
    def __init__(self, makes):
        super().__init__()
        self.of_hidden, self.of_side = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(8)) if makes else None

    def forward(self, hidden, side=None):
        side = self.bias * 2 if side is None else side
        moved = self.of_hidden(hidden) * self.of_side(side).tanh()
        return hidden + moved, side + moved if side.shape == moved.shape else side


class Sided(tf.PreTrainedModel):
    """
    Four layers that get, beside hidden states, what `config.kind` says: the embeddings, a row of a table, a bias that
    the first of them makes for all, what the first of each two makes for the second, or a second stream.
    """

    config_class = tf.PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings, self.table = nn.Embedding(99, 8), nn.Parameter(torch.randn(4, 8))
        self.layers = nn.ModuleList(Layer(makes=config.kind == "bias" and i == 0) for i in range(4))
        self.classifier = nn.Linear(8, 5)
        self.cut_before = None  # of this layer, by the model itself, as the engine should
        self.post_init()

    def forward(self, input_ids, labels=None, **_):
        embedded = hidden = self.embeddings(input_ids).tanh()
        rows, kind, made = self.table.tanh(), self.config.kind, None
        for i, layer in enumerate(self.layers):
            if i == self.cut_before and made is not None:
                made = made.detach()
            side = {"embeddings": embedded, "table": rows[i], "bias": made}.get(kind, embedded if i == 0 else made)
            if kind == "pairs" and i % 2 == 0:
                side = hidden
            hidden, other = layer(hidden, side)
            made = other if kind != "bias" or i == 0 else made
        logits = self.classifier(hidden.mean(1))
        return SequenceClassifierOutput(None if labels is None else cross_entropy(logits, labels), logits)


def sided(kind):
    torch.manual_seed(0)
    model = Sided(tf.PreTrainedConfig(kind=kind, num_labels=5)).train()
    with torch.no_grad():
        model.embeddings.weight.normal_()
    return model, Partition((("layers.0", "layers.1"), ("layers.2", "layers.3"))), StageHeads([8], 5)


def learned(model, partition, heads, batch, stages=None):
    engine = Stagewise(model, partition, heads)
    with engine.step(lambda logits: cross_entropy(logits, batch["labels"]), WEIGHTS, stages) as step:
        loss = model(**batch).loss
    (loss + WEIGHTS[0] * step.transport).backward()
    return gradients(model, heads)


@pytest.mark.parametrize("kind", ["embeddings", "table", "bias", "pairs"])
def test_side_inputs_are_cut_at_the_ends_of_stages(kind):
    """What a stage has made it alone learns from; what was made around the layers, all stages."""
    model, partition, heads = sided(kind)
    batch = {"input_ids": torch.randint(99, (3, 6)), "labels": torch.tensor([0, 1, 2])}
    assert check_cut(model, partition).streams == ()
    model.cut_before = 2
    detached_step(model, partition, heads, batch, WEIGHTS)
    expected = gradients(model, heads)
    model.cut_before = None
    found = learned(model, partition, heads, batch)
    alone = [learned(model, partition, heads, batch, [stage]) for stage in range(2)]
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}")
            assert any(some[name] is not None for some in alone), name


def test_a_second_stream_is_refused():
    model, partition, _ = sided("stream")
    with pytest.raises(ValueError, match=r"layers.1 of Sided hands on a second stream.*Set num_stages to 1"):
        check_cut(model, partition)
    trace = trace_stages(model, Partition((("layers.0", "layers.1", "layers.2"), ("layers.3",))))
    assert trace.beside == trace.streams == ("layers.2",)
    assert trace.twice is None
