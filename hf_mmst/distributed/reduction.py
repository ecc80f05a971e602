"""Data parallelism: the gradients of a stage are averaged over the processes while the next stage runs."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Reduction:
    """
    Averages the gradients of stages over the processes of data-parallel training.

    DistributedDataParallel would average them when the last stage's loss is stepped back through. The gradients of
    a stage before it are there when that stage has learned: [`start`] takes them away and sends them off in one
    message, and returns while it is on its way. [`finish`] sends what is left, asks all processes for which parameters
    that is, so that nothing is sent of stages that rest, and gives back the means. Gradients that come late, as
    through side inputs of all layers, are among what is left; the means add up.

    To be made in each process before the model is wrapped: the first process's weights are sent to the others, and
    DistributedDataParallel, which goes on sending buffers, is told to leave the parameters alone.

    Args:
        model (`nn.Module`): what will be wrapped, with its auxiliary heads.
        stages (`Sequence[Sequence[nn.Parameter]]`): the parameters of each stage, all of the model's together.

    Attributes:
        finished (`bool`): whether the latest micro-batch was the last of its step, whose gradients are averaged.
    """

    finished = False

    def __init__(self, model: nn.Module, stages: Sequence[Sequence[nn.Parameter]]):
        self._set_stages(stages)
        least = min(self._parameters, key=torch.Tensor.numel)  # it does not wrap a model with nothing to learn
        taken = {id(p) for p in self._parameters if p is not least}
        names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in taken]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        for parameters in _by_type(self._parameters):
            flat = torch.cat([p.detach().reshape(-1) for p in parameters])
            dist.broadcast(flat, src=0)
            for parameter, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.data.copy_(values.view_as(parameter))

    def _set_stages(self, stages: Sequence[Sequence[nn.Parameter]]) -> None:
        self._stages = [[p for p in stage if p.requires_grad] for stage in stages]
        self._parameters = [p for stage in self._stages for p in stage]
        self._sent: dict[int, list[_Message]] = {}

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Take back what DistributedDataParallel was told about `model`."""
        vars(model).pop("_ddp_params_and_buffers_to_ignore", None)
        for parameter in model.parameters():
            vars(parameter).pop("_ddp_ignored", None)

    @contextlib.contextmanager
    def micro_batch(self, wrapper: DistributedDataParallel, last: bool) -> Iterator[None]:
        """Within this context a micro-batch is stepped back through; after the `last` of a step all is averaged."""
        with wrapper.no_sync():
            yield
        self.finished = last
        if last:
            wrapper.require_forward_param_sync = True  # of buffers, before the next forward pass
            self.finish()

    def start(self, stage: int) -> None:
        """Take the gradients of `stage`, from 0, and send them off."""
        self._sent[stage] = [_Message(parameters) for parameters in _by_type(self._stages[stage])]

    def wait(self, stage: int) -> None:
        """Give back the means of the gradients of `stage` that were sent."""
        for message in self._sent.pop(stage, ()):
            message.give_back()

    def finish(self) -> None:
        """Average all gradients that have not been sent, and give back the means of all."""
        last = [_Message(parameters) for parameters in _by_type(self._learned())]
        for message in itertools.chain(*self._sent.values(), last):
            message.give_back()
        self._sent.clear()

    def _learned(self) -> list[nn.Parameter]:
        """The parameters that have gradients in any process."""
        device = self._parameters[0].device
        learned = torch.tensor([p.grad is not None for p in self._parameters], dtype=torch.int32, device=device)
        dist.all_reduce(learned, dist.ReduceOp.MAX)
        return [p for p, has in zip(self._parameters, learned.tolist(), strict=True) if has]


class _Message:
    """An all-reduce under way, of gradients end to end; after them, for each, the share of processes that have it."""

    def __init__(self, parameters: list[nn.Parameter]):
        self._parameters = parameters
        self._had = [p.grad is not None for p in parameters]
        zero = parameters[0].new_zeros(())
        gradients = [zero.expand(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in parameters]
        self._flat = torch.cat([*gradients, zero.new_tensor(self._had)]).div_(dist.get_world_size())
        for parameter in parameters:
            parameter.grad = None
        self._work = dist.all_reduce(self._flat, async_op=True)

    def give_back(self) -> None:
        """Wait, and add the means to the gradients; a parameter that has none in any process is left without."""
        self._work.wait()
        *means, shares = self._flat.split([*(p.numel() for p in self._parameters), len(self._parameters)])
        learned = self._had if all(self._had) else shares.tolist()
        for parameter, mean, has in zip(self._parameters, means, learned, strict=True):
            if not has:
                continue
            mean = mean.view_as(parameter)
            if not parameter.is_contiguous():  # channels last
                mean = torch.empty_like(parameter, requires_grad=False).copy_(mean)
            parameter.grad = mean if parameter.grad is None else parameter.grad.add_(mean)


def _by_type(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_type.setdefault(parameter.dtype, []).append(parameter)
    yield from by_type.values()
