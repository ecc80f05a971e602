"""The trainer against the equations: precision, accumulation, clipping, checkpointing and optimizers together."""

import contextlib
import copy

import pytest
import reference
import torch
from runs import assert_same, trainer, weights
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import default_collate
from transformers import Trainer
from zoo import Samples, make

from hf_mmst.method.stepping import parameters_by_stage

CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="fp16 needs a GPU; its scaler runs in fp32 on a CPU in the cases beside this one",
)
ROUNDING = ("k_proj.bias", "key.bias")  # a softmax does not see them: their gradients are rounding, if not zero
STEPS, BATCH = 3, 4
TOLERANCE = {"fp32": 1e-4, "scaled": 1e-4, "bf16": 3e-2, "fp16": 1e-2}


def expected(name, args, heads, partition):
    """What the equations give in `STEPS` steps: the model and its heads."""
    model, data = make(name).to(args.device), Samples(name)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    everything = [*model.parameters(), *heads.parameters()]
    optimizer = cls([{"params": everything, "weight_decay": 0.0}], **kwargs)
    number, low = args.gradient_accumulation_steps, {"bf16": torch.bfloat16, "fp16": torch.float16}
    for step in range(STEPS):
        for micro in range(step * number, (step + 1) * number):
            batch = default_collate([data[i] for i in range(micro * BATCH, (micro + 1) * BATCH)])
            batch = {key: value.to(args.device) for key, value in batch.items()}
            precision = low.get(args.mixed_precision)
            cast = torch.autocast(args.device.type, precision) if precision else contextlib.nullcontext()
            with cast:
                reference.train_step(model, name, partition, heads, batch, [args.transport_weight] * 3)
        for parameter in everything:
            if parameter.grad is not None:
                parameter.grad /= number
        stages = parameters_by_stage(model, partition, heads)
        for group in stages if args.stage_clipping else [everything]:
            if args.max_grad_norm > 0:
                clip_grad_norm_(group, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model, heads


@pytest.mark.parametrize(
    ("name", "precision", "optim", "settings"),
    [
        ("vit", "fp32", "adamw_torch_fused", {"gradient_accumulation_steps": 2}),
        ("bert", "fp32", "sgd", {"stage_clipping": True, "gradient_accumulation_steps": 2}),
        ("vit", "fp32", "adafactor", {"stage_clipping": True}),
        ("bert", "fp32", "rmsprop", {"activation_checkpointing": True, "max_grad_norm": 0.0}),
        ("bert", "fp32", "adagrad", {"head_layers": 1, "gradient_accumulation_steps": 2}),
        ("vit", "bf16", "adamw_torch", {"gradient_accumulation_steps": 2, "activation_checkpointing": True}),
        ("bert", "bf16", "sgd", {"stage_clipping": True}),
        ("vit", "scaled", "adamw_torch_fused", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}),
        pytest.param("vit", "fp16", "adamw_torch", {"gradient_accumulation_steps": 2}, marks=CUDA),
        pytest.param("bert", "fp16", "sgd", {"stage_clipping": True, "activation_checkpointing": True}, marks=CUDA),
    ],
)
def test_the_steps_are_those_of_the_equations(name, precision, optim, settings, tmp_path):
    settings = {"max_grad_norm": 0.5, "lr_scheduler_type": "constant", "adam_epsilon": 1e-3, "optim": optim, **settings}
    if precision in ("bf16", "fp16"):
        settings |= {precision: True, "use_cpu": precision == "bf16"}
    settings |= {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential"}
    trained = trainer(tmp_path, name, **settings)
    if precision == "scaled":
        trained.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [{k: v.cpu() for k, v in weights(module).items()} for module in (trained.model, trained.heads)]
    modules = expected(name, trained.args, copy.deepcopy(trained.heads), trained.partition)
    trained.train()
    for module, wanted, start in zip((trained.model, trained.heads), modules, before, strict=True):
        found = weights(module)
        kept = {k: v for k, v in wanted.state_dict().items() if not k.endswith(ROUNDING)}
        off = sum((found[k] - v).float().cpu().square().sum() for k, v in kept.items())
        moved = sum((v.cpu() - start[k]).float().square().sum() for k, v in kept.items())
        assert moved > 0
        assert (off / moved).sqrt() < TOLERANCE[precision]


def test_a_step_with_gradients_that_overflow_is_left_out_for_all_stages(tmp_path):
    trained = trainer(tmp_path, "vit", max_steps=2, max_grad_norm=0.0, optim="sgd")
    trained.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    before, seen = weights(trained.model), []
    step = trained.create_optimizer().register_step_pre_hook(lambda *_: seen.append(weights(trained.model)))
    trained.train()
    step.remove()
    assert len(seen) == 1  # the first one overflowed, the second did not
    assert_same({name: seen[0][name] for name in before}, before)
