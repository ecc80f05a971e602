"""Adapters of PEFT in stages: what learns, that offload changes no number, and what plain PEFT makes of the files."""

from types import SimpleNamespace

import peft
import pytest
import torch
from benchmark_planner import BATCH, Zeros, measured_bytes, simulation
from benchmark_planner import make as build
from reference import detached_step, gradients
from runs import StopAt, arguments, assert_same, trainer, weights
from runs import run_end_to_end as end_to_end_or_plain
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, Trainer, TrainingArguments, set_seed
from zoo import Samples, batch, make

from hf_mmst import MMSTConfig, MMSTTrainer, Partition, StageHeads, Stagewise, find_layers, load_stages
from hf_mmst.planning.ways import Way

ATTENTION = ["query", "value"]
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(  # and weights of the layers' own
        r=4,
        target_modules=ATTENTION,
        lora_dropout=0.1,
        modules_to_save=["classifier", "attention.output.LayerNorm"],
    ),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, use_dora=True, modules_to_save=["classifier"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["key", "value", "intermediate.dense"],
        feedforward_modules=["intermediate.dense"],
        modules_to_save=["classifier"],
    ),
}
ORDERS = {
    "simultaneous": {},
    "sequential": {"stage_order": "sequential"},
    "multi_lap": {"stage_order": "multi_lap", "num_laps": 2},
    "model loss": {"stage_order": "sequential", "stage_objective": "model"},
    "end_to_end": {"stage_order": "end_to_end"},
    "end-to-end laps": {"stage_order": "sequential", "end_to_end_laps": 1},
}
CASES = [
    (kind, order) for kind in ADAPTERS for order in ORDERS if kind == "lora" or order in ("simultaneous", "sequential")
]
STEPS = 8


def adapted(kind):
    set_seed(0)
    return peft.get_peft_model(make("bert"), ADAPTERS[kind]())


def run(folder, kind, order, extra=None, **settings):
    settings = {"max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 3, **ORDERS[order], **settings}
    return trainer(folder, "bert", adapted(kind), extra=extra, **settings)


def logits(model):
    samples = batch("bert", 16, seed=1)
    samples.pop("labels")
    with torch.no_grad():
        return model.eval()(**samples).logits


@pytest.mark.parametrize(("kind", "order"), CASES)
def test_adapters_learn_resume_and_are_loaded_by_plain_peft(kind, order, tmp_path):
    straight = run(tmp_path / "straight", kind, order)
    before = weights(straight.model)
    straight.train()
    after = weights(straight.model)
    # What learns has changed, and nothing else.
    learning = {name for name, parameter in straight.model.named_parameters() if parameter.requires_grad}
    assert {name for name in after if not torch.equal(after[name], before[name])} == learning
    for stage in straight.partition.stages:
        assert any(name.startswith(tuple(f"{layer}." for layer in stage)) for name in learning)
    # One stage on the device at a time: the same numbers; the run stops in the middle and goes on.
    other = {} if order in ("simultaneous", "end_to_end") else {"offload": "stages"}
    other |= {"save_strategy": "steps", "save_steps": 5}
    run(tmp_path / "other", kind, order, {"callbacks": [StopAt(5)]}, **other).train()
    resumed = run(tmp_path / "other", kind, order, **other)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_same(weights(resumed.model), after)
    # Plain PEFT reads the folder; merged, the model says the same.
    expected = logits(straight.model)
    straight.save_model()
    loaded = peft.PeftModel.from_pretrained(make("bert"), tmp_path / "straight")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(merged), rtol=0, atol=0)
    stages = load_stages(tmp_path / "straight")
    assert stages.partition == straight.partition
    assert_same(weights(stages.heads), weights(straight.heads))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_are_those_of_the_equations(kind):
    model = adapted(kind).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    samples, transport = batch("bert"), [0.5, 0.5]
    partition = Partition.by_cost(find_layers(model), 2)
    heads = StageHeads([32], 5)
    _, around = detached_step(model, partition, heads, samples, transport)
    assert around == []
    expected = gradients(model, heads)
    engine = Stagewise(model, partition, heads)
    with engine.step(lambda z: cross_entropy(z, samples["labels"]), transport, mask=samples["attention_mask"]) as step:
        loss = model(**samples).loss
    (loss + transport[-1] * step.transport).backward()
    found = gradients(model, heads)
    assert sum(gradient is not None for gradient in found.values()) > 8
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_end_to_end_order_has_the_numbers_of_plain_trainer(kind, tmp_path):
    trained = []
    for cls in (None, Trainer):
        set_seed(0)
        model = peft.get_peft_model(make("bert", dropout=True), ADAPTERS[kind]())
        chosen = {} if cls is None else {"cls": cls}
        one = end_to_end_or_plain(tmp_path / str(cls), "bert", model=model, max_steps=6, max_grad_norm=0.0, **chosen)
        one.train()
        trained.append(weights(one.model))
    assert_same(*trained)


