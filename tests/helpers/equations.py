"""The steps of a trainer against those of the equations, in each precision."""

import contextlib
import copy

import reference
import torch
from runs import trainer, weights
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import default_collate
from transformers import Trainer
from zoo import Samples, make

from hf_mmst.method.stepping import parameters_by_stage

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


def assert_follows(folder, name, precision, optim, settings):
    """Train a few steps and compare with what the equations give; precision is fp32, scaled, bf16 or fp16."""
    settings = {"max_grad_norm": 0.5, "lr_scheduler_type": "constant", "adam_epsilon": 1e-3, "optim": optim, **settings}
    if precision in ("bf16", "fp16"):
        settings |= {precision: True}
    settings |= {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential"}
    trained = trainer(folder, name, **settings)
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
