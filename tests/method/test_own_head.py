"""The model's own head, of the tokens that a loss looks at: the numbers are those of all tokens'."""

import pytest
import torch
from encoders import CAUSAL, MASKED
from encoders import build as make_any
from engines import assert_close
from reference import gradients, next_token_loss, token_loss, train_step
from runs import losses, trainer, weights
from transformers import BertConfig, BertForMaskedLM, LongformerConfig, LongformerForMaskedLM, set_seed
from transformers.modeling_outputs import MaskedLMOutput
from zoo import TEXT, Samples, batch, make

from hf_mmst import Partition, StageHeads, Stagewise, find_layers
from hf_mmst.cut.chosen_tokens import ChosenTokens
from hf_mmst.cut.example_inputs import ExampleInputs
from hf_mmst.cut.hidden_states import hidden_states_of
from hf_mmst.cut.objectives import objective_of
from hf_mmst.method.own_head import ModelsOwnHead, is_of_single_tokens


def tells(model):
    return is_of_single_tokens(model, find_layers(model), ExampleInputs.made_up(model))


@pytest.mark.parametrize("chosen", [[0], [5, 6, 11], range(8), range(0, 16, 3)])
def test_what_is_packed_comes_out_again(chosen):
    mask = torch.zeros(16, dtype=torch.bool)
    mask[[*chosen]] = True
    hidden, labels = torch.randn(4, 4, 3), torch.arange(16).view(4, 4)
    tokens = ChosenTokens.of(mask.view(4, 4))
    packed = tokens.packed(hidden)
    assert packed.shape == (-(-len(chosen) // 4), 4, 3)
    assert torch.equal(tokens.unpacked(packed), hidden.flatten(0, 1)[mask])
    assert torch.equal(tokens.among(labels), torch.tensor([*chosen]))


@pytest.mark.parametrize("number", [0, 13, 16])
def test_nothing_is_packed_where_no_row_is_saved(number):
    assert ChosenTokens.of((torch.arange(16) < number).view(4, 4)) is None


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "llama"])
def test_gradients_of_few_labels_equal_the_reference(name):
    model = make(name)
    objective, layers = objective_of(model), find_layers(model)
    partition = Partition.by_cost(layers, 3)
    heads = StageHeads([32] * 2, 0, layers=[model.get_submodule(layers[-1])], kind="own")
    inputs, w = batch(name, size=6), [0.5, 0.0, 2.0]
    inputs["labels"][:, ::2] = -100
    criterion = token_loss if name.startswith("bert") else next_token_loss
    expected_losses = train_step(model, name, partition, heads, inputs, w, criterion=criterion)
    expected = gradients(model, heads)
    tokens, sizes = objective.tokens(inputs["labels"]), []

    def loss_of(logits):
        sizes.append(logits.shape)
        return objective.loss_of(tokens, logits, inputs["labels"])

    engine = Stagewise(model, partition, heads)
    with engine.step(loss_of, w, mask=inputs["attention_mask"], tokens=tokens) as step:
        outputs = model(**inputs)
    (outputs.loss + w[2] * step.transport).backward()
    assert_close(gradients(model, heads), expected)
    found = [float(step.losses[k] + w[k] * step.transports[k]) for k in range(2)]
    assert found == pytest.approx(expected_losses[:2], rel=1e-5)
    assert sizes == [(tokens.count, 99)] * 2
    assert tokens.count < inputs["labels"].numel() / 2


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2"])
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_training_is_that_of_all_logits(name, order, tmp_path):
    def run(packs):
        set_seed(0)
        data = Samples(name)
        data.columns["labels"][:, ::2] = -100
        one = trainer(tmp_path, name, data=data, stage_order=order, max_steps=6, per_device_train_batch_size=8)
        staged = one._run.staged
        assert staged.packs_tokens
        staged.packs_tokens = packs
        sizes, logits = set(), staged.engine._own_head.logits
        staged.engine._own_head.logits = lambda *given: noted(sizes, logits(*given))
        one.train()
        one.compute_metrics = None
        return one, sizes, one.evaluate(data)

    def noted(sizes, found):
        sizes.add(found.dim())
        return found

    (packed, few, found), (whole, all_of_them, expected) = run(True), run(False)
    assert (few, all_of_them) == ({2}, {3})
    names = {"eval_loss", *(f"eval_stage_{k}_{name}" for k in (1, 2, 3) for name in ("loss", "perplexity"))}
    assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-4)
    assert losses(packed) == pytest.approx(losses(whole), rel=1e-4)
    assert_close(weights(packed.model), weights(whole.model))


def test_of_layers_that_pad_all_logits_are_made():
    config = LongformerConfig(**TEXT, attention_window=8)  # 12 tokens are padded to 16
    model = LongformerForMaskedLM(config).eval()
    layers, inputs = find_layers(model), batch("bert-mlm")
    tokens = objective_of(model).tokens(inputs["labels"])
    head, found = ModelsOwnHead(model, layers), {}
    head.inputs = (), {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hook = model.get_submodule(layers[-1]).register_forward_hook(lambda *call: found.update(output=call[-1]))
        expected = model(**head.inputs[1]).logits
        hook.remove()
        hidden = hidden_states_of(found["output"])
        assert hidden.shape[1] == 16
        torch.testing.assert_close(head.logits(hidden, found["output"], tokens), tokens.among(expected))
    with pytest.raises(ValueError, match=r"puts out \[4, 16\] tokens for labels of \[4, 12\].*pad_to_multiple_of"):
        tokens.among(hidden)


class MeanOfAll(BertForMaskedLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.bert(input_ids, attention_mask=attention_mask)[0]
        return MaskedLMOutput(logits=self.cls(hidden + hidden.mean(1, keepdim=True)))


class WithoutPadding(BertForMaskedLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.bert(input_ids, attention_mask=attention_mask)[0]
        return MaskedLMOutput(logits=self.cls(hidden if attention_mask is None else hidden * attention_mask[..., None]))


@pytest.mark.parametrize("kind", [MeanOfAll, WithoutPadding])
def test_heads_that_see_more_than_a_token_get_all(kind):
    assert not tells(kind(BertConfig(**TEXT)))
    assert tells(BertForMaskedLM(BertConfig(**TEXT)))


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL])
def test_heads_of_language_models_are_of_single_tokens(name):
    assert tells(make_any(name, {**MASKED, **CAUSAL}))