@pytest.mark.parametrize("order", ["simultaneous", "sequential", "end_to_end"])
def test_the_best_adapters_come_back(order, tmp_path):
    best = {}

    def accuracy(found):  # best at the second of three evaluations
        best.setdefault("seen", []).append(weights(done.model))
        return {"accuracy": [0.1, 0.9, 0.3][min(len(best["seen"]) // done.partition.num_stages - 1, 2)]}

    done = run(
        tmp_path,
        "dora",
        order,
        eval_strategy="steps",
        eval_steps=1,
        eval_delay=7,  # while the last stage learns
        save_strategy="steps",
        save_steps=1,
        max_steps=9,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    done.compute_metrics = accuracy
    done.train()
    assert done.state.best_global_step == 8
    at_best = peft.PeftModel.from_pretrained(make("bert"), tmp_path / "checkpoint-8")
    torch.testing.assert_close(logits(done.model), logits(at_best), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_quantized_weights(bits, tmp_path, monkeypatch):
    modules = pytest.importorskip(
        "bitsandbytes.nn.modules", reason="quantized weights need bitsandbytes; adapters on full weights run without it"
    )
    # With these kernels, weights of 4 bits that a CPU has evaluated with learn no more, on plain Trainer either.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    make("bert").save_pretrained(tmp_path / "base")
    skipped = {"llm_int8_skip_modules": ["pooler", "classifier"]}
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **skipped)

    def trained(folder, order, cls=MMSTTrainer, stop=None, resume=None, **settings):
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", quantization_config=quantization)
        model = peft.get_peft_model(model, ADAPTERS["lora"]())
        config = MMSTConfig if cls is MMSTTrainer else TrainingArguments
        settings = {"max_steps": STEPS, "max_grad_norm": 0.0, **settings, **(ORDERS[order] if order else {})}
        callbacks = [StopAt(stop)] if stop else None
        args = arguments(tmp_path / folder, config, **settings)
        one = cls(model, args, train_dataset=Samples("bert"), callbacks=callbacks)
        one.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in one.model.named_parameters() if p.requires_grad}

    plain = trained("plain", None, Trainer, activation_checkpointing=True)
    assert_same(trained("end_to_end", "end_to_end"), plain)
    straight = trained("straight", "sequential")
    saving = {"offload": "stages", "save_strategy": "steps", "save_steps": 5}
    trained("other", "sequential", stop=5, **saving)
    assert_same(trained("other", "sequential", resume=True, **saving), straight)
    assert_same(trained("early", "simultaneous", stage_clipping=True), trained("late", "simultaneous"))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_planned_for(bits, tmp_path, monkeypatch):
    modules = pytest.importorskip(
        "bitsandbytes.nn.modules", reason="quantized weights need bitsandbytes; full weights run without it"
    )
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    build("bert").save_pretrained(tmp_path / "base")
    skipped = {"llm_int8_skip_modules": ["pooler", "classifier"]}
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **skipped)

    def quantized():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", quantization_config=quantization)
        return peft.get_peft_model(model, ADAPTERS["lora"]())

    for way in (Way(), Way(offload="layers")):
        model = quantized()
        planned = simulation(model, "fp32").peak(way).total
        assert planned == pytest.approx(measured_bytes(model, "fp32", way, 0, str(tmp_path)), rel=0.03)
        settings = {"memory_budget": str(int(1.12 * planned)), "stage_order": "end_to_end", "num_stages": None}
        args = arguments(tmp_path, MMSTConfig, per_device_train_batch_size=BATCH, **settings)
        done = MMSTTrainer(quantized(), args, train_dataset=Zeros(model))
        assert args.offload == way.offload
    done.train()
    for module in done.model.modules():  # weights of 8 bits rest with what their modules compute with
        if getattr(module, "state", None) is not None:
            assert module.state.CB.data_ptr() == module.weight.data_ptr()


def test_quantized_layers_are_not_copied(tmp_path):
    model = adapted("lora")
    base = model.get_base_model()
    base.config.name_or_path, base.is_quantized = "somewhere", True
    base.hf_quantizer = SimpleNamespace(is_trainable=True, is_compileable=False)
    assert len(trainer(tmp_path, "bert", model).heads.layers) == 0
    with pytest.raises(ValueError, match="layers of .* are quantized.*Set head_layers to 0"):
        trainer(tmp_path, "bert", model, head_layers=1)
