"""What a trainer is made of, without a trainer: a model made ready, and its turns."""

from types import SimpleNamespace

import pytest
import transformers as tf
from runs import arguments
from transformers import TrainerState
from zoo import TEXT, batch, make

from hf_mmst.distributed.wrappers import Wrapper
from hf_mmst.trainer.staging import Staging
from hf_mmst.trainer.turns import Turns


def staging(folder, data=None, loss_func=None, **settings):
    wrapper = Wrapper(SimpleNamespace())
    return Staging(
        arguments(folder, **settings),
        wrapper,
        lambda number: data and {k: v[:number] for k, v in data.items()},
        ["labels"],
        loss_func,
    )


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("with_data", [True, False])
def test_a_model_is_made_ready(name, with_data, tmp_path):
    model = make(name)
    staged = staging(tmp_path, batch(name) if with_data else None).of(model)
    assert staged.num_stages == len(staged.parameters) == 3
    assert len(staged.heads) == 2
    shared_out = [id(p) for stage in staged.parameters for p in stage]
    assert len(shared_out) == len({*shared_out})
    assert {*shared_out} == {id(p) for module in (model, staged.heads) for p in module.parameters()}
    assert staged.layers == [model.get_submodule(layer) for layer in staged.partition.layers]
    assert "3 stages of" in staged.summary(arguments(tmp_path))


def test_a_model_without_a_task_needs_a_loss(tmp_path):
    model = tf.BertModel(tf.BertConfig(**TEXT))
    with pytest.raises(ValueError, match="BertModel has no head .* set num_stages to 1"):
        staging(tmp_path).of(model)
    assert staging(tmp_path, num_stages=1).of(model).num_stages == 1


def test_turns_are_planned_end_and_are_taken_up(tmp_path):
    turns = Turns(arguments(tmp_path, stage_order="sequential"), 3)
    assert not turns.are_several
    epochs, samples, steps = turns.plan(2, 5, 40, 10)  # of one stage
    assert (epochs, samples, steps) == (6, 120, 30)
    assert turns.are_several
    assert [turns.model_counts(step) for step in (1, 20, 21, 30)] == [False, False, True, True]
    state = TrainerState(global_step=4, max_steps=30)
    turns.restore(state, 30)
    first = turns.order.at(3)
    assert turns.end(first, state) == 6
    assert state.max_steps == turns.order.total_steps == 24
    assert turns.samples_taken(120, state) == 96
    assert turns.end(turns.order.at(3), state) == 0
    again, resumed = Turns(arguments(tmp_path, stage_order="sequential"), 3), TrainerState(max_steps=30)
    again.plan(2, 5, 40, 10)
    resumed.log_history = [{"stage_1_stopped_early": 6, "step": 4}]
    again.restore(resumed, 30)
    assert again.order == turns.order
